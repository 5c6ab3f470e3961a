"""The native kernel and how it is chosen: it gives the same bits everywhere, and never uses a stale pointer."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from grokadamw import GrokAdamW
from grokadamw import backends as update
from grokadamw.backends import cpu, native
from grokadamw.backends.types import Batch, MicroStep, Scalars

from ..models import compiled_for, laid_out, running
from .test_update import TOLERANCES, everything, numbers

DTYPES = list(TOLERANCES)


def test_it_was_built_and_looks_through_dlpack() -> None:
    """Developers have a compiler, so the kernel exists. It reads tensors through DLPack if torch can (2.6 cannot)."""
    found = native.kernel()
    assert not isinstance(found, str), found
    assert found.instruction_set in ("baseline", "x86-64-v3", "x86-64-v4")
    assert (found.signature is not None) == hasattr(Tensor, "__dlpack_c_exchange_api__")


# bits


def some(sizes: list[int], dtype: torch.dtype, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    state = torch.promote_types(dtype, torch.float32)

    def random(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]

    steps = [torch.tensor(3.0) for _ in sizes]
    return Batch(random(dtype), random(dtype), random(state), [x.square() for x in random(state)], random(state), steps)


def with_numbers(count: int) -> Scalars:
    return numbers(beta1=[0.9] * count, bias_beta1=[0.9] * count, amplify_after=0)


def part(tensors: Batch, place: slice) -> Batch:
    """Return copies of a slice of each tensor, as far from a multiple of 64 bytes as the slice itself."""
    lists = []
    for column in tensors[:5]:
        copies = []
        for x in column:
            room = torch.empty(x.numel() + 64, dtype=x.dtype)
            start = place.start % 64
            copies.append(room[start : start + place.stop - place.start].copy_(x[place]))
        lists.append(copies)
    return Batch(*lists, [x.clone() for x in tensors.steps])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_elements_bits_do_not_depend_on_where_it_lies(dtype: torch.dtype) -> None:
    """Slices of 0 to 64 elements at every offset show that vectors and leftover elements round alike."""
    whole = some([128], dtype)
    expected = Batch(*([x.clone() for x in column] for column in whole[:6]))
    cpu.step(expected, with_numbers(1))
    for offset in range(64):
        places = [slice(offset, offset + length) for length in range(65)]
        lists = [part(whole, place) for place in places]
        together = Batch(*([x for batch in lists for x in batch[i]] for i in range(6)))
        cpu.step(together, with_numbers(len(places)))
        for column, wanted in zip(together[:5], expected[:5], strict=True):
            for place, x in zip(places, column, strict=True):
                assert torch.equal(x, wanted[0][place])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["v3", "v4"])
def test_every_instruction_set_gives_the_same_bits(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in native._instruction_sets():
        pytest.skip(f"this processor has no x86-64-{name}")
    results, sums = [], []
    for level in ("baseline", name):
        with compiled_for(monkeypatch, level):
            found = native.kernel()
            assert not isinstance(found, str)
            assert found.instruction_set.endswith(level)
            tensors = some([1, 1000, 33], dtype)
            sums.append(cpu.sum_of_squares(tensors.grads))
            cpu.step(tensors, with_numbers(3))
            results.append(everything(tensors))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(*sums)


@pytest.mark.parametrize("own_threads", [False, True], ids=["OpenMP", "own threads"])
def test_any_number_of_threads_gives_the_same_bits(own_threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = native.kernel()
    assert not isinstance(found, str)
    sizes = [3, found.piece - 1, 0, 5 * found.piece + 7, 1, 2 * found.piece]
    monkeypatch.setattr(cpu, "_ALONE", 0)
    if own_threads:
        monkeypatch.setattr(cpu, "_openmp", lambda: None)
    else:
        assert sys.platform != "linux" or cpu._openmp() is not None
    results = []
    for threads in (1, 2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        tensors = some(sizes, torch.float32)
        total = cpu.sum_of_squares(tensors.grads)
        cpu.step(tensors, with_numbers(len(sizes)))
        results.append([total, *everything(tensors)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_norm_is_summed_in_table_order() -> None:
    """The norm is summed over fixed blocks of all elements, regardless of the tensors that they belong to."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double()
    found = native.kernel()
    assert not isinstance(found, str)
    blocks = [cpu.sum_of_squares([block]).item() for block in x.split(found.piece)]
    assert cpu.sum_of_squares([x]).item() == sum(blocks)
    many = list(x.split(found.piece // 4))
    assert cpu.sum_of_squares(many).item() == pytest.approx(sum(blocks), rel=1e-14)
    assert cpu.sum_of_squares(many) == cpu.sum_of_squares([block.clone() for block in many])


def test_the_norm_of_what_has_no_gaps_is_the_kernels_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update.foreach, "sum_of_squares", None)
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert cpu.sum_of_squares([x]).item() == pytest.approx(x.double().square().sum().item(), rel=1e-14)


# half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.7, 0.001, -1.3, 3.0, 2.0**-20])
def test_every_half_number_is_read_and_rounded_as_torch_does(dtype: torch.dtype, factor: float) -> None:
    """The test multiplies all 65,536 values of θ by a factor, as decoupled weight decay does."""
    theta = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    zeros = [torch.zeros(theta.shape) for _ in range(3)]
    tensors = Batch([theta.clone()], [torch.zeros_like(theta)], *([x] for x in zeros), [torch.zeros(())])
    cpu.step(tensors, with_numbers(1)._replace(lr=1.0, weight_decay=1 - factor))
    expected = (theta.float() * torch.tensor(1 - (1 - factor), dtype=torch.float64).float()).to(dtype)
    torch.testing.assert_close(tensors.params[0], expected, rtol=0, atol=0, equal_nan=True)
    squares = cpu.sum_of_squares([theta[theta.isfinite()]])
    torch.testing.assert_close(squares, theta[theta.isfinite()].double().square().sum(), rtol=1e-14, atol=0)


# rare cases


def test_a_table_of_dlpack_that_is_another_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "__dlpack_c_exchange_api__", 123, raising=False)
    assert native._signature("baseline") is None


def test_denormal_numbers_are_flushed_by_every_thread_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_ALONE", 0)
    found = native.kernel()
    assert not isinstance(found, str)
    results = []
    torch.set_flush_denormal(True)
    try:
        for own in (False, True):
            monkeypatch.setattr(torch, "get_num_threads", lambda own=own: 1 + own)
            tensors = some([8 * found.piece], torch.float32)
            tensors.params[0].fill_(1e-39)
            cpu.step(tensors, with_numbers(1)._replace(lr=0.0))
            results.append(tensors.params[0].view(torch.int32))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(*results)


# threads and processes


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LARGE = """
import os, torch
from grokadamw import GrokAdamW
def make():
    p = torch.nn.Parameter(torch.linspace(-1, 1, 1_000_000))
    return p, GrokAdamW([p], lr=0.01)
def step(p, optimizer):
    p.grad = p.detach().cos()
    optimizer.step()
torch.set_num_threads(2)
p, optimizer = make()
step(p, optimizer)
"""


def test_a_fork_steps_on() -> None:
    """A forked child has none of its parent's threads, and does not wait for them."""
    code = f"""{LARGE}
child = os.fork()
if not child:
    from grokadamw.backends import cpu
    assert cpu._threads(1_000_000) == (2, None)
    optimizer.step()
    os._exit(17)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
step(p, optimizer)
print(optimizer.metrics()["step"])
"""
    assert run(code) == "2.0"


def test_the_number_of_threads_is_torchs_of_this_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    found = native.kernel()
    assert not isinstance(found, str)
    seen: list[int] = []
    spy = found._replace(step=lambda table, threads, openmp: seen.append(threads) or found.step(table, threads, openmp))
    monkeypatch.setattr(native, "kernel", lambda: spy)
    p, small = nn.Parameter(torch.ones(cpu._ALONE + 1)), nn.Parameter(torch.ones(2))
    optimizer = GrokAdamW([{"params": [p]}, {"params": [small], "lr": 0.1}])  # one backend call per group
    p.grad, small.grad = torch.ones_like(p), torch.ones_like(small)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 2, 1, 3, 1]


def test_where_no_thread_can_be_started_one_does_it_all() -> None:
    code = f"""
import resource
{LARGE}
from grokadamw.backends import cpu
cpu._openmp = lambda: None
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
os.setuid(65534)  # root may have as many as it likes
step(p, optimizer)
q, other = make()
step(q, other)
step(q, other)
assert torch.equal(p, q)
print("done")
"""
    if os.getuid() != 0:
        pytest.skip("needs root, to become a user who may not start threads")
    assert run(code) == "done"


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8", "master_weight_bits": 24}], ids=["float32", "24 bits"])
def test_limited_rows_need_little_stack(options: dict[str, Any]) -> None:
    """Threads may have 128 KiB of stack: those that a user starts, and those of the kernel, as with musl."""
    code = f"""
import ctypes, threading, torch
from grokadamw import GrokAdamW
from grokadamw.backends import cpu, native
libc, attributes = ctypes.CDLL(None), (ctypes.c_char * 256)()
if hasattr(libc, "pthread_setattr_default_np"):
    assert libc.pthread_attr_init(attributes) == 0
    assert libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(1 << 17)) == 0
    assert libc.pthread_setattr_default_np(attributes) == 0
threading.stack_size(1 << 17)
dtype = torch.bfloat16 if {options!r} else torch.float32
widths = 512, native.kernel().row_bytes // 4
params = [torch.nn.Parameter(torch.ones((1 << 18) // width, width, dtype=dtype)) for width in widths]
optimizer = GrokAdamW(params, max_row_change=0.03, **{options!r})
assert optimizer.implementation().startswith("cpu")
def steps():
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
for openmp in (cpu._openmp, lambda: None):
    cpu._openmp = openmp
    torch.set_num_threads(8 if openmp() is None else 1)
    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
print(all(p.detach()[0, 0].item() < 1 for p in params))
"""
    assert run(code) == "True"


def test_a_step_needs_no_memory() -> None:
    """A step raises the process's peak memory (as Linux counts it) by less than 4 MiB, with and without row limits."""
    code = """
import torch
from grokadamw import GrokAdamW
def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024
p = torch.nn.Parameter(torch.ones(4_000, 4_000))
p.grad = torch.ones_like(p)
for options in ({}, {"max_row_change": 0.01, "max_row_norm": 1.0}):
    optimizer = GrokAdamW([p], **options)
    for _ in range(2):
        optimizer.step()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    optimizer.step()
    print(status("VmHWM") - before)
"""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("counts memory as Linux does")
    free, limited = map(float, run(code).split())
    assert free < 4
    assert limited < 4


# the choice of a backend, and its reason


def test_it_says_which_one_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.ones(2))]

    def said(**options: Any) -> str:
        return GrokAdamW(params, **options).implementation()

    found = native.kernel()
    assert not isinstance(found, str)
    ours = f"cpu: the native kernel, compiled for {found.instruction_set}"
    assert said() == said(fused=True) == ours
    assert said(fused=False) == "foreach: fused=False"
    assert said(foreach=True) == "foreach: foreach=True"
    assert said(foreach=False) == "reference: foreach=False"
    assert said(differentiable=True) == "reference: differentiable=True"
    assert GrokAdamW([torch.ones(2, device="meta")]).implementation() == "foreach: parameters on meta"
    assert GrokAdamW([torch.ones(2, dtype=torch.complex64)]).implementation() == ours
    assert GrokAdamW([{"params": []}]).implementation() == ""
    with running("blocks"):
        assert said() == "blocks: the native kernel was not built"
        with monkeypatch.context() as patch:
            patch.setattr(update.blocks, "_SMALL", 3)
            assert said().startswith("foreach: the native kernel was not built, and a tensor this small is quicker")
        assert said(compat="0.1.2").startswith("foreach: the native kernel was not built, and torch's fused AdamW")
        assert said(second_moment="raw").startswith("foreach: the native kernel was not built, and torch's fused")
        monkeypatch.delattr(torch, "_fused_adamw_")
        assert said() == "foreach: the native kernel was not built, and this torch has no fused AdamW"


def test_it_says_what_the_next_step_will_do() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = GrokAdamW([p])
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.add_param_group({"params": [q], "foreach": True})
    lines = optimizer.implementation().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["cpu for 1 parameter", "foreach for 1 parameter"]
    optimizer.param_groups[0]["foreach"] = True
    assert optimizer.implementation() == "foreach: foreach=True"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_LIBRARY": native._LIBRARY.with_name("absent.so")}, "was not built: install grokadamw again"),
        ({"_LIBRARY": native._LIBRARY.with_name("cpu.py")}, "cannot be loaded: .*cpu.py"),
        ({"Table": native._Python}, "was built for another version of grokadamw: install grokadamw again"),
        ({"_instruction_sets": lambda: ["mmx"]}, "was built for another version of grokadamw: install grokadamw again"),
    ],
)
def test_why_there_is_no_kernel(change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in change.items():
        monkeypatch.setattr(native, name, value)
    monkeypatch.setattr(native, "kernel", native.kernel.__wrapped__)
    with pytest.raises(RuntimeError, match=f"the native kernel {reason}"):
        cpu.step(some([3], torch.float32), with_numbers(1))


def test_torch_may_limit_the_instructions() -> None:
    """The variable that limits the instruction set of torch's own operations also limits the kernel's."""
    code = "from grokadamw.backends import native; print(native.kernel().instruction_set)"
    assert run(code, ATEN_CPU_CAPABILITY="default") == "baseline"


def test_a_dtensor_needs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernel", lambda: "not built")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        p = nn.Parameter(distribute_tensor(torch.ones(100, 100), init_device_mesh("cpu", (1,)), [Shard(0)]))
        optimizer = GrokAdamW([p])
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.implementation() == "blocks: not built"  # blocks takes this rank's shard
        assert (p.to_local() < 1).all()
    finally:
        dist.destroy_process_group()


# limits on rows

SHAPES = [(5, 3), (3, 30_000), (3000, 7), (4, 3, 2, 2), (0, 2), (2, 0), (1, 1), (70, 1030), (2, 17), (9,)]
matrices = st.builds(
    lambda rows, width: (*rows, width) if len(rows) == 1 else (rows[0], width, rows[1]),
    st.sampled_from([(1,), (3,), (40,), (2, 2)]),
    st.sampled_from([1, 3, 15, 16, 17, 64, 127, 128, 129, 600, 1000, 1025]),
)


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.lists(st.one_of(matrices, st.sampled_from([(0, 3), (3, 0), (7,), ()])), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    limits=st.sampled_from(
        [{"max_row_change": 0.02}, {"max_row_norm": 0.7}, {"max_row_change": 0.05, "max_row_norm": 1.5}]
    ),
    others=st.sampled_from([{}, {"accumulation_steps": 2, "second_moment": "raw"}, {"lamb": 0.0}, {"maximize": True}]),
    layout=st.sampled_from(["in order", "transposed", "not aligned"]),
    scale=st.sampled_from([0.05, 5.0, 1e25]),  # float32 cannot hold the squares of 1e25
    seed=st.integers(0, 2**31),
)
def test_limited_rows_are_rows_pys(
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    limits: dict[str, float],
    others: dict[str, Any],
    layout: str,
    scale: float,
    seed: int,
) -> None:
    """The kernel agrees with rows.py. One row is 0, one has an infinite element, and one gradient has a NaN."""
    results = []
    scale = min(scale, 5e3) if dtype == torch.float16 else scale
    for foreach in (None, True):
        torch.manual_seed(seed)
        params = [nn.Parameter(laid_out(scale * torch.randn(shape), dtype, layout)) for shape in shapes]
        for p in params:
            if p.dim() > 1 and p.numel():
                p.data[-1] = 0
                p.data[(0,) * p.dim()] = torch.inf
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, **dict.fromkeys(limits, 0.3)}]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = GrokAdamW(groups, lr=0.01, gamma=0.0, foreach=foreach, **limits, **others)
            for step in range(4):
                for p in params:
                    p.grad = laid_out(torch.randn(p.shape), dtype, layout)
                    if step == 1 and p.numel():
                        p.grad[(0,) * p.dim()] = torch.nan
                optimizer.step()
        assert foreach or optimizer.implementation().startswith("cpu: ")
        results.append(params)
    tolerance = TOLERANCES[dtype][1]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=5 * tolerance, atol=tolerance, equal_nan=True)


def some_with_rows(dtype: torch.dtype) -> Batch:
    """Return a batch of all SHAPES in which some rows move far or have a large norm."""
    generator = torch.Generator().manual_seed(0)
    tensors = some([math.prod(shape) for shape in SHAPES], dtype)
    columns = [[x.view(shape) for x, shape in zip(column, SHAPES, strict=True)] for column in tensors[:5]]
    for theta in columns[0]:
        theta *= 3 * torch.rand(theta.shape[:1] + (1,) * (theta.dim() - 1), generator=generator)
    widths = [cpu.row_width(theta, coded=False) for theta in columns[0]]
    assert [width > 0 for width in widths] == [theta.dim() > 1 and theta.numel() > 0 for theta in columns[0]]
    return Batch(*columns, tensors.steps, row_widths=widths)


def limiting(change: float, norm: float) -> Scalars:
    return with_numbers(len(SHAPES))._replace(max_row_change=change, max_row_norm=norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_limited_rows_have_the_same_bits_for_any_number_of_threads_and_instruction_set(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    monkeypatch.setattr(cpu, "_ALONE", 0)
    for threads, name in ((1, "baseline"), (2, "baseline"), (2, "v3"), (3, "v3"), (1, "v4"), (2, "v4")):
        if name not in native._instruction_sets():
            continue
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with compiled_for(monkeypatch, name):
            tensors = some_with_rows(dtype)
            cpu.step(tensors, limiting(0.002, 20.0))
            results.append(everything(tensors))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    free = some_with_rows(dtype)
    cpu.step(free, limiting(0.0, 0.0))
    changed = [not torch.equal(a, b) for a, b in zip(results[0], free.params, strict=False)]
    assert changed == [width > 0 for width in free.row_widths or ()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("moves", [True, False])
def test_where_nothing_is_cut_the_bits_are_those_of_no_limit(dtype: torch.dtype, moves: bool) -> None:
    """Limits that no row reaches change no bits. Nor do tight limits in a micro-batch that moves no parameter."""
    results = []
    for limit in (0.0, 1e6 if moves else 1e-6):
        tensors = some_with_rows(dtype)
        if not moves:
            tensors = tensors._replace(row_widths=tensors.row_widths and [3] * len(SHAPES))
        micro_step = MicroStep(1, True, True) if moves else MicroStep(2, True, False)
        cpu.step(tensors, limiting(limit, limit)._replace(micro_step=micro_step, raw_second_moment=True))
        results.append(everything(tensors))
    assert all(map(torch.equal, *results))


def test_a_step_that_is_not_written_limits_nothing() -> None:
    tensors, before = some_with_rows(torch.float32), some_with_rows(torch.float32)
    cpu.step(tensors, limiting(1e-6, 1e-6)._replace(finite=torch.tensor(False)))
    assert all(map(torch.equal, everything(tensors), everything(before)))


def left_to_rows_py(params: list[Any], **options: Any) -> int:
    """Return how many parameters the backends leave to rows.py in a step."""
    optimizer = GrokAdamW(params, lr=0.1, max_row_change=0.01, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    return sum(len(batch.unlimited) for batch, _ in optimizer._prepared(False)[0])


def test_whose_rows_the_kernel_limits() -> None:
    def two() -> list[Any]:
        return [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 3).t()), torch.ones(4)]

    assert left_to_rows_py(two()) == 1  # the transposed matrix, whose rows are not contiguous
    for options in ({"foreach": True}, {"foreach": False}, {"fused": False}):
        assert left_to_rows_py(two(), **options) == 2
    shared = torch.ones(4, 2)
    assert left_to_rows_py([shared[:3], shared[1:]]) == 2
    assert left_to_rows_py([torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)]) == 0
    assert left_to_rows_py([torch.ones(3, 2, dtype=torch.complex64)]) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_longest_row(dtype: torch.dtype) -> None:
    found = native.kernel()
    assert not isinstance(found, str)
    longest = found.row_bytes // dtype.itemsize
    assert left_to_rows_py([torch.ones(2, longest, dtype=dtype), torch.ones(2, longest + 1, dtype=dtype)]) == 1
    results = []
    for foreach in (None, True):
        p = torch.ones(2, longest, dtype=dtype)
        optimizer = GrokAdamW([p], lr=0.1, max_row_change=0.01, foreach=foreach)
        p.grad = torch.ones_like(p)
        optimizer.step()
        results.append(p)
    tolerance = TOLERANCES[dtype][1]
    torch.testing.assert_close(*results, rtol=tolerance, atol=0)


def test_the_preset_leaves_nothing_to_rows_py() -> None:
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 17), nn.LayerNorm(17), nn.Linear(17, 6))
    optimizer = GrokAdamW.for_grokking(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert not any(batch.unlimited for batch, _ in optimizer._prepared(False)[0])
