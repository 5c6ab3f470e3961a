"""State dicts of other optimizers and releases, and the files that hold them."""

from __future__ import annotations

import copy
import errno
import functools
import pickle
import re
import runpy
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grokadamw import Accumulate, GrokAdamW, Grokfast, GrokfastMA
from grokadamw.__main__ import main
from grokadamw.checkpoints import to_adamw, to_float32, to_grokadamw
from grokadamw.options import STATES
from grokadamw.signals import AccuracyGap
from grokadamw.state import formats

from .models import KEEPERS, network, parameters, train
from .test_precision import FORMATS, LOSSES

HERE = Path(__file__).parent / "checkpoints"
write = runpy.run_path(str(HERE / "write.py"))
MICRO: dict[str, Any] = {"accumulation_steps": 4, "second_moment": "raw"}
AS_ADAMW = {"lamb": 0.0, "gamma": 0.0, "gradient_clipping": 0.0}


def load(name: str) -> Any:
    return torch.load(HERE / f"{name}.pt", weights_only=True)


def continued(name: str, state_dict: Any, make: Any = GrokAdamW, **options: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a saved run after it was continued with a state dict for as long as the run itself was."""
    model = write["model"]()
    model.load_state_dict(load(name)["model"])
    optimizer = make(write["groups"](model, named="0.1.2" not in name), **write["SETTINGS"], **options)
    optimizer.load_state_dict(state_dict)
    write["train"](model, optimizer, range(5, 10))
    return model.state_dict()


def close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=tolerance, atol=tolerance)


# files that older releases wrote


@pytest.mark.parametrize("name", ["grokadamw-0.1.2", "grokadamw-0.1.2-resumed"])
def test_a_run_of_the_published_release_goes_on(name: str) -> None:
    """The file also holds the weights after five more steps, which the continued run must reach."""
    saved = load(name)
    close(continued(name, saved["optimizer"], compat="0.1.2"), saved["later"], 1e-6)


def test_a_run_of_an_older_version_goes_on() -> None:
    saved = load("grokadamw-0.2.0")
    later = continued("grokadamw-0.2.0", saved["optimizer"])
    close(later, saved["later"], 1e-6)


def test_a_run_of_adamw_goes_on() -> None:
    saved = load("torch-2.13-adamw")
    close(continued("torch-2.13-adamw", saved["optimizer"], **AS_ADAMW), saved["later"], 1e-6)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", sorted(path.stem for path in HERE.glob("*.pt")))
def test_every_file_goes_on_in_every_format(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for least in ("SMALL", "NARROW"):
        monkeypatch.setattr(formats, least, 1)  # the files' models are small
    saved = load(name)
    options = {**(AS_ADAMW if name.startswith("torch") else {}), **FORMATS[kind]}
    model = write["model"]()
    optimizer = GrokAdamW(write["groups"](model, named="0.1.2" not in name), **write["SETTINGS"], **options)
    optimizer.load_state_dict(saved["optimizer"])
    before, after = (to_float32(state_dict)["state"] for state_dict in (saved["optimizer"], optimizer.state_dict()))
    for i, state in before.items():
        for moment in (moment for moment in STATES if moment in state):
            assert (after[i][moment] - state[moment]).norm() <= 2 * LOSSES[kind] * state[moment].norm()
    later = continued(name, saved["optimizer"], **options)
    if "0.1.2" not in name:  # its arithmetic differs
        close(later, saved["later"], 0.02)
    assert all(x.isfinite().all() for x in later.values())


@pytest.mark.parametrize("name", ["grokadamw-0.1.2", "grokadamw-0.2.0", "torch-2.13-adamw"])
def test_a_conversion_leaves_what_it_is_given_alone(name: str) -> None:
    given = load(name)["optimizer"]
    before = copy.deepcopy(given)
    for convert in (to_grokadamw, to_adamw):
        convert(given)
        assert repr(given) == repr(before)


@pytest.mark.parametrize("name", sorted(path.stem for path in HERE.glob("*.pt")))
def test_older_files_know_no_accuracies_and_go_on_with_some(name: str) -> None:
    model = write["model"]()
    optimizer = GrokAdamW(write["groups"](model, named="0.1.2" not in name), grokking_signal_fns=AccuracyGap())
    optimizer.load_state_dict(load(name)["optimizer"])
    assert all(group["train_acc"] is group["eval_acc"] is None for group in optimizer.param_groups)
    optimizer.record(train_acc=1.0, eval_acc=0.25)
    write["train"](model, optimizer, range(5, 6))
    assert optimizer.metrics()["signal/AccuracyGap"] == 0.75
    assert not {"train_acc", "eval_acc"} & to_adamw(optimizer.state_dict())["param_groups"][0].keys()


# the published release


@pytest.mark.parametrize("options", [{"second_moment": "raw"}, {"window_size": 4}], ids=str)
def test_a_file_of_the_release_is_doubted_if_the_mathematics_differ(options: dict[str, Any]) -> None:
    optimizer = GrokAdamW(write["groups"](write["model"](), named=False), **options)
    with pytest.warns(UserWarning, match=f"state_dict is of a run with {next(iter(options))}="):
        optimizer.load_state_dict(load("grokadamw-0.1.2")["optimizer"])


def test_nothing_of_the_published_release_is_lost() -> None:
    given = load("grokadamw-0.1.2-resumed")["optimizer"]
    converted = to_grokadamw(given)
    assert list(converted["state"]) == list(range(6))
    for group, old in zip(converted["param_groups"], given["param_groups"], strict=True):
        in_use = list(old["state"].items())[-len(old["params"]) :]
        for key, (param, state) in zip(group["params"], in_use, strict=True):
            assert converted["state"][key].keys() == {"step", "exp_avg", "exp_avg_sq", "grok_ema"}
            assert all(converted["state"][key][name] is value for name, value in state.items())
            assert converted["state"][key]["exp_avg"].shape == param.shape
            assert converted["state"][key] is not state
        kept = {name: value for name, value in old.items() if name != "state"}
        assert group == {**kept, "second_moment": "filtered", "window_size": None}  # as that release computes


@pytest.mark.parametrize("how", ["too few", "not a multiple", "other steps", "other shapes"])
def test_a_state_that_nobody_can_tell_whose_it_is_is_refused(how: str) -> None:
    given = load("grokadamw-0.1.2-resumed")["optimizer"]
    group = given["param_groups"][0]
    entries = list(group["state"].items())
    if how == "other steps":
        entries[-1][1]["step"] = 2
    if how == "other shapes":
        entries[0] = (nn.Parameter(torch.zeros(7)), entries[0][1])
    group["state"] = dict({"too few": entries[:2], "not a multiple": entries[1:]}.get(how, entries))
    optimizer = GrokAdamW(write["groups"](write["model"](), named=False))
    with pytest.raises(ValueError, match=r"0\.1\.2.*param_groups\[0\].*Delete the key 'state'"):
        optimizer.load_state_dict(given)
    assert not optimizer.state
    for group in given["param_groups"]:
        del group["state"]
    optimizer.load_state_dict(given)
    assert not optimizer.state


def test_a_run_that_was_saved_before_its_first_step() -> None:
    given = load("grokadamw-0.1.2")["optimizer"]
    for group in given["param_groups"]:
        del group["state"]
    assert to_grokadamw(given)["state"] == {}


# torch.optim.AdamW and Adam


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_and_back(kind: Any, dtype: torch.dtype) -> None:
    """A run that AdamW, GrokAdamW (set like AdamW) and AdamW take in turn equals one run of AdamW."""
    model, whole = network(dtype), network(dtype)
    settings = {"lr": 0.01, "weight_decay": 0.0 if kind is torch.optim.Adam else 0.1}
    uninterrupted = kind(whole.parameters(), **settings)
    train(whole, range(15), lambda step, loss: uninterrupted.step())

    first = kind(model.parameters(), **settings)
    train(model, range(5), lambda step, loss: first.step())
    ours = GrokAdamW(model.named_parameters(), **AS_ADAMW, lr=7.0, foreach=False)
    ours.load_state_dict(first.state_dict())
    assert ours.param_groups[0]["lr"] == 0.01
    assert not {"amsgrad", "decoupled_weight_decay"} & ours.param_groups[0].keys()
    train(model, range(5, 10), lambda step, loss: ours.step())
    second = kind(model.parameters())
    second.load_state_dict(to_adamw(ours.state_dict()) if kind is torch.optim.AdamW else as_adam(ours))
    assert second.param_groups[0].keys() == first.param_groups[0].keys() | {"param_names", "decoupled_weight_decay"}
    assert second.param_groups[0]["foreach"] is None
    train(model, range(10, 15), lambda step, loss: second.step())
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-13}[dtype]
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def as_adam(ours: GrokAdamW) -> dict[str, Any]:
    """Return a state dict for Adam, which without weight decay differs from AdamW's in one flag alone."""
    state_dict = to_adamw(ours.state_dict())
    for group in state_dict["param_groups"]:
        group["decoupled_weight_decay"] = False
    return state_dict


def test_the_slow_gradient_starts_at_zero_and_is_left_behind() -> None:
    saved = load("torch-2.13-adamw")["optimizer"]
    model = write["model"]()
    optimizer = GrokAdamW(write["groups"](model, named=True))
    optimizer.load_state_dict(saved)
    assert not any("grok_ema" in state for state in optimizer.state.values())
    write["train"](model, optimizer, range(1))
    for param, state in optimizer.state.items():
        assert state["step"] == 6
        c = optimizer.metrics()["clip_coefficient"]
        torch.testing.assert_close(state["grok_ema"], (1 - optimizer.metrics()["alpha"]) * c * param.grad)
    exported = to_adamw(optimizer.state_dict())
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in exported["state"].values())
    reference = torch.optim.AdamW(write["groups"](model, named=True))
    assert all(
        ours.keys() == expected.keys() | {"decoupled_weight_decay"}  # torch 2.6 lacks this key
        for ours, expected in zip(exported["param_groups"], reference.param_groups, strict=True)
    )


@pytest.mark.filterwarnings("ignore:this was saved after 1 of")
@pytest.mark.parametrize("keeper", [name for name in KEEPERS if "SGD" not in name])
def test_what_else_is_kept_is_left_behind(keeper: str) -> None:
    model = network()
    optimizer = KEEPERS[keeper](model)
    train(model, range(3), lambda step, loss: optimizer.step())
    exported = to_adamw(optimizer.state_dict())
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in exported["state"].values())
    known = torch.optim.AdamW(model.named_parameters()).param_groups[0].keys() | {"decoupled_weight_decay"}
    assert exported["param_groups"][0].keys() == known


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "Accumulate": lambda inner: Accumulate(inner, 3),
    "Grokfast": Grokfast,
    "GrokfastMA": lambda inner: GrokfastMA(inner, 2),
    "both": lambda inner: Accumulate(Grokfast(inner), 3),
}


@pytest.mark.parametrize("inner", [torch.optim.AdamW, functools.partial(GrokAdamW, lamb=0.0)])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        *(("Accumulate", "Grokfast"), ("Accumulate", "GrokfastMA"), ("both", "GrokfastMA")),
        *(("Grokfast", "Accumulate"), ("GrokfastMA", "Accumulate"), ("both", "Accumulate"), ("GrokfastMA", "both")),
    ],
)
@pytest.mark.filterwarnings("ignore:state_dict is of a run with Grokfast's filter")
def test_another_wrapper_drops_what_is_not_its_own(before: str, after: str, inner: Any) -> None:
    model = network()
    saving, loading = (WRAPPERS[name](inner(model.parameters())) for name in (before, after))
    train(model, range(5), lambda step, loss: saving.step())
    what = "this optimizer keeps" if after == "both" else "has entries of Accumulate or Grokfast"
    with pytest.warns(UserWarning, match=what):
        loading.load_state_dict(saving.state_dict())
    alone = WRAPPERS[after](inner(model.parameters()))
    train(model, range(5), lambda step, loss: alone.step())
    assert set(loading.param_groups[0]) - set(alone.param_groups[0]) <= {"grokfast_alpha"}  # the other filter's key
    assert all(set(state) <= set(alone.state[param]) for param, state in loading.state.items())


class Foreign(torch.optim.Optimizer):
    """A wrapper of another library, which shares groups and state as Accelerate's does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name) if name in ("inner", "__class__") else getattr(self.inner, name)


def test_another_librarys_wrapper_in_between_loses_nothing() -> None:
    def made(model: nn.Module) -> Accumulate:
        return Accumulate(Foreign(Grokfast(torch.optim.AdamW(model.parameters()))), 2)

    model, other = network(), network()
    optimizer, again = made(model), made(other)
    train(model, range(5), lambda step, loss: optimizer.step())
    other.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for trained, stepped in ((model, optimizer), (other, again)):
        train(trained, range(5, 10), lambda step, loss, stepped=stepped: stepped.step())
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("wrap", [lambda inner: Accumulate(inner, 3), lambda inner: Grokfast(inner)])
def test_what_a_wrapper_collected_is_dropped_with_a_warning(wrap: Callable[[Any], Any]) -> None:
    """A later wrapper would go on with gradients of long ago if the state kept them."""
    model = network()
    wrapped, plain, again = (
        wrap(GrokAdamW(model.parameters(), lamb=0.0)),
        *(GrokAdamW(model.parameters(), lamb=0.0) for _ in range(2)),
    )
    train(model, range(5), lambda step, loss: wrapped.step())
    with pytest.warns(UserWarning, match="are dropped: to continue that run, load it into the same wrapper"):
        plain.load_state_dict(wrapped.state_dict())
    of_plain = set(GrokAdamW(network().parameters()).param_groups[0])
    saved = plain.state_dict()
    assert set(saved["param_groups"][0]) == of_plain
    assert all(set(state) <= {"step", *STATES} for state in saved["state"].values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(again).load_state_dict(saved)


@pytest.mark.parametrize("convert", [to_adamw, to_grokadamw])
def test_a_cycle_before_the_first_step_has_no_moments_yet(convert: Callable[[Any], Any]) -> None:
    model = network()
    optimizer = Accumulate(GrokAdamW(model.parameters()), steps=3)
    train(model, range(2), lambda step, loss: optimizer.step())
    with pytest.warns(UserWarning, match="has entries of Accumulate or Grokfast"):
        converted = convert(optimizer.state_dict())
    assert converted["state"] == {}


def test_a_loss_that_adamw_cannot_help_is_warned_of() -> None:
    """The conversion loses low bits and a part of a step. It warns of these losses, and of nothing else."""
    for dtype, options, steps, message in (
        (torch.bfloat16, {"master_weight_bits": 24}, 1, "low bits .* save full_precision_state_dict"),
        (torch.float32, MICRO, 2, "after 2 of accumulation_steps=4 micro-batches: .* Save where optimizer.stepped"),
        (torch.bfloat16, {}, 1, ""),
        (torch.float32, {"master_weight_bits": 24}, 1, ""),
        (torch.float32, MICRO, 4, ""),
    ):
        model = network(dtype)
        optimizer = GrokAdamW(model.named_parameters(), **options)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        for _ in range(steps):
            optimizer.step()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            to_adamw(optimizer.state_dict())
        assert len(seen) == bool(message)
        assert all(re.search(message, str(warning.message)) for warning in seen)


def test_what_a_scheduler_and_hooks_have_added_stays() -> None:
    saved = load("torch-2.13-adamw")["optimizer"]
    saved["param_groups"][0]["initial_lr"] = 0.5
    saved["state"]["a hook's"] = 1
    for there in (to_grokadamw(saved), to_grokadamw(to_grokadamw(saved)), to_adamw(to_grokadamw(saved))):
        assert there["param_groups"][0]["initial_lr"] == 0.5
        assert there["state"]["a hook's"] == 1


def test_a_slow_gradient_that_adamw_carried_along_is_stale() -> None:
    """AdamW accepts our state dict and keeps the entries that it does not know, so μ has missed AdamW's steps."""
    model = network()
    optimizer = GrokAdamW(model.named_parameters())
    train(model, range(2), lambda step, loss: optimizer.step())
    adamw = torch.optim.AdamW(model.named_parameters())
    adamw.load_state_dict(optimizer.state_dict())
    assert all("grok_ema" in state for state in adamw.state.values())
    train(model, range(2, 4), lambda step, loss: adamw.step())
    with pytest.warns(UserWarning, match="no slow gradient"):
        optimizer.load_state_dict(adamw.state_dict())
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


def test_adams_tensor_betas_become_numbers() -> None:
    saved = load("torch-2.13-adamw")["optimizer"]
    saved["param_groups"][0]["betas"] = (torch.tensor(0.5), torch.tensor(0.75))
    betas = to_grokadamw(saved)["param_groups"][0]["betas"]
    assert betas == (0.5, 0.75)
    assert all(type(beta) is float for beta in betas)


def test_amsgrad_is_refused() -> None:
    model = network()
    adam = torch.optim.AdamW(model.parameters(), amsgrad=True)
    train(model, range(2), lambda step, loss: adam.step())
    saved = adam.state_dict()
    optimizer = GrokAdamW(model.parameters())
    with pytest.raises(ValueError, match="amsgrad=True.*set 'amsgrad' to False"):
        optimizer.load_state_dict(saved)
    saved["param_groups"][0]["amsgrad"] = False
    optimizer.load_state_dict(saved)
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values())
    first, second = parameters()
    in_part = torch.optim.AdamW([{"params": [first]}, {"params": [second], "amsgrad": True}])
    with pytest.raises(ValueError, match="amsgrad=True"):
        to_grokadamw(in_part.state_dict())


def test_adams_own_weight_decay_is_doubted() -> None:
    model = network()
    if "decoupled_weight_decay" not in torch.optim.Adam(model.parameters()).defaults:
        pytest.skip("this torch's state dicts do not tell Adam from AdamW")
    adam = torch.optim.Adam(model.parameters(), weight_decay=0.25)
    for take in (to_grokadamw, GrokAdamW(model.parameters()).load_state_dict):
        with pytest.warns(UserWarning, match=r"weight_decay=0\.25 was Adam's") as caught:
            take(adam.state_dict())
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_grokadamw(torch.optim.AdamW(model.parameters(), weight_decay=0.25).state_dict())
        to_grokadamw(torch.optim.Adam(model.parameters()).state_dict())  # this Adam has no decay


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.NAdam, torch.optim.RMSprop])
def test_another_kind_of_optimizer_is_refused(kind: Any, stepped: bool) -> None:
    model = network()
    other = kind(model.parameters(), lr=0.1)
    train(model, range(int(stepped)), lambda step, loss: other.step())
    with pytest.raises(
        ValueError, match=r"an optimizer that is not supported: its groups have .*lr.* from others, start with"
    ):
        GrokAdamW(model.parameters()).load_state_dict(other.state_dict())


def test_a_common_option_does_not_make_it_ours() -> None:
    """The groups of AdaBound have `gamma`, too."""
    zeros = torch.zeros(3)
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "final_lr": 0.1, "gamma": 1e-3, "eps": 1e-8, "params": [0]}
    saved = {"state": {0: {"step": 7, "exp_avg": zeros, "exp_avg_sq": zeros}}, "param_groups": [group]}
    with pytest.raises(ValueError, match="an optimizer that is not supported: its groups have "):
        GrokAdamW([nn.Parameter(zeros)]).load_state_dict(saved)


def test_entries_of_others_are_no_other_kind_of_optimizer() -> None:
    """Other code may keep averages of weights in the state, for parameters that were never trained, too."""
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = GrokAdamW(model.named_parameters())
    train(model, range(1), lambda step, loss: optimizer.step())
    for p in model.parameters():
        optimizer.state[p]["slow_weights"] = p.detach().clone()
    again = GrokAdamW(model.named_parameters())
    again.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(again.state[p]["slow_weights"], p) for p in model.parameters())


@pytest.mark.parametrize("keeper", [name for name in KEEPERS if "SGD" not in name])
def test_json_makes_strings_of_keys(keeper: str) -> None:
    model, other = network(), network()
    optimizer, again = KEEPERS[keeper](model), KEEPERS[keeper](other)
    train(model, range(4), lambda step, loss: optimizer.step())
    saved = copy.deepcopy(optimizer.state_dict())
    again.load_state_dict({**saved, "state": {str(key): state for key, state in saved["state"].items()}})
    other.load_state_dict(model.state_dict())
    for trained, stepped in ((model, optimizer), (other, again)):
        train(trained, range(4, 7), lambda step, loss, stepped=stepped: stepped.step())
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert not any(isinstance(key, str) for key in again.state)


def test_a_state_of_none_counts_as_missing() -> None:
    """ZeroRedundancyOptimizer writes None for parameters that other ranks step."""
    model, other = network(), network()
    optimizer, again = GrokAdamW(model.parameters()), GrokAdamW(other.parameters())
    train(model, range(2), lambda step, loss: optimizer.step())
    saved = optimizer.state_dict()
    saved["state"][1] = None
    again.load_state_dict(saved)
    first, second = list(other.parameters())[:2]
    assert torch.equal(again.state[first]["exp_avg"], optimizer.state[next(model.parameters())]["exp_avg"])
    assert second not in again.state


def test_moments_without_a_step_count_are_refused() -> None:
    saved = load("torch-2.13-adamw")["optimizer"]
    del saved["state"][0]["step"]
    with pytest.raises(ValueError, match="its state of parameter 0 has exp_avg, exp_avg_sq"):
        to_grokadamw(saved)


@pytest.mark.parametrize("value", [None, {}, {"state": {}}, {"state": {}, "param_groups": [1]}, {"optimizer": {}}])
def test_what_is_no_state_dict_is_refused(value: Any) -> None:
    for convert in (to_grokadamw, to_adamw):
        with pytest.raises(ValueError, match="not an optimizer's, which"):
            convert(value)


def test_a_whole_optimizer_that_was_pickled_by_the_published_release_is_refused() -> None:
    optimizer = GrokAdamW.__new__(GrokAdamW)
    with pytest.raises(ValueError, match=r"pickled optimizer of grokadamw 0\.1\.2.*state_dict\(\)"):
        optimizer.__setstate__({"defaults": {"lr": 0.1}, "state": {}, "param_groups": []})


# names


def named(order: list[str], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[tuple[str, nn.Parameter]]]:
    model = network(dtype)
    params = dict(model.named_parameters())
    return model, [(name, params[name.removeprefix("module.")]) for name in order]


def test_state_finds_its_parameter_by_name() -> None:
    """State goes to the parameter of the same name, also inside wrappers; a group's numbers go with its names."""
    names = [name for name, _ in network().named_parameters()]
    model, params = named(names)
    gap = AccuracyGap()
    gap.record(train=0.75, eval=0.5)
    optimizer = GrokAdamW(
        [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "lr": 0.25}], grokking_signal_fns=gap
    )
    train(model, range(3), lambda step, loss: optimizer.step())
    twin, params = named([f"module.{name}" for name in reversed(names)])
    other = GrokAdamW([{"params": params[:4]}, {"params": params[4:]}], grokking_signal_fns=AccuracyGap())
    other.load_state_dict(optimizer.state_dict())
    ours, expected = dict(model.named_parameters()), dict(twin.named_parameters())
    assert [group["lr"] for group in other.param_groups] == [0.25, 0.5]
    table = [(row.layer, row.names, row.beta1) for row in optimizer.layer_table()]
    assert [
        (row.layer, [name.removeprefix("module.") for name in row.names][::-1], row.beta1)
        for row in other.layer_table()
    ] == table
    for name in names:
        for key, value in optimizer.state[ours[name]].items():
            assert torch.equal(other.state[expected[name]][key], value)
    other.update_signals()
    assert other.metrics()["signal"] == 0.25


def test_names_stay_the_optimizers_own() -> None:
    """What a wrapper added to the saved names must not separate groups that are added later from their layers."""
    names = [name for name, _ in network().named_parameters()]
    model, params = named([f"module.{name}" for name in names[::2]])
    optimizer = GrokAdamW(params)
    train(model, range(2), lambda step, loss: optimizer.step())
    _, params = named(names)
    other = GrokAdamW(params[::2])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["param_names"] == names[::2]
    other.add_param_group({"params": params[1::2]})
    assert other.param_groups[1]["layers"] == other.param_groups[0]["layers"] == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:two parameters are called")
@pytest.mark.parametrize("change", ["one renamed", "none on one side", "one twice", "one twice on both sides"])
def test_other_names_go_by_order_as_in_torch(change: str) -> None:
    names = [name for name, _ in network().named_parameters()]
    model, params = named(names)
    if change == "one twice on both sides":
        params[0] = (params[1][0], params[0][1])
    optimizer = GrokAdamW(params)
    train(model, range(2), lambda step, loss: optimizer.step())
    twin, params = named(names)
    if change == "one renamed":
        params[0] = ("renamed", params[0][1])
    if change.startswith("one twice"):
        params[0] = (params[1][0], params[0][1])
    other = GrokAdamW([p for _, p in params] if change == "none on one side" else params)
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(optimizer.state[a]["exp_avg"], other.state[b]["exp_avg"])
    if change == "one renamed":  # the new name stays
        assert other.param_groups[0]["param_names"][0] == "renamed"


@pytest.mark.parametrize("change", ["one renamed and moved", "other groups", "one group more", "one parameter more"])
def test_names_that_leave_a_doubt_are_refused(change: str) -> None:
    names = [name for name, _ in network().named_parameters()]
    model, params = named(names)
    optimizer = GrokAdamW([{"params": params[:3]}, {"params": params[3:]}])
    train(model, range(2), lambda step, loss: optimizer.step())
    _, params = named(names)
    if change == "one renamed and moved":
        params = [("renamed", params[5][1]), *params[:5]]
    cut = 4 if change == "other groups" else 3
    groups: list[dict[str, Any]] = [{"params": params[:cut]}, {"params": params[cut:]}]
    if change == "other groups":
        groups = [{"params": params[::2]}, {"params": params[1::2]}]
    if change == "one group more":
        groups.append({"params": [("more", nn.Parameter(torch.zeros(1)))]})
    if change == "one parameter more":
        groups[1]["params"].append(("more", nn.Parameter(torch.zeros(1))))
    other = GrokAdamW(groups)
    message = {
        "one group more": "different number of parameter groups, 2, than the optimizer, 3",
        "one parameter more": "doesn't match the size of optimizer's group",
        "one renamed and moved": r"both name '0\.weight', in different places.*'4\.bias', 'renamed'",
        "other groups": "both name .* in different places.*only one side has these groups",
    }
    with pytest.raises(ValueError, match=message[change]):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_names_that_are_there_twice_are_refused_in_another_order() -> None:
    """Two names become equal if a submodule is called `_orig_mod`, as torch.compile calls its model."""
    params = [(name, nn.Parameter(torch.ones(3))) for name in ("weight", "_orig_mod.weight", "bias")]
    saved = GrokAdamW(params).state_dict()
    GrokAdamW(params).load_state_dict(saved)
    with pytest.raises(ValueError, match="both name 'weight' twice, and others in another order"):
        GrokAdamW(params[::-1]).load_state_dict(saved)


# python -m grokadamw convert


def test_a_file_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command `convert` finds a state dict wherever it is in a file, and leaves everything else as it was."""
    name = "grokadamw-0.1.2-resumed"
    target = tmp_path / "new.pt"
    subprocess.run([sys.executable, "-m", "grokadamw", "convert", HERE / f"{name}.pt", target], check=True)
    saved, converted = load(name), torch.load(target, weights_only=True)
    close(converted["model"], saved["model"], 0)
    close(continued(name, converted["optimizer"], compat="0.1.2"), saved["later"], 1e-6)
    assert list(tmp_path.iterdir()) == [target]
    assert main(["convert", str(target), str(target), "--to", "adamw"]) == 0
    assert capsys.readouterr().out == f"{target}: 1 optimizer state dict for adamw\n"
    torch.optim.AdamW(write["groups"](write["model"](), named=False)).load_state_dict(torch.load(target)["optimizer"])


def test_a_converted_file_keeps_its_permissions_and_links(tmp_path: Path) -> None:
    real, link = tmp_path / "real.pt", tmp_path / "link.pt"
    real.write_bytes((HERE / "torch-2.13-adamw.pt").read_bytes())
    real.chmod(0o640)
    link.symlink_to(real)
    assert main(["convert", str(link), str(link)]) == 0
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert "amsgrad" not in torch.load(real)["optimizer"]["param_groups"][0]


def test_state_dicts_are_found_in_lists_and_dicts(tmp_path: Path) -> None:
    """Lightning keeps state dicts in a list. A converted file has lists and tuples where they were."""
    one = load("torch-2.13-adamw")["optimizer"]
    before, after = tmp_path / "before.pt", tmp_path / "after.pt"
    deep = ({"o": one}, [1]), OrderedDict(o=one)
    torch.save({"optimizer_states": [one, one], "epoch": 3, "deep": deep[0], "ordered": deep[1]}, before)
    assert main(["convert", str(before), str(after)]) == 0
    content = torch.load(after)
    assert (content["epoch"], content["deep"][1]) == (3, [1])
    assert type(content["ordered"]) is OrderedDict
    for state_dict in [*content["optimizer_states"], content["deep"][0]["o"], content["ordered"]["o"]]:
        assert "amsgrad" not in state_dict["param_groups"][0]


def _around_itself() -> list[Any]:
    content: list[Any] = []
    content.append(content)
    return content


class Dangerous:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("it-ran"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Dangerous(), "it holds builtins.getattr, pathlib."),  # the class's name differs between Python versions
        ({"model": {}}, "holds no optimizer state dict"),
        ({"state": {}, "param_groups": [{}]}, "holds no optimizer state dict"),
        (
            {"state": {}, "param_groups": [{"params": [], "lr": 1, "eps": 1, "amsgrad": False}]},
            "no betas, weight_decay",
        ),
        (_around_itself(), "a part of it contains itself"),
        (b"not a file of torch's", "torch.save did not write this file"),
        (b"hello", "torch.save did not write this file"),
        (b"", "torch.save did not write this file"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_converted_is_refused(
    content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "in.pt", tmp_path / "out.pt"
    target.write_text("precious")
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        source.write_bytes(content)
    elif content is not None:
        torch.save(content, source)
    assert main(["convert", str(source), str(target)]) == 1
    assert message in capsys.readouterr().err
    assert target.read_text() == "precious"
    assert set(tmp_path.iterdir()) <= {source, target}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 1920 vs 1812\nand more")]
)
def test_what_cannot_be_written_leaves_the_old_file(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.pt"
    target.write_text("precious")

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("os.fsync", fail)
    assert main(["convert", str(HERE / "torch-2.13-adamw.pt"), str(target)]) == 1
    reason = capsys.readouterr().err.partition(f"grokadamw: {target}: cannot be written: ")[2]
    assert reason in ("No space left on device\n", "unexpected pos 1920 vs 1812\n")
    assert target.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [target]


def test_the_conversions_need_no_optimizer() -> None:
    """In a package without __init__ the conversions import the modules for groups and state formats, and no step."""
    code = """
import sys, types
package = types.ModuleType("grokadamw")
package.__path__ = sys.argv[1:]
sys.modules["grokadamw"] = package
import grokadamw.checkpoints
print(*sorted(name for name in sys.modules if name.startswith("grokadamw.")))
"""
    folder = HERE.parent.parent / "grokadamw"
    loaded = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True).stdout
    private = ("_checks", "_hints", "_numbers", "_warn")
    public = ("checkpoints", "layers", "options", "param_groups", "shards")
    needed = (*private, *public, "state", "state.formats", "state.window")
    assert loaded.split() == [f"grokadamw.{name}" for name in needed]


def test_a_pickled_optimizer_of_an_older_version_goes_on() -> None:
    """The groups of an older version lack the keys that came later."""
    optimizer = GrokAdamW(network().named_parameters())
    state = optimizer.__getstate__()
    for where in (state["defaults"], *state["param_groups"]):
        for name in ("capturable", "fused", "train_acc", "eval_acc"):
            del where[name]
    older = GrokAdamW.__new__(GrokAdamW)
    older.__setstate__(pickle.loads(pickle.dumps(state)))
    for p in older.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    older.step()
    assert older.param_groups[0]["fused"] is None
    older.add_param_group({"params": [("new", nn.Parameter(torch.ones(1)))]})
    assert all(group["train_acc"] is group["eval_acc"] is None for group in older.param_groups)


@pytest.mark.parametrize("options", [{"state_dtype": "int8"}, {"window_size": 3}], ids=str)
def test_an_adamw_made_from_the_groups_changes_no_checkpoint(options: dict[str, Any]) -> None:
    """torch's AdamW shares the groups that it is given, and writes its own options into them."""
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), **options)
    train(model, range(4), lambda step, loss: optimizer.step())
    before = copy.deepcopy(optimizer.state_dict())
    torch.optim.AdamW(optimizer.param_groups)
    resumed = GrokAdamW(copy.deepcopy(model).named_parameters(), **options)
    resumed.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(resumed.state_dict()["state"], before["state"], rtol=0, atol=0)


def test_keys_that_are_strings_are_checked_and_may_be_a_hooks() -> None:
    saved = GrokAdamW(parameters()).state_dict()
    saved["state"]["7"] = {"of a hook": 1}
    assert to_grokadamw(saved)["state"] == {"7": {"of a hook": 1}}
    saved["state"]["0"] = 3
    with pytest.raises(ValueError, match="the state of parameter 0 is a int, not a dict"):
        to_grokadamw(saved)


def test_keys_of_wrappers_are_left_behind_before_the_first_step_too() -> None:
    (group,) = to_adamw(Accumulate(Grokfast(GrokAdamW(parameters(), lamb=0.0)), 2).state_dict())["param_groups"]
    assert not any(name.startswith(("accumul", "grokfast")) for name in group)
