"""A parameter's state, `optimizer.state[p]`: made at zero, and brought back from a checkpoint.

`step` is a 0-d float32 tensor, on the CPU or on the accelerator that the parameter is on. `exp_avg` (m),
`exp_avg_sq` (v) and `grok_ema` (μ) have the parameter's shape, and its dtype, but float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from .checkpoints import to_grokadamw
from .layers import unwrapped
from .numbers import reads_are_free

State: TypeAlias = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq", "grok_ema")


def prepare(state: State, param: Tensor, published: bool, with_slow_gradient: bool) -> None:
    """Fill in what a step needs, at zero. RuntimeError for a state of another shape, and for an expanded parameter."""
    for name in MOMENTS:
        if name in state and state[name].shape != param.shape:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} has a state of shape {tuple(state[name].shape)}: its data "
                "was replaced; delete optimizer.state[parameter] to start it afresh"
            )
    names = ["exp_avg", "exp_avg_sq"] + ["grok_ema"] * with_slow_gradient
    dtype = _dtype(param, published)
    new: State = {
        name: torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        for name in names
        if name not in state
    }
    if "step" not in state:
        if param.numel() and any(s == 0 and size > 1 for s, size in zip(param.stride(), param.shape, strict=True)):
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} and strides {param.stride()} keeps several of its elements "
                "in one place, where they cannot be updated apart: make it of a clone()"
            )
        new = {"step": torch.zeros((), dtype=torch.float32, device=_step_device(param)), **new}
    state.update(new)  # all of it or, where memory has run out, none


@contextmanager
def keeping_precision(optimizer: Optimizer, published: bool) -> Iterator[None]:
    """Inside, optimizer.load_state_dict keeps the state as it was saved: torch would cast it to its parameter's dtype.

    It takes the state dicts that `to_grokadamw` takes, and finds parameters by name where both sides have names.

    Raises:
        ValueError: a state has another shape than its parameter, or cannot be gone on from. Nothing was loaded then.
    """
    loaded: list[tuple[Tensor, State]] = []

    def keep(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = _in_order(to_grokadamw(state_dict), optimizer.param_groups)
        loaded.extend(_states(state_dict, optimizer.param_groups))
        return state_dict

    def restore(_: Optimizer) -> None:
        for param, state in loaded:
            optimizer.state[param] = _placed(param, state, published)

    # after the user's own pre-hooks, and before their post-hooks
    before = optimizer.register_load_state_dict_pre_hook(keep)
    after = optimizer.register_load_state_dict_post_hook(restore, prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _in_order(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The saved parameters in the order and the groups of ours, where both have the same names."""
    saved = state_dict["param_groups"]
    if len(saved) != len(groups) or not all("param_names" in group for group in [*saved, *groups]):
        return state_dict
    names = [[unwrapped(name) for name in group["param_names"]] for group in groups]
    known = {
        unwrapped(name): (key, layer)
        for group in saved
        for name, key, layer in zip_longest(group["param_names"], group["params"], group.get("layers", ()))
    }
    ours = list(chain.from_iterable(names))
    count = sum(len(group["params"]) for group in saved)
    if set(ours) != set(known) or not len(ours) == len(known) == count:
        return state_dict
    ordered = []
    for old, group, group_names in zip(saved, groups, names, strict=True):
        new = {**old, "params": [known[name][0] for name in group_names], "param_names": group["param_names"]}
        if "layers" in old:
            new["layers"] = [known[name][1] for name in group_names]
        ordered.append(new)
    return {**state_dict, "param_groups": ordered}


def _states(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> Iterator[tuple[Tensor, State]]:
    """The parameters that have a state in a state dict, with that state."""
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in groups)
    for key, param in zip(keys, params, strict=False):  # torch refuses other numbers of parameters
        state = state_dict["state"].get(key)
        if state is None:
            continue
        for name in MOMENTS:
            if name in state and state[name].shape != param.shape:
                raise ValueError(
                    f"state_dict: {name} of parameter {key} has shape {tuple(state[name].shape)}, the parameter itself "
                    f"{tuple(param.shape)}; parameters must come in the order that they were saved in"
                )
        yield param, state


def _placed(param: Tensor, state: State, published: bool) -> State:
    """A loaded state where and as a step wants it."""
    placed = dict(state)
    for name, value in state.items():
        if name == "step":
            placed[name] = torch.as_tensor(value, dtype=torch.float32, device=_step_device(param))
        elif isinstance(value, Tensor):
            placed[name] = value.to(param.device, _dtype(param, published))
    return placed


def _dtype(param: Tensor, published: bool) -> torch.dtype:
    """Of the moments: one that small updates do not vanish in, but in release 0.1.2 the parameter's own."""
    return param.dtype if published else torch.promote_types(param.dtype, torch.float32)


def _step_device(param: Tensor) -> torch.device:
    """Where neither the host nor the device waits for a step count."""
    return torch.device("cpu") if reads_are_free(param.device) else param.device
