"""Convert state dicts of other optimizers and releases to GrokAdamW's, and back.

A state dict is what an optimizer's `state_dict()` returns: `{"state": {id: {name: tensor}}, "param_groups": [...]}`.
The functions do not modify their argument, and their results share its tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain
from types import NoneType
from typing import Any, TypeAlias

from torch import Tensor

from ._warn import warn
from .options import STATES
from .param_groups import GROUP_KEYS
from .state import window
from .state.formats import unpacked

__all__ = ["is_state_dict", "to_adamw", "to_float32", "to_grokadamw"]

StateDict: TypeAlias = dict[str, Any]
_Group: TypeAlias = dict[str, Any]

# keys of torch.optim.AdamW's and Adam's groups that GrokAdamW's groups lack, or use with another meaning
_ADAMW: _Group = {"amsgrad": False, "decoupled_weight_decay": True}
_ADAMW |= {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
# keys of GrokAdamW's groups that AdamW does not share, and state entries that AdamW lacks
_OURS = {*GROUP_KEYS} - {"lr", "betas", "eps", "weight_decay", "maximize", *_ADAMW}
_MARKS = _OURS - {"gamma"}  # any of these keys marks a group as ours; AdaBound's groups have gamma, too
# prefixes of the wrappers' group keys and state entries
OF_ACCUMULATE, OF_FILTERS = ("accumulated", "accumulation_cycle"), ("grokfast_",)
_COUNTS = ("accumulated_grads", "grokfast_step", "grokfast_ring_count")  # the number of gradients in those entries
_OUR_STATE = ("grok_ema", *window.names("grok_"), "micro_step", "param_low")
_NEEDED = ("step", "exp_avg", "exp_avg_sq")  # all of AdamW's state
_SUPPORTED = (
    "GrokAdamW continues from torch.optim.AdamW, Adam and GrokAdamW; from others, start with fresh moments, or convert "
    "the state dict to one of these forms"
)


def is_state_dict(value: Any) -> bool:
    """Return True if the value is an optimizer's state dict."""
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list) and all(isinstance(group, dict) and "params" in group for group in groups)


def check_form(value: Any) -> None:
    """Raise ValueError if the value is not an optimizer's state dict."""
    if not is_state_dict(value):
        raise ValueError(
            "state_dict is not an optimizer's, which has 'state' and 'param_groups': give what state_dict() returned, "
            "or the part of a checkpoint that holds it"
        )
    for key, state in _states(value):
        if not isinstance(state, (dict, NoneType)):
            raise ValueError(f"state_dict: the state of parameter {key} is a {type(state).__name__}, not a dict")


def to_grokadamw(state_dict: StateDict) -> StateDict:
    """Convert a state dict to GrokAdamW's form, from which `GrokAdamW.load_state_dict` continues the run.

    From `torch.optim.AdamW` or `Adam`, it takes the moments, the step counts and the options that GrokAdamW has, too.
    They have no slow gradient μ, so μ starts at 0. From grokadamw 0.1.2, it takes everything. A state dict of this
    version is returned as it is. Anything that an `Accumulate` or `Grokfast` wrapper collected is left out, with a
    warning.

    Raises:
        ValueError: the run cannot be continued without loss. The message says why, and what to do.
    """
    check_form(state_dict)
    state_dict = without_wrappers(with_whole_states(state_dict))
    groups = state_dict["param_groups"]
    if any("state" in group for group in groups):
        return _from_0_1_2(state_dict)
    of_adam = any("amsgrad" in group for group in groups)
    if groups and not of_adam and not any(name in group for group in groups for name in _MARKS):
        raise ValueError(
            f"state_dict is of an optimizer that is not supported: its groups have {_listed(groups[0])}. {_SUPPORTED}"
        )
    for key, state in _states(state_dict):
        missing = [name for name in _NEEDED if name not in state] if state else []
        if missing and (of_adam or len(missing) < len(_NEEDED)):  # ours may hold only the entries of wrappers
            raise ValueError(
                f"state_dict is of an optimizer that is not supported: its state of parameter {key} has "
                f"{_listed(state)}. {_SUPPORTED}"
            )
    return _from_adam(state_dict) if of_adam else state_dict


def with_whole_states(state_dict: StateDict) -> StateDict:
    """Return a state dict in which entries under a parameter's key written as a string are moved to the key itself.

    JSON turns integer keys into strings, as does torch.distributed.checkpoint for values that are not tensors.
    """
    known = {key for group in state_dict["param_groups"] for key in group["params"]}
    state = dict(state_dict["state"])
    strings = [k for k in state if isinstance(k, str) and k not in known and k.isdecimal() and int(k) in known]
    for key in strings:
        own = state.pop(key)
        check_form({**state_dict, "state": {int(key): own}})
        state[int(key)] = {**(state.get(int(key)) or {}), **(own or {})}
    return {**state_dict, "state": state} if strings else state_dict


def without_wrappers(state_dict: StateDict, but: tuple[str, ...] = ()) -> StateDict:
    """Remove the wrappers' entries, and warn if they hold gradients. Names that begin with one of `but` stay.

    If a wrapper has already taken its state out, its group keys stay, because it needs them.
    """
    prefixes = tuple(prefix for prefix in (*OF_ACCUMULATE, *OF_FILTERS) if prefix not in but)
    states = {key: state for key, state in _states(state_dict) if isinstance(state, dict)}
    if not any(name.startswith(prefixes) for state in states.values() for name in state):
        return state_dict
    counts = [name for name in _COUNTS if name.startswith(prefixes)]
    if any(int(state.get(name, 0)) > 0 for state in states.values() for name in counts):
        warn(
            "state_dict has entries of Accumulate or Grokfast, which are dropped: to continue that run, load it into "
            "the same wrapper",
            UserWarning,
        )

    def rest(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if not name.startswith(prefixes)}

    kept = {key: rest(state) if key in states else state for key, state in state_dict["state"].items()}
    # before its first step the optimizer has no state of its own
    kept = {key: state for key, state in kept.items() if state or not states.get(key)}
    return {**state_dict, "state": kept, "param_groups": list(map(rest, state_dict["param_groups"]))}


def to_float32(state_dict: StateDict) -> StateDict:
    """Convert a GrokAdamW state dict so that m, v and μ are at least float32, whatever `state_dtype` it was saved in.

    Low bits of parameters stay as they are: see `full_precision_state_dict`. A GrokAdamW with any `state_dtype` can
    load both the original and the converted state dict.

    Raises:
        ValueError: as for `to_grokadamw`.
    """
    ours = to_grokadamw(state_dict)
    states = {key: _unpacked(state) if isinstance(state, dict) else state for key, state in ours["state"].items()}
    groups = [{**group, "state_dtype": "float32"} for group in ours["param_groups"]]
    return {**ours, "state": states, "param_groups": groups}


def _unpacked(state: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: unpacked(state, name) for name in STATES if name in state}
    return {name: numbers.get(name, value) for name, value in state.items() if not name.endswith("_scale")}


def to_adamw(state_dict: StateDict) -> StateDict:
    """Convert a state dict to `torch.optim.AdamW`'s form: moments, steps and AdamW's options.

    Everything else is left out: μ, signals, layers and their group keys. AdamW has one β1 for all layers. If γ is not
    0, the first moments of deep layers were averaged with a smaller β1; they adapt within a few steps. A warning is
    issued if weights lose their low bits, which `full_precision_state_dict` saves; if the moments hold only some of a
    step's micro-batches, which AdamW takes for a whole step; and in the cases of `to_grokadamw`.

    Raises:
        ValueError: as for `to_grokadamw`.
    """
    ours, groups, states = to_float32(state_dict), [], {}
    _warn_of_loss(ours)
    for group in ours["param_groups"]:
        left_out = {*_OURS, *_ADAMW, *(name for name in group if name.startswith((*OF_ACCUMULATE, *OF_FILTERS)))}
        groups.append({**_ADAMW, "maximize": False, **_without(group, left_out)})
    for key, state in ours["state"].items():
        states[key] = {n: state[n] for n in _NEEDED if n in state} if isinstance(state, dict) else state
    return {**ours, "state": states, "param_groups": groups}


def _warn_of_loss(state_dict: StateDict) -> None:
    """Warn of lost low bits of weights, and of moments that hold only a part of a step's micro-batches."""
    if any("param_low" in state for _, state in _states(state_dict) if isinstance(state, dict)):
        warn(
            "the weights' low bits (param_low, of master_weight_bits) are left out, as AdamW has none: weights keep "
            "only the bits of their dtype. To keep all bits, save full_precision_state_dict(model, optimizer), too",
            UserWarning,
        )
    first: _Group = next(iter(state_dict["param_groups"]), {})
    if (done := int(first.get("micro_step") or 0)) > 0:
        warn(
            f"this was saved after {done} of accumulation_steps={first['accumulation_steps']} micro-batches: m and v "
            "hold a part of a step, which AdamW takes for a whole one. Save where optimizer.stepped is True",
            UserWarning,
        )


def _from_adam(state_dict: StateDict) -> StateDict:
    if any(group.get("amsgrad") for group in state_dict["param_groups"]):
        raise ValueError(
            "state_dict is of an Adam with amsgrad=True, which divides by the largest second moment so far: GrokAdamW "
            "does not support it. To continue without it, set 'amsgrad' to False in each of its groups"
        )
    needed = {"lr", "betas", "eps", "weight_decay"}
    for i, group in enumerate(state_dict["param_groups"]):
        if missing := sorted(needed - group.keys()):
            raise ValueError(f"state_dict: param_groups[{i}] has no {', '.join(missing)}, as an AdamW's or Adam's has")
    ours = {"grokking_signal_fns": None}  # marks a group as GrokAdamW's
    groups = [_without(group, _ADAMW) | ours for group in state_dict["param_groups"]]
    for group, old in zip(groups, state_dict["param_groups"], strict=True):
        if isinstance(group["betas"], (tuple, list)):  # else loading refuses them
            group["betas"] = tuple(beta.item() if isinstance(beta, Tensor) else beta for beta in group["betas"])
        if old.get("decoupled_weight_decay") is False and old["weight_decay"] != 0:
            warn(
                f"weight_decay={old['weight_decay']:g} was Adam's, which is added to the gradient; GrokAdamW's is "
                "decoupled from it, like AdamW's, and usually larger: choose a new value",
                UserWarning,
            )
    states = {
        key: _without(state, ("max_exp_avg_sq", *_OUR_STATE)) if isinstance(state, dict) else state
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states, "param_groups": groups}


def _from_0_1_2(state_dict: StateDict) -> StateDict:
    """Convert a state dict of release 0.1.2.

    It kept the state in `group["state"]`, keyed by Parameter, in the order of their first gradients. After loading, it
    did not find this state and appended new entries, so the last entries are the ones in use.
    """
    states: dict[Any, Any] = dict(state_dict["state"])
    groups = []
    for i, group in enumerate(state_dict["param_groups"]):
        of_release = {"grokking_signal_fns": None, "second_moment": "filtered", "window_size": None}
        groups.append(_without(group, ("state",)) | of_release)
        ids, entries = group["params"], list(group.get("state", {}).items())
        if entries:
            states.update(zip(ids, _in_use(entries, len(ids), i), strict=True))
    return {**state_dict, "state": states, "param_groups": groups}


def _in_use(entries: list[tuple[Tensor, dict[str, Any]]], count: int, i: int) -> list[dict[str, Any]]:
    """Return the states of the group's parameters in order. Raise ValueError if the order is in doubt."""
    last = entries[-count:]
    shapes = [param.shape for param, _ in last]
    blocks = [entries[start : start + count] for start in range(0, len(entries), count)]
    if (
        len(last) < count
        or any([param.shape for param, _ in block] != shapes for block in blocks)
        or len({int(state["step"]) for _, state in last}) > 1
    ):
        raise ValueError(
            f"state_dict is of grokadamw 0.1.2, and param_groups[{i}] does not hold one state for each of its {count} "
            "parameters, all of one step count: some had no gradient at first, or never, so states cannot be "
            "matched. Delete the key 'state' of each of its groups to continue with fresh moments"
        )
    return [dict(state) for _, state in last]


def _states(state_dict: StateDict) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the id and state of each parameter that has a state. Skip entries that hooks may have added."""
    for key in chain.from_iterable(group["params"] for group in state_dict["param_groups"]):
        if key in state_dict["state"]:
            yield key, state_dict["state"][key]


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(map(str, values))


def _without(values: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
