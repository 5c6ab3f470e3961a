"""Compiled kernels on a GPU give the oracle's numbers and the same bits each time. The host never waits for them."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.on_gpu.launches import launched
from grokadamw import GrokAdamW
from grokadamw.backends import gpu, reference
from grokadamw.backends.gpu_tables import SHAPES

from ..backends import test_update
from ..backends.test_memory import EVENTS, add_a_group, replace_the_parameters, share_the_model, share_the_state
from ..backends.test_update import CASES, TOLERANCES, numbers, tensors
from ..models import KEEPERS, batch, network
from ..oracle import Oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:layer .* of parameter group"),
    pytest.mark.filterwarnings("ignore:a step was skipped"),
]

CHUNK = SHAPES[4].chunk
SIZES = [0, 1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 100_003]


def parameters(dtype: torch.dtype = torch.float32, sizes: list[int] = SIZES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(n, generator=generator).to("cuda", dtype)) for n in sizes]


def set_gradients(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    """Set gradients in place, where a CUDA graph reads them."""
    for i, p in enumerate(params):
        grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(grad)


def everything(optimizer: GrokAdamW) -> list[Tensor]:
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return [x.clone() for x in [*params, *(x for state in optimizer.state.values() for x in state.values())]]


def test_it_runs() -> None:
    p = nn.Parameter(torch.ones(3, device="cuda"))
    assert GrokAdamW([p]).implementation() == "gpu: one Triton launch for all tensors of a kind"
    assert GrokAdamW([p], fused=True).implementation().startswith("gpu: ")


# numbers


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("on_device", [False, True], ids=["numbers", "tensor numbers"])
def test_agrees_with_the_reference(dtype: torch.dtype, case: str, on_device: bool) -> None:
    changes = dict(CASES[case])
    shapes = [(), (0,), (7,), (CHUNK + 3,), (3, 2 * CHUNK)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_update, "SHAPES", shapes)
        start = tensors(dtype, changes.pop("with_mu", True))
    # some of 24,000 random v are near 0: their updates are 80 times lr, and the rounding of m / √v grows as much
    start = start._replace(exp_avg_sqs=[v + 0.01 for v in start.exp_avg_sqs])
    wide = type(start)(
        *(None if part is None else [x.to(torch.float64, copy=True) for x in part] for part in start[:6])
    )
    reference.step(wide, numbers(**changes))
    ours = type(start)(*(None if part is None else [x.cuda() for x in part] for part in start[:6]))
    given = numbers(**changes)
    if on_device:
        scalars = {
            name: torch.tensor(getattr(given, name), dtype=torch.float64, device="cuda")
            for name in ("lr", "alpha", "clip")
        }
        given = given._replace(**scalars, finite=torch.tensor(True, device="cuda"))
    gpu.step(ours, given)
    state, param = TOLERANCES[dtype]
    for ours_list, wide_list, tolerance in zip(ours[:6], wide[:6], (param, 0, state, state, state, 0), strict=True):
        for a, b in zip(ours_list or [], wide_list or [], strict=True):
            torch.testing.assert_close(a.cpu().double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_several_steps_are_the_oracles(dtype: torch.dtype, offset: int) -> None:
    """The run has two groups, layers, signals, clipping, a step that is not finite, and memory aligned or not."""
    hyper = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "alpha_init": 0.9, "lamb": 2.0}
    hyper |= {"gamma": 0.1, "grokking_signal_decay_rate": 0.5, "gradient_clipping": 0.5, "maximize": False}
    groups = [hyper | {"amplify_after": 0}, hyper | {"amplify_after": 2, "lr": 0.02}]
    params = [
        [nn.Parameter(torch.empty(p.numel() + offset, dtype=dtype, device="cuda")[offset:].copy_(p)) for p in ps]
        for ps in (parameters(dtype), parameters(dtype, [3, 2 * CHUNK]))
    ]
    values = [[p.detach().double().cpu().numpy() for p in ps] for ps in params]
    layers = [list(range(len(ps))) for ps in params]
    oracle = Oracle([g | {"values": v, "layers": n} for g, v, n in zip(groups, values, layers, strict=True)])
    optimizer = GrokAdamW(
        [g | {"params": ps} for g, ps in zip(groups, params, strict=True)], grokking_signal_fns=lambda: 0.3
    )
    flat = [p for ps in params for p in ps]
    for step in range(5):
        set_gradients(flat, step, torch.nan if step == 2 else 1.0)
        optimizer.step()
        oracle.step([[p.grad.double().cpu().numpy() for p in ps] for ps in params], 0.3)
    assert optimizer.metrics()["skipped_steps"] == 1
    state, param = TOLERANCES[dtype]
    for p, value in zip(flat, [value for group in oracle.groups for value in group["values"]], strict=True):
        np.testing.assert_allclose(p.detach().double().cpu(), value, rtol=5 * param, atol=5 * param)
    for p, expected in zip(flat, [x for group in oracle.groups for x in group["state"]], strict=True):
        for name, key in (("exp_avg", "m"), ("exp_avg_sq", "v"), ("grok_ema", "mu")):
            ours = optimizer.state[p][name].double().cpu()
            np.testing.assert_allclose(ours, expected[key], rtol=10 * state, atol=10 * state)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_norm_is_float64s(dtype: torch.dtype) -> None:
    grads = [p.detach() for p in parameters(dtype)]
    expected = sum(grad.double().square().sum().item() for grad in grads)
    total = gpu.sum_of_squares(grads)
    assert total.item() == pytest.approx(expected, rel=1e-13)
    assert torch.equal(total, gpu.sum_of_squares([grad.clone() for grad in grads]))


def test_half_numbers_are_rounded_to_even() -> None:
    """The test multiplies every value of θ by a number, as weight decay does."""
    for dtype in (torch.bfloat16, torch.float16):
        theta = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        zeros = [torch.zeros(theta.shape, device="cuda") for _ in range(3)]
        given = reference.Batch(
            [theta.cuda()], [torch.zeros_like(theta).cuda()], *([x] for x in zeros), [torch.zeros((), device="cuda")]
        )
        gpu.step(given, numbers(beta1=[0.9], bias_beta1=[0.9], lr=1.0, weight_decay=0.3))
        expected = (theta.float() * torch.tensor(1 - 0.3, dtype=torch.float64).float()).to(dtype)
        torch.testing.assert_close(given.params[0].cpu(), expected, rtol=0, atol=0, equal_nan=True)


WIDTHS = [(5, 3), (40, 16), (7, 50), (300, 64), (9, 113), (3, 256), (2, 3, 100), (5, 1024), (3, 1500), (2, 4096), (17,)]


def limited(
    dtype: torch.dtype, foreach: bool | None, limits: dict[str, float], offsets: tuple[int, ...]
) -> list[Tensor]:
    """Return parameters with rows of every width, and their state, after five steps, one of which is not finite."""
    generator = torch.Generator().manual_seed(0)

    def placed(shape: tuple[int, ...], scale: float, offset: int) -> Tensor:
        values = scale * torch.randn(shape, generator=generator)
        room = torch.empty(values.numel() + offset, dtype=dtype, device="cuda")
        return room[offset:].view(shape).copy_(values)

    places = list(itertools.islice(itertools.cycle(offsets), len(WIDTHS)))
    params = [nn.Parameter(placed(shape, 0.05, offset)) for shape, offset in zip(WIDTHS, places, strict=True)]
    optimizer = GrokAdamW(params, lr=0.01, gamma=0.0, foreach=foreach, **limits)
    for step in range(5):
        for p, offset in zip(params, places, strict=True):
            p.grad = placed(p.shape, torch.nan if step == 2 else 1.0, offset)
        optimizer.step()
    return everything(optimizer)


@pytest.mark.parametrize("offsets", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("limits", [{"max_row_change": 0.02}, {"max_row_change": 0.05, "max_row_norm": 1.5}], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_limited_rows_are_rows_pys(dtype: torch.dtype, limits: dict[str, float], offsets: tuple[int, ...]) -> None:
    ours, expected, again = (limited(dtype, foreach, limits, offsets) for foreach in (None, True, None))
    tolerance = 5 * TOLERANCES[dtype][1]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    without = limited(dtype, None, {}, offsets)
    nothing_cut = limited(dtype, None, {"max_row_change": 1e6, "max_row_norm": 1e6}, offsets)
    assert all(torch.equal(a, b) for a, b in zip(without, nothing_cut, strict=True))


def test_two_runs_have_the_same_bits() -> None:
    runs = []
    for _ in range(2):
        params = parameters()
        optimizer = GrokAdamW(params, grokking_signal_fns=lambda: 0.2)
        for step in range(5):
            set_gradients(params, step)
            optimizer.step()
        runs.append(everything(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_more_than_2_31_elements() -> None:
    count = 2**31 + 8
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    p = nn.Parameter(torch.ones(count, dtype=torch.float16, device="cuda"))
    p.grad = torch.zeros_like(p)
    p.grad[:4] = p.grad[-4:] = torch.tensor([1.0, -1.0, 2.0, 0.5], device="cuda")
    small = nn.Parameter(torch.ones(8, dtype=torch.float16, device="cuda"))
    small.grad = torch.cat([p.grad[:4], p.grad[-4:]])
    large, optimizer = GrokAdamW([p], lr=0.25), GrokAdamW([small], lr=0.25)
    for _ in range(2):
        large.step()
        optimizer.step()
    assert torch.equal(torch.cat([p[:4], p[-4:]]), small)
    assert large.metrics()["grad_norm"] == pytest.approx(optimizer.metrics()["grad_norm"])


# no waiting, and few launches


@contextmanager
def nothing_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nonfinite": "propagate", "gradient_clipping": 0.0},
        {"fused": True},
        {"window_size": 3},
        {"accumulation_steps": 2, "second_moment": "raw"},
        {"max_row_change": 0.03, "max_row_norm": 3.0},
    ],
    ids=str,
)
def test_no_step_waits_for_the_device(options: dict[str, Any]) -> None:
    """The host never waits, even if lr, losses and gradients' addresses change, or the step unscales for GradScaler."""
    params = parameters()
    optimizer = GrokAdamW(params, **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    loss = scaler.scale(torch.ones((), device="cuda"))
    for step in range(5):
        for p in params:
            p.grad = None
        set_gradients(params, step)
        optimizer.record(train_loss=loss, eval_loss=2 * loss)
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
        with nothing_waits():
            if options.get("fused"):
                scaler.step(optimizer)
            else:
                optimizer.step()
        if options.get("fused"):
            scaler.update()
    assert optimizer.metrics()["step"] == 5 // options.get("accumulation_steps", 1)


@pytest.mark.parametrize("keeper", KEEPERS)
def test_what_keeps_more_does_as_on_the_cpu(keeper: str) -> None:
    """Filters around other optimizers, windows and micro-batches give the CPU's weights on a GPU."""
    weights = []
    for device in ("cpu", "cuda"):
        model = network(torch.float64).to(device)
        optimizer = KEEPERS[keeper](model)
        for step in range(9):
            x, y = (part.to(device) for part in batch(step, torch.float64))
            model.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        weights.append([p.detach().cpu() for p in model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def launches_of(optimizer: GrokAdamW) -> list[str]:
    """Return the names of all that the device does in a step, as the profiler reports it."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    return launched(profile.events())


@pytest.mark.parametrize("tensors_in_a_group", [1, 150])
@pytest.mark.parametrize(
    ("options", "triton"),
    [
        ({"nonfinite": "propagate", "gradient_clipping": 0.0}, {"update": 1}),
        ({"gradient_clipping": 0.0}, {"squares": 1, "judge": 1, "update": 1}),
        ({}, {"squares": 1, "judge": 1, "update": 1}),
        ({"max_row_change": 0.03}, {"squares": 1, "judge": 1, "update": 1}),
    ],
    ids=str,
)
def test_launches(options: dict[str, Any], triton: dict[str, int], tensors_in_a_group: int) -> None:
    """The profiler counts our launches, and at most one of torch's, which advances the step counts."""
    params = [nn.Parameter(p.data.view(5, 20)) for p in parameters(sizes=[100] * 2 * tensors_in_a_group)]
    optimizer = GrokAdamW([{"params": params[:tensors_in_a_group]}, {"params": params[tensors_in_a_group:]}], **options)
    for step in range(4):
        set_gradients(params, step)
        optimizer.step()
    of_device = launches_of(optimizer)
    counts = Counter(name if name in triton else "others" for name in of_device if "Mem" not in name)
    assert {name: counts[name] for name in triton} == triton
    assert counts["others"] <= 1, of_device
    assert not any("Memcpy" in name for name in of_device), of_device


# graphs and streams


def test_replays_are_the_eager_run_bit_for_bit() -> None:
    said = [0.0]
    options: dict[str, Any] = {"grokking_signal_fns": lambda: said[0], "grokking_signal_decay_rate": 1.0}
    options |= {"signal_boost": 1.0, "max_row_change": 0.05, "decay_boost": 8.0}
    params, twins = parameters(), parameters()
    lr = torch.tensor(0.01, device="cuda", dtype=torch.float64)
    replayed, eager = GrokAdamW(params, lr=lr, capturable=True, **options), GrokAdamW(twins, lr=0.01, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(3):
            set_gradients(params, step)
            replayed.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.step()
    assert replayed._run.graphs  # the kernels were captured, not foreach
    for step in range(10):
        said[0] = 0.3 * max(step - 2, 0)
        set_gradients(twins, step)
        eager.param_groups[0]["lr"] = 0.01 * (1 + max(step - 2, 0))
        if step == 6:
            twins[3].grad.fill_(torch.nan)
        eager.step()
        if step >= 3:
            set_gradients(params, step)
            if step == 6:
                params[3].grad.fill_(torch.nan)
            lr.fill_(0.01 * (1 + max(step - 2, 0)))
            replayed.update_signals()
            graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(everything(replayed), everything(eager), strict=True))
    assert replayed.metrics() == pytest.approx(eager.metrics(), rel=1e-12)
    assert replayed.metrics()["skipped_steps"] == 1


@pytest.mark.parametrize("betas_change", [False, True])
def test_eager_steps_between_replays_do_not_disturb_the_graph(betas_change: bool) -> None:
    """Eager steps have gradients and tables elsewhere. A replay uses the β1 of the capture, which is in its table."""
    params, twins = parameters(), parameters()
    replayed, eager = GrokAdamW(params, capturable=True), GrokAdamW(twins)

    def set_betas(optimizer: GrokAdamW, step: int) -> None:
        if betas_change:  # they also change right before the capture
            optimizer.param_groups[0]["betas"] = (0.9 - 0.01 * step, 0.99)

    for step in range(3):
        for ps, optimizer in ((params, replayed), (twins, eager)):
            set_betas(optimizer, step)
            set_gradients(ps, step)
            optimizer.step()
    set_betas(replayed, 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.step()
    own = [p.grad for p in params]
    for step in range(3, 9):
        for p, grad in zip(params, own, strict=True):
            p.grad = grad if step % 2 else None
        for ps in (params, twins):
            set_gradients(ps, step)
        set_betas(eager, 3 if step % 2 else step)
        eager.step()
        set_betas(replayed, step)
        if step % 2:
            filled = [
                torch.full((n,), 2**40, dtype=torch.int64, device="cuda") for n in range(1, 300, 7)
            ]  # these overwrite what was freed
            del filled
            graph.replay()
        else:
            replayed.step()
    assert all(torch.equal(a, b) for a, b in zip(everything(replayed), everything(eager), strict=True))


def test_on_a_side_stream() -> None:
    params, twins = parameters(), parameters()
    optimizer, eager = GrokAdamW(params), GrokAdamW(twins)
    side = torch.cuda.Stream()
    for step in range(6):
        set_gradients(twins, step)
        eager.step()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side if step % 3 else torch.cuda.current_stream()):
            set_gradients(params, step)
            optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(everything(optimizer), everything(eager), strict=True))


def test_on_several_devices() -> None:
    """The norm covers the gradients of all devices. The second one may be the CPU, which has another backend."""
    second = "cuda:1" if torch.cuda.device_count() > 1 else "cpu"
    params = parameters()
    apart = [nn.Parameter(p.detach().to("cuda:0" if i % 2 else second)) for i, p in enumerate(params)]
    optimizers = [GrokAdamW(params), GrokAdamW(apart)]
    for step in range(3):
        for ps, optimizer in zip((params, apart), optimizers, strict=True):
            set_gradients(ps, step)
            optimizer.step()
    for a, b in zip(params, apart, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-6, atol=1e-6)


# memory that moves


MOVED = [
    event for event in EVENTS if event not in (share_the_state, share_the_model, add_a_group, replace_the_parameters)
]


@pytest.mark.parametrize("event", MOVED, ids=lambda event: event.__name__)
def test_whatever_moves_is_followed(event: Any) -> None:
    models = [network().cuda(), network().cuda()]
    optimizers = [
        GrokAdamW(model.named_parameters(), lr=0.01, foreach=foreach)
        for model, foreach in zip(models, (None, True), strict=True)
    ]
    for i in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            x, y = (tensor.cuda() for tensor in batch(i))
            model.zero_grad()
            (model(x) - y).square().mean().backward()
            if i == 3:
                event(model, optimizer)
            optimizer.step()
    for a, b in zip(everything(optimizers[0]), everything(optimizers[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_after_a_checkpoint_it_goes_on_bit_for_bit() -> None:
    params = parameters()
    optimizer = GrokAdamW(params)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    again = copy.deepcopy(params)
    resumed = GrokAdamW(again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for ps, stepped in ((params, optimizer), (again, resumed)):
        for step in range(3, 6):
            set_gradients(ps, step)
            stepped.step()
    assert all(torch.equal(a, b) for a, b in zip(everything(optimizer), everything(resumed), strict=True))


def test_the_compiled_step_is_foreachs() -> None:
    params, twins = parameters(), parameters()
    optimizer, eager = GrokAdamW(params), GrokAdamW(twins)
    for step in range(2):  # eager steps make the state of both, so step counts are parts of one tensor
        for ps, stepped in ((params, optimizer), (twins, eager)):
            set_gradients(ps, step)
            stepped.step()
    compiled = torch.compile(optimizer.step)
    for step in range(2, 4):
        for ps, take_step in ((params, compiled), (twins, eager.step)):
            set_gradients(ps, step)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                take_step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
