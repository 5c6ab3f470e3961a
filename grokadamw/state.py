"""A parameter's state, `optimizer.state[p]`: made at zero, and brought back from a checkpoint.

`step` is a 0-d float32 tensor, on the CPU or on the accelerator that the parameter is on. `exp_avg` (m),
`exp_avg_sq` (v) and `grok_ema` (μ) have the parameter's shape, and its dtype, but float32 at least.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .gradients import reads_are_free

State: TypeAlias = dict[str, Any]


def prepare(state: State, param: Tensor, published: bool, with_slow_gradient: bool) -> None:
    """Fill in what a step needs, at zero."""

    def zeros() -> Tensor:
        return torch.zeros_like(param, dtype=_dtype(param, published), memory_format=torch.preserve_format)

    if "step" not in state:
        state["step"] = torch.zeros((), device=_step_device(param))
        state["exp_avg"], state["exp_avg_sq"] = zeros(), zeros()
    if with_slow_gradient and "grok_ema" not in state:
        state["grok_ema"] = zeros()


def loaded(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> list[tuple[Tensor, State]]:
    """The parameters that have a state in a state dict, with that state.

    Raises:
        ValueError: a state has another shape than its parameter.
    """
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in groups)
    found = []
    for key, param in zip(keys, params, strict=False):  # torch refuses other numbers of parameters
        if key not in state_dict["state"]:
            continue
        state = state_dict["state"][key]
        for name in ("exp_avg", "exp_avg_sq", "grok_ema"):
            if name in state and state[name].shape != param.shape:
                raise ValueError(
                    f"state_dict: {name} of parameter {key} has shape {tuple(state[name].shape)}, the parameter itself "
                    f"{tuple(param.shape)}; parameters must come in the order that they were saved in"
                )
        found.append((param, state))
    return found


def restored(param: Tensor, state: State, published: bool) -> State:
    """A loaded state as a step wants it. torch would round a bfloat16 parameter's float32 state to bfloat16."""
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
