"""The size of an optimizer in bytes, with the state that it has or that its next step would create."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..shards import like, part
from .slots import WINDOW, State, add_missing

KINDS = ("parameters", "gradients", "exp_avg", "exp_avg_sq", "grok_ema", "param_low", "window", "step")


def sizes(groups: Sequence[dict[str, Any]], state: Mapping[Tensor, State], options: dict[str, Any]) -> dict[str, int]:
    """Return this rank's bytes for each of `KINDS`, their `total`, and the total of torch's AdamW, `adamw`."""
    found, trained = dict.fromkeys(KINDS, 0), 0
    for group in groups:
        for param in group["params"]:
            if is_lazy(param):  # it has no shape yet
                continue
            own = part(param)
            grad = own if param.grad is None or param.grad.layout != torch.strided else part(param.grad)
            found["parameters"] += own.nbytes
            if is_frozen(param, state):
                continue
            trained += own.nbytes
            found["gradients"] += grad.nbytes
            for name, x in _whole_state(param, state.get(param, {}), options, group["lamb"]):
                found[name] += part(x).nbytes
    # AdamW's moments have the dtype of their parameter
    adamw = found["parameters"] + 2 * trained + found["gradients"] + found["step"]
    return {**found, "total": sum(found.values()), "adamw": adamw}


def is_frozen(param: Tensor, state: Mapping[Tensor, State]) -> bool:
    """Return True if a parameter gets no gradient, and has neither one nor state from before; or has no shape yet."""
    return is_lazy(param) or (not param.requires_grad and param.grad is None and param not in state)


def _whole_state(param: Tensor, state: State, options: dict[str, Any], lamb: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a parameter's state by kind, with those that its next step would create (without memory)."""
    whole = dict(state)
    own = part(param)
    outline = like(torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device="meta"), param.shape, param)
    add_missing(whole, outline, options, lamb)
    for name, x in whole.items():
        kind = "window" if name in WINDOW else name.removesuffix("_scale")
        if isinstance(x, Tensor) and kind in KINDS:
            yield kind, x
