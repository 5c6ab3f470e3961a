"""Tests of the signals, which drive α."""

from __future__ import annotations

import copy
import functools
import gc
import math
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import AdamW

from grokadamw import Accumulate, GrokAdamW, Grokfast
from grokadamw._numbers import as_number
from grokadamw.signals import AccuracyGap, Plateau, SlowGradient, loss_gap, memorisation
from grokadamw.step.alpha import Signals, filter_memory

from .models import network, parameters, set_gradients, train

losses = st.floats(0, 1e6)


def optimizer_with(fns: Any, **options: Any) -> GrokAdamW:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.full_like(p, 0.1)
    return GrokAdamW([p], grokking_signal_fns=fns, **options)


def alpha_after(optimizer: GrokAdamW) -> float:
    optimizer.step()
    return optimizer.metrics()["alpha"]


# signal and alpha


def test_the_default_is_the_gap_of_the_recorded_losses() -> None:
    optimizer = optimizer_with(None)
    assert alpha_after(optimizer) == 0.98
    assert math.isnan(optimizer.metrics()["signal"])
    optimizer.record(train_loss=0.5)
    assert alpha_after(optimizer) == 0.98
    optimizer.record(eval_loss=torch.tensor(2.0, requires_grad=True))
    assert alpha_after(optimizer) == pytest.approx(0.98 * math.exp(-0.1 * 0.75))
    assert optimizer.metrics()["signal/loss_gap"] == 0.75
    optimizer.record(train_loss=3.0)
    assert alpha_after(optimizer) == 0.98


def test_no_signals_is_not_the_default() -> None:
    optimizer = optimizer_with([])
    optimizer.record(train_loss=0.1, eval_loss=1.0)
    assert alpha_after(optimizer) == 0.98


@pytest.mark.filterwarnings("ignore:the grokking signal")
@pytest.mark.parametrize(
    "value",
    [-1.0, -1e30, 0, 1, 1e30, math.nan, math.inf, -math.inf, None, True, torch.tensor(0.5), torch.tensor([[0.5]]),
     torch.tensor(math.nan), torch.tensor([1.0, 2.0]), torch.tensor(2, dtype=torch.int32), "0.5", 1j],
    ids=str,
)  # fmt: skip
def test_whatever_a_signal_says_alpha_stays_in_range(value: Any) -> None:
    optimizer = optimizer_with(lambda: value)
    (p,) = optimizer.param_groups[0]["params"]
    for _ in range(3):
        before = p.detach().clone()
        assert 0 <= alpha_after(optimizer) <= 0.98
        assert not torch.equal(p, before)
        assert p.isfinite().all()


@pytest.mark.parametrize("what", ["raises", "returns None", "returns nan", "returns inf"])
def test_a_useless_signal_is_left_out_named_once_and_counted(what: str) -> None:
    def broken() -> Any:
        if what == "raises":
            raise ZeroDivisionError("nothing recorded")
        return {"returns None": None, "returns nan": math.nan, "returns inf": math.inf}[what]

    optimizer = optimizer_with([broken, lambda: 0.5])
    said = "raised ZeroDivisionError" if what == "raises" else what.replace("returns", "returned")
    with pytest.warns(RuntimeWarning, match=f"the grokking signal broken {said}"):
        assert alpha_after(optimizer) == pytest.approx(0.98 * math.exp(-0.05))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert alpha_after(optimizer) == pytest.approx(0.98 * math.exp(-0.05))
    metrics = optimizer.metrics()
    assert (metrics["signal"], metrics["signal_failures"]) == (0.5, 3)
    assert math.isnan(metrics["signal/broken"])


def test_what_raises_is_not_hidden_when_it_stops_the_program() -> None:
    def interrupted() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer_with(interrupted).step()


@pytest.mark.parametrize(("combine", "expected"), [("mean", 0.5), ("max", 0.9), ("min", 0.1), (sum, 1.5)])
def test_signals_combine(combine: Any, expected: float) -> None:
    optimizer = optimizer_with([lambda: 0.1, lambda: 0.9, lambda: torch.tensor(0.5)], combine=combine)
    optimizer.step()
    assert optimizer.metrics()["signal"] == pytest.approx(expected)


@pytest.mark.parametrize("combine", [lambda values: math.nan, lambda values: math.inf, lambda values: 1 / 0])
def test_a_combination_that_is_none_is_no_signal(combine: Any) -> None:
    optimizer = optimizer_with(lambda: 0.5, combine=combine)
    with pytest.warns(RuntimeWarning, match="`combine`"):
        assert alpha_after(optimizer) == 0.98
    assert optimizer.metrics()["signal_failures"] == 1


def test_a_combination_that_is_none_at_all_is_named() -> None:
    optimizer = optimizer_with(lambda: 0.5, combine=lambda values: None)
    with pytest.warns(RuntimeWarning, match="`combine` returned None"):
        assert alpha_after(optimizer) == 0.98


@pytest.mark.parametrize("compat", [None, "0.1.2"])
def test_a_signal_may_add_a_group(compat: str | None) -> None:
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))

    def signal() -> float:
        if len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": [q]})
        return 0.5

    optimizer = GrokAdamW([p], grokking_signal_fns=signal, compat=compat)
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert not torch.equal(q, torch.ones(2))
    assert optimizer.metrics()["alpha"] == pytest.approx(0.98 * math.exp(-0.1 * 0.5))


def test_signals_are_evaluated_once_a_step_whatever_the_groups() -> None:
    calls = []
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = GrokAdamW([{"params": [p]} for p in params], grokking_signal_fns=lambda: calls.append(1) or 0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(calls) == 1
    assert [group["train_loss"] for group in optimizer.param_groups] == [None] * 3
    optimizer.record(train_loss=0.25)
    assert [group["train_loss"] for group in optimizer.param_groups] == [0.25] * 3


@given(st.floats(0, 1), st.floats(0, 100), st.floats(allow_nan=False))
def test_alpha_is_never_out_of_range(alpha_init: float, decay_rate: float, signal: float) -> None:
    for value in (signal, torch.tensor(signal, dtype=torch.float64)):
        assert 0 <= float(filter_memory(alpha_init, decay_rate, value)) <= alpha_init


# registration


def test_without_a_limit_a_very_negative_signal_makes_alpha_very_large() -> None:
    """Release 0.1.2 had no limit to α. A number must not raise an error where a tensor is infinite."""
    for signal in (-1e5, torch.tensor(-1e5)):
        assert float(filter_memory(0.98, 0.1, signal, clamp=False)) > 1e300
    assert filter_memory(0.0, 0.1, -1e5, clamp=False) == 0


def two(train_loss: float, eval_loss: float) -> float:
    return eval_loss - train_loss


@functools.wraps(two)
def decorated(*arguments: float) -> float:
    return two(*arguments)


class InModule(nn.Module):
    def forward(self, train_loss: float, eval_loss: float) -> float:
        return eval_loss - train_loss


class Owner:
    def none(self) -> float:
        return 0.5

    def both(self, train_loss: float, eval_loss: float) -> float:
        return eval_loss - train_loss

    def __call__(self, train: float, evaluation: float, scale: float = 1.0) -> float:
        return scale * (evaluation - train)


@pytest.mark.parametrize(
    ("function", "takes_losses"),
    [
        (lambda: 0.5, ""),
        (lambda *args: 0.5, ""),
        (lambda x=1, y=2: 0.5, ""),
        (lambda train, evaluation: 0.5, "in order"),
        (lambda train_loss, evaluation: 0.5, "in order"),
        (two, "in order"),
        (decorated, "in order"),
        (InModule(), "in order"),
        (lambda eval_loss, train_loss: 0.5, "by name"),
        (lambda train_loss=0.0, eval_loss=0.0, scale=1.0: 0.5, "in order"),
        (lambda *, train_loss, eval_loss: 0.5, "by name"),
        (lambda **losses: 0.5, "by name"),
        (lambda scale=1.0, **losses: 0.5, "by name"),
        (lambda train_loss, **others: 0.5, "by name"),
        (functools.partial(lambda **options: 0.5, scale=1.0), "by name"),
        (functools.partial(lambda **losses: 0.5, train_loss=0.5), ""),
        (lambda *args, **kwargs: 0.5, ""),
        (lambda train, evaluation, **others: 0.5, "in order"),
        (Owner().none, ""),
        (Owner().both, "in order"),
        (Owner(), "in order"),
        (functools.partial(two, eval_loss=1.0, train_loss=0.5), ""),
        (max, ""),  # without a signature
    ],
)
def test_kinds_are_told_apart_at_registration(function: Any, takes_losses: str) -> None:
    assert Signals(function).takes_losses == [takes_losses]


@pytest.mark.parametrize(
    "function",
    [
        lambda train, evaluation: evaluation - train,
        lambda eval_loss, train_loss: eval_loss - train_loss,
        lambda *, train_loss, eval_loss: eval_loss - train_loss,
        lambda eval_loss=9.0, train_loss=9.0: eval_loss - train_loss,
        lambda train_loss, eval_loss, /: eval_loss - train_loss,
        lambda **losses: losses["eval_loss"] - losses["train_loss"],
        lambda eval_loss, **others: eval_loss - others["train_loss"],
        decorated,
        InModule(),
    ],
)
def test_losses_arrive_where_they_belong(function: Any) -> None:
    assert Signals(function).evaluate(0.5, 2.0) == 1.5


def test_a_signal_of_losses_waits_for_both() -> None:
    calls = []
    optimizer = optimizer_with(lambda train_loss, eval_loss: calls.append((train_loss, eval_loss)) or 0.5)
    optimizer.step()
    optimizer.record(eval_loss=2)
    optimizer.step()
    assert not calls
    assert optimizer.metrics()["signal_failures"] == 0
    optimizer.record(train_loss=1)
    optimizer.step()
    assert calls == [(1.0, 2.0)]


@pytest.mark.parametrize(
    "function",
    [
        lambda eval_loss, train: 0.5,
        lambda eval_loss, train_loss, /: 0.5,
        lambda evaluation, train_loss: 0.5,
        lambda val, train: 0.5,
        lambda val_loss, other: 0.5,
        lambda other, training_loss: 0.5,
    ],
)
def test_losses_that_would_arrive_in_the_wrong_place_are_refused(function: Any) -> None:
    with pytest.raises(TypeError, match="requires"):
        Signals(function)


@pytest.mark.parametrize(
    "function", [lambda train_acc, eval_acc: 0.5, lambda val_accuracy, train: 0.5, lambda *, train_acc, eval_acc: 0.5]
)
def test_a_signal_of_accuracies_would_get_losses_and_is_refused(function: Any) -> None:
    with pytest.raises(
        TypeError, match=r"accuracies are not passed to signals; give grokadamw.signals.AccuracyGap\(\)"
    ):
        Signals(function)


def test_functions_of_the_same_name_are_numbered_apart() -> None:
    def gap() -> float:
        return 0.5

    def gap_1() -> float:
        return 0.5

    assert Signals([gap, gap_1, gap]).names == ["gap_2", "gap_1", "gap_3"]


def test_a_signal_whose_readiness_raises_is_left_out() -> None:
    class Broken:
        @property
        def ready(self) -> bool:
            raise ZeroDivisionError

        def __call__(self) -> float:
            return 0.5

    with pytest.warns(RuntimeWarning, match="Broken raised ZeroDivisionError"):
        assert alpha_after(optimizer_with(Broken())) == 0.98


@pytest.mark.parametrize("state", [{"t": torch.zeros(2)}, {(1, 2): 3}, {"a": [{1: 2}]}, {"f": loss_gap}])
def test_a_state_that_is_not_plain_is_refused_by_the_signals_name(state: dict[Any, Any]) -> None:
    class Keeper:
        def state_dict(self) -> dict[Any, Any]:
            return state

        def __call__(self) -> float:
            return 0.5

    with pytest.raises(TypeError, match=r"state_dict\(\) of the grokking signal Keeper is not plain data"):
        optimizer_with(Keeper()).state_dict()


def test_a_module_may_be_a_signal_and_keeps_its_weights_to_itself() -> None:
    class Scaled(InModule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

    optimizer = optimizer_with(Scaled())
    optimizer.record(train_loss=1.0, eval_loss=1.5)
    optimizer.step()
    assert optimizer.metrics()["signal"] == 0.5
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["param_groups"][0]["signal_state"] is None


def test_a_class_is_not_a_signal() -> None:
    with pytest.raises(TypeError, match=r"the class AccuracyGap: .*AccuracyGap\(\)"):
        optimizer_with(AccuracyGap)


def test_signals_set_in_a_group_by_hand_are_refused() -> None:
    optimizer = optimizer_with(None)
    optimizer.param_groups[0]["grokking_signal_fns"] = [lambda: 0.5]
    with pytest.raises(ValueError, match="set_signals"):
        optimizer.step()


def test_bind_is_called_at_registration() -> None:
    class Bound:
        def bind(self, optimizer: GrokAdamW) -> None:
            self.groups = len(optimizer.param_groups)

        def __call__(self) -> float:
            return float(self.groups)

    optimizer = optimizer_with(Bound())
    optimizer.step()
    assert optimizer.metrics()["signal"] == 1
    optimizer.set_signals([Bound(), Bound()], combine="max")
    optimizer.step()
    assert {"signal/Bound_1", "signal/Bound_2"} <= set(optimizer.metrics())


@pytest.mark.parametrize(
    "make",
    [
        *(
            lambda params, kind=kind: GrokAdamW(params, grokking_signal_fns=kind())
            for kind in (AccuracyGap, SlowGradient)
        ),
        lambda params: copy.deepcopy(GrokAdamW(params, grokking_signal_fns=AccuracyGap())),
        *(
            lambda params, kind=kind: Grokfast(AdamW(params), amplify_when=kind())
            for kind in (AccuracyGap, SlowGradient)
        ),
        lambda params: Accumulate(GrokAdamW(params), 1),
    ],
)
def test_an_optimizer_is_freed_without_the_garbage_collector(make: Any) -> None:
    """Otherwise the states of several optimizers are in memory at once, as in a search for hyperparameters."""
    optimizer = make(parameters(2))
    set_gradients([p for group in optimizer.param_groups for p in group["params"]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # signals without a value
        optimizer.step()
    state = weakref.ref(next(iter(optimizer.state.values()))["exp_avg"])
    gc.disable()
    try:
        del optimizer
        assert state() is None
    finally:
        gc.enable()


def test_set_signals_keeps_the_combination_and_refuses_the_bad() -> None:
    optimizer = optimizer_with([lambda: 1.0], combine="max")
    optimizer.set_signals([lambda: 0.25, lambda: 0.75])
    optimizer.step()
    assert optimizer.metrics()["signal"] == 0.75
    with pytest.raises(TypeError, match="requires"):
        optimizer.set_signals(lambda a, b, c: 0.0)
    optimizer.step()
    assert optimizer.metrics()["signal"] == 0.75


# ready-made signals


@given(losses, losses)
def test_loss_gap(train_loss: float, eval_loss: float) -> None:
    larger = max(train_loss, eval_loss)
    expected = max(0.0, eval_loss - train_loss) / larger if larger > 0 else 0.0
    assert loss_gap(train_loss, eval_loss) == expected
    assert 0 <= expected <= 1
    tensors = (torch.tensor(loss, dtype=torch.float64) for loss in (train_loss, eval_loss))
    torch.testing.assert_close(float(loss_gap(*tensors)), expected)


@given(losses, losses)
def test_memorisation(train_loss: float, eval_loss: float) -> None:
    gap = max(0.0, eval_loss - train_loss)
    expected = (gap / eval_loss * min(1.0, gap)) ** 2 if gap > 0 else 0.0
    assert memorisation(train_loss, eval_loss) == pytest.approx(expected)
    tensors = (torch.tensor(loss, dtype=torch.float64) for loss in (train_loss, eval_loss))
    assert float(memorisation(*tensors)) == pytest.approx(expected)


def test_memorisation_is_large_only_where_the_training_data_alone_is_known() -> None:
    assert memorisation(4.6, 4.8) < 0.01  # at the start
    assert memorisation(0.01, 5.0) > 0.99  # memorised
    assert memorisation(0.001, 0.1) < 0.01  # generalised


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("train_loss", [math.nan, math.inf, 0.1])
@pytest.mark.parametrize("eval_loss", [math.nan, math.inf])
def test_memorisation_of_a_loss_that_is_not_finite_is_nan(train_loss: float, eval_loss: float, kind: Any) -> None:
    assert math.isnan(memorisation(kind(train_loss), kind(eval_loss)))
    assert math.isnan(memorisation(kind(eval_loss), kind(train_loss)))


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize(
    ("train_loss", "eval_loss"), [(math.nan, 0.3), (0.1, math.nan), (math.inf, 0.3), (0.1, math.inf)]
)
def test_a_loss_that_is_not_finite_is_no_signal(train_loss: float, eval_loss: float, kind: Any) -> None:
    """A non-finite loss gives NaN rather than a gap of 0, because a run that diverges does not generalise."""
    assert math.isnan(loss_gap(kind(train_loss), kind(eval_loss)))
    optimizer = optimizer_with(None)
    optimizer.record(train_loss=train_loss, eval_loss=eval_loss)
    with pytest.warns(RuntimeWarning, match="loss_gap returned nan"):
        assert alpha_after(optimizer) == 0.98


def test_loss_gap_of_negative_losses_is_0_as_in_the_published_release() -> None:
    assert loss_gap(-2.0, -1.0) == 0
    assert loss_gap(torch.tensor(-2.0), torch.tensor(-1.0)) == 0


def test_accuracy_gap() -> None:
    gap = AccuracyGap()
    signals = Signals([gap, lambda: 1.0])
    assert signals.evaluate(None, None) == 1  # the gap does not count until both are recorded
    gap.record(train=torch.tensor(0.75))
    assert signals.evaluate(None, None) == 1
    assert signals.failures == 0
    gap.record(eval=0.25)
    assert signals.evaluate(None, None) == 0.75
    gap.record(train=0.125)
    assert gap() == 0
    with pytest.raises(TypeError, match="eval="):
        gap.record(train=1.0, eval="high")
    with pytest.raises(ValueError, match="train=99"):
        gap.record(train=99, eval=31)
    assert gap() == 0


def test_accuracy_gap_hears_what_the_optimizer_records() -> None:
    gap = AccuracyGap()
    optimizer = optimizer_with(gap)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    optimizer.record(train_acc=1.0)
    assert alpha_after(optimizer) == 0.98  # the gap waits for both
    assert optimizer.metrics()["signal_failures"] == 0
    optimizer.record(eval_acc=0.25)
    assert alpha_after(optimizer) == pytest.approx(0.98 * math.exp(-0.1 * 0.75))
    assert optimizer.metrics()["signal/AccuracyGap"] == 0.75
    optimizer.record(train_acc=0.125)
    assert alpha_after(optimizer) == 0.98
    optimizer.set_signals(AccuracyGap())  # a new one reads what was recorded before
    optimizer.record(train_acc=0.75)
    assert alpha_after(optimizer) == pytest.approx(0.98 * math.exp(-0.1 * 0.5))


def test_what_an_accuracy_gap_was_given_itself_counts_first() -> None:
    gap = AccuracyGap()
    optimizer = optimizer_with(gap)
    optimizer.record(train_acc=1.0, eval_acc=0.25)
    gap.record(eval=0.5)
    assert gap() == 0.5
    gap.record(train=0.75)
    assert gap() == 0.25
    optimizer.record(train_acc=0.5, eval_acc=0.5)
    assert gap() == 0.25
    assert gap.state_dict() == {"train": 0.75, "eval": 0.5}


@given(st.floats(0, 1), st.floats(0, 1), st.none() | st.floats(0, 1), st.none() | st.floats(0, 1))
def test_the_gap_of_accuracies(train: float, evaluation: float, own_train: Any, own_eval: Any) -> None:
    gap = AccuracyGap()
    optimizer = optimizer_with(gap)
    optimizer.record(train_acc=train, eval_acc=evaluation)
    gap.record(train=own_train, eval=own_eval)
    expected = (train if own_train is None else own_train) - (evaluation if own_eval is None else own_eval)
    assert gap() == max(expected, 0)
    assert Signals(gap).evaluate(None, None) == max(expected, 0)


@pytest.mark.usefixtures("nothing_is_free_to_read")
def test_an_accuracy_that_is_on_a_device_is_not_read() -> None:
    gap = AccuracyGap()
    optimizer = GrokAdamW([nn.Parameter(torch.empty(2, device="meta"))], grokking_signal_fns=gap)
    optimizer.record(train_acc=torch.empty((), device="meta"), eval_acc=torch.empty(1, device="meta"))  # no values
    assert gap.ready
    assert gap().device.type == "meta"
    here = optimizer_with(gap)
    here.record(train_acc=torch.tensor(0.75), eval_acc=torch.tensor(0.25, requires_grad=True))
    assert isinstance(gap(), torch.Tensor)
    assert float(gap()) == 0.5
    here.record(train_acc=0.125)
    assert float(gap()) == 0


@given(losses | losses.map(lambda loss: -loss), losses | losses.map(lambda loss: -loss), st.floats(1e-3, 1e3))
def test_plateau(train_loss: float, eval_loss: float, threshold: float) -> None:
    """Losses of densities may be negative."""
    signal = Plateau(threshold)(train_loss, eval_loss)
    assert 0 <= signal <= 1
    if train_loss >= threshold or eval_loss <= 0:
        assert signal == 0
    assert Plateau(threshold)(min(train_loss, 0.0), eval_loss) == pytest.approx(min(1.0, max(eval_loss, 0) / threshold))
    tensors = (torch.tensor(loss, dtype=torch.float64) for loss in (train_loss, eval_loss))
    torch.testing.assert_close(float(Plateau(threshold)(*tensors)), float(signal))


@pytest.mark.parametrize("maximize", [False, True])
def test_slow_gradient_is_the_cosine_of_mu_and_g(maximize: bool) -> None:
    signal = SlowGradient(every=2)
    model = network(torch.float64)
    optimizer = GrokAdamW(model.named_parameters(), grokking_signal_fns=signal, maximize=maximize)
    said = []

    def take_step(step: int, loss: torch.Tensor) -> None:
        mu = [optimizer.state[p]["grok_ema"].flatten() for p in model.parameters() if p in optimizer.state]
        g = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
        expected = torch.cosine_similarity(torch.cat(mu), -g if maximize else g, dim=0).item() if mu else 0.0
        optimizer.step()
        said.append((optimizer.metrics()["signal"], max(0.0, expected)))

    train(model, range(5), take_step)
    assert [ours for ours, _ in said[::2]] == pytest.approx([wanted for _, wanted in said[::2]], abs=1e-12)
    assert said[3][0] == said[2][0]  # not evaluated in between
    assert 0 < said[2][0] <= 1


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_slow_gradient_reads_state_in_fewer_bits(state_dtype: str) -> None:
    said = []
    for dtype in ("float32", state_dtype):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(80, 70))
        optimizer = GrokAdamW([p], state_dtype=dtype, grokking_signal_fns=SlowGradient(every=1))
        for _ in range(3):
            p.grad = torch.randn(80, 70) + 0.5
            optimizer.step()
        assert optimizer.metrics()["signal_failures"] == 0
        said.append(optimizer.metrics()["signal"])
    assert said[1] == pytest.approx(said[0], rel=0.02)
    assert said[0] > 0


@pytest.mark.parametrize(
    ("signal", "says"),
    [(SlowGradient(), "has no optimizer"), (AccuracyGap(), "has no accuracies")],
)
def test_a_signal_inside_a_function_says_what_it_lacks(signal: Any, says: str) -> None:
    optimizer = optimizer_with(lambda: 1 - signal())
    with pytest.warns(RuntimeWarning, match=says):
        optimizer.step()
    assert math.isnan(optimizer.metrics()["signal"])
    signal.bind(optimizer)
    optimizer.record(train_acc=0.75, eval_acc=0.5)
    optimizer.step()
    assert 0 <= optimizer.metrics()["signal"] <= 1


def test_slow_gradient_sees_the_smallest_numbers() -> None:
    optimizer = optimizer_with(SlowGradient(every=1))
    (p,) = optimizer.param_groups[0]["params"]
    p.grad.fill_(1e-24)
    optimizer.step()
    optimizer.step()
    assert optimizer.metrics()["signal"] == pytest.approx(1, abs=1e-6)


@pytest.mark.filterwarnings("ignore:a step was skipped")
def test_slow_gradient_is_0_where_there_is_none() -> None:
    optimizer = optimizer_with(SlowGradient(every=1))
    (p,) = optimizer.param_groups[0]["params"]
    for grad in (0.1, 0.0, math.nan):
        p.grad.fill_(grad)
        optimizer.step()
        assert optimizer.metrics()["signal"] == 0
    assert optimizer.metrics()["signal_failures"] == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlowGradient(0), "every=0 is out of range"),
        (lambda: SlowGradient(1.5), r"every=1\.5 is not an integer"),  # type: ignore[arg-type]
        (lambda: SlowGradient(np.int64(0)), "every=np.int64.0."),
        (lambda: Plateau(0), "threshold=0"),
        (lambda: Plateau(np.float32("nan")), "threshold=np.float32.nan."),
        (lambda: Plateau("0.1"), "threshold='0.1' is not a number"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_of_ready_made_signals(make: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_ready_made_signals_take_numpys_numbers() -> None:
    threshold, every = Plateau(np.float32(0.5)).threshold, SlowGradient(np.int64(3)).every
    assert [(threshold, type(threshold)), (every, type(every))] == [(0.5, float), (3, int)]


# on a device


@pytest.mark.usefixtures("nothing_is_free_to_read")
@pytest.mark.parametrize("combine", ["mean", "max", "min", sum])
def test_tensors_stay_and_mean_the_same(combine: Any) -> None:
    values = [torch.tensor(0.25), 0.75, torch.tensor(math.nan)]
    signals = Signals([lambda v=v: v for v in values], combine)
    result = signals.evaluate(None, None)
    assert isinstance(result, float) if callable(combine) else isinstance(result, torch.Tensor)
    assert float(result) == {"mean": 0.5, "max": 0.75, "min": 0.25}.get(combine, 1.0)
    assert signals.failures == 0
    with pytest.warns(RuntimeWarning, match="returned NaN or infinity"):
        signals.settle()
    assert signals.failures == 1


@pytest.mark.usefixtures("nothing_is_free_to_read")
@pytest.mark.parametrize("combine", ["mean", "max", "min"])
def test_no_usable_tensor_is_no_signal(combine: str) -> None:
    result = Signals([lambda: torch.tensor(math.inf), lambda: torch.tensor(math.nan)], combine).evaluate(None, None)
    assert float(filter_memory(0.98, 0.1, result)) == 0.98


@pytest.mark.usefixtures("nothing_is_free_to_read")
def test_failures_on_a_device_are_counted_when_they_are_read() -> None:
    params = parameters()
    optimizer = GrokAdamW(params, grokking_signal_fns=lambda: torch.tensor(math.nan))
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    with pytest.warns(RuntimeWarning, match="grokking signal <lambda> returned NaN or infinity"):
        assert optimizer.metrics()["signal_failures"] == 3
    assert optimizer.metrics()["signal_failures"] == 3


@pytest.mark.usefixtures("nothing_is_free_to_read")
def test_a_recorded_tensor_is_a_copy() -> None:
    loss = torch.tensor(0.5, requires_grad=True)
    optimizer = optimizer_with(None)
    optimizer.record(train_loss=loss, eval_loss=1.0)
    loss.detach().fill_(7.0)
    assert not optimizer.param_groups[0]["train_loss"].requires_grad
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.metrics()["signal"] == 0.5
    assert isinstance(as_number(loss), torch.Tensor)


@pytest.mark.usefixtures("nothing_is_free_to_read")
@pytest.mark.parametrize(("compat", "alpha"), [(None, 0.98), ("0.1.2", 0.98 * math.exp(0.1))])
def test_a_negative_signal_on_a_device_acts_as_one_that_the_host_reads(compat: str | None, alpha: float) -> None:
    optimizer = GrokAdamW([nn.Parameter(torch.ones(3))], compat=compat, grokking_signal_fns=lambda: torch.tensor(-1.0))
    optimizer.update_signals()
    assert optimizer.metrics()["alpha"] == pytest.approx(alpha, rel=1e-6)


@pytest.mark.usefixtures("nothing_is_free_to_read")
def test_groups_share_what_a_device_computes() -> None:
    params = [*parameters(), *parameters()]
    options: list[dict[str, Any]] = [{}, {"lr": 0.1}, {"signal_boost": 2.0}, {"alpha_init": 0.5}]
    groups = [{"params": [param], **own} for param, own in zip(params, options, strict=True)]
    optimizer = GrokAdamW(groups, grokking_signal_fns=lambda: torch.tensor(0.5))
    set_gradients(params, 0)
    optimizer.step()
    alike, other_lr, boosted, forgetful = optimizer._run.last.effects  # each has an α and a boost
    assert alike is other_lr
    assert float(alike.alpha) == float(boosted.alpha) == pytest.approx(0.98 * math.exp(-0.05))
    assert (float(boosted.boost), float(forgetful.alpha)) == (2.0, pytest.approx(0.5 * math.exp(-0.05)))


def test_a_copy_counts_its_own_losses() -> None:
    optimizer = GrokAdamW([nn.Parameter(torch.ones(4))], signal_boost=2.0)
    optimizer.record(train_loss=1.0, eval_loss=1.0)
    copied = copy.deepcopy(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(60):
            optimizer.record(train_loss=0.9)
            copied.record(train_loss=0.9)


@pytest.mark.parametrize("compat", [None, "0.1.2"])
def test_a_group_that_is_added_knows_what_was_recorded(compat: str | None) -> None:
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    optimizer = GrokAdamW([p], compat=compat)
    optimizer.record(train_loss=0.1, eval_loss=2.0, train_acc=0.9)
    optimizer.add_param_group({"params": [q]})
    assert [group["eval_loss"] for group in optimizer.param_groups] == [2.0, 2.0]
    assert optimizer.param_groups[1]["train_acc"] == 0.9
    p.grad, q.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    alphas = {effect.alpha for effect in optimizer._run.last.effects}
    assert len(alphas) == 1
    assert alphas.pop() < 0.98


def test_every_signal_has_a_key_in_the_metrics_from_the_start() -> None:
    def gap(scale: float, train_loss: float, eval_loss: float) -> float:
        return scale * (eval_loss - train_loss)

    optimizer = GrokAdamW([nn.Parameter(torch.ones(1))], grokking_signal_fns=[functools.partial(gap, 2.0), loss_gap])
    before = optimizer.metrics()
    assert math.isnan(before["signal/gap"])
    optimizer.record(train_loss=1.0, eval_loss=1.5)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    optimizer.step()
    assert optimizer.metrics().keys() == before.keys()
    assert optimizer.metrics()["signal/gap"] == 1.0


def test_keys_inside_of_tuples_are_strings_too() -> None:
    class Keeps:
        def __call__(self) -> float:
            return 0.5

        def state_dict(self) -> Any:
            return {"seen": ({1: 2},)}

        def load_state_dict(self, state: Any) -> None:
            pass

    optimizer = GrokAdamW([nn.Parameter(torch.ones(2))], grokking_signal_fns=Keeps())
    with pytest.raises(TypeError, match="Keeps is not plain data .1 is a key"):
        optimizer.state_dict()


def test_the_metrics_have_the_largest_boosts_of_all_groups() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    boosted = {"params": params[1:], "signal_boost": 2.0, "decay_boost": 1.0}
    optimizer = GrokAdamW([{"params": params[:1]}, boosted], grokking_signal_fns=lambda: 0.5)
    for p in params:
        p.grad = torch.ones(2)
    optimizer.step()
    assert (optimizer.metrics()["boost"], optimizer.metrics()["decay_boost"]) == (2, 1.5)
