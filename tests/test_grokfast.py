"""Tests of Grokfast's filters around other optimizers."""

from __future__ import annotations

import copy
import importlib.util
import math
import pickle
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from grokadamw import Accumulate, GrokAdamW, Grokfast, GrokfastMA
from grokadamw.grokfast import gradfilter_ema, gradfilter_ma
from grokadamw.signals import AccuracyGap, SlowGradient

from .models import KEEPERS, network, same, saved_and_loaded, train


class AtLeast:
    """A signal that cannot be made without arguments."""

    def __init__(self, least: float) -> None:
        self.least = least

    def __call__(self) -> float:
        return self.least


INNER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.1),
    "SGD, momentum": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "Adam": lambda params: Adam(params, lr=0.01, weight_decay=0.01),
    "AdamW, fused": lambda params: AdamW(params, lr=0.01, fused=True),
    "AdamW, capturable": lambda params: AdamW(params, lr=torch.tensor(0.01)),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=0.01),
    "GrokAdamW": lambda params: GrokAdamW(params, lr=0.01, lamb=0.0, gamma=0.0),
}
WRAPPERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "EMA": (lambda inner, **o: Grokfast(inner, alpha=0.9, lamb=3.0, **o), lambda *a: gradfilter_ema(*a, 0.9, 3.0)),
    "MA": (lambda inner, **o: GrokfastMA(inner, 5, 3.0, **o), lambda *a: gradfilter_ma(*a, 5, 3.0)),
    "MA, sum": (
        lambda inner, **o: GrokfastMA(inner, 5, 0.1, "sum", False, **o),
        lambda *a: gradfilter_ma(*a, 5, 0.1, "sum", False),
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("inner", INNER)
def test_the_same_as_the_function_and_then_the_optimizer(inner: str, wrapper: str) -> None:
    wrapped, function = WRAPPERS[wrapper]
    ours, expected = network(torch.float64), network(torch.float64)
    optimizer, plain, memory = wrapped(INNER[inner](ours.parameters())), INNER[inner](expected.parameters()), None

    def filtered(step: int, loss: Tensor) -> None:
        nonlocal memory
        memory = function(expected, memory)
        plain.step()

    def untouched(step: int, loss: Tensor) -> None:
        before = [p.grad for p in ours.parameters()]
        copies = [g.clone() for g in before]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(ours.parameters(), before, strict=True))
        assert all(torch.equal(g, c) for g, c in zip(before, copies, strict=True))

    train(ours, range(25), untouched)
    train(expected, range(25), filtered)
    for a, b in zip(ours.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def other_peoples() -> Iterator[Any]:
    folder = Path(sys.prefix) / "peers"
    for package, module, name in (
        ("pytorch-optimizer", "pytorch_optimizer", "Lion"),
        ("bitsandbytes", "bitsandbytes.optim", "AdamW8bit"),
    ):
        missing = not (folder / package).exists()
        yield pytest.param(package, module, name, marks=pytest.mark.skipif(missing, reason="make peers installs it"))


@pytest.mark.parametrize(("package", "module", "name"), list(other_peoples()))
def test_around_other_peoples_optimizers(package: str, module: str, name: str) -> None:
    """A resumed run equals the uninterrupted run also around optimizers of other packages."""
    folder = str(Path(sys.prefix) / "peers" / package)
    if folder not in sys.path:
        sys.path.append(folder)

    def make(model: nn.Module) -> Any:
        return Grokfast(getattr(importlib.import_module(module), name)(model.parameters(), lr=0.01))

    resumed_is_uninterrupted(make, torch.float32, copies=False)  # not all of them can be copied


def resumed_is_uninterrupted(
    make: Callable[[nn.Module], Any], dtype: torch.dtype = torch.float64, copies: bool = True
) -> None:
    """Check runs that go on from a checkpoint, and from a deepcopy and a pickle of the optimizer."""
    model = network(dtype)
    optimizer = make(model)
    train(model, range(8), lambda step, loss: optimizer.step())
    state, saved = copy.deepcopy(model.state_dict()), saved_and_loaded(optimizer.state_dict())
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))] if copies else []
    train(model, range(8, 20), lambda step, loss: optimizer.step())
    resumed = network(dtype, seed=1)
    again = make(resumed)
    again.load_state_dict(saved)
    resumed.load_state_dict(state)
    train(resumed, range(8, 20), lambda step, loss: again.step())
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for other in others:  # a copy has parameters of its own
        params = [p for group in other.param_groups for p in group["params"]]
        twin = network(dtype)
        with torch.no_grad():
            for p, q in zip(twin.parameters(), params, strict=True):
                p.copy_(q)

        def step_twin(
            step: int, loss: Tensor, twin: nn.Module = twin, params: Any = params, other: Any = other
        ) -> None:
            for p, q in zip(twin.parameters(), params, strict=True):
                q.grad = p.grad
            other.step()
            with torch.no_grad():
                for p, q in zip(twin.parameters(), params, strict=True):
                    p.copy_(q)

        train(twin, range(8, 20), step_twin)
        for a, b in zip(model.parameters(), params, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("inner", INNER)
def test_resumed_is_uninterrupted(inner: str, wrapper: str, dtype: torch.dtype) -> None:
    resumed_is_uninterrupted(lambda model: WRAPPERS[wrapper][0](INNER[inner](model.parameters())), dtype)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_around_muon(wrapper: str) -> None:
    """Muon takes only matrices, and keeps its momentum under a name of its own."""
    ours, expected = (
        nn.ParameterList([nn.Parameter(torch.eye(3)[:2]), nn.Parameter(torch.ones(4, 4))]) for _ in range(2)
    )
    wrapped, function = WRAPPERS[wrapper]
    optimizer, plain, memory = wrapped(torch.optim.Muon(ours)), torch.optim.Muon(expected), None
    for i in range(12):
        for p, q in zip(ours, expected, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            q.grad = p.grad.clone()
        optimizer.step()
        memory = function(expected, memory)
        plain.step()
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)  # Muon computes in bfloat16
        assert "momentum_buffer" in optimizer.state[p]


def test_what_goes_around_what() -> None:
    params = [nn.Parameter(torch.ones(2))]
    for make in (
        lambda: Grokfast(GrokfastMA(SGD(params))),
        lambda: Grokfast(Accumulate(SGD(params), 2)),  # it would filter micro-batches
        lambda: Accumulate(Accumulate(SGD(params), 2), 2),
    ):
        with pytest.raises(ValueError, match="use at most one filter, and put Accumulate outermost"):
            make()
    for wrapper in (Grokfast, GrokfastMA):
        with pytest.warns(UserWarning, match=f"{wrapper.__name__} around a GrokAdamW with lamb=2.0 filters twice"):
            wrapper(GrokAdamW(params, gamma=0.0))
        wrapper(GrokAdamW(params, gamma=0.0, lamb=0.0))
    optimizer = Accumulate(GrokfastMA(Adam(params), 7), 3)
    shown = (
        "Accumulate(steps=3, gradient_clipping=0.0, GrokfastMA(window_size=7, filter_type='mean', warmup=True, Adam ("
    )
    assert repr(optimizer).startswith(shown)
    resumed_is_uninterrupted(lambda m: Accumulate(Grokfast(Adam(m.parameters(), lr=0.01)), 3))


def test_a_filter_of_another_kind_begins_anew_and_says_so() -> None:
    model = network()
    optimizer = GrokfastMA(Adam(model.parameters(), lr=0.01), 4)
    train(model, range(6), lambda step, loss: optimizer.step())
    saved = saved_and_loaded(optimizer.state_dict())
    for other, words in (
        (Grokfast(Adam(model.parameters())), r"\(window_size=4, .*\), and .* \(an exponential moving average\)"),
        (GrokfastMA(Adam(model.parameters()), 4, filter_type="sum"), r"filter_type='mean'.*filter_type='sum'"),
    ):
        with pytest.warns(UserWarning, match=words):
            other.load_state_dict(saved)
        train(model, range(6, 7), lambda step, loss, other=other: other.step())
    names = {name for state in optimizer.state.values() for name in state}
    assert {"grokfast_ring", "exp_avg"} < names
    ema = Grokfast(Adam(model.parameters()))
    with pytest.warns(UserWarning, match="exponential"):
        ema.load_state_dict(saved)
    assert not any(name.startswith("grokfast") for state in ema.state.values() for name in state)
    again = Grokfast(Adam(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(saved_and_loaded(ema.state_dict()))  # by now an EMA's state dict
    narrow = GrokfastMA(Adam(model.parameters()), 4, window_dtype=torch.bfloat16)
    narrow.load_state_dict(saved)
    assert {state["grokfast_ring"].dtype for state in narrow.state.values()} == {torch.bfloat16}


def test_what_is_no_state_dict_is_refused() -> None:
    optimizer = Grokfast(SGD([nn.Parameter(torch.ones(2))]))
    for value in ({}, None, {"model": {}, "optimizer": optimizer.state_dict()}):
        with pytest.raises(ValueError, match="not an optimizer's"):
            optimizer.load_state_dict(value)


@pytest.mark.parametrize(
    "wrong",
    [{"grokfast_lamb": -1.0}, {"grokfast_alpha": 1.5}, {"grokfast_alpha": None}, {"grokfast_amplify_after": -1}],
)
def test_numbers_that_a_step_refuses_are_refused_before_anything_changes(wrong: dict[str, Any]) -> None:
    model = network()
    optimizer = Grokfast(Adam(model.parameters(), lr=0.01))
    train(model, range(3), lambda step, loss: optimizer.step())
    before, given = saved_and_loaded(optimizer.state_dict()), saved_and_loaded(optimizer.state_dict())
    given["param_groups"][0].update(wrong, lr=7.0)
    with pytest.raises(ValueError, match=rf"param_groups\[0\] cannot be loaded, as {next(iter(wrong))}="):
        optimizer.load_state_dict(given)
    assert same(optimizer.state_dict(), before)


@pytest.mark.parametrize("keeper", ["Grokfast", "GrokfastMA", "Accumulate"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state, name: state.pop(name), "a parameter's state has .* without {}: remove"),
        (lambda state, name: state.update({name: None}), "{} of a parameter"),
        (lambda state, name: state.update({name: [state[name]]}), "{} of a parameter"),
        (lambda state, name: state.update({name: np.array([1.0, 2.0])}), "{} of a parameter"),
    ],
)
def test_what_is_kept_is_refused_in_part_or_of_another_kind_before_anything_changes(
    keeper: str, change: Callable[[dict[str, Any], str], Any], words: str
) -> None:
    model = network()
    optimizer = KEEPERS[keeper](model)
    train(model, range(3), lambda step, loss: optimizer.step())
    before = saved_and_loaded(optimizer.state_dict())
    for name in optimizer._state_names:
        given = saved_and_loaded(before)
        change(given["state"][3], name)
        given["param_groups"][0]["lr"] = 7.0
        with pytest.raises(ValueError, match=f"state_dict: {words.format(name)}"):
            optimizer.load_state_dict(given)
    assert same(optimizer.state_dict(), before)


@pytest.mark.parametrize("count", [math.nan, math.inf, -1, None, "two"])
def test_a_cycle_of_no_number_of_micro_batches_is_refused_before_anything_changes(count: Any) -> None:
    model = network()
    optimizer = Accumulate(Adam(model.parameters(), lr=0.01), 2)
    train(model, range(3), lambda step, loss: optimizer.step())
    before, given = saved_and_loaded(optimizer.state_dict()), saved_and_loaded(optimizer.state_dict())
    given["param_groups"][0].update(accumulated_steps=count, lr=7.0)
    with pytest.raises(ValueError, match="state_dict: accumulated_steps"):
        optimizer.load_state_dict(given)
    assert same(optimizer.state_dict(), before)


def test_the_slow_gradient_is_a_signal_here_too() -> None:
    model = network()
    signal = SlowGradient(every=1)
    optimizer = Grokfast(SGD(model.parameters(), lr=0.1), amplify_when=signal)
    said = []
    train(model, range(5), lambda step, loss: (optimizer.step(), said.append(signal._value)))
    assert said[0] == 0
    assert all(0 < value <= 1 for value in said[1:])


def test_a_checkpoint_of_the_inner_optimizer_is_gone_on_from_and_the_other_way_round() -> None:
    model = network()
    inner = Adam(model.parameters(), lr=0.01)
    train(model, range(5), lambda step, loss: inner.step())
    optimizer = Grokfast(Adam(model.parameters(), lr=0.5), lamb=1.5)
    optimizer.load_state_dict(saved_and_loaded(inner.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups[0]["grokfast_lamb"] == 1.5
    train(model, range(5, 10), lambda step, loss: optimizer.step())
    assert {state["step"].item() for state in optimizer.state.values()} == {10}
    plain = Adam(model.parameters())
    plain.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(model, range(10, 12), lambda step, loss: plain.step())


def test_what_does_not_fit_is_refused_before_anything_is_loaded() -> None:
    model = network()
    optimizer = GrokfastMA(Adam(model.parameters(), lr=0.01), 4)
    train(model, range(6), lambda step, loss: optimizer.step())
    saved = saved_and_loaded(optimizer.state_dict())
    other = GrokfastMA(Adam(model.parameters(), lr=0.5), 9)
    with pytest.raises(ValueError, match=r"grokfast_ring .* shape \(4, .*\), and not \(9, "):
        other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.5
    assert not other.state


@pytest.mark.parametrize("wrapper", [lambda o: Grokfast(o), lambda o: GrokfastMA(o, 3), lambda o: Accumulate(o, 1)])
def test_a_failed_step_leaves_everything_as_it_was(wrapper: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = wrapper(GrokAdamW(model.parameters(), nonfinite="raise", lamb=0.0, gamma=0.0))
    train(model, range(5), lambda step, loss: optimizer.step())
    before = copy.deepcopy(optimizer.state_dict())
    kept = [p.detach().clone() for p in model.parameters()]
    grads = [torch.full_like(p, torch.nan) for p in model.parameters()]
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    after = optimizer.state_dict()
    for key, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][key][name])), name
    assert all(torch.equal(p, k) and p.grad is g for p, k, g in zip(model.parameters(), kept, grads, strict=True))


def test_groups_state_and_schedulers_are_shared() -> None:
    model = network()
    first, *others = model.parameters()
    inner = SGD([first], lr=0.1, momentum=0.9)
    optimizer = Grokfast(inner)
    optimizer.add_param_group({"params": others, "lr": 0.2, "grokfast_lamb": 0.0})
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, range(3), lambda step, loss: (optimizer.step(), schedule.step()))
    assert [group["lr"] for group in inner.param_groups] == [0.1 / 8, 0.2 / 8]
    assert ["grokfast_ema" in inner.state[p] for p in model.parameters()] == [True] + [False] * 5  # the rest has λ = 0
    optimizer.param_groups[1]["grokfast_lamb"] = 2.0
    train(model, range(3, 4), lambda step, loss: optimizer.step())
    assert all("grokfast_ema" in inner.state[p] for p in model.parameters())
    assert "SGD" in repr(inner)
    assert "grokfast_lamb: 2.0" in repr(optimizer)


def test_hooks_fire() -> None:
    fired: list[str] = []
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = Grokfast(SGD([p]))
    optimizer.register_step_pre_hook(lambda *_: fired.append("before the step"))
    optimizer.register_step_post_hook(lambda *_: fired.append("after the step"))
    optimizer.optimizer.register_step_pre_hook(lambda *_: fired.append("before the inner step"))
    optimizer.step()
    assert fired == ["before the step", "before the inner step", "after the step"]
    optimizer.register_state_dict_pre_hook(lambda *_: fired.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: fired.append("before loading"))
    optimizer.register_load_state_dict_post_hook(lambda _: fired.append("after loading"))
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert fired[3:] == ["before saving", "before loading", "after loading"]


@pytest.mark.parametrize("make", [Grokfast, lambda inner, **o: GrokfastMA(inner, 3, warmup=False, **o)])
def test_the_filter_can_wait(make: Callable[..., Any]) -> None:
    """The filter waits for a number of steps or for a signal. It follows the gradients in the meantime."""
    runs = {}
    for name, options in {
        "off": {"lamb": 0.0},
        "on": {},
        "after": {"amplify_after": 6},
        "when": {"amplify_when": (gap := AccuracyGap())},  # it has no value at first
    }.items():
        model = network()
        optimizer = make(SGD(model.parameters(), lr=0.1), **options)

        def take_step(step: int, loss: Tensor, optimizer: Any = optimizer, name: str = name) -> None:
            if step == 6 and name == "when":
                gap.record(train=1.0, eval=0.0)
            optimizer.step()

        weights = []
        train(model, range(6), take_step)
        weights.append(model[0].weight.detach().clone())
        train(model, range(6, 9), take_step)
        weights.append(model[0].weight.detach().clone())
        runs[name] = weights
    assert torch.equal(runs["off"][0], runs["after"][0])
    assert torch.equal(runs["off"][0], runs["when"][0])
    assert not torch.equal(runs["off"][0], runs["on"][0])
    assert torch.equal(runs["after"][1], runs["when"][1])
    assert not torch.equal(runs["after"][1], runs["off"][1])


def test_a_signal_amplifies_once_at_most() -> None:
    weights = []
    for says in (None, lambda: 1.0, lambda: 7.0, lambda: True):
        model = network()
        optimizer = Grokfast(SGD(model.parameters(), lr=0.1), amplify_when=says)
        train(model, range(3), lambda step, loss, optimizer=optimizer: optimizer.step())
        weights.append(model[0].weight)
    assert all(torch.equal(weights[0], other) for other in weights[1:])


def test_another_one_around_the_same_optimizer_begins_anew() -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    inner = SGD([{"params": [p], "grokfast_lamb": 0.5}])
    assert Grokfast(inner).param_groups[0]["grokfast_lamb"] == 0.5  # the user's own value
    first = GrokfastMA(inner, 3, 2.0)
    for _ in range(5):
        first.step()
    second = GrokfastMA(inner, 5, 1.0)
    assert second.param_groups[0]["grokfast_lamb"] == 1.0
    second.step()
    assert second.state[p]["grokfast_ring"].shape == (5, 2)
    assert second.state[p]["grokfast_ring_count"] == 1
    third = Grokfast(inner)
    third.step()
    assert set(third.state[p]) == {"grokfast_ema", "grokfast_step"}


class AsksWhetherItIsThere(torch.optim.Optimizer):
    """An optimizer that creates a parameter's state only if the parameter has no entry yet."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if p not in self.state:
                self.state[p] = {"m": torch.zeros_like(p)}
            p.sub_(self.state[p]["m"].add_(p.grad))


@pytest.mark.parametrize("make", [Grokfast, GrokfastMA, lambda o: Accumulate(o, 2)])
def test_the_inner_optimizer_finds_its_state_as_if_it_were_alone(make: Callable[[Any], Any]) -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = make(AsksWhetherItIsThere([p]))
    optimizer.step()
    saved = optimizer.state_dict()["state"][0]
    for _ in range(5):
        optimizer.step()
    assert saved is optimizer.state[p]
    assert "m" in saved
    assert len(saved) > 2


@pytest.mark.parametrize("value", [torch.nan, -1.0, None, "a string"])
@pytest.mark.filterwarnings("ignore:the grokking signal")
def test_a_signal_that_says_nothing_leaves_the_filter_off(value: Any) -> None:
    model, plain = network(), network()
    optimizer = Grokfast(SGD(model.parameters(), lr=0.1), amplify_when=lambda: value)
    train(model, range(3), lambda step, loss: optimizer.step())
    inner = SGD(plain.parameters(), lr=0.1)
    train(plain, range(3), lambda step, loss: inner.step())
    assert torch.equal(model[0].weight, plain[0].weight)


def test_accuracies_that_never_come_are_missed_once() -> None:
    model = network()
    optimizer = Grokfast(SGD(model.parameters(), lr=0.1), amplify_when=(gap := AccuracyGap()))
    with pytest.warns(UserWarning, match=r"wait for train_acc and eval_acc: call AccuracyGap's own record") as said:
        train(model, range(150), lambda step, loss: optimizer.step())
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = Grokfast(SGD(model.parameters(), lr=0.1), amplify_when=gap)
        gap.record(train=0.9, eval=0.5)
        train(model, range(150), lambda step, loss: other.step())


def test_what_a_signal_remembers_is_in_the_checkpoint() -> None:
    def make(gap: AccuracyGap) -> Grokfast:
        return Grokfast(SGD([nn.Parameter(torch.ones(2))]), amplify_when=gap)

    gap, other = AccuracyGap(), AccuracyGap()
    optimizer, again = make(gap), make(other)
    gap.record(train=0.9, eval=0.5)
    again.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert other() == gap()
    assert copy.deepcopy(optimizer)._gate() == pickle.loads(pickle.dumps(optimizer))._gate() == 0.9 - 0.5


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda p: Grokfast(SGD([p]), amplify_when=lambda train_loss, eval_loss: 1), TypeError, "takes losses"),
        (lambda p: Grokfast([p]), TypeError, "optimizer is of type list, and not a torch.optim.Optimizer"),
        (lambda p: Grokfast(SGD([p]), amplify_when=lambda step: 1), TypeError, "amplify_when=.*requires arguments"),
        (lambda p: GrokfastMA(SGD([p]), warmup="no"), TypeError, "warmup='no'"),
        (lambda p: Grokfast(torch.optim.LBFGS([p])), TypeError, "cannot wrap LBFGS, which evaluates its closure"),
        (lambda p: Grokfast(SGD([p]), alpha=2.0), ValueError, "alpha=2.0"),
        (lambda p: Grokfast(SGD([p]), lamb=-1.0), ValueError, "lamb=-1.0"),
        (lambda p: Grokfast(SGD([p]), amplify_after=1.5), TypeError, "amplify_after=1.5"),
        (lambda p: Grokfast(SGD([p]), amplify_when=3), TypeError, "amplify_when=3"),
        (lambda p: Grokfast(SGD([{"params": [p], "grokfast_lamb": "2"}])), TypeError, "grokfast_lamb='2'"),
        (lambda p: GrokfastMA(SGD([p]), 0), ValueError, "window_size=0"),
        (lambda p: GrokfastMA(SGD([p]), filter_type="max"), ValueError, "filter_type='max'"),
        (lambda p: GrokfastMA(SGD([p]), window_dtype=torch.int8), ValueError, "window_dtype=torch.int8"),
        (lambda p: Grokfast(SGD([p]), amplify_when=AtLeast), TypeError, r"it is a class, so give AtLeast\(...\)"),
        (lambda p: Grokfast(SGD([p], differentiable=True)), ValueError, "Grokfast cannot wrap .* differentiable=True"),
        (
            lambda p: Accumulate(SGD([p], differentiable=True), 2),
            ValueError,
            "Accumulate cannot wrap .* differentiable=",
        ),
        (
            lambda p: Accumulate(GrokAdamW([p], accumulation_steps=3, second_moment="raw"), 2),
            ValueError,
            "Accumulate around a GrokAdamW with accumulation_steps=3: both accumulate",
        ),
        (
            lambda p: Accumulate(SGD([p]), accumulation_steps=2),
            TypeError,
            "argument accumulation_steps: give steps",
        ),
        (lambda p: Accumulate(SGD([p]), 0), ValueError, "steps=0"),
        (lambda p: Accumulate(SGD([p]), 2, gradient_clipping=None), TypeError, "gradient_clipping=None"),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[Any], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(nn.Parameter(torch.ones(2)))


def test_a_number_set_wrong_by_hand_is_refused_at_the_next_step() -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = Grokfast(SGD([p]))
    optimizer.param_groups[0]["grokfast_alpha"] = -0.5
    with pytest.raises(ValueError, match="grokfast_alpha=-0.5"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2))
    with pytest.raises(ValueError, match="grokfast_lamb=-2"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "grokfast_lamb": -2})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("make", [lambda o: Grokfast(o), lambda o: GrokfastMA(o, 3, warmup=False)])
def test_complex_parameters_and_a_narrow_ring(make: Callable[[Any], Any]) -> None:
    """A complex parameter counts as two real ones."""
    one = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    two = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    optimizers = [make(SGD([p], lr=0.1)) for p in (one, two)]
    for i in range(7):
        two.grad = torch.randn(2, 2, generator=torch.Generator().manual_seed(i))
        one.grad = torch.view_as_complex(two.grad).conj().resolve_conj().conj()
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(torch.view_as_real(one), two)
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokfastMA(SGD([p]), 3, window_dtype=torch.bfloat16)
    p.grad = torch.full((3,), 1 + 2**-12)
    for _ in range(3):
        optimizer.step()
    assert optimizer.state[p]["grokfast_ring"].dtype == torch.bfloat16
    assert torch.equal(optimizer.state[p]["grokfast_ring_sum"], torch.full((3,), 3.0))


@pytest.mark.parametrize("make", [lambda o: Grokfast(o), lambda o: GrokfastMA(o, 3)])
@pytest.mark.filterwarnings("ignore:a step was skipped")
def test_what_is_not_finite_is_not_remembered(make: Callable[[Any], Any]) -> None:
    """The inner optimizer may skip a non-finite gradient and go on, so the filter must not keep it."""
    model = network()
    optimizer = make(GrokAdamW(model.named_parameters(), lamb=0.0, gamma=0.0))

    def take_step(step: int, loss: Tensor) -> None:
        if step == 2:
            model[0].weight.grad[0, 0] = torch.nan
        optimizer.step()

    train(model, range(8), take_step)
    assert optimizer.optimizer.metrics()["skipped_steps"] == 1
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", [Grokfast, GrokfastMA])
def test_hooks_of_the_inner_optimizer_do_not_reach_the_loops_gradients(kind: Any) -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = kind(SGD([p]), amplify_after=5)

    def clip(*_: Any) -> None:
        nn.utils.clip_grad_norm_([p], 1.0)

    optimizer.optimizer.register_step_pre_hook(clip)
    p.grad = torch.full((2,), 100.0)
    optimizer.step()
    assert (p.grad == 100).all()
    kept = optimizer.state[p]["grokfast_ema" if kind is Grokfast else "grokfast_ring_sum"]
    assert (kept == 100).all()


@pytest.mark.parametrize("function", [gradfilter_ema, gradfilter_ma])
def test_complex_gradients_as_autograd_leaves_them(function: Callable[..., Any]) -> None:
    model = nn.ParameterList([nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))])
    (model[0].conj() * torch.tensor([1 - 1j, 2j])).real.sum().backward()
    before = model[0].grad.resolve_conj().clone()
    assert model[0].grad.is_conj()
    options = {"window_size": 1} if function is gradfilter_ma else {}
    function(model, lamb=1.0, **options)
    torch.testing.assert_close(model[0].grad, 2 * before)


@pytest.mark.parametrize("function", [gradfilter_ema, gradfilter_ma])
def test_a_gradient_without_memory_is_zero(function: Callable[..., Any]) -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(2))])
    torch.sgn(model[0]).sum().backward()
    assert model[0].grad._is_zerotensor()
    function(model)
    assert torch.equal(model[0].grad, torch.zeros(2))


def test_a_signals_memory_is_found_when_groups_are() -> None:
    """Groups that are loaded in another order are matched by their parameters' names."""
    model = network()
    params = list(model.named_parameters())

    def make(reverse: bool, gap: AccuracyGap) -> Grokfast:
        groups = [{"params": params[:3]}, {"params": params[3:]}]
        return Grokfast(AdamW(groups[::-1] if reverse else groups), amplify_when=gap)

    gap, other = AccuracyGap(), AccuracyGap()
    gap.record(train=1.0, eval=0.5)
    make(True, other).load_state_dict(saved_and_loaded(make(False, gap).state_dict()))
    assert other() == 0.5


def test_what_is_saved_stays_what_it_was_called() -> None:
    """Like torch's, a state dict keeps its entries when the optimizer takes further steps."""
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = Accumulate(SGD([p]), 3)
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.step()
    optimizer.step()
    assert list(saved["state"][0]) == ["accumulated", "accumulated_grads"]
    optimizer.state["of a hook"] = torch.ones(2)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(optimizer.state["of a hook"], torch.ones(2))
    optimizer.param_groups = list(optimizer.param_groups)
    assert optimizer.param_groups is optimizer.optimizer.param_groups


def test_no_learning_rate_is_none_at_all() -> None:
    """Some optimizers find their own learning rate, and have None in its place."""
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.zeros(2)
    inner = SGD([p], lr=0.0)
    optimizer = Accumulate(inner, 3)
    inner.step = lambda closure=None: None  # type: ignore[method-assign]
    optimizer.param_groups[0]["lr"] = None
    optimizer.step()
    assert optimizer.param_groups[0]["accumulated_steps"] == 1


def test_a_graph_cannot_capture_it(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = Grokfast(SGD([nn.Parameter(torch.ones(2))]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot capture a step of Grokfast"):
        optimizer.step()


def test_a_closure_runs_before_gradients_are_read() -> None:
    model, twin = network(), network()
    optimizer, other = Grokfast(SGD(model.parameters(), lr=0.1)), Grokfast(SGD(twin.parameters(), lr=0.1))
    x, y = torch.ones(4, 5), torch.ones(4, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        first = optimizer.step(closure)
        other.zero_grad()
        (twin(x) - y).square().mean().backward()
        other.step()
    assert first.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


class WithModes(SGD):
    """An optimizer like schedule-free's, which must be told when the model is evaluated."""

    mode = "none"

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


KEEPING: list[Callable[[Any], Any]] = [Grokfast, lambda inner: GrokfastMA(inner, window_size=3)]


@pytest.mark.parametrize(
    ("wrap", "wrap_anew"),
    [*product(KEEPING, KEEPING), *[2 * (lambda inner: Accumulate(inner, 2),)]],
)
def test_what_is_dropped_is_missed(wrap: Callable[[Any], Any], wrap_anew: Callable[[Any], Any]) -> None:
    """If an inner optimizer loaded a filter's state and any filter wrapped it later, the state was lost silently."""
    model = network()
    optimizer = wrap(SGD(model.parameters(), lr=0.1))
    train(model, range(3), lambda step, loss: optimizer.step())
    inner = SGD(model.parameters(), lr=0.1)
    inner.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match="put the same wrapper around .* and call the wrapper's load_state_dict"):
        wrap_anew(inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap_anew(inner)  # nothing is left to drop
        again = wrap(SGD(model.parameters(), lr=0.1))
        again.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("wrap", [*KEEPING, lambda inner: Accumulate(inner, 2)])
def test_state_can_be_reset_as_torchs(wrap: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = wrap(torch.optim.Adam(model.parameters()))
    train(model, range(4), lambda step, loss: optimizer.step())
    optimizer.__setstate__({"state": defaultdict(dict)})
    assert not optimizer.state
    assert optimizer.state is optimizer.optimizer.state
    train(model, range(2), lambda step, loss: optimizer.step())
    steps = 1 if isinstance(optimizer, Accumulate) else 2
    assert {state["step"].item() for state in optimizer.state.values()} == {steps}
    optimizer.__setstate__(optimizer.optimizer.__getstate__())
    assert {state["step"].item() for state in optimizer.state.values()} == {steps}


@pytest.mark.parametrize("wrap", [*KEEPING, lambda inner: Accumulate(inner, 2)])
def test_memory_is_not_said_to_be_what_the_inner_optimizer_keeps(wrap: Callable[[Any], Any]) -> None:
    optimizer = wrap(GrokAdamW(network().named_parameters(), lamb=0.0))
    assert not hasattr(optimizer, "memory")
    with pytest.raises(AttributeError, match=r"of GrokAdamW does not count .*: call optimizer.optimizer.memory\(\)"):
        optimizer.memory()
    assert optimizer.optimizer.memory()["total"] > 0
    with pytest.raises(AttributeError, match="'SGD' object has no attribute 'memory'"):
        wrap(SGD(network().parameters(), lr=0.1)).memory()
    if not isinstance(optimizer, Accumulate):
        with pytest.raises(AttributeError, match=r"call optimizer.optimizer.optimizer.memory\(\)"):
            Accumulate(optimizer, 2).memory()


@pytest.mark.parametrize("wrap", [*KEEPING, lambda inner: Accumulate(inner, 2)])
def test_an_interrupt_loses_nothing(wrap: Callable[[Any], Any]) -> None:
    """A wrapper removes its entries from the state while the inner optimizer steps, and must put them back."""

    class Interrupted(dict[str, Any]):
        def pop(self, *_: Any) -> Any:
            raise KeyboardInterrupt

        def __delitem__(self, _: str) -> None:
            raise KeyboardInterrupt

    model = network()
    optimizer = wrap(SGD(model.parameters(), lr=0.1, momentum=0.9))
    train(model, range(4), lambda step, loss: optimizer.step())
    *_, last = optimizer.state
    optimizer.state[last] = Interrupted(optimizer.state[last])
    before = {param: set(state) for param, state in optimizer.state.items()}
    with pytest.raises(KeyboardInterrupt):
        train(model, range(2), lambda step, loss: optimizer.step())
    assert {param: set(state) for param, state in optimizer.state.items()} == before


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("inner", [SGD, *filter(None, [getattr(torch.optim, "Muon", None)])])
@pytest.mark.parametrize("wrap", [Grokfast, lambda inner, **how: GrokfastMA(inner, window_size=3, **how)])
def test_slow_gradient_is_of_every_filter(wrap: Callable[..., Any], inner: Any, maximize: bool) -> None:
    """Filters average gradients with their own sign, whether or not the inner optimizer maximizes."""
    (p,) = params = [nn.Parameter(torch.ones(3, 2))]
    options = {} if inner is not SGD else {"maximize": maximize}
    optimizer = wrap(inner(params, lr=1e-3, **options), amplify_when=SlowGradient(every=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            p.grad = torch.ones(3, 2)
            optimizer.step()
    assert optimizer._gate() == pytest.approx(1)


AROUND: dict[str, Callable[[Any], Any]] = {
    "Grokfast": Grokfast,
    "GrokfastMA": lambda inner: GrokfastMA(inner, window_size=3),
    "Accumulate": lambda inner: Accumulate(inner, 2),
    "both": lambda inner: Accumulate(Grokfast(inner), 2),
}


@pytest.mark.parametrize("name", AROUND)
def test_methods_of_the_inner_optimizer_are_the_wrappers_too(name: str) -> None:
    inner = WithModes(network().parameters(), lr=0.1)
    optimizer = AROUND[name](inner)
    optimizer.train()
    assert inner.mode == "train"
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other.eval()
        assert (other.mode, inner.mode) == ("eval", "train")
    with pytest.raises(AttributeError, match="no attribute 'eat'"):
        optimizer.eat()
    with pytest.raises(AttributeError, match="no attribute '_eat'"):
        optimizer._eat()
    around_ours = AROUND[name](GrokAdamW(network().parameters()))
    around_ours.record(train_loss=1.0)
    assert around_ours.param_groups[0]["train_loss"] == 1.0


@pytest.mark.parametrize("name", ["Grokfast", "GrokfastMA", "Accumulate"])
def test_a_memory_that_no_longer_fits_is_named_before_anything_is_written(name: str) -> None:
    p = nn.Parameter(torch.ones(6, 2))
    optimizer = AROUND[name](SGD([p], lr=0.1))
    p.grad = torch.ones(6, 2)
    optimizer.step()
    state, new = optimizer.state.pop(p), nn.Parameter(torch.ones(4, 2))
    optimizer.param_groups[0]["params"][0], optimizer.state[new] = new, state
    new.grad = torch.ones(4, 2)
    for entry in [entry for entry, kept in state.items() if isinstance(kept, Tensor) and kept.dim()]:
        with pytest.raises(RuntimeError, match=rf"state\['{entry}'\] of a parameter of shape \(4, 2\).*or delete"):
            optimizer.flush() if name == "Accumulate" else optimizer.step()
        with pytest.raises(RuntimeError, match=entry):
            optimizer.step()
        assert torch.equal(new, torch.ones(4, 2))
        state[entry] = (state[entry][:, :4] if entry == "grokfast_ring" else state[entry][:4]).clone()
    optimizer.step()
    assert not torch.equal(new, torch.ones(4, 2))


@pytest.mark.parametrize("wrap", [lambda o: Grokfast(o, lamb=1e-12), lambda o: GrokfastMA(o, 2, 1e-12)])
def test_an_inner_optimizer_that_begins_anew_does_so(wrap: Any) -> None:
    """The inner optimizer may clear its state at the end of a step. The filter keeps its own."""
    found = []
    for around in (lambda o: o, wrap):
        p = nn.Parameter(torch.zeros(3))
        inner = torch.optim.SGD([p], lr=1.0, momentum=0.9)
        calls = count(1)
        inner.register_step_post_hook(lambda o, *_, calls=calls: o.state.clear() if next(calls) % 3 == 0 else None)
        optimizer = around(inner)
        for _ in range(5):
            p.grad = torch.ones(3)
            optimizer.step()
        found.append(p.detach())
    torch.testing.assert_close(*found)
    assert any(name.startswith("grokfast") for name in optimizer.state[p])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_window_follows_the_dtype_of_its_parameter(dtype: torch.dtype) -> None:
    """The windows of GrokfastMA and of GrokAdamW change their dtype with the parameter."""
    module = nn.Module()
    module.p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    wrapped = GrokfastMA(torch.optim.SGD(module.parameters(), lr=0.0), 3, 1.0, warmup=False)
    own = GrokAdamW(module.parameters(), lr=0.0, window_size=3, gradient_clipping=0.0)
    for i in range(6):
        if i == 2:
            module.to(dtype)
        grad = torch.linspace(0.1, 1, 4, dtype=torch.float64) * (i + 1) / 7
        for optimizer in (wrapped, own):
            module.p.grad = grad.to(module.p.dtype)
            optimizer.step()
    last = [(torch.linspace(0.1, 1, 4, dtype=torch.float64) * (i + 1) / 7).to(dtype) for i in (3, 4, 5)]
    torch.testing.assert_close(own.state[module.p]["grok_ema"], sum(last) / 3)
    for state, prefix in ((own.state[module.p], "grok"), (wrapped.state[module.p], "grokfast")):
        for name in ("ring", "ring_sum", "ring_lap"):
            assert state[f"{prefix}_{name}"].dtype == dtype
        torch.testing.assert_close(state[f"{prefix}_ring_sum"], sum(last))


@pytest.mark.parametrize("how", ["converted", "loaded"])
@pytest.mark.parametrize(
    ("wrap", "factor"),
    [
        (lambda inner: Grokfast(inner, alpha=0.0, lamb=1.0), 2.0),
        (lambda inner: GrokfastMA(inner, window_size=1, lamb=1.0), 2.0),
        (lambda inner: Accumulate(inner, steps=2), 1.0),
    ],
    ids=["Grokfast", "GrokfastMA", "Accumulate"],
)
def test_memory_gets_the_precision_of_the_gradients(wrap: Callable[[Any], Any], factor: float, how: str) -> None:
    """A float32 run goes on in float64, and no gradient may be rounded to float32 on its way to the inner optimizer."""
    model = nn.Linear(5, 4, bias=False)
    optimizer = wrap(SGD(model.parameters(), lr=0.1))
    for _ in range(4):
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
    saved = saved_and_loaded(optimizer.state_dict())
    model.double()
    if how == "loaded":
        optimizer = wrap(SGD(model.parameters(), lr=0.1))
        optimizer.load_state_dict(saved)
    grad = torch.rand(4, 5, dtype=torch.float64) + 0.1
    before = model.weight.detach().clone()
    for _ in range(2 if factor == 1 else 1):
        model.weight.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(before - model.weight, 0.1 * factor * grad, rtol=1e-13, atol=1e-15)


def test_a_hook_may_replace_or_change_what_is_loaded() -> None:
    optimizer = Grokfast(SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    saved = optimizer.state_dict()
    other = copy.deepcopy(saved)
    other["param_groups"][0]["lr"] = 0.5
    changing = optimizer.register_load_state_dict_pre_hook(lambda _, given: given.update(extra=1))
    optimizer.load_state_dict(saved)
    assert saved.keys() == {"state", "param_groups"}  # the hook got a shallow copy, as in torch
    changing.remove()
    optimizer.register_load_state_dict_pre_hook(lambda _, given: other)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("name", ["grokfast_ring_sum", "grokfast_ring_lap"])
def test_a_windows_sums_must_fit(name: str) -> None:
    p = nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2)
    optimizer = GrokfastMA(SGD([p], lr=0.1), 2)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][name] = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=rf"{name} of a parameter has shape \(2, 3\), and not \(3, 2\)"):
        optimizer.load_state_dict(saved)


@pytest.mark.filterwarnings("error")
def test_another_optimizers_lamb_is_no_filter() -> None:
    Grokfast(SGD([{"params": [nn.Parameter(torch.ones(2))], "lamb": 1.0}], lr=0.1))
