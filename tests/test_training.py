"""Tests of events in training: λ switched off and on, boosts, loss spikes, zero and non-finite gradients."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from grokadamw import GrokAdamW
from grokadamw.signals import SlowGradient

from .models import (
    AS_ADAMW,
    IMPLEMENTATIONS,
    network,
    parameters,
    running,
    same,
    saved_and_loaded,
    set_gradients,
    train,
)

# the slow gradient, on and off


def test_amplification_is_switched_off_and_on_in_mid_run() -> None:
    """While λ is 0 the step is AdamW's, but still updates μ, so that μ is up to date when λ is 2 again."""
    params, twins = parameters(1), parameters(1)
    optimizer = GrokAdamW(params, gamma=0.0, gradient_clipping=0.0, lamb=2.0)
    always = GrokAdamW(twins, gamma=0.0, gradient_clipping=0.0, lamb=2.0)
    for step, lamb in enumerate([2.0, 2.0, 0.0, 0.0, 2.0]):
        optimizer.param_groups[0]["lamb"] = lamb
        set_gradients(params, step)
        set_gradients(twins, step)
        before = {name: value.clone() for name, value in optimizer.state[params[0]].items()}
        optimizer.step()
        always.step()
        state = optimizer.state[params[0]]
        assert torch.equal(state["grok_ema"], always.state[twins[0]]["grok_ema"])
        if lamb == 0:
            g = params[0].grad
            torch.testing.assert_close(state["exp_avg"], 0.9 * before["exp_avg"] + 0.1 * g)
            torch.testing.assert_close(state["exp_avg_sq"], 0.999 * before["exp_avg_sq"] + 0.001 * g.square())


def test_the_slow_gradient_can_be_freed_and_begins_again_at_zero() -> None:
    params = parameters()
    optimizer = GrokAdamW(params, gradient_clipping=0.0)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    optimizer.param_groups[0]["lamb"] = 0.0
    optimizer.free_slow_gradient()
    optimizer.step()
    for state in optimizer.state.values():
        assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
    saved_and_loaded(optimizer.state_dict())
    optimizer.param_groups[0]["lamb"] = 2.0
    optimizer.step()
    for p in params:
        torch.testing.assert_close(optimizer.state[p]["grok_ema"], (1 - 0.98) * p.grad)
        assert optimizer.state[p]["step"] == 5


# lr, max_row_change and weight_decay, by the signal

BOOSTED = {"signal_boost": 2.0, "max_row_change": 0.01, "decay_boost": 8.0, "weight_decay": 0.3}


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}], ids=["float32", "int8"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_boosts_are_a_higher_lr_a_wider_limit_and_more_decay(implementation: str, options: dict[str, Any]) -> None:
    """Boosts equal a manual schedule bit for bit, and leave the groups as they are. Signals are clamped to [0, 1]."""
    said: list[Any] = [None]
    with running(implementation, chunk=4096) as how:
        models = [nn.Sequential(nn.Linear(70, 70), nn.Linear(70, 2)) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        boosted, by_hand = (
            GrokAdamW(model.named_parameters(), lr=0.01, grokking_signal_fns=lambda: said[0], **how, **options, **given)
            for model, given in zip(models, (BOOSTED, {}), strict=True)
        )
        for step, signal in enumerate([0.0, 0.25, torch.tensor(0.5), 1.0, 7.0, -3.0]):
            said[0], factor = signal, 1 + 2 * min(max(float(signal), 0.0), 1.0)
            of_decay = 1 + 8 * min(max(float(signal), 0.0), 1.0)
            by_hand.param_groups[0].update(lr=0.01 * factor, max_row_change=0.01 * factor, weight_decay=0.3 * of_decay)
            for model, optimizer in zip(models, (boosted, by_hand), strict=True):
                set_gradients(list(model.parameters()), step, scale=10.0**-step)
                optimizer.step()
            assert same(models[0].state_dict(), models[1].state_dict())
            assert (boosted.metrics()["boost"], boosted.metrics()["decay_boost"]) == (factor, of_decay)
            assert BOOSTED.items() <= boosted.param_groups[0].items()
            assert boosted.param_groups[0]["lr"] == 0.01


@pytest.mark.filterwarnings("ignore:the grokking signal")
@pytest.mark.parametrize("said", [None, math.nan, torch.tensor(math.nan)])
def test_without_a_usable_signal_there_is_no_boost(said: Any) -> None:
    params, twins = parameters(), parameters()
    boosted = GrokAdamW(params, signal_boost=1.0, decay_boost=1.0, grokking_signal_fns=lambda: said)
    plain = GrokAdamW(twins, grokking_signal_fns=[])
    for ps, optimizer in ((params, boosted), (twins, plain)):
        set_gradients(ps)
        optimizer.step()
    assert all(map(torch.equal, params, twins))
    assert boosted.metrics()["boost"] == boosted.metrics()["decay_boost"] == 1


def test_groups_have_boosts_of_their_own() -> None:
    params = parameters()
    groups = [{"params": params[:1], "signal_boost": 1.0}, {"params": params[1:], "decay_boost": 8.0}]
    optimizer = GrokAdamW(groups, **AS_ADAMW, lr=0.1, weight_decay=0.0, grokking_signal_fns=lambda: 1.0)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [float((old - p).mean()) for old, p in zip(before, params, strict=True)]
    assert moved == pytest.approx([0.2, 0.1], rel=1e-5)
    assert (optimizer.metrics()["boost"], optimizer.metrics()["decay_boost"]) == (2, 9)


# spikes, infinities, zeros and derivatives


def test_a_loss_spike_does_not_end_the_run() -> None:
    """Clipping limits one gradient that is ten million times too large, so that the moments soon forget it."""

    def losses(spike: float) -> list[float]:
        model, seen = network(), []
        optimizer = GrokAdamW(model.named_parameters(), lr=0.01)

        def take_step(step: int, loss: torch.Tensor) -> None:
            seen.append(loss.item())
            if step == 50:
                for p in model.parameters():
                    p.grad *= spike
                loss = loss * spike
            optimizer.record(train_loss=loss, eval_loss=1.1 * loss)
            optimizer.step()

        train(model, range(200), take_step)
        return seen

    spiked, smooth = losses(1e7), losses(1.0)
    assert max(spiked[51:60]) < 1.5 * max(smooth[51:60])
    assert sum(spiked[150:]) < 1.1 * sum(smooth[150:])


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("at", range(5))
@pytest.mark.filterwarnings("ignore:a step was skipped")
def test_an_infinite_gradient_at_any_step_has_not_been(at: int, foreach: bool) -> None:
    def run(with_it: bool) -> list[torch.Tensor]:
        model = network()
        optimizer = GrokAdamW(model.named_parameters(), foreach=foreach)

        def take_step(step: int, loss: torch.Tensor) -> None:
            if step == at and with_it:
                kept = [p.grad.clone() for p in model.parameters()]
                for p in model.parameters():
                    p.grad[0] = torch.inf
                optimizer.step()
                for p, grad in zip(model.parameters(), kept, strict=True):
                    p.grad.copy_(grad)
            optimizer.step()

        train(model, range(5), take_step)
        return [*model.parameters(), *(x for state in optimizer.state.values() for x in state.values())]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_zero_gradient_forever_decays_and_stays_finite(dtype: torch.dtype, foreach: bool) -> None:
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    options = {"lr": 0.25, "weight_decay": 0.5, "alpha_init": 0.9}  # the weight and the averages soon underflow
    optimizer = GrokAdamW([p], **options, grokking_signal_fns=SlowGradient(every=1), foreach=foreach)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad.zero_()
    for _ in range(1000):
        optimizer.step()
    assert p.isfinite().all()
    assert all(value.isfinite().all() for value in optimizer.state[p].values())
    assert p.abs().max() < 1e-3

    untouched = nn.Parameter(torch.ones(3, dtype=dtype))
    untouched.grad = torch.zeros_like(untouched)
    optimizer = GrokAdamW([untouched], weight_decay=0.0, foreach=foreach)
    for _ in range(100):
        optimizer.step()
    assert untouched.tolist() == [1, 1, 1]


def test_no_graph_outlives_a_differentiable_step() -> None:
    p = torch.ones(2, dtype=torch.float64)
    optimizer = GrokAdamW([p], differentiable=True)
    p.grad = torch.full_like(p, 0.5, requires_grad=True)
    optimizer.step()
    last = optimizer._run.last
    assert not any(number.requires_grad for number in (last.norm, *last.clips))  # type: ignore[union-attr]
    assert optimizer.metrics()["grad_norm"] == pytest.approx(0.5**0.5)


def test_a_learning_rate_has_a_derivative() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def end(lr: torch.Tensor) -> torch.Tensor:
        p = start.clone()
        optimizer = GrokAdamW([p], lr=lr, differentiable=True, weight_decay=0.5)
        for g in ([0.3, 0.1], [0.2, -0.4]):
            p.grad = torch.tensor(g, dtype=torch.float64)
            optimizer.step()
        return p

    assert torch.autograd.gradcheck(end, lr)


# non-finite gradients


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("clipping", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(foreach: bool, clipping: float, value: float) -> None:
    params = parameters()
    optimizer = GrokAdamW(params, foreach=foreach, gradient_clipping=clipping)
    set_gradients(params)
    params[1].grad[1, 1] = value  # type: ignore[index]
    before = copy.deepcopy([p.detach() for p in params])
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.metrics()["skipped_steps"] == 2
    assert optimizer.metrics()["step"] == 0
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    set_gradients(params)
    optimizer.step()
    assert optimizer.metrics()["step"] == 1


def test_raise_names_the_parameter_and_writes_nothing() -> None:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), nonfinite="raise")
    train(model, range(1), lambda step, loss: optimizer.step())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    model[2].weight.grad[0, 0] = torch.inf
    with pytest.raises(RuntimeError, match=r"not finite: 2\.weight\. Nothing was written"):
        optimizer.step()
    after = model.state_dict(), optimizer.state_dict()["state"]
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert all(torch.equal(before[1][i][key], after[1][i][key]) for i in before[1] for key in before[1][i])


@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_propagate_does_as_adamw(clipping: float) -> None:
    ours, expected = parameters(), parameters()
    for params in (ours, expected):
        set_gradients(params)
        params[0].grad[0, 0] = torch.inf  # type: ignore[index]
    GrokAdamW(ours, nonfinite="propagate", **AS_ADAMW | {"gradient_clipping": clipping}).step()
    if clipping:
        torch.nn.utils.clip_grad_norm_(expected, clipping)
    torch.optim.AdamW(expected).step()
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_a_sum_of_squares_that_overflows_is_skipped() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = GrokAdamW([p])
    p.grad = torch.full_like(p, 1e200)
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))


def test_a_skipped_step_is_counted_even_where_warnings_are_errors() -> None:
    params = parameters()
    optimizer = GrokAdamW(params)
    set_gradients(params, scale=float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="a step was skipped"):
            optimizer.step()
    assert optimizer.metrics()["skipped_steps"] == 1
    optimizer.add_param_group({"params": parameters(1)})
    assert optimizer.param_groups[1]["skipped_steps"] == 1


def test_raise_looks_again_after_signals() -> None:
    """Signals are user code and may change gradients, so the step checks the gradients again after them."""
    params = parameters()

    def signal() -> float:
        params[1].grad[0, 0] = torch.nan  # type: ignore[index]
        return 0.5

    optimizer = GrokAdamW(params, nonfinite="raise", grokking_signal_fns=signal)
    set_gradients(params)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="not finite: parameter 1 of group 0"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


def test_a_step_that_raises_does_not_move_the_signals() -> None:
    params = parameters()
    signal = SlowGradient()
    optimizer = GrokAdamW(params, nonfinite="raise", grokking_signal_fns=signal)
    set_gradients(params, scale=float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    assert signal.state_dict()["calls"] == 0


@pytest.mark.filterwarnings("ignore:a step was skipped")
def test_a_first_step_that_is_skipped_makes_no_state() -> None:
    """A skipped first step creates no state, so λ may be set to 0 before the first step that is taken."""
    params = parameters()
    optimizer = GrokAdamW(params)
    set_gradients(params, scale=float("nan"))
    optimizer.step()
    assert not optimizer.state
    optimizer.param_groups[0]["lamb"] = 0.0
    set_gradients(params)
    optimizer.step()
    assert all("grok_ema" not in optimizer.state[p] for p in params)
