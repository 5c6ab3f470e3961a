"""The gpu backend takes one launch for all tensors. Triton interprets its kernels here, and also compiles them."""

from __future__ import annotations

import ast
import copy
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import grokadamw
from benchmarks.on_gpu.rehearsal import that_read
from grokadamw import GrokAdamW
from grokadamw.backends import gpu, memory
from grokadamw.backends.gpu_tables import JUDGE_BLOCK, JUDGE_THREADS, SHAPES, Shape, Tables, _runs, misaligned
from grokadamw.step.stages import write

from ..models import batch, laid_out, network, running, skip_unless_interpreted
from ..oracle import Oracle
from ..test_oracle import every_step_is_the_oracles, problems
from .test_update import TOLERANCES


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Run the kernels on the CPU, and treat the CPU as a device whose numbers the host must wait for."""
    with running("gpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other tests check the warnings of skipped steps and layers
        patches = [patch.object(module, "reads_are_free", lambda device: False) for module in that_read()]
        for patched in patches:
            patched.start()
        try:
            yield
        finally:
            for patched in patches:
                patched.stop()


@pytest.fixture
def _as_on_a_gpu() -> Iterator[None]:
    with as_on_a_gpu():
        yield


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Yield a counter of the launches of each kernel inside the context."""
    counts: Counter[str] = Counter()
    kernels = gpu.kernels()

    class Counted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            counts[self.name] += 1
            return getattr(kernels, self.name)[grid]

    class Kernels:
        tl = kernels.tl
        update, update_coded, squares, judge = map(Counted, ("update", "update_coded", "squares", "judge"))

    with patch.object(gpu, "kernels", Kernels):
        yield counts


# the oracle


@settings(max_examples=3 * settings().max_examples // 5)
@given(problem=problems())
def test_with_numbers_on_the_device_too_every_step_is_the_oracles(problem: dict[str, Any]) -> None:
    """The problems have missing gradients, mixed layers, several groups and steps that are not finite.

    λ does not change: the host does not know that a step is skipped, so a skipped step still creates state.
    """
    problem["steps"] = [{**step, "lamb": None} for step in problem["steps"]]
    with as_on_a_gpu():
        every_step_is_the_oracles(problem, {})


CHUNK = 256
sizes = st.sampled_from([0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 7, 1000])


@settings(max_examples=settings().max_examples // 5)
@given(
    shapes=st.lists(sizes, min_size=1, max_size=8),
    options=st.fixed_dictionaries(
        {"gradient_clipping": st.sampled_from([0.0, 0.5])}
        | {"nonfinite": st.sampled_from(["skip", "propagate"]), "gamma": st.sampled_from([0.0, 0.3])}
    ),
    offset=st.sampled_from([0, 1, 4]),
    on_device=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_sizes_about_a_chunk(
    shapes: list[int], options: dict[str, Any], offset: int, on_device: bool, seed: int
) -> None:
    """Chunks have four blocks, as on a GPU, and memory is aligned or not. Results agree to float32's rounding."""
    rng = np.random.default_rng(seed)
    starts = [rng.normal(size=n).astype(np.float32) for n in shapes]

    def placed(values: np.ndarray) -> torch.Tensor:
        return torch.empty(len(values) + offset)[offset:].copy_(torch.from_numpy(values))

    hyper = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "alpha_init": 0.9, "lamb": 2.0}
    hyper |= {"grokking_signal_decay_rate": 0.1, "amplify_after": 1, "maximize": False, **options}
    of_oracle = {k: v for k, v in hyper.items() if k != "nonfinite"}
    oracle = Oracle([{**of_oracle, "values": starts, "layers": list(range(len(shapes)))}])
    in_blocks = dict.fromkeys(SHAPES, Shape(CHUNK, CHUNK // 4, 1))
    with as_on_a_gpu() if on_device else running("gpu"), patch.dict(SHAPES, in_blocks):
        params = [nn.Parameter(placed(start)) for start in starts]
        optimizer = GrokAdamW(params, **hyper)
        for _ in range(2):
            grads = [rng.normal(size=n).astype(np.float32) for n in shapes]
            for p, grad in zip(params, grads, strict=True):
                p.grad = placed(grad)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
            oracle.step([list(grads)], None)
        assert optimizer.implementation().startswith("gpu: ")
    (group,) = oracle.groups
    for p, value, state in zip(params, group["values"], group["state"], strict=True):
        np.testing.assert_allclose(p.detach().numpy(), value, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(optimizer.state[p]["exp_avg"].numpy(), state["m"], rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(optimizer.state[p]["exp_avg_sq"].numpy(), state["v"], rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(optimizer.state[p]["grok_ema"].numpy(), state["mu"], rtol=2e-6, atol=2e-6)


# limits on rows

matrices = st.tuples(
    st.sampled_from([(1,), (3,), (2, 2)]), st.sampled_from([1, 3, 15, 16, 17, 48, 65, 257, 1024, 1025, 1552])
).map(lambda pair: (*pair[0], pair[1]) if len(pair[0]) == 1 else (pair[0][0], pair[1], pair[0][1]))


@settings(max_examples=settings().max_examples // 2)
@given(
    shapes=st.lists(st.one_of(matrices, st.sampled_from([(0, 3), (3, 0), (7,), ()])), min_size=1, max_size=4),
    dtype=st.sampled_from(list(TOLERANCES)),
    options=st.sampled_from(
        [{"max_row_change": 0.02}, {"max_row_norm": 0.7}, {"max_row_change": 0.05, "max_row_norm": 1.5}]
    ),
    others=st.sampled_from([{}, {"accumulation_steps": 2, "second_moment": "raw"}, {"lamb": 0.0}]),
    layout=st.sampled_from(["in order", "transposed", "not aligned"]),
    longest=st.sampled_from([256, 1 << 16]),
    chunk=st.sampled_from([256, 4096]),
    on_device=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_limited_rows_are_rows_pys(
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    options: dict[str, float],
    others: dict[str, Any],
    layout: str,
    longest: int,
    chunk: int,
    on_device: bool,
    seed: int,
) -> None:
    """Rows of every width agree with rows.py. The kernel leaves rows to it that are too long or not in order.

    One row is 0, one has an outlier or an infinite element, and the second step's gradient is not finite.
    """
    results = []
    for foreach in (None, True):
        torch.manual_seed(seed)
        params = [nn.Parameter(laid_out(0.05 * torch.randn(shape), dtype, layout)) for shape in shapes]
        for p in params:
            if p.dim() > 1 and p.numel():
                p.data[-1] = 0
                p.data[(0,) * p.dim()] = 1.0 if on_device else torch.inf  # on a device foreach turns inf into NaN
        shape_of_chunks = patch.dict(SHAPES, dict.fromkeys(SHAPES, Shape(chunk, 256, 1)))
        too_long = patch("grokadamw.backends.gpu.LONGEST", longest)
        with as_on_a_gpu() if on_device else running("gpu"), shape_of_chunks, too_long, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02, **dict.fromkeys(options, 0.3)}]
            optimizer = GrokAdamW(groups, lr=0.01, gamma=0.0, foreach=foreach, **options, **others)
            for step in range(3):
                for p in params:
                    p.grad = laid_out(torch.randn(p.shape), dtype, layout)
                    if step == 1 and p.numel():
                        p.grad[(0,) * p.dim()] = torch.nan
                optimizer.step()
        assert foreach or optimizer.implementation().startswith("gpu: ")
        results.append(params)
    tolerance = TOLERANCES[dtype][1]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=5 * tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize(
    "options",
    [{}, {"state_dtype": "bfloat16"}, {"state_dtype": "int8"}, {"state_dtype": "int8", "master_weight_bits": 24}],
    ids=str,
)
def test_rows_are_limited_beside_tensors_that_are_aligned_otherwise(options: dict[str, Any]) -> None:
    """One launch limits straight, odd and long rows. It used to find no body for straight rows, and to skip them."""
    shapes, offsets = [(64, 64), (64, 128), (128, 60), (4, 1088), (4, 1030), (5,)], (0, 1)
    dtype = torch.bfloat16 if "master_weight_bits" in options else torch.float32
    results = []
    for implementation in ("gpu", "foreach"):
        torch.manual_seed(0)
        with running(implementation, chunk=1024):
            params, starts = [], []
            for shape, offset in itertools.product(shapes, offsets):
                size = math.prod(shape)
                starts.append(torch.randn(shape).to(dtype))
                params.append(nn.Parameter(torch.empty(size + 1, dtype=dtype)[offset : offset + size].view(shape)))
                params[-1].data.copy_(starts[-1])
            optimizer = GrokAdamW(params, lr=0.05, max_row_change=0.05, **options)
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn(p.shape).to(dtype)
                optimizer.step()
            assert all((p != start).float().mean() > 0.5 for p, start in zip(params, starts, strict=True))
            results.append([p.detach().clone() for p in params])
    tolerance = TOLERANCES[dtype][1]
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=5 * tolerance, atol=tolerance)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_where_nothing_is_cut_the_bits_are_those_of_no_limit() -> None:
    runs = []
    for limits in ({}, {"max_row_change": 1e6, "max_row_norm": 1e6}):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (2, 100), (1, 300), (1, 1030))]
        optimizer = GrokAdamW(params, lr=0.1, **limits)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        runs.append([*params, *(x for state in optimizer.state.values() for x in state.values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_norm_is_float64s_whatever_the_dtypes(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, generator=generator).to(dtype) for n in (3, 100, 0, 33)]
    grads.append(torch.randn(50, generator=generator))
    expected = torch.stack([grad.double().square().sum() for grad in grads]).sum()
    with launches() as counts:
        total = gpu.sum_of_squares(grads)
    torch.testing.assert_close(total, expected, rtol=1e-14, atol=0)
    assert total == gpu.sum_of_squares([grad.clone() for grad in grads])
    assert counts == {"squares": 1 if dtype == torch.float32 else 2}
    skipped = torch.zeros((), dtype=torch.int64)
    verdict = gpu.judge(grads, [0.5, 0.0, 1e9], torch.tensor(4.0), torch.tensor([0.0]), skipped, needs_norm=True)
    norm = expected.sqrt() / 4
    torch.testing.assert_close(verdict.norm, norm, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.stack(verdict.clips), torch.stack([0.5 / (norm + 1e-6), *norm.new_ones(2)]))
    torch.testing.assert_close(torch.stack(verdict.factors), torch.stack(verdict.clips) / 4)
    assert verdict.finite
    assert skipped == 0


# launches and what is sent


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("tensors", [1, 10])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"gradient_clipping": 0.0, "nonfinite": "propagate"}, {"update": 1}),
        ({"gradient_clipping": 0.0}, {"squares": 1, "judge": 1, "update": 1}),
        ({"gradient_clipping": 1.0}, {"squares": 1, "judge": 1, "update": 1}),
        ({"gradient_clipping": 1.0, "nonfinite": "propagate"}, {"squares": 1, "judge": 1, "update": 1}),
    ],
    ids=str,
)
def test_launches_of_a_step(tensors: int, options: dict[str, Any], expected: dict[str, int]) -> None:
    """Two groups, one of them without weight decay, take the same launches for any number of tensors."""
    params = [nn.Parameter(torch.ones(1 + i % 5)) for i in range(2 * tensors)]
    groups = [{"params": params[:tensors]}, {"params": params[tensors:], "weight_decay": 0.0, "lr": 0.1}]
    optimizer = GrokAdamW(groups, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        with launches() as counts:
            optimizer.step()
        assert counts == expected


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("weights", [None, 24])
def test_state_in_fewer_bits_is_one_more(weights: int | None) -> None:
    """State in fewer bits takes one more launch, because small tensors keep float32 state."""
    dtype = torch.float32 if weights is None else torch.bfloat16
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in [(64, 64), (33, 128), (64,), (3, 5)]]
    optimizer = GrokAdamW(params, state_dtype="int8", master_weight_bits=weights, gradient_clipping=0.0)
    for _ in range(2):
        for p in params:
            p.grad = torch.full_like(p, 0.01)
        with launches() as counts, patch.dict(SHAPES, {n: Shape(4096, 4096, 1) for n in SHAPES}):
            optimizer.step()
        own = {"update_coded": 2} if weights else {"update_coded": 1, "update": 1}
        assert counts == {"squares": 1, "judge": 1, **own}
    assert optimizer.implementation() == "gpu: one Triton launch for all tensors of a kind"


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("layers", [1, 3])
def test_the_preset_is_as_many(layers: int) -> None:
    """The preset's groups for embeddings, biases and norms cost no more launches. rows.py does and copies nothing."""
    blocks = [nn.Sequential(nn.Linear(6, 17), nn.LayerNorm(17), nn.Linear(17, 6)) for _ in range(layers)]
    model = nn.Sequential(nn.Embedding(7, 6), *blocks)
    optimizer = GrokAdamW.for_grokking(model)
    assert len(optimizer.param_groups) >= 3
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with launches() as counts:
            calls, tables = optimizer._prepared(False)
            write(calls, tables)
        assert counts == {"squares": 1, "judge": 1, "update": 1}
        assert not any(batch.unlimited for batch, _ in calls)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_nothing_is_sent_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    send = Tables._send
    monkeypatch.setattr(
        Tables, "_send", lambda self, words, device: (sent.append(len(words)), send(self, words, device))[1]
    )
    params = [nn.Parameter(torch.ones(5)) for _ in range(30)]
    optimizer = GrokAdamW(params)
    for p in params:
        p.grad = torch.ones(5)
    for _ in range(3):
        optimizer.step()
    sent.clear()
    optimizer.step()
    assert sent == []
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert sent == [20]  # the group's numbers
    sent.clear()
    for p in params:
        p.grad = p.grad.clone()
    optimizer.step()
    assert sent == [30]  # addresses of gradients, which the norm and the update share
    sent.clear()
    optimizer.param_groups[0]["betas"] = (0.8, 0.99)
    optimizer.step()
    assert sorted(sent) == [20, 330]  # β1 is in the table of tensors


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("after", ["steps", "a checkpoint", "a copy", "a file"])
def test_the_counts_of_steps_are_one_tensor(after: str, tmp_path: Any) -> None:
    """The step counts of all groups are views of one tensor, which one launch advances."""
    model = network()
    weights, biases = ([p for p in model.parameters() if p.dim() == n] for n in (2, 1))
    optimizer = GrokAdamW([{"params": weights}, {"params": biases, "weight_decay": 0.0}])
    for i in range(2):
        take_step(model, optimizer, i)
    if after == "a checkpoint":
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state["step"] = state["step"].reshape(1).clone() if state is saved["state"][0] else state["step"].clone()
        optimizer.load_state_dict(saved)
    elif after == "a copy":
        model, optimizer = copy.deepcopy((model, optimizer))
    elif after == "a file":
        torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
        optimizer.load_state_dict(torch.load(tmp_path / "saved.pt"))
    counts = [state["step"] for state in optimizer.state.values()]
    assert {count.untyped_storage().data_ptr() for count in counts} == {counts[0].untyped_storage().data_ptr()}
    take_step(model, optimizer, 2)
    assert [count.item() for count in counts] == [3.0] * 6
    model[2].weight.requires_grad_(False)  # a parameter without a gradient keeps its count
    take_step(model, optimizer, 3)
    assert sorted(count.item() for count in counts) == [3.0, 4.0, 4.0, 4.0, 4.0, 4.0]


def take_step(model: nn.Module, optimizer: GrokAdamW, i: int, scale: float = 1.0) -> None:
    x, y = batch(i)
    optimizer.zero_grad()
    (scale * (model(x) - y).square().mean()).backward()
    optimizer.step()


def test_counts_that_only_adjoin_are_apart() -> None:
    """Step counts at adjacent addresses are not joined if their storages differ, as two blocks of an allocator do."""
    at = memory.packed([108, 100, 104, 112, 200])
    assert list(_runs(at, [1, 1, 1, 2, 1])) == [(1, 3), (3, 1), (4, 1)]
    assert list(_runs(at, [1] * 5)) == [(1, 4), (4, 1)]
    with as_on_a_gpu():
        room = torch.zeros(4)
        counts = [room[:2].clone()[0], *room.unbind()]
        optimizer = GrokAdamW(params := [nn.Parameter(torch.ones(2)) for _ in counts])
        for p, count in zip(params, counts, strict=True):
            optimizer.state[p] = {"step": count}
            p.grad = torch.ones(2)
        optimizer.step()
        assert [count.item() for count in counts] == [1.0] * 5


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_skips_are_counted_where_the_gradients_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count of skipped steps moves to the device of the gradients, also after the model has moved."""
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p])
    elsewhere = torch.zeros((), dtype=torch.int64, device="meta")
    optimizer._run.skipped = elsewhere
    moved = []

    def to(counter: torch.Tensor, device: torch.device) -> torch.Tensor:
        moved.append(counter)
        return torch.tensor(5, device=device)

    p.grad = torch.full((3,), torch.nan)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "to", to)
        optimizer._run.skip_counter(p.device, movable=True)
    optimizer.step()
    assert moved == [elsewhere]
    assert optimizer.metrics()["skipped_steps"] == 6


def test_nothing_is_counted_that_nothing_asked_for() -> None:
    for options in ({"gradient_clipping": 0.0}, {"gradient_clipping": 1.0}):
        p = nn.Parameter(torch.ones(3, device="meta"))
        optimizer = GrokAdamW([p], nonfinite="propagate", **options)
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.state_dict()  # this must not read numbers, which the meta device does not have


# GradScaler


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("options", [{}, {"gradient_clipping": 0.0, "nonfinite": "propagate"}], ids=str)
@settings(max_examples=settings().max_examples // 10)
@given(overflows=st.lists(st.booleans(), min_size=1, max_size=4), poison=st.sampled_from([torch.inf, torch.nan]))
def test_the_loss_scale_is_undone_in_the_kernel(options: dict[str, Any], overflows: list[bool], poison: float) -> None:
    """A scale that is a power of two changes no bits of the run, and neither do the steps that overflow."""
    runs = []
    for amp in (True, False):
        model = network()
        optimizer = GrokAdamW(model.named_parameters(), lr=0.01, **options)
        for i, overflow in enumerate(overflows):
            if amp:
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**12), torch.tensor([float(overflow)])
            if overflow and amp:
                for p in model.parameters():
                    p.grad = torch.full_like(p, poison)
                optimizer.step()
                optimizer.found_inf = torch.zeros(1)
            with launches() as counts:
                take_step(model, optimizer, i, 2.0**12 if amp else 1.0)
            assert counts["judge"] == (amp or not options)
        states = [x for state in optimizer.state.values() for x in state.values()]
        runs.append(([*model.parameters(), *states], optimizer.metrics()))
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-12, nan_ok=True)
    assert runs[0][1]["skipped_steps"] == 0


# the choice of a backend, and its reason


def test_it_says_why_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(p: torch.Tensor, **options: Any) -> str:
        return GrokAdamW([p], **options).implementation()

    with running("gpu"):
        p = nn.Parameter(torch.ones(2))
        assert said(p) == said(p, fused=True) == "gpu: one Triton launch for all tensors of a kind"
        assert said(p, fused=False) == "foreach: fused=False"
        assert said(p, foreach=True) == "foreach: foreach=True"
        assert said(nn.Parameter(torch.ones(4)[::2])).startswith("foreach: memory with gaps")
        with patch.object(gpu, "_why_not_here", gpu._why_not_here.__wrapped__):
            with patch.object(gpu, "kernels", lambda: "Triton cannot be imported"):
                assert said(p) == "foreach: Triton cannot be imported"
                p.grad = torch.ones(2)
                GrokAdamW([p]).step()
            monkeypatch.setattr(gpu, "kernels", gpu.kernels.__wrapped__)
            with patch("triton.__version__", "3.2.0"):
                assert said(p).startswith("foreach: the kernels need Triton 3.3 or newer")
            monkeypatch.setitem(sys.modules, "triton", None)
            monkeypatch.delitem(sys.modules, "grokadamw.backends.gpu_kernels")
            monkeypatch.delattr(grokadamw.backends, "gpu_kernels")
            assert said(p).startswith("foreach: Triton cannot be imported: ")


@pytest.mark.parametrize("path", sorted(Path(gpu.__file__).parent.glob("gpu_*.py")), ids=lambda path: path.stem)
def test_kernels_have_no_chain_of_three_conditions(path: Path) -> None:
    """Triton 3.3, which comes with torch 2.7, refuses to compile `a and b and c`."""
    functions = [
        x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.FunctionDef) and x.decorator_list
    ]
    kernels = [x for x in functions if "jit" in ast.unparse(x.decorator_list[0])]
    chains = [x for kernel in kernels for x in ast.walk(kernel) if isinstance(x, ast.BoolOp) and len(x.values) > 2]
    assert not chains, ast.unparse(chains[0])


def test_where_triton_cannot_launch_foreach_runs() -> None:
    """Triton needs a C compiler for its launcher. Images that are only made to run programs may lack one."""

    class Broken:
        def __getitem__(self, grid: Any) -> Any:
            raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    skip_unless_interpreted()
    kernels = gpu.kernels()
    InterpretedFunction = type("InterpretedFunction", (Broken,), {})
    broken = SimpleNamespace(tl=kernels.tl, update=InterpretedFunction(), squares=Broken())
    afresh = patch.object(gpu, "_why_not_here", gpu._why_not_here.__wrapped__)
    with running("gpu"), afresh, patch.object(gpu, "kernels", lambda: broken):
        p = nn.Parameter(torch.ones(2))
        optimizer = GrokAdamW([p])
        assert optimizer.implementation() == "foreach: Triton does not work here: Failed to find C compiler."
        p.grad = torch.ones(2)
        optimizer.step()
    assert (p < 1).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")
def test_fakes_of_a_gpus_tensors_need_none() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        p = nn.Parameter(torch.ones(3, device="cuda"))
        optimizer = GrokAdamW([p])
        p.grad = torch.ones_like(p)
        for _ in range(2):
            optimizer.step()


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are not interpreted")
def test_the_interpreter_is_for_the_cpu() -> None:
    """The interpreter would write to the addresses of a GPU's tensors as if they were in host memory."""
    skip_unless_interpreted()
    reason = gpu._why_not_here.__wrapped__(torch.device("cuda"))
    assert reason == "TRITON_INTERPRET is set, and Triton's interpreter runs only on the CPU"


class Compiled:
    """A stand-in for a compiled Triton kernel that records how it was launched."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launched: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.launched.append(("by Triton", grid, arguments))

    def run(self, *arguments: Any) -> None:
        self.launched.append(arguments)


def test_what_is_compiled_is_launched_without_triton_unless_a_hook_wants_to_know() -> None:
    """Triton launches a compiled kernel only if a hook is set. A hook is None, a chain of functions, or a function."""
    made, tensors = Compiled(), [torch.zeros(1), torch.zeros(2)]
    asked: list[dict[str, Any]] = []
    kernel = {(3,): lambda *_, **options: (asked.append(options), made)[1]}
    chain, hooks = SimpleNamespace(calls=[]), SimpleNamespace(launch_exit_hook=None)
    hooks.launch_enter_hook = chain
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7))
    tl = SimpleNamespace(float32="fp32")

    def launch() -> Any:
        gpu._launch("update", 3, torch.device("cpu"), tensors, 5, PARAM=torch.float32, TAIL=True, warps=4)
        return made.launched.pop() if made.launched else None

    with (
        patch.object(gpu, "kernels", lambda: SimpleNamespace(tl=tl, update=kernel)),
        patch.object(gpu, "_runtime", lambda: (driver, hooks)),
        patch.dict(gpu._compiled, clear=True),
    ):
        assert launch() is None  # Triton compiled the kernel, and launched it itself
        assert asked == [{"PARAM": "fp32", "TAIL": True, "num_warps": 4, "enable_fp_fusion": False}]
        given = (*(x.data_ptr() for x in tensors), 5, torch.float32, True)
        directly = 3, 1, 1, 7, "function", "metadata", None, None, None, *given
        assert launch() == directly
        chain.calls.append(print)
        assert launch() == ("by Triton", (3, 1, 1), given)
        chain.calls.clear()
        hooks.launch_exit_hook = print
        assert launch() == ("by Triton", (3, 1, 1), given)
        hooks.launch_enter_hook = hooks.launch_exit_hook = None
        assert launch() == directly
        assert len(asked) == 1
        with patch.object(gpu, "_runtime", lambda: None):  # a version of Triton that was never tested
            assert launch() is None
        assert len(asked) == 2


@given(st.lists(st.integers(0, 2**60), max_size=9), st.sampled_from([1, 8, 16]))
def test_addresses_are_aligned_if_all_are_multiples_of_16(numbers: list[int], factor: int) -> None:
    assert misaligned(memory.packed([n * factor for n in numbers])) == any(n * factor % 16 for n in numbers)


# the compiled code


@pytest.fixture(scope="module")
def codes() -> list[dict[str, Any]]:
    pytest.importorskip("rich")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compiled", "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def test_full_chunks_move_in_words_of_16_bytes(codes: list[dict[str, Any]]) -> None:
    """Every store moves 16 bytes, and so does every load except those of tables and single numbers."""
    seen = set()
    for code in codes:
        if code["target"].startswith("sm_") and code["kernel"] == "update" and not code["tail"]:
            seen.add((code["target"], code["param"]))
            streams = {"float32": (10, 8), "float64": (10, 8)}.get(code["param"], (8, 7))
            assert (code["wide_loads"], code["wide_stores"]) == streams
            assert (code["scalar_stores"], code["other_stores"], code["other_loads"]) == (0, 0, 0)
            assert code["scalar_loads"] == 30  # one flag, one chunk, nine entries of tensors, a count, 18 numbers
    assert {"sm_80", "sm_90", "sm_100"} <= {target for target, _ in seen}
    assert len(seen) == 15


def test_so_do_straight_rows(codes: list[dict[str, Any]]) -> None:
    """Rows move in 16 bytes, or 8 for halves, as programs have twice the warps. Tails add four scalar stores."""
    seen = 0
    for code in codes:
        if code["target"].startswith("sm_") and code["kernel"] in ("update, rows of 256", "update, longer rows"):
            seen += 1
            assert code["scalar_stores"] == 4
            assert code["wide_stores"] >= 6
            assert code["other_stores"] <= (3 if code["param"] in ("float16", "bfloat16") else 0)
    assert seen == 30


def test_so_do_those_of_micro_batches_which_leave_the_parameter_alone(codes: list[dict[str, Any]]) -> None:
    seen = 0
    for code in codes:
        if code["target"].startswith("sm_") and code["kernel"] == "update, micro-batch" and not code["tail"]:
            seen += 1
            streams = {"float32": (8, 6), "float64": (8, 6)}.get(code["param"], (7, 6))
            assert (code["wide_loads"], code["wide_stores"]) == streams
            assert (code["scalar_stores"], code["other_stores"], code["other_loads"]) == (0, 0, 0)
    assert seen == 15


def test_so_does_what_is_kept_in_fewer_bits(codes: list[dict[str, Any]]) -> None:
    """A thread has eight elements: 16-bit values move in 16 bytes, 8-bit values in 8. Scales are single numbers."""
    (code,) = [code for code in codes if code["kernel"] == "update_coded, int8, 24 bits" and not code["tail"]]
    assert (code["wide_loads"], code["other_loads"]) == (2, 4)
    assert (code["wide_stores"], code["other_stores"], code["scalar_stores"]) == (1, 4, 3)


def test_no_kernel_spills(codes: list[dict[str, Any]]) -> None:
    for code in codes:
        if code["target"].startswith("sm_"):
            is_large = code["kernel"] == "update, longer rows" or "coded" in code["kernel"]
            assert code["spilled"] == 0, code
            assert code["registers"] <= (128 if is_large else 104), code


def test_every_kernel_is_compiled_for_every_gpu(codes: list[dict[str, Any]]) -> None:
    counts = Counter((code["target"], code["kernel"]) for code in codes if "coded" not in code["kernel"])
    kernels = ["update", "update, micro-batch", "squares", *(f"judge, {n} batches" for n in (2, 32, 1024))]
    assert counts == {
        (target, kernel): (6 if target == "sm_75" else 8) // (2 if "rows" in kernel else 1)
        for target in ("sm_75", "sm_80", "sm_90", "sm_100", "gfx942")
        for kernel in [*kernels, "update, rows of 256", "update, longer rows", "update, odd rows"]
    }


def test_so_is_that_of_state_in_fewer_bits(codes: list[dict[str, Any]]) -> None:
    found = {(code["target"], code["kernel"]) for code in codes if "coded" in code["kernel"]}
    assert {target for target, _ in found} == {"sm_75", "sm_80", "sm_90", "sm_100", "gfx942"}
    assert len(found) == 5 + 2 + 4  # one target has five formats and two kinds of rows, the others one format each


def test_the_judge_fills_a_block_and_has_few_turns(codes: list[dict[str, Any]]) -> None:
    """The judge is one block. It adds the sums of a billion numbers in at most 64 turns, each waiting for memory."""
    chunks = -(-(10**9) // SHAPES[4].chunk)
    assert -(-chunks // JUDGE_BLOCK) <= 64
    registers = [
        code["registers"] for code in codes if code["target"].startswith("sm_") and code["kernel"].startswith("judge")
    ]
    assert max(registers) * JUDGE_THREADS <= 65536, registers  # the registers of a block


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize(("hip", "warps"), [(None, 32), ("7.0", 16)])
def test_the_judge_has_as_many_threads_as_a_gpu_lets_a_block_have(
    hip: str | None, warps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warp has 64 threads on AMD's GPUs, so the judge takes half as many warps there."""
    given: list[dict[str, Any]] = []
    kernels = gpu.kernels()
    counted = SimpleNamespace(tl=kernels.tl, squares=kernels.squares, judge={(1,): lambda *_, **kw: given.append(kw)})
    monkeypatch.setattr(gpu, "kernels", lambda: counted)
    monkeypatch.setattr(torch.version, "hip", hip)
    gpu.judge([torch.ones(3)], [1.0], None, None, None, needs_norm=True)
    assert [(kw["num_warps"], kw["BLOCK"]) for kw in given] == [(warps, JUDGE_BLOCK)]
