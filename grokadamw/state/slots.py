"""A parameter's state, `optimizer.state[p]`: create it as zeros, and convert it when its parameter has changed.

`step` is a 0-d float32 tensor, on the CPU or on the accelerator that the parameter is on. `exp_avg` (m),
`exp_avg_sq` (v) and `grok_ema` (μ) have the parameter's shape. Their dtype is the parameter's, but at least float32
(with compat the parameter's own), or what `state_dtype` asks for: see formats.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._numbers import as_number, as_real, reads_are_free, wide
from ..options import STATES, rules_of
from ..shards import part, placed, shards_of
from . import formats, window

State: TypeAlias = dict[str, Any]
WINDOW = tuple(window.names("grok_"))


def check(state: State, param: Tensor) -> None:
    """Raise RuntimeError for a state or parameter that a step cannot use, before the step writes anything."""
    check_shapes(state, (*STATES, *WINDOW, *formats.EXTRAS), param)
    if overlaps(param):
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} and strides {param.stride()} has several elements at one "
            "address, so they cannot be updated separately: make it from a clone()"
        )
    if not param.is_complex() and (not param.is_floating_point() or param.itemsize < 2):
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} has dtype {param.dtype}: give parameters of float16, bfloat16, "
            "float32, float64 or a complex dtype"
        )


def overlaps(x: Tensor) -> bool:
    """Return True if elements may share an address: if a dimension's stride is not longer than all smaller ones."""
    if x.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def check_grad(param: Tensor, grad: Tensor) -> None:
    """Raise RuntimeError for a sparse gradient, or one of another shape than its parameter."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            "grokadamw does not support sparse gradients: build its module with sparse=False (torch.nn.Embedding), or "
            "give it to torch.optim.SparseAdam"
        )
    if grad.shape != param.shape:
        raise RuntimeError(
            f"the gradient has shape {tuple(grad.shape)}, and the parameter {tuple(param.shape)}: the parameter's data "
            "was replaced after backward(). Call zero_grad(), and compute the gradients again"
        )


def states_of(groups: Sequence[dict[str, Any]], state: Mapping[Any, Any]) -> Iterator[State]:
    """Yield the state of every parameter that has one, but not entries that hooks may have added."""
    for group in groups:
        yield from (state[param] for param in group["params"] if param in state)


def check_shapes(state: State, names: Iterable[str], param: Tensor) -> None:
    """Raise RuntimeError if a tensor under one of these names in the state does not fit its parameter's shape.

    A name that ends in "_ring" is a window's; its first dimension is the length. One in "_count" is a 0-d tensor.
    """
    shape = as_real(param).shape
    for name in names:
        kept = state.get(name)
        if not isinstance(kept, Tensor) or name.endswith("_count"):
            continue
        found = as_real(kept).shape[1 if name.endswith("_ring") else 0 :]
        is_scale = name.endswith("_scale")
        if is_scale and (kept.dtype != torch.float32 or not kept.is_contiguous()):
            raise RuntimeError(
                f"state[{name!r}] must be contiguous and torch.float32, and is {kept.dtype} with strides "
                f"{kept.stride()}: delete optimizer.state[parameter] to reset it"
            )
        if found != (formats.shape_of_scales(param) if is_scale else shape):
            raise RuntimeError(
                f"state[{name!r}] of a parameter of shape {tuple(param.shape)} has shape {tuple(kept.shape)}: the "
                f"parameter's data was replaced. Change optimizer.state[parameter][{name!r}] in the same way, or "
                "delete optimizer.state[parameter] to reset it"
            )


def add_missing(
    state: State, param: Tensor, options: dict[str, Any], lamb: Any, count: Tensor | None = None
) -> list[str]:
    """Create missing state that a step needs under these options and a group's λ, as zeros; return the new names.

    Low bits of a parameter that no longer has 16 bits are dropped: its weights are then what its own dtype holds.
    """
    names = ["exp_avg", "exp_avg_sq"] + ["grok_ema"] * needs_mu(options, lamb)
    new: State = {}
    for name in names:
        if name not in state:
            new |= formats.new(param, name, options, dtype_of(param, options))
    low = formats.low_dtype(param, options)
    if low is not None and "param_low" not in state:
        new["param_low"] = torch.zeros_like(param, dtype=low, memory_format=torch.preserve_format)
    if "step" not in state:
        if count is None:
            count = torch.zeros((), dtype=torch.float32, device=step_device(param))
        new = {"step": count, **new}
    has_mu = needs_mu(options, lamb) or "grok_ema" in state
    if has_mu and options["window_size"] is not None and WINDOW[0] not in state:
        empty = window.new(param, options["window_size"], options["window_dtype"], step_device(param))
        new.update(window.named(empty, "grok_"))
    if options["accumulation_steps"] > 1 and "micro_step" not in state:
        new["micro_step"] = 0
    state.update(new)  # at the end, so that all is added or, if memory runs out, nothing
    if low is None:
        state.pop("param_low", None)
    return list(new)


def needs_mu(options: dict[str, Any], lamb: Any) -> bool:
    """Return True if a step with this λ needs μ, under the optimizer's options, and creates it if it is missing."""
    return float(lamb) > 0 or rules_of(options).always_has_mu


def lay_out(state: State, param: Tensor, options: dict[str, Any]) -> None:
    """Convert state, as loading does, if its parameter's dtype or memory format has changed, or it was set by hand.

    It must have the memory order of its parameter, because backends write it in that order.
    """
    shards = shards_of(param)
    if shards is not None:
        kept = [name for name in (*STATES, *formats.EXTRAS) if name in state]
        state.update({name: placed(state[name], shards) for name in kept})
    state.update(window.fitted(state, "grok_", param, options["window_dtype"]))
    for name in misfits(state, param, options):
        if name == "step":
            count = state[name]
            if not isinstance(count, Tensor) or count.numel() != 1 or count.dtype != torch.float32:
                count = as_number(count, "state['step']")
            # a float32 count keeps its memory, which processes may share
            state[name] = torch.as_tensor(count, dtype=torch.float32, device=step_device(param)).reshape(())
        elif name == "param_low":
            low = torch.empty_like(param, dtype=state[name].dtype, memory_format=torch.preserve_format)
            part(low).copy_(part(state[name]))
            state[name] = low
        else:
            new = formats.packed(state, name, param, options, dtype_of(param, options))
            state.pop(f"{name}_scale", None)
            state.update(new)


def misfits(state: State, param: Tensor, options: dict[str, Any]) -> list[str]:
    """Return the names of the entries that `lay_out` would convert."""
    found = formats.misfits(state, param, options, dtype_of(param, options))
    found += window.fitted(state, "grok_", param, options["window_dtype"])
    step = state.get("step")
    if step is not None and not (isinstance(step, Tensor) and step.dtype == torch.float32 and step.dim() == 0):
        found.append("step")
    return found


def new_counts(states: Mapping[Tensor, State], params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Create the missing step counts on accelerators: parts of one tensor per device, which one launch can advance."""
    counts: dict[Tensor, Tensor] = {}
    for device, missing in by_device(param for param in params if "step" not in states.get(param, {})).items():
        counts.update(zip(missing, torch.zeros(len(missing), dtype=torch.float32, device=device).unbind(), strict=True))
    return counts


def by_device(params: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    """Return the parameters whose step counts are on an accelerator, by device."""
    lists: dict[torch.device, list[Tensor]] = {}
    for param in params:
        if not reads_are_free(param.device):
            lists.setdefault(param.device, []).append(param)
    return lists


def dtype_of(param: Tensor, options: dict[str, Any]) -> torch.dtype:
    """Return the dtype of the moments, wide enough for small updates; with compat="0.1.2" the parameter's."""
    return param.dtype if rules_of(options).state_in_param_dtype else wide(param.dtype)


def step_device(param: Tensor) -> torch.device:
    """Return the device for a parameter's step count: one where nothing waits for it."""
    return torch.device("cpu") if reads_are_free(param.device) else param.device
