"""Tests of runs that are saved, loaded, copied or pickled, and then continue."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from grokadamw import Accumulate, GrokAdamW, Grokfast, GrokfastMA
from grokadamw.signals import AccuracyGap, SlowGradient, loss_gap, memorisation

from .models import network, parameters, same, saved_and_loaded, set_gradients, train, trained


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stop", range(14))
@pytest.mark.filterwarnings("ignore:a step was skipped", "ignore:layer")
def test_a_resumed_run_is_the_uninterrupted_run(stop: int, dtype: torch.dtype) -> None:
    """Resume after any step, with stateful signals, recorded losses, skips, and float32 state of bfloat16 weights."""

    def start() -> tuple[nn.Module, GrokAdamW]:
        model = network(dtype)
        decayed = [(n, p) for n, p in model.named_parameters() if n.endswith("weight")]
        others = [(n, p) for n, p in model.named_parameters() if n.endswith("bias")]
        gap, told = AccuracyGap(), AccuracyGap()
        optimizer = GrokAdamW(
            [{"params": decayed, "amplify_after": 3}, {"params": others, "weight_decay": 0.0, "alpha_init": 0.9}],
            lr=0.01,
            grokking_signal_fns=[
                SlowGradient(every=4),
                gap,
                told,
                lambda train_loss, eval_loss: eval_loss - train_loss,
            ],
            grokking_signal_decay_rate=1.0,
            signal_boost=1.0,
        )
        optimizer.gap = gap  # type: ignore[attr-defined]
        return model, optimizer

    def run(model: nn.Module, optimizer: GrokAdamW, steps: range) -> None:
        def take_step(step: int, loss: torch.Tensor) -> None:
            if step in (0, 6):
                model[0].bias.grad[0] = torch.nan
            if step == 4:
                optimizer.gap.record(train=0.9, eval=0.1)  # type: ignore[attr-defined]
            if step % 3 == 0:
                optimizer.record(train_loss=loss, eval_loss=loss + 0.2)
            if step % 5 == 2:
                optimizer.record(train_acc=0.9 + step / 140, eval_acc=step / 14)
            optimizer.step()

        train(model, steps, take_step)

    model, optimizer = start()
    run(model, optimizer, range(14))

    half, stopped = start()
    run(half, stopped, range(stop))
    saved = saved_and_loaded({"model": half.state_dict(), "optimizer": stopped.state_dict()})
    resumed_model, resumed = start()
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    run(resumed_model, resumed, range(stop, 14))

    assert same(model.state_dict(), resumed_model.state_dict())
    assert same(optimizer.state_dict(), resumed.state_dict())
    assert resumed.metrics()["skipped_steps"] == 2
    if stop < 14:
        assert same(optimizer.metrics(), resumed.metrics())


def test_a_state_dict_is_plain_data() -> None:
    _, optimizer = trained(grokking_signal_fns=[lambda: 0.5, SlowGradient()])
    state_dict = optimizer.state_dict()
    assert same(saved_and_loaded(state_dict), state_dict)
    group = state_dict["param_groups"][0]
    assert group["grokking_signal_fns"] is None
    assert (group["train_loss"], group["eval_loss"]) == (0.1, 0.4)
    assert group["layers"] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("wrap", [lambda inner: inner, lambda inner: Accumulate(inner, 1)])
def test_loading_drops_what_a_scheduler_has_added(wrap: Any) -> None:
    """A scheduler reads `initial_lr` if a group has it, so one that stays gives the next schedule a wrong lr."""
    found = []
    for inner in (torch.optim.AdamW, GrokAdamW):
        optimizer = wrap(inner(parameters(2), lr=1e-2))
        saved = copy.deepcopy(optimizer.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = 1e-7
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=10)
        optimizer.load_state_dict(saved)
        groups = optimizer.param_groups
        found.append((torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0).base_lrs, "max_lr" in groups[0]))
    assert found[0] == found[1] == ([1e-2], False)


def test_every_group_has_the_same_keys_from_the_start() -> None:
    first, second, third = parameters(3)
    optimizer = GrokAdamW([{"params": [first]}, {"params": [second], "layer": 3}])
    keys = set(optimizer.param_groups[0])
    optimizer.record(train_loss=1.0, eval_loss=2.0)
    set_gradients([first, second])
    optimizer.step()
    optimizer.add_param_group({"params": [third]})
    assert {"grokking_signal_fns", "train_loss", "eval_loss", "train_acc", "eval_acc", "layers"} <= keys
    assert all(set(group) == keys for group in optimizer.param_groups)
    assert all(set(group) == keys for group in optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize("options", [{}, {"signal_boost": 3.0}])
def test_pickle_keeps_all_but_signals_of_ones_own(options: dict[str, float]) -> None:
    def own() -> float:
        return 0.5

    signals = [own, AccuracyGap(), memorisation]
    _, optimizer = trained(grokking_signal_fns=signals, nonfinite="raise", second_moment="raw", **options)
    optimizer.record(train_loss=0.5, eval_loss=5.5)
    pickled = pickle.dumps(optimizer)
    with pytest.warns(UserWarning, match="is without own. Call optimizer.set_signals"):
        copied = pickle.loads(pickled)
    assert same(copied.state_dict(), optimizer.state_dict())
    assert copied.defaults == optimizer.defaults
    copied.step()
    assert copied.metrics()["signal"] == pytest.approx(memorisation(0.5, 5.5))
    copied.record(train_acc=1.0, eval_acc=0.25)  # the copy's AccuracyGap reads the copy's accuracies
    copied.step()
    assert copied.metrics()["signal"] == pytest.approx((memorisation(0.5, 5.5) + 0.75) / 2)
    copied.set_signals(lambda: 0.25)
    copied.step()
    assert copied.metrics()["signal"] == 0.25


def test_a_shallow_copy_says_at_its_line_what_it_is_without() -> None:
    _, optimizer = trained(grokking_signal_fns=lambda: 0.5)
    with pytest.warns(UserWarning, match="is without <lambda>. Call optimizer.set_signals") as caught:
        copy.copy(optimizer)
    assert caught[0].filename == __file__


def test_pickle_keeps_how_signals_combine_or_says_that_it_does_not() -> None:
    for combine, expected in (("min", memorisation(0.5, 1.0)), (max, 0.5 * (0.5 + memorisation(0.5, 1.0)))):
        _, optimizer = trained(grokking_signal_fns=[loss_gap, memorisation], combine=combine)
        optimizer.record(train_loss=0.5, eval_loss=1.0)
        pickled = pickle.dumps(optimizer)
        with nullcontext() if combine == "min" else pytest.warns(UserWarning, match="is without combine"):
            copied = pickle.loads(pickled)
        copied.step()
        assert copied.metrics()["signal"] == pytest.approx(expected)


def test_pickle_keeps_the_default_signal() -> None:
    _, optimizer = trained()
    copied = pickle.loads(pickle.dumps(optimizer))
    copied.step()
    assert copied.metrics()["signal"] == pytest.approx(0.75)  # from the recorded losses


def test_deepcopy_keeps_signals_and_gives_them_the_copy() -> None:
    model, optimizer = trained(grokking_signal_fns=[lambda: 0.5, SlowGradient(every=1)], combine="max")
    twin_model, twin = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin_model, twin)):
        train(m, range(3, 6), lambda step, loss, o=o: o.step())
    assert same(model.state_dict(), twin_model.state_dict())
    assert same(optimizer.metrics(), twin.metrics())
    train(twin_model, range(6, 9), lambda step, loss: twin.step())
    assert twin.metrics()["signal/SlowGradient"] != optimizer.metrics()["signal/SlowGradient"]


def test_deepcopy_knows_what_the_last_step_did_and_what_layers_are_called() -> None:
    model = network()
    optimizer = GrokAdamW(model.parameters())
    optimizer.set_layers(model)
    train(model, range(2), lambda step, loss: optimizer.step())
    copied = copy.deepcopy(optimizer)
    assert same(copied.metrics(), optimizer.metrics())
    assert copied.layer_table() == optimizer.layer_table()


def test_a_loss_with_a_graph_that_was_set_by_hand_can_be_copied() -> None:
    _, optimizer = trained()
    for name in ("train_loss", "eval_acc"):
        optimizer.param_groups[0][name] = (0.5 * torch.ones(1, requires_grad=True)).sum()
    copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["train_loss"] == optimizer.param_groups[0]["eval_acc"] == 0.5


def test_a_copy_warns_for_itself_and_keeps_what_waits() -> None:
    params = parameters()
    optimizer = GrokAdamW(params, grokking_signal_fns=lambda: None)
    optimizer._run.signals.waiting["Later"] = {"calls": 3}  # as if loaded before its signal is registered
    copied = copy.deepcopy(optimizer)
    for resumed in (optimizer, copied):
        set_gradients(resumed.param_groups[0]["params"])
        with pytest.warns(RuntimeWarning, match="returned None"):
            resumed.step()
        assert json.loads(resumed.state_dict()["param_groups"][0]["signal_state"]) == {"Later": {"calls": 3}}
    optimizer._run.signals.waiting.clear()
    assert copied._run.signals.waiting


def test_a_copy_hears_its_own_accuracies() -> None:
    _, optimizer = trained(grokking_signal_fns=AccuracyGap())
    optimizer.record(train_acc=1.0, eval_acc=0.25)
    copied = copy.deepcopy(optimizer)
    copied.record(eval_acc=0.5)
    for resumed, gap in ((optimizer, 0.75), (copied, 0.5)):
        resumed.step()
        assert resumed.metrics()["signal"] == gap


def test_state_waits_for_signals_that_are_registered_later() -> None:
    _, optimizer = trained(grokking_signal_fns=SlowGradient(every=2))
    saved = saved_and_loaded(optimizer.state_dict())
    _, late = trained()
    late.load_state_dict(saved)
    assert late.state_dict()["param_groups"][0]["signal_state"] == saved["param_groups"][0]["signal_state"]
    signal = SlowGradient(every=2)
    late.set_signals(signal)
    assert signal.state_dict() == json.loads(saved["param_groups"][0]["signal_state"])["SlowGradient"]


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_keep_what_signals_remember_until_they_are_registered(how: str) -> None:
    _, optimizer = trained(grokking_signal_fns=SlowGradient(every=2))
    remembered = json.loads(optimizer.state_dict()["param_groups"][0]["signal_state"])["SlowGradient"]
    copied = pickle.loads(pickle.dumps(optimizer))
    if how == "deepcopy":
        copied = copy.deepcopy(copied)
    assert "SlowGradient" in copied.state_dict()["param_groups"][0]["signal_state"]
    signal = SlowGradient(every=2)
    copied.set_signals([lambda: 0.5, signal])
    assert signal.state_dict() == remembered


def test_a_pickle_does_not_take_a_subclass_of_a_known_signal_for_that_signal() -> None:
    class Half(AccuracyGap):
        def __call__(self) -> Any:
            return 0.5

    _, optimizer = trained(grokking_signal_fns=Half())
    with pytest.warns(UserWarning, match="without Half"):
        copied = pickle.loads(pickle.dumps(optimizer))
    copied.record(train_acc=1.0, eval_acc=0.0)
    copied.update_signals()
    assert not [name for name in copied.metrics() if name.startswith("signal/")]


def test_what_signals_remember_goes_by_their_names() -> None:
    gap = AccuracyGap()
    gap.record(train=0.9, eval=0.5)
    _, optimizer = trained(grokking_signal_fns=[gap, SlowGradient()])
    saved = saved_and_loaded(optimizer.state_dict())
    other_gap, slow = AccuracyGap(), SlowGradient()
    _, other = trained(grokking_signal_fns=[lambda: 0.5, slow, other_gap])
    other.load_state_dict(saved)
    assert other_gap() == pytest.approx(0.4)
    assert slow.state_dict()["calls"] == 3
    _, without = trained()
    without.load_state_dict(saved)
    assert without.state_dict()["param_groups"][0]["signal_state"] == saved["param_groups"][0]["signal_state"]


def test_a_signal_that_cannot_go_on_starts_afresh() -> None:
    class Renamed(SlowGradient):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("count")

    Renamed.__name__ = "SlowGradient"
    _, optimizer = trained(grokking_signal_fns=SlowGradient())
    _, other = trained(grokking_signal_fns=Renamed())
    with pytest.warns(RuntimeWarning, match="SlowGradient cannot load its state"):
        other.load_state_dict(optimizer.state_dict())
    other.step()


def test_what_another_optimizers_checkpoint_does_not_say_stays_as_it_was() -> None:
    ours, expected = parameters(), parameters()
    adamw = torch.optim.AdamW([{"params": expected[:1]}, {"params": expected[1:], "lr": 0.5}])
    set_gradients(expected)
    adamw.step()
    optimizer = GrokAdamW(
        [{"params": ours[:1], "lamb": 0.0, "gamma": 0.3}, {"params": ours[1:], "layer": 3, "gradient_clipping": 0.0}]
    )
    signal = SlowGradient()
    optimizer.set_signals(signal)
    optimizer.state_dict()
    signal()
    optimizer.load_state_dict(adamw.state_dict())
    assert signal.state_dict()["calls"] == 1
    first, second = optimizer.param_groups
    assert (first["lamb"], first["gamma"], first["layers"]) == (0, 0.3, [0])
    assert (second["lr"], second["layer"], second["layers"], second["gradient_clipping"]) == (0.5, 3, [3], 0)


def test_loading_forgets_what_the_last_step_did() -> None:
    _, optimizer = trained()
    assert optimizer.metrics()["alpha"] < 0.98
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert np.isnan(optimizer.metrics()["alpha"])
    assert np.isnan(optimizer.metrics()["signal/loss_gap"])
    assert not optimizer.stepped


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"accumulation_steps": 2, "second_moment": "raw"}], ids=str)
def test_copies_tell_gradscaler_the_same(options: dict[str, Any]) -> None:
    optimizer = GrokAdamW(parameters(), **options)
    for other in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert getattr(other, "_step_supports_amp_scaling", False) == bool(options)


@pytest.mark.usefixtures("nothing_is_free_to_read")
@pytest.mark.filterwarnings("ignore:a step was skipped")
def test_loading_forgets_skips_that_were_not_read_back() -> None:
    params = parameters()
    optimizer = GrokAdamW(params)
    set_gradients(params)
    optimizer.step()
    saved = saved_and_loaded(optimizer.state_dict())
    set_gradients(params, scale=math.nan)
    optimizer.step()
    optimizer.load_state_dict(saved)
    assert optimizer.metrics()["skipped_steps"] == 0


def test_a_step_count_from_elsewhere_becomes_a_tensor() -> None:
    _, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for i, state in saved["state"].items():
        state["step"] = 3 if i % 2 else torch.tensor(3)
    optimizer.load_state_dict(saved)
    assert all(s["step"].dtype == torch.float32 and s["step"] == 3 for s in optimizer.state.values())
    optimizer.step()


def test_a_wrapper_that_copies_attributes_shares_what_changes() -> None:
    """Signals that are set on a wrapper with copied attributes, such as Lightning's, reach the original optimizer."""
    params = parameters()
    optimizer = GrokAdamW(params)
    wrapper = GrokAdamW.__new__(GrokAdamW)
    wrapper.__dict__ = dict(optimizer.__dict__)
    wrapper.set_signals(lambda: 0.25)
    set_gradients(params)
    optimizer.step()
    assert wrapper.metrics()["signal"] == optimizer.metrics()["signal"] == 0.25


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("exp_avg", torch.zeros(2, 2), r"exp_avg of parameter 3 has shape \(2, 2\), the parameter itself \(8,\)"),
        ("step", torch.zeros(2), r"step of parameter 3 is a tensor of shape \(2,\), not one number"),
        ("step", None, "step of parameter 3=None is not one number"),
        ("step", math.nan, "step of parameter 3 is nan: give a number of steps"),
        ("step", torch.tensor(-1.0), "step of parameter 3 is -1: give a number of steps"),
        ("exp_avg_sq", None, "exp_avg_sq of parameter 3 is None, not a tensor"),
        ("grok_ema", [0.0] * 8, r"grok_ema of parameter 3 is \[0.0, .*, not a tensor"),
        ("grok_ring", torch.zeros(2, 8), r"the window of parameter 3 has shape \(2, 8\), and with window_size=3"),
        ("grok_ring_sum", ..., "the window of parameter 3 lacks grok_ring_sum: remove grok_ring, "),
        ("grok_ring_lap", torch.zeros(2), r"grok_ring_lap of parameter 3 has shape \(2,\), not \(8,\): remove"),
        ("grok_ring_lap", 1.0, "grok_ring_lap of parameter 3 is 1.0, not a tensor"),
        ("grok_ring_count", torch.zeros(2), r"grok_ring_count of parameter 3 is a tensor of shape \(2,\)"),
        ("grok_ring_count", math.inf, "grok_ring_count of parameter 3 is inf: give a number of steps"),
    ],
)
def test_a_state_that_cannot_be_used_is_refused_before_anything_changes(name: str, value: Any, words: str) -> None:
    _, optimizer = trained(window_size=3)
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    wrong["state"][3][name] = value
    if value is ...:
        del wrong["state"][3][name]
    wrong["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match=f"state_dict: {words}"):
        optimizer.load_state_dict(wrong)
    assert same(optimizer.state_dict(), before)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"lr": -1.0}, "lr=-1.0 is out of range"),
        ({"lr": None}, "lr=None is not a number"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\) is not a pair of numbers"),
        ({"betas": None}, "betas=None is not a pair of numbers"),
        ({"eps": "small"}, "eps='small' is not a number"),
        ({"max_row_change": -0.1}, "max_row_change=-0.1 is out of range"),
        ({"layer": 0.5}, "layer=0.5 is not an integer"),
        ({"layers": [0, -1, 0, 0, 0, 0]}, r"layers\[1\]=-1 is out of range"),
        ({"layers": None}, "layers=None is not a list of integers"),
        ({"train_loss": torch.ones(2)}, r"train_loss is a tensor of shape \(2,\), not one number"),
        ({"eval_acc": "high"}, "eval_acc='high' is not one number"),
        ({"skipped_steps": None}, "skipped_steps=None is not one number"),
        ({"last_norm": "x"}, "last_norm='x' is not one number"),
        ({"cycle": None}, "cycle=None is not a list of 8 numbers"),
        ({"cycle": (0.9,)}, r"cycle=\(0.9,\) is not a list of 8 numbers"),
    ],
)
@pytest.mark.parametrize("group", [0, 1])
def test_an_option_that_is_not_allowed_is_refused_before_anything_changes(
    wrong: dict[str, Any], words: str, group: int
) -> None:
    _, optimizer = trained()
    optimizer.add_param_group({"params": [(f"{i}.w", nn.Parameter(torch.ones(2))) for i in range(6)]})
    before = copy.deepcopy(optimizer.state_dict())
    given = copy.deepcopy(before)
    given["param_groups"][group].update(wrong)
    given["param_groups"][0]["weight_decay"] = 7.0
    with pytest.raises(ValueError, match=rf"state_dict: param_groups\[{group}\] cannot be loaded, as {words}"):
        optimizer.load_state_dict(given)
    assert same(optimizer.state_dict(), before)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": None}, {"betas": (0.9, "x")}, {"eps": None}])
def test_so_are_those_of_another_optimizer(wrong: dict[str, Any]) -> None:
    _, optimizer = trained()
    before = copy.deepcopy(optimizer.state_dict())
    given = torch.optim.AdamW([nn.Parameter(torch.ones(2)) for _ in range(6)]).state_dict()
    given["param_groups"][0].update(wrong)
    with pytest.raises(ValueError, match=rf"param_groups\[0\] cannot be loaded, as {next(iter(wrong))}"):
        optimizer.load_state_dict(given)
    assert same(optimizer.state_dict(), before)


@pytest.mark.parametrize("given", [None, "x", torch.zeros(3), {}, {"state": {}}])
def test_what_is_no_state_dict_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="state_dict is not an optimizer's, which has 'state' and 'param_groups'"):
        GrokAdamW(parameters()).load_state_dict(given)


def test_a_state_that_is_no_dict_is_refused() -> None:
    _, optimizer = trained()
    saved = optimizer.state_dict()
    saved["state"] = {**saved["state"], 3: 0.5}
    with pytest.raises(ValueError, match="state_dict: the state of parameter 3 is a float, not a dict"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("names", [["w"], "x", []])
def test_names_that_are_too_few_are_not_loaded(names: Any) -> None:
    model, optimizer = trained()
    names_before = copy.copy(optimizer.param_groups[0]["param_names"])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["param_names"] = names
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"] == names_before
    train(model, range(1), lambda step, loss: optimizer.step())
    assert len(optimizer.layer_table()) > 1


def test_loading_leaves_what_a_trainer_told_gradscaler() -> None:
    """Loading keeps a `_step_supports_amp_scaling` that a trainer has set, as torch's AdamW does."""
    optimizer = GrokAdamW(parameters())
    optimizer._step_supports_amp_scaling = True
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer._step_supports_amp_scaling


def test_options_that_do_not_go_together_are_refused_before_anything_changes() -> None:
    params = parameters()
    optimizer = GrokAdamW(params, compat="0.1.2")
    set_gradients(params)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    given = GrokAdamW(parameters(), max_row_change=0.03).state_dict()
    with pytest.raises(ValueError, match=r"param_groups\[0\] cannot be loaded, as max_row_change=0.03 with compat"):
        optimizer.load_state_dict(given)
    assert same(optimizer.state_dict(), before)


def test_a_schedulers_0_is_loaded() -> None:
    """A scheduler's rounding may make an lr of 0 slightly negative; a checkpoint with such an lr can be loaded."""
    optimizer = GrokAdamW(parameters())
    optimizer.param_groups[0]["lr"] = -1e-19
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == -1e-19


@pytest.mark.parametrize("changed", [{"second_moment": "raw"}, {"lamb": 0.0}])
def test_a_warning_that_is_an_error_comes_before_anything_changes(changed: dict[str, Any]) -> None:
    _, saved = trained()
    saved.free_slow_gradient()
    _, optimizer = trained(**changed)
    before = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="state_dict"):
            optimizer.load_state_dict(saved.state_dict())
    assert same(optimizer.state_dict(), before)


def test_so_does_one_about_the_preset_or_a_filter() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    preset = GrokAdamW.for_grokking(model)
    adamw = torch.optim.AdamW([{"params": group["params"]} for group in preset.param_groups], lr=0.5)
    ours = GrokfastMA(torch.optim.SGD(model.parameters()), 3, amplify_when=lambda: 0.5)
    expected = GrokfastMA(torch.optim.SGD(model.parameters()), 3, filter_type="sum")
    for optimizer, saved, words in ((preset, adamw, "the preset's"), (ours, expected, "Grokfast's filter")):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        saved.step()
        before = copy.deepcopy(optimizer.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=words):
                optimizer.load_state_dict(saved.state_dict())
        assert same(optimizer.state_dict(), before)


def test_load_hooks_see_what_is_loaded() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = GrokAdamW([p])
    p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    seen = []
    optimizer.register_load_state_dict_pre_hook(
        lambda o, s: {**s, "state": {0: {**s["state"][0], "step": torch.tensor(9.0)}}}
    )
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append((o.state[p]["exp_avg"].dtype, o.state[p]["step"]))
    )
    optimizer.load_state_dict(saved)
    assert seen == [(torch.float32, 9.0)]


def test_how_to_run_is_not_a_checkpoints_affair() -> None:
    model, optimizer = trained(foreach=False)
    _, other = trained()
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["foreach"] is None
    saved = optimizer.state_dict()
    for name in ("foreach", "fused", "capturable"):
        del saved["param_groups"][0][name]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["foreach"] is False


def test_what_a_hook_keeps_in_the_state_is_no_trouble() -> None:
    _, optimizer = trained()
    optimizer.state["a hook's"] = 1  # type: ignore[index]
    assert optimizer.metrics()["step"] > 0
    optimizer.free_slow_gradient()
    assert optimizer.state["a hook's"] == 1  # type: ignore[index]


def test_a_slow_gradient_that_is_not_in_the_checkpoint_is_missed() -> None:
    _, optimizer = trained()
    optimizer.free_slow_gradient()
    with pytest.warns(UserWarning, match="lamb=2 in group 0, and no slow gradient") as caught:
        optimizer.load_state_dict(optimizer.state_dict())
    assert caught[0].filename == __file__


@pytest.mark.usefixtures("nothing_is_free_to_read")
def test_losses_that_an_older_version_saved_as_tensors_become_numbers() -> None:
    optimizer = GrokAdamW([nn.Parameter(torch.empty(2, device="meta"))])
    saved = optimizer.state_dict()
    for name in ("train_loss", "eval_acc"):
        saved["param_groups"][0][name] = torch.tensor(0.5, dtype=torch.float64)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["train_loss"] == optimizer.param_groups[0]["eval_acc"] == 0.5


@pytest.mark.parametrize("corrupt", ["{", "[1]", 0.5])
def test_a_corrupt_memory_of_signals_starts_afresh(corrupt: Any) -> None:
    optimizer = GrokAdamW(parameters(), grokking_signal_fns=AccuracyGap())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["signal_state"] = corrupt
    with pytest.warns(RuntimeWarning, match="not JSON.*start from scratch"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("options", [{}, {"window_size": 3}, {"master_weight_bits": 32}, {"master_weight_bits": 24}])
def test_what_was_loaded_in_memory_is_a_copy(options: dict[str, Any]) -> None:
    """Loading copies the tensors. Torch's optimizers share them with the optimizer that made the state dict."""
    params, twins = parameters(), parameters()
    for p in (*params, *twins) if "master_weight_bits" in options else ():
        p.data = p.data.bfloat16()
    optimizer, other = GrokAdamW(params, **options), GrokAdamW(twins, **options)
    for _ in range(2):
        set_gradients(params)
        optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    set_gradients(twins)
    other.step()
    assert same(optimizer.state_dict(), before)
    assert not same(other.state_dict()["state"], before["state"])


@pytest.mark.parametrize(
    ("make", "entry"),
    [
        (GrokAdamW, "exp_avg"),
        (lambda params: Grokfast(torch.optim.AdamW(params)), "grokfast_ema"),
        (lambda params: Accumulate(GrokAdamW(params), steps=2), "accumulated"),
        (lambda params: Accumulate(GrokAdamW(params), steps=2), "exp_avg"),
    ],
)
def test_a_load_that_fails_changes_nothing(make: Callable[[Any], Any], entry: str) -> None:
    """A load that fails midway, e.g. for lack of memory, changes nothing. Here the copy of a meta tensor fails."""
    model = network()
    optimizer = make(list(model.parameters()))
    train(model, range(5), lambda step, loss: optimizer.step())
    before = copy.deepcopy(optimizer.state_dict())
    broken = copy.deepcopy(before)
    broken["param_groups"][0]["lr"] = 0.5
    last = max(broken["state"])
    broken["state"][last][entry] = broken["state"][last][entry].to("meta")
    with pytest.raises(NotImplementedError, match="meta"):
        optimizer.load_state_dict(broken)
    assert same(optimizer.state_dict(), before)


def test_losses_that_were_saved_as_tensors_are_numbers_once_loaded() -> None:
    optimizer = GrokAdamW(parameters())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["train_loss"] = torch.tensor(0.5)
    optimizer.load_state_dict(saved)
    assert same(optimizer.param_groups[0]["train_loss"], 0.5)


def test_a_copy_knows_whether_the_last_step_was_whole() -> None:
    params = parameters()
    optimizer = GrokAdamW(params)
    set_gradients(params)
    optimizer.step()
    assert optimizer.stepped
    assert copy.deepcopy(optimizer).stepped


@pytest.mark.filterwarnings("error")
def test_what_has_nothing_to_lose_is_loaded_without_a_warning() -> None:
    params = parameters()
    GrokAdamW(params).load_state_dict(GrokAdamW(params).state_dict())  # which has no slow gradient yet
    GrokAdamW(params).load_state_dict(torch.optim.AdamW(params).state_dict())  # this is no preset


def test_without_micro_batches_their_count_is_not_kept() -> None:
    params = parameters()
    optimizer, other = GrokAdamW(params, accumulation_steps=1), GrokAdamW(params)
    set_gradients(params)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["micro_step"] = 0
    other.load_state_dict(saved)
    assert "micro_step" not in other.state[params[0]]
