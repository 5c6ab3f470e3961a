"""Gradient accumulation around any optimizer, and inside GrokAdamW's moments."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR

from grokadamw import Accumulate, GrokAdamW, Grokfast, GrokfastMA
from grokadamw.checkpoints import to_adamw

from .models import IMPLEMENTATIONS, batch, network, parameters, running, same, saved_and_loaded, set_gradients
from .test_grokfast import resumed_is_uninterrupted

STEPS = 6


def micro_batches(k: int, dtype: torch.dtype = torch.float64) -> list[list[tuple[Tensor, Tensor]]]:
    """Return k micro-batches for each step."""
    numbers = itertools.count()
    return [[batch(next(numbers), dtype) for _ in range(k)] for _ in range(STEPS)]


def backward(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss


def closest(ours: nn.Module, expected: nn.Module, tolerance: float) -> None:
    for a, b in zip(ours.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# Accumulate


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("inner", [AdamW, SGD])
def test_it_is_the_joined_batch(inner: Any, k: int, clip: float) -> None:
    ours, expected = network(torch.float64), network(torch.float64)
    optimizer, joined = Accumulate(inner(ours.parameters(), lr=0.01), k, clip), inner(expected.parameters(), lr=0.01)
    schedules = [OneCycleLR(o, 0.1, total_steps=STEPS, cycle_momentum=False) for o in (optimizer, joined)]
    for micro in micro_batches(k):
        for x, y in micro:
            assert not optimizer.stepped or x is micro[0][0]
            backward(ours, x, y)
            optimizer.step()
        assert optimizer.stepped
        backward(expected, *map(torch.cat, zip(*micro, strict=True)))
        if clip:
            nn.utils.clip_grad_norm_(expected.parameters(), clip)
        joined.step()
        for schedule in schedules:
            schedule.step()
    closest(ours, expected, 1e-12)


def test_around_grokadamw_it_clips_once_and_evaluates_signals_once() -> None:
    ours, expected, calls = network(torch.float64), network(torch.float64), [0, 0]

    def signal(i: int) -> Callable[[], float]:
        def count() -> float:
            calls[i] += 1
            return 0.3

        return count

    make = [
        GrokAdamW(m.named_parameters(), lr=0.01, grokking_signal_fns=signal(i)) for i, m in enumerate([ours, expected])
    ]
    optimizer = Accumulate(make[0], 4)
    for micro in micro_batches(4):
        for x, y in micro:
            backward(ours, x, y)
            optimizer.step()
        backward(expected, *map(torch.cat, zip(*micro, strict=True)))
        make[1].step()
    closest(ours, expected, 1e-12)
    assert calls == [STEPS, STEPS]
    assert make[0].metrics()["grad_norm"] == pytest.approx(make[1].metrics()["grad_norm"], rel=1e-12)


def test_an_incomplete_cycle_can_be_flushed() -> None:
    ours, expected = network(torch.float64), network(torch.float64)
    optimizer, joined = Accumulate(Adam(ours.parameters()), 4), Adam(expected.parameters())
    for micro in micro_batches(3):
        for x, y in micro:
            backward(ours, x, y)
            optimizer.step()
        assert not optimizer.stepped
        optimizer.flush()
        assert optimizer.stepped
        backward(expected, *map(torch.cat, zip(*micro, strict=True)))
        joined.step()
    closest(ours, expected, 1e-12)
    optimizer.flush()  # nothing is left to step with
    assert not optimizer.stepped
    closest(ours, expected, 1e-12)


def test_parameters_without_a_gradient_in_some_micro_batches() -> None:
    """A missing gradient counts as 0; a parameter that has none in the whole cycle is left alone."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    twins = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer, plain = Accumulate(AdamW(params), 3), AdamW(twins)
    for cycle in range(3):
        for i in range(3):
            has = [i == 0, i != cycle, False]
            for p, has_grad in zip(params, has, strict=True):
                p.grad = torch.full((2,), 3.0 + i) if has_grad else None
            optimizer.step()
            assert [p.grad is not None for p in params] == has
        twins[0].grad, twins[1].grad = torch.full((2,), 1.0), torch.full((2,), (12.0 - 3 - cycle) / 3)
        plain.step()
        assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    assert params[2] not in optimizer.state


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_added_up_in_float32_in_memory_of_their_own(set_to_none: bool) -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = Accumulate(SGD([p], lr=1.0), 257)
    for _ in range(257):
        optimizer.zero_grad(set_to_none)
        p.backward(torch.ones_like(p))  # a sum in bfloat16 stops at 256, because 256 + 1 is 256 there
        optimizer.step()
    assert torch.equal(p, torch.full_like(p, -1))
    assert (p.grad == 1).all()


def boosted(model: nn.Module) -> GrokAdamW:
    """Return an optimizer whose boosts are fixed at the start of a cycle, so a resumed run needs them in its state."""
    optimizer = GrokAdamW(
        model.named_parameters(), lr=0.01, accumulation_steps=3, second_moment="raw", signal_boost=2.0, decay_boost=4.0
    )
    optimizer.record(train_loss=0.2, eval_loss=1.0)
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda m: Accumulate(Adam(m.parameters(), lr=0.01), 3),
        lambda m: Accumulate(SGD(m.parameters(), lr=0.01), 3, 0.1),
        lambda m: Accumulate(GrokAdamW(m.named_parameters(), lr=0.01), 5),
        lambda m: GrokAdamW(m.named_parameters(), lr=0.01, accumulation_steps=3, second_moment="raw"),
        lambda m: boosted(m),
        lambda m: GrokAdamW(m.named_parameters(), lr=0.01, window_size=3),
        lambda m: Accumulate(GrokAdamW(m.named_parameters(), lr=0.01, window_size=2, window_dtype=torch.bfloat16), 3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_resumed_in_the_middle_is_uninterrupted(make: Callable[[nn.Module], Any], dtype: torch.dtype) -> None:
    resumed_is_uninterrupted(make, dtype)  # interrupted after 8 steps


def scaled(make: Callable[[nn.Module], Any], overflows: bool, amp: bool | None) -> nn.Module:
    """Return a model trained under a GradScaler, or without one if `amp` is None; some micro-batches may overflow."""
    model = network()
    optimizer = make(model)
    if amp is not None:
        optimizer._step_supports_amp_scaling = amp
    scaler = GradScaler("cpu", init_scale=2.0**10, enabled=amp is not None)
    for i in range(12):
        for overflow in (True, False) if overflows and i % 3 == 1 else (False,):
            x, y = batch(i)
            model.zero_grad()
            scaler.scale((model(x) - y).square().mean()).backward()
            if overflow:
                model[0].weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
    return model


@pytest.mark.parametrize("amp", [True, False], ids=["the optimizer unscales", "GradScaler unscales"])
@pytest.mark.parametrize(
    "make",
    [
        lambda m: Accumulate(AdamW(m.parameters(), lr=0.01, fused=True), 3),
        lambda m: Accumulate(GrokAdamW(m.named_parameters(), lr=0.01), 3),
        lambda m: GrokAdamW(m.named_parameters(), lr=0.01, accumulation_steps=3, second_moment="raw"),
        lambda m: GrokAdamW(m.named_parameters(), lr=0.01, window_size=3),
        lambda m: Grokfast(AdamW(m.parameters(), lr=0.01)),
        lambda m: GrokfastMA(AdamW(m.parameters(), lr=0.01, fused=True), 3),
    ],
)
def test_under_gradscaler_an_overflow_has_not_happened(make: Callable[[nn.Module], Any], amp: bool) -> None:
    ours, expected = scaled(make, True, amp), scaled(make, False, None)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), expected.parameters(), strict=True))


def test_the_inner_optimizer_says_whether_it_unscales() -> None:
    params = [nn.Parameter(torch.ones(2))]
    assert Accumulate(AdamW(params, fused=True), 2)._step_supports_amp_scaling
    assert not hasattr(Grokfast(AdamW(params)), "_step_supports_amp_scaling")
    assert Grokfast(AdamW(params, fused=True))._step_supports_amp_scaling


@pytest.mark.parametrize(
    "make",
    [
        lambda m: Accumulate(AdamW(m.parameters(), lr=0.01), 2),
        lambda m: GrokAdamW(m.named_parameters(), accumulation_steps=2, second_moment="raw"),
    ],
)
def test_a_scheduler_hears_of_each_step_once(make: Callable[[nn.Module], Any]) -> None:
    """A gradient that overflows makes no step, and `stepped` is False after it."""
    model, stepped = network(), []
    optimizer, scaler = make(model), GradScaler("cpu", init_scale=2.0)
    for i, overflow in enumerate([False, False, True, True, False, True, False]):
        model.zero_grad()
        x, y = batch(i)
        scaler.scale((model(x) - y).square().mean()).backward()
        if overflow:
            model[0].weight.grad[0, 0] = torch.nan
        scaler.step(optimizer)
        scaler.update()
        stepped.append(optimizer.stepped)
    assert stepped == [False, True, False, False, False, False, True]


def test_a_cycle_of_accumulate_under_way_keeps_its_length() -> None:
    model = network()
    optimizer = Accumulate(AdamW(model.parameters()), 4)
    (micro, *_) = micro_batches(3, torch.float32)
    for x, y in micro:
        backward(model, x, y)
        optimizer.step()
    saved = saved_and_loaded(optimizer.state_dict())
    other = Accumulate(AdamW(model.parameters()), 2)
    with pytest.raises(ValueError, match="after 3 of 4 micro-batches.*construct it with steps=4"):
        other.load_state_dict(saved)
    assert not other.state
    optimizer.step()
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    other.step()
    assert not other.stepped
    other.step()
    assert other.stepped
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert not other.stepped


def test_groups_that_the_inner_optimizer_got_take_part() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = Accumulate(Grokfast(SGD(params[:1], lr=1.0), lamb=1.0), 2)
    optimizer.optimizer.optimizer.add_param_group({"params": params[1:]})
    optimizer.flush()  # nothing has been accumulated yet
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(2)
        optimizer.step()
    assert torch.equal(params[0], params[1])
    assert (params[0] == -1).all()


# inside the moments


def in_moments(model: nn.Module, k: int, **options: Any) -> GrokAdamW:
    return GrokAdamW(model.named_parameters(), lr=0.01, accumulation_steps=k, second_moment="raw", **options)


def exact(model: nn.Module, k: int, **options: Any) -> Accumulate:
    return Accumulate(GrokAdamW(model.named_parameters(), lr=0.01, second_moment="raw", **options), k)


@pytest.mark.parametrize(
    ("implementation", "k"),
    [(name, k) for name in IMPLEMENTATIONS for k in (2, 3, 10) if name != "gpu" or k == 3],  # the interpreter is slow
)
def test_m_and_mu_are_the_exact_ones_and_v_is_the_mean_of_squares(implementation: str, k: int) -> None:
    with running(implementation) as how:
        options = {"gradient_clipping": 0.0, "amplify_after": 2, "grokking_signal_fns": lambda: 0.5, **how}
        ours, expected = network(torch.float64), network(torch.float64)
        optimizer, buffered = in_moments(ours, k, **options), exact(expected, k, **options)
        v = [torch.zeros_like(p) for p in ours.parameters()]
        for micro in micro_batches(k):
            for nth, (x, y) in enumerate(micro):
                backward(ours, x, y)
                for p, q, square in zip(ours.parameters(), expected.parameters(), v, strict=True):
                    q.grad = p.grad  # both get the same gradients, because another v leads to other weights
                    square.mul_(1 if nth else 0.999).add_(p.grad.square(), alpha=0.001 / k)
                optimizer.step()
                buffered.step()
                assert optimizer.stepped == buffered.stepped == (nth == k - 1)
            for p, q, square in zip(ours.parameters(), expected.parameters(), v, strict=True):
                a, b = optimizer.state[p], buffered.state[q]
                torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(a["grok_ema"], b["grok_ema"], rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(a["exp_avg_sq"], square, rtol=1e-12, atol=1e-12)
                assert a["step"] == b["step"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_micro_batch_is_the_plain_step_bit_for_bit(implementation: str) -> None:
    with running(implementation) as how:
        runs = []
        for options in ({}, {"accumulation_steps": 1}):
            model = network()
            optimizer = GrokAdamW(model.named_parameters(), lr=0.01, second_moment="raw", **how, **options)
            for (micro,) in micro_batches(1, torch.float32):
                backward(model, *micro)
                optimizer.step()
            runs.append([*model.parameters(), *(x for s in optimizer.state.values() for x in s.values())])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_between_steps_there_is_no_buffer() -> None:
    """The optimizer holds its state and nothing else once the gradients are freed, and a micro-step needs no memory."""
    code = """
import torch
from grokadamw import GrokAdamW
def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024
p = torch.nn.Parameter(torch.ones(16_000_000))
optimizer = GrokAdamW([p], accumulation_steps=3, second_moment="raw")
def micro_step():
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = None
for _ in range(3):
    micro_step()
before = status("VmRSS")
micro_step()
between = status("VmRSS") - before
p.grad = torch.ones_like(p)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
optimizer.step()
optimizer.step()
print(between, status("VmHWM") - before, sum(x.nbytes for x in optimizer.state[p].values() if torch.is_tensor(x)))
"""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("counts memory as Linux does")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    between, peak, state = map(float, done.stdout.split())
    assert between < 4  # MiB; a gradient takes 61
    assert peak < 4
    assert state == 3 * 64_000_000 + 4


def test_numbers_hold_for_a_cycle_and_signals_are_heard_at_its_start() -> None:
    """Changed within a cycle, α, λ, γ and betas act from the next cycle on, lr and weight decay at the next step."""
    fixed = {"lamb": 1.0, "betas": (0.8, 0.99), "gamma": 0.3, "alpha_init": 0.5}
    at_once = {"lr": 0.02, "weight_decay": 0.3}
    runs, calls = [], []
    for changes in (
        {3: at_once, 6: fixed},
        {4: at_once | fixed},
        {5: at_once | fixed},
        {},
    ):  # the second cycle has the micro-batches 3 to 5
        model = network(torch.float64)
        optimizer = in_moments(model, 3, grokking_signal_fns=lambda: calls.append(1) or len(calls))
        calls.clear()
        for nth, (x, y) in enumerate(itertools.chain.from_iterable(micro_batches(3))):
            optimizer.param_groups[0].update(changes.get(nth, {}))
            backward(model, x, y)
            optimizer.step()
        runs.append(list(model.parameters()))
        assert len(calls) == STEPS
    for run in runs[1:3]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    assert not torch.equal(runs[0][0], runs[3][0])


def test_a_group_that_is_added_within_a_cycle_joins_it() -> None:
    """The group joins with its own numbers, as if it had been there without a gradient."""
    runs = []
    for is_late in (True, False):
        first, second = parameters()
        own: dict[str, Any] = {"params": [second], "betas": (0.5, 0.9), "alpha_init": 0.7, "lamb": 3.0, "layer": 1}
        groups = [{"params": [first], "layer": 0}] + [own] * (not is_late)
        optimizer = GrokAdamW(groups, lr=0.1, accumulation_steps=2, second_moment="raw")
        set_gradients([first], 1)
        optimizer.step()
        if is_late:
            optimizer.add_param_group(own)
        for i in (2, 3, 4):
            set_gradients([first, second], i)
            optimizer.step()
            assert optimizer.stepped == (i != 3)
        runs.append([first.detach(), second.detach(), optimizer.state_dict()])
    assert same(*runs)


@pytest.mark.parametrize("k", [2, 3])
def test_a_gradient_that_comes_later_in_a_cycle_is_as_one_of_0_before(k: int) -> None:
    """Averages decay once a cycle, whenever the first gradient comes, even if other parameters have begun the cycle."""
    runs = []
    for early in (None, torch.zeros(3, dtype=torch.float64)):
        params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
        optimizer = GrokAdamW(params, lr=0.01, accumulation_steps=k, second_moment="raw", gamma=0.0)
        for nth in range(4 * k):
            params[0].grad = torch.full_like(params[0], 0.1 + nth)
            params[1].grad = torch.full_like(params[1], 0.2 + nth) if nth % k == k - 1 else early
            optimizer.step()
        runs.append(torch.stack(params))
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_is_not_finite_adds_nothing_and_the_cycle_goes_on() -> None:
    ours, expected = network(torch.float64), network(torch.float64)
    optimizer, other = in_moments(ours, 3), in_moments(expected, 3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the gradients of a micro-batch hold NaN")
        for cycle, micro in enumerate(micro_batches(3)):
            for nth, (x, y) in enumerate(micro):
                backward(ours, x, y)
                backward(expected, x, y)
                if nth == cycle % 3:
                    ours[0].weight.grad[0, 0] = [torch.nan, torch.inf][cycle % 2]
                    for p in expected.parameters():
                        p.grad.zero_()
                optimizer.step()
                other.step()
    closest(ours, expected, 1e-12)
    assert optimizer.metrics()["skipped_steps"] == STEPS
    assert optimizer.metrics()["step"] == STEPS


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_where_reading_would_make_the_host_wait(
    implementation: str, request: pytest.FixtureRequest, recwarn: pytest.WarningsRecorder
) -> None:
    """If reading makes the host wait, α, c and the check for finite gradients are tensors. The results are the same."""
    runs = []
    for waits in (False, True):
        if waits:
            request.getfixturevalue("nothing_is_free_to_read")
        with running(implementation) as how:
            for options in ({"accumulation_steps": 3, "second_moment": "raw", "amplify_after": 1}, {"window_size": 3}):
                model = network(torch.float64)
                optimizer = GrokAdamW(
                    model.named_parameters(), lr=0.01, grokking_signal_fns=lambda: 0.5, **options, **how
                )
                batches = list(itertools.chain.from_iterable(micro_batches(3)))
                batches = batches[:9] if implementation == "gpu" else batches  # the interpreter is slow
                for i, (x, y) in enumerate(batches):
                    backward(model, x, y)
                    if i % 5 == 1:
                        model[0].weight.grad[0, 0] = torch.nan
                    optimizer.step()
                runs.append(model)
                assert optimizer.metrics()["skipped_steps"] == len(batches[1::5])
    closest(runs[2], runs[0], 1e-10)
    closest(runs[3], runs[1], 1e-10)


def test_raising_leaves_the_cycle_where_it_was() -> None:
    model = network(torch.float64)
    optimizer = in_moments(model, 3, nonfinite="raise")
    (first, second, _), *_ = micro_batches(3)
    backward(model, *first)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    backward(model, *second)
    model[0].weight.grad[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="0.weight"):
        optimizer.step()
    after = optimizer.state_dict()
    assert after["param_groups"][0]["micro_step"] == before["param_groups"][0]["micro_step"] == 1
    for key, state in before["state"].items():
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(after["state"][key][n])) for n, x in state.items())


def test_a_cycle_under_way_is_not_gone_on_from_with_another_length() -> None:
    model = network()
    optimizer = in_moments(model, 3)
    (micro, *_) = micro_batches(3, torch.float32)
    for x, y in micro[:2]:
        backward(model, x, y)
        optimizer.step()
    saved = saved_and_loaded(optimizer.state_dict())
    for k in (1, 4):
        other = in_moments(model, k)
        with pytest.raises(ValueError, match=f"after 2 of accumulation_steps=3 .* has accumulation_steps={k}"):
            other.load_state_dict(saved)
        assert not other.state
    backward(model, *micro[2])
    optimizer.step()
    with pytest.warns(UserWarning, match="accumulation_steps=3, and this optimizer keeps accumulation_steps=4"):
        in_moments(model, 4).load_state_dict(saved_and_loaded(optimizer.state_dict()))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"accumulation_steps": 2}, ValueError, "accumulation_steps=2 with second_moment='filtered'.*raw.*Accumulate"),
        ({"accumulation_steps": 0}, ValueError, "accumulation_steps=0"),
        ({"accumulation_steps": 2.0}, TypeError, "accumulation_steps=2.0"),
        ({"accumulation_steps": 2, "second_moment": "raw", "window_size": 5}, ValueError, "window_size=5"),
        ({"accumulation_steps": 2, "second_moment": "raw", "compat": "0.1.2"}, ValueError, "compat='0.1.2'"),
        ({"accumulation_steps": 2, "second_moment": "raw", "differentiable": True}, ValueError, "differentiable=True"),
        ({"accumulation_steps": 2, "second_moment": "raw", "capturable": True}, ValueError, "capturable=True"),
        ({"window_size": 0}, ValueError, "window_size=0"),
        ({"window_size": True}, TypeError, "window_size=True"),
        ({"window_size": 3, "compat": "0.1.2"}, ValueError, "window_size=3 with compat"),
        ({"window_size": 3, "window_dtype": torch.float16}, ValueError, "window_dtype=torch.float16"),
        ({"window_dtype": torch.bfloat16}, ValueError, "window_dtype=torch.bfloat16 without a window"),
        ({"amplify_by_signal": 1}, ValueError, "amplify_by_signal=1"),
        ({"amplify_by_signal": True, "grokking_signal_fns": []}, ValueError, "amplify_by_signal=True without a signal"),
        ({"amplify_by_signal": True, "capturable": True}, ValueError, "amplify_by_signal=True with capturable"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        GrokAdamW([nn.Parameter(torch.ones(2))], **options)


# windows in GrokAdamW


def test_a_window_goes_with_its_checkpoint() -> None:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), lr=0.01, window_size=3)
    for (micro,) in micro_batches(1, torch.float32):
        backward(model, *micro)
        optimizer.step()
    saved = saved_and_loaded(optimizer.state_dict())
    other = GrokAdamW(model.named_parameters(), window_size=5)
    with pytest.raises(ValueError, match=r"window_size=5 .*construct the optimizer with window_size=3"):
        other.load_state_dict(saved)
    assert not other.state
    ema = GrokAdamW(model.named_parameters())
    with pytest.warns(UserWarning, match="window_size=3, and this optimizer keeps window_size=None"):
        ema.load_state_dict(saved)
    assert {key for state in ema.state.values() for key in state} == {"step", "exp_avg", "exp_avg_sq", "grok_ema"}
    windowed = GrokAdamW(model.named_parameters(), window_size=3)
    with pytest.warns(UserWarning, match="window_size=None"):
        windowed.load_state_dict(saved_and_loaded(ema.state_dict()))
    backward(model, *micro)
    windowed.step()
    for p in model.parameters():  # the window starts again, with one gradient
        torch.testing.assert_close(windowed.state[p]["grok_ema"], windowed.state[p]["grok_ring"][0])
    optimizer.free_slow_gradient()
    assert {key for state in optimizer.state.values() for key in state} == {"step", "exp_avg", "exp_avg_sq"}


def test_a_window_is_there_wherever_there_is_a_slow_gradient() -> None:
    """A state with a slow gradient gets a window even if λ is 0, and a window that was deleted starts again."""
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    old = GrokAdamW([p])
    old.step()
    old.param_groups[0]["lamb"] = 0.0
    optimizer = GrokAdamW([p], window_size=3)
    with pytest.warns(UserWarning, match="window_size"):
        optimizer.load_state_dict(saved_and_loaded(old.state_dict()))
    for _ in range(3):
        optimizer.step()
    for name in [name for name in optimizer.state[p] if name.startswith("grok_ring")]:
        del optimizer.state[p][name]
    optimizer.step()
    assert optimizer.state[p]["grok_ring_count"] == 1


def test_numpys_integers_are_pythons() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    for options in ({"accumulation_steps": np.int64(2), "second_moment": "raw"}, {"window_size": np.int64(2)}):
        optimizer = GrokAdamW([p], **options)
        for _ in range(3):
            optimizer.step()
        saved_and_loaded(optimizer.state_dict())
    wrapped = Grokfast(SGD([p]), alpha=np.float64(0.9), amplify_after=np.int64(1))
    wrapped.step()
    wrapped.param_groups[0]["grokfast_lamb"] = np.float32(1.5)
    assert saved_and_loaded(wrapped.state_dict())["param_groups"][0]["grokfast_lamb"] == 1.5


def test_a_float16_parameter_has_a_window_with_room() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = GrokAdamW([p], window_size=3)
    p.grad = torch.full((3,), 60000.0, dtype=torch.float16)
    optimizer.step()
    assert optimizer.state[p]["grok_ring"].dtype == torch.float32
    wrapped = Grokfast(AdamW([p], fused=True))
    scaler = GradScaler("cpu", init_scale=2.0)
    scaler.scale(p.float().sum()).backward()
    with pytest.raises(ValueError, match="float16 gradient.*keep parameters in float32"):
        scaler.step(wrapped)


def test_a_cycle_is_its_own_optimizers() -> None:
    """A new optimizer starts its own cycle, even with groups or state of one that is in the middle of a cycle."""
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    options = {"accumulation_steps": 3, "second_moment": "raw"}
    first = GrokAdamW([p], **options)
    first.step()
    second = GrokAdamW(first.param_groups, **options)
    assert second.param_groups[0]["micro_step"] == 0
    inner = GrokAdamW([p])
    plain = saved_and_loaded(inner.state_dict())
    wrapped = Accumulate(inner, 3)
    wrapped.step()
    again = Accumulate(inner, 3)
    assert again.param_groups[0]["accumulated_steps"] == 0
    again.step()
    again.step()
    again.load_state_dict(plain)
    assert again.param_groups[0]["accumulated_steps"] == 0
    first.load_state_dict(to_adamw(first.state_dict()))
    for nth in (1, 2, 3):
        first.step()
        assert first.stepped == (nth == 3)


def test_what_the_inner_optimizer_refuses_can_be_discarded() -> None:
    model = network()
    optimizer = Accumulate(GrokAdamW(model.named_parameters(), nonfinite="raise"), 2)
    (good, bad), *_ = micro_batches(2, torch.float32)
    backward(model, *bad)
    model[0].weight.grad[0, 0] = torch.nan
    optimizer.step()
    backward(model, *good)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not finite"):
            optimizer.step()
    optimizer.discard()
    for _ in range(2):
        backward(model, *good)
        optimizer.step()
    assert optimizer.stepped


def test_complex_parameters_are_accumulated() -> None:
    one, two = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j])), nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    optimizers = [Accumulate(SGD([p], lr=0.1), 3, 0.5) for p in (one, two)]
    for i in range(7):
        two.grad = torch.randn(2, 2, generator=torch.Generator().manual_seed(i))
        one.grad = torch.view_as_complex(two.grad.clone())
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(torch.view_as_real(one), two)


def test_a_scaler_without_gradients_has_found_nothing() -> None:
    params = [nn.Parameter(torch.ones(2))]
    for optimizer in (Accumulate(SGD(params), 2), GrokAdamW(params, fused=True), Grokfast(AdamW(params, fused=True))):
        scaler = GradScaler("cpu")
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        assert torch.equal(params[0], torch.ones(2))


def test_stepped_is_about_the_last_call() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = GrokAdamW([p])
    assert not optimizer.stepped
    p.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.stepped
    assert copy.deepcopy(optimizer).stepped
    p.grad[0] = torch.nan
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        optimizer.step()
    assert not optimizer.stepped


COPIED: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    **{name: getattr(torch.optim, name) for name in ("Adam", "AdamW", "NAdam", "RMSprop", "Adagrad", "Rprop", "SGD")},
    "GrokAdamW": lambda params: GrokAdamW(params, window_size=2),
    "Grokfast": lambda params: Grokfast(Adam(params), amplify_after=1),
    "GrokfastMA": lambda params: GrokfastMA(AdamW(params), 2),
}


@pytest.mark.parametrize("name", COPIED)
@pytest.mark.parametrize("calls", range(7))
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_go_on_from_anywhere_in_a_cycle(name: str, calls: int, how: str) -> None:
    """Copies also work in the first cycle, before there is inner state; one parameter gets its first gradient late."""
    model = network(torch.float64)
    optimizer = Accumulate(COPIED[name](list(model.parameters())), 3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def go_on(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
        for step in range(first, last):
            backward(model, *batch(step, torch.float64))
            if step < 4:
                model[0].bias.grad = None  # type: ignore[union-attr]
            optimizer.step()

    go_on(model, optimizer, 0, calls)
    before = copy.deepcopy(optimizer.state_dict())
    if how == "deepcopy":
        twin, other, its_schedule = copy.deepcopy((model, optimizer, schedule))
    elif how == "pickle":
        twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        twin, other = torch.load(file, weights_only=False)
    assert same(optimizer.state_dict(), before)
    assert same(other.state_dict(), before)
    if how == "deepcopy":
        assert its_schedule.optimizer is other
    for pair in ((model, optimizer), (twin, other)):
        go_on(*pair, calls, 9)
    assert same(dict(model.state_dict()), dict(twin.state_dict()))
    assert same(optimizer.state_dict(), other.state_dict())


def test_a_copy_of_both_optimizers_has_one_inside_the_other() -> None:
    model = network()
    inner = AdamW(model.parameters())
    optimizer = Accumulate(inner, 2)
    backward(model, *batch(0))
    optimizer.step()
    copied, its_inner = copy.deepcopy((optimizer, inner))
    assert copied.optimizer is its_inner
    assert copy.copy(optimizer).optimizer is inner
    optimizer.step()
    for copied, its_inner in (copy.deepcopy((optimizer, inner)), pickle.loads(pickle.dumps((optimizer, inner)))):
        assert copied.optimizer is its_inner


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="torch 2.10 and newer have it")
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, None])
def test_gradients_keep_the_dtype_that_their_parameter_asks_for(grad_dtype: torch.dtype | None) -> None:
    """The inner optimizer gets gradients of `grad_dtype` also in `flush`, and if the last micro-batch has none."""
    p, q = (nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    p.grad_dtype = q.grad_dtype = grad_dtype  # type: ignore[attr-defined]
    seen = []
    inner = SGD([p, q], lr=0.5)
    inner.register_step_pre_hook(lambda *_: seen.append([x.grad.dtype for x in (p, q) if x.grad is not None]))
    optimizer = Accumulate(inner, 2)
    for grads in ([p, q], [q], [p]):
        optimizer.zero_grad()
        for x in grads:
            x.grad = torch.ones(3, dtype=grad_dtype or torch.bfloat16)
        optimizer.step()
    optimizer.zero_grad()
    optimizer.flush()
    dtype = grad_dtype or torch.bfloat16
    assert seen == [[dtype, dtype], [dtype]]
    assert torch.equal(p.float(), torch.full((3,), 0.25))
    assert torch.equal(q.float(), torch.full((3,), 0.5))


def test_nothing_is_kept_alive() -> None:
    """Neither the wrapper nor its cycle keeps a gradient alive."""
    model = network()
    optimizer = Accumulate(Adam(model.parameters()), 2)
    (micro, *_) = micro_batches(2, torch.float32)
    for x, y in micro:
        backward(model, x, y)
        optimizer.step()
    import weakref

    gone = [weakref.ref(p.grad) for p in model.parameters()]
    model.zero_grad()
    gc.collect()
    assert not any(ref() is not None for ref in gone)


@pytest.mark.usefixtures("nothing_is_free_to_read")
def test_an_overflow_on_a_device_is_no_micro_batch() -> None:
    params = parameters()
    optimizer = GrokAdamW(params, accumulation_steps=2, second_moment="raw")
    set_gradients(params)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor([1.0])
    optimizer.step()
    assert optimizer.param_groups[0]["micro_step"] == 0
    assert not optimizer.state
    optimizer.found_inf = torch.tensor([0.0])
    optimizer.step()
    assert optimizer.param_groups[0]["micro_step"] == 1
    assert optimizer.metrics()["skipped_steps"] == 0


@pytest.mark.parametrize("k", [1, 2])
def test_gradients_stay_as_they_are(k: int) -> None:
    """Also those that are clipped, and the first ones of a parameter that come in the last micro-batch."""
    params = parameters()
    optimizer = Accumulate(SGD(params, lr=0.1), k, gradient_clipping=0.01)
    if k > 1:
        set_gradients(params[:1])
        optimizer.step()
    set_gradients(params, seed=2)
    before = [p.grad.clone() for p in params if p.grad is not None]
    optimizer.step()
    assert optimizer.stepped
    assert same([p.grad for p in params], before)


def test_a_flush_that_the_inner_optimizer_refuses_can_be_repeated() -> None:
    params, expected = parameters(), parameters()
    optimizer, other = Accumulate(AdamW(params, lr=0.1), 3), Accumulate(AdamW(expected, lr=0.1), 3)
    for _ in range(2):
        set_gradients(params)
        set_gradients(expected)
        optimizer.step()
        other.step()

    def refuse(*_: object) -> None:
        handle.remove()
        raise RuntimeError("not now")

    handle = optimizer.optimizer.register_step_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="not now"):
        optimizer.flush()
    optimizer.flush()
    other.flush()
    assert same(optimizer.state_dict()["state"], other.state_dict()["state"])


def test_a_first_gradient_in_the_last_micro_batch_is_averaged_in_float32() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(4096, dtype=torch.bfloat16))
    optimizer = Accumulate(SGD([p], lr=1.0), 3, gradient_clipping=0.7)
    optimizer.step()
    optimizer.step()
    p.grad = torch.randn_like(p)
    mean = p.grad.float() / 3
    mean *= 0.7 / (mean.norm() + 1e-6)
    optimizer.step()
    assert (p + mean.bfloat16()).count_nonzero() <= 4  # our norm is summed in another order


def test_a_cycle_of_another_length_is_forgotten_once_loaded() -> None:
    params = parameters()
    optimizer, other = (Accumulate(SGD(params, lr=0.1), 2) for _ in range(2))
    optimizer.load_state_dict(Accumulate(SGD(params, lr=0.1), 4).state_dict())
    assert optimizer.param_groups[0]["accumulation_cycle"] == 2
    set_gradients(params)
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    other.step()
    assert other.stepped


def test_progress_starts_over_with_the_state_of_the_inner_optimizer_alone() -> None:
    params = parameters()
    optimizer = Accumulate(SGD(params, lr=0.1), 2)
    set_gradients(params)
    optimizer.step()
    optimizer.load_state_dict(SGD(params, lr=0.1).state_dict())
    optimizer.step()
    assert not optimizer.stepped


def test_what_a_wrapper_loads_is_a_copy() -> None:
    params = parameters()
    optimizer, other = (Accumulate(SGD(params, lr=0.1), 3) for _ in range(2))
    set_gradients(params)
    optimizer.step()
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other.load_state_dict(saved)
    other.step()
    assert same(saved, before)


def test_gradients_of_inference_mode_have_no_version() -> None:
    params = parameters()
    for optimizer in (Accumulate(SGD(params, lr=0.1), 2), GrokAdamW(params, accumulation_steps=2, second_moment="raw")):
        for _ in range(2):
            with torch.inference_mode():
                grads = [torch.ones_like(p) for p in params]
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            optimizer.step()
        assert optimizer.stepped


@pytest.mark.filterwarnings("error")
def test_between_cycles_nothing_that_is_dropped_is_missed() -> None:
    params = parameters()
    optimizer = Accumulate(GrokAdamW(params), 2)
    for _ in range(2):
        set_gradients(params)
        optimizer.step()
    assert "accumulated" in optimizer.state[params[0]]
    GrokAdamW(params).load_state_dict(optimizer.state_dict())
