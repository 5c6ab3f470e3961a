"""State dicts of other optimizers and releases → GrokAdamW's, and back: pure functions of state dicts.

A state dict is what an optimizer's `state_dict()` returns: `{"state": {id: {name: tensor}}, "param_groups": [...]}`.
Neither function writes into its argument; tensors are shared with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any, TypeAlias

from torch import Tensor

from .options import GROUP_KEYS, STATES
from .state.formats import unpacked

__all__ = ["is_state_dict", "to_adamw", "to_float32", "to_grokadamw"]

StateDict: TypeAlias = dict[str, Any]
_Group: TypeAlias = dict[str, Any]

# what a group of torch.optim.AdamW and Adam holds, and one of GrokAdamW does not, or not with that meaning
_ADAMW: _Group = {"amsgrad": False, "decoupled_weight_decay": True}
_ADAMW |= {"foreach": None, "capturable": False, "differentiable": False, "fused": None}
# what one of GrokAdamW holds beside what both mean alike, and its state beside AdamW's
_OURS = {*GROUP_KEYS} - {"lr", "betas", "eps", "weight_decay", "maximize", *_ADAMW}
_OUR_STATE = ("grok_ema", "grok_ring", "grok_ring_sum", "grok_ring_lap", "grok_ring_count", "micro_step", "param_low")
_NEEDED = ("step", "exp_avg", "exp_avg_sq")
_KINDS = (
    "GrokAdamW goes on from torch.optim.AdamW, Adam, and GrokAdamW; from others, start with fresh moments, or give it "
    "their form"
)


def is_state_dict(value: Any) -> bool:
    """Return True if this is an optimizer's state dict."""
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list) and all(isinstance(group, dict) and "params" in group for group in groups)


def to_grokadamw(state_dict: StateDict) -> StateDict:
    """Return a state dict that `GrokAdamW.load_state_dict` goes on from.

    From `torch.optim.AdamW` or `Adam`: moments, step counts and the numbers that both have; the slow gradient μ, which
    they lack, starts at 0. From grokadamw 0.1.2: everything. GrokAdamW's own comes back as it is.

    Raises:
        ValueError: it cannot be continued without loss. The message says why, and what can be done.
    """
    if not is_state_dict(state_dict):
        raise ValueError(
            "this is no optimizer's state dict, which has 'state' and 'param_groups': give what state_dict() returned, "
            "and of a checkpoint the part that holds it"
        )
    groups = state_dict["param_groups"]
    if any("state" in group for group in groups):
        return _from_0_1_2(state_dict)
    of_adam = any("amsgrad" in group for group in groups)
    if groups and not of_adam and not any(name in group for group in groups for name in _OURS):
        raise ValueError(f"state_dict is of another kind of optimizer: its groups have {_listed(groups[0])}. {_KINDS}")
    for key, state in _states(state_dict):
        if state and not all(name in state for name in _NEEDED):
            raise ValueError(
                f"state_dict is of another kind of optimizer: its state of parameter {key} has {_listed(state)}. "
                + _KINDS
            )
    return _from_adam(state_dict) if of_adam else state_dict


def to_float32(state_dict: StateDict) -> StateDict:
    """Return a GrokAdamW's state dict whose m, v and μ are float32 at least, whatever `state_dtype` kept them in.

    Low bits of parameters stay as they are: see `full_precision_state_dict`. GrokAdamW loads either, in any format.

    Raises:
        ValueError: as `to_grokadamw`.
    """
    ours = to_grokadamw(state_dict)
    states = {key: _unpacked(state) if isinstance(state, dict) else state for key, state in ours["state"].items()}
    groups = [{**group, "state_dtype": "float32"} for group in ours["param_groups"]]
    return {**ours, "state": states, "param_groups": groups}


def _unpacked(state: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: unpacked(state, name) for name in STATES if name in state}
    return {name: numbers.get(name, value) for name, value in state.items() if not name.endswith("_scale")}


def to_adamw(state_dict: StateDict) -> StateDict:
    """Return a state dict that `torch.optim.AdamW.load_state_dict` goes on from: moments, steps and AdamW's numbers.

    Everything else is left out: μ, signals, layers and what the groups say of them. AdamW has one β1 for all layers;
    where γ is not 0, the first moments of deep layers come from a smaller one, and adapt within a few steps.

    Raises:
        ValueError: as `to_grokadamw`.
    """
    ours = to_float32(state_dict)
    groups = [{**_ADAMW, "maximize": False, **_without(g, {*_OURS, *_ADAMW})} for g in ours["param_groups"]]
    states = {key: _without(s, _OUR_STATE) if isinstance(s, dict) else s for key, s in ours["state"].items()}
    return {**ours, "state": states, "param_groups": groups}


def _from_adam(state_dict: StateDict) -> StateDict:
    if any(group.get("amsgrad") for group in state_dict["param_groups"]):
        raise ValueError(
            "state_dict is of an Adam with amsgrad=True, which divides by the largest second moment so far: GrokAdamW "
            "has no such thing. To go on without, set 'amsgrad' to False in each of its groups"
        )
    ours = {"grokking_signal_fns": None}  # by which it is known
    groups = [_without(group, _ADAMW) | ours for group in state_dict["param_groups"]]
    for group, old in zip(groups, state_dict["param_groups"], strict=True):
        group["betas"] = tuple(map(float, group["betas"]))  # AdamW's may be tensors
        if old.get("decoupled_weight_decay") is False and old["weight_decay"] != 0:
            warnings.warn(
                f"weight_decay={old['weight_decay']:g} was Adam's, a part of the gradient; GrokAdamW's is AdamW's, "
                "apart from it, and usually larger: choose it anew",
                UserWarning,
                stacklevel=3,
            )
    states = {
        key: _without(state, ("max_exp_avg_sq", *_OUR_STATE)) if isinstance(state, dict) else state
        for key, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states, "param_groups": groups}


def _from_0_1_2(state_dict: StateDict) -> StateDict:
    """Release 0.1.2 kept its state in `group["state"]`, under Parameters, in the order of their first gradients.

    On loading it did not find it again and began another one behind it, so that the last entries are those in use.
    """
    states: dict[Any, Any] = dict(state_dict["state"])
    groups = []
    for i, group in enumerate(state_dict["param_groups"]):
        groups.append(_without(group, ("state",)) | {"grokking_signal_fns": None})
        ids, entries = group["params"], list(group.get("state", {}).items())
        if entries:
            states.update(zip(ids, _in_use(entries, len(ids), i), strict=True))
    return {**state_dict, "state": states, "param_groups": groups}


def _in_use(entries: list[tuple[Tensor, dict[str, Any]]], count: int, i: int) -> list[dict[str, Any]]:
    """Return the states of the group's parameters, in their order, where that is beyond doubt."""
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
            "parameters, all of one step count: some had no gradient at first, or never, and nothing says which state "
            "is whose. Delete the key 'state' of each of its groups to go on with fresh moments"
        )
    return [dict(state) for _, state in last]


def _states(state_dict: StateDict) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Return the parameters' ids that have a state, with it; what hooks may have put beside them is left out."""
    for key in chain.from_iterable(group["params"] for group in state_dict["param_groups"]):
        if key in state_dict["state"]:
            yield key, state_dict["state"][key]


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(map(str, values))


def _without(values: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
