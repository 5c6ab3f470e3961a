"""What a step asks of the gradients as a whole: their norm, the clip coefficient, and whether they are finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .numbers import Number, as_real, mesh_of


def global_norm(
    grads: Sequence[Tensor], sum_of_squares: Callable[[Sequence[Tensor]], Tensor], home: torch.device | None
) -> Number:
    """Row 2, N = √Σg² over all elements of all gradients, on any devices: a float, or with home a 0-d tensor there."""
    sums = [sum_of_squares(tensors) for tensors in _by_place(grads)]
    if home is None:
        return math.sqrt(sum(total.item() for total in sums))
    total = torch.stack([total.to(home) for total in sums]).sum()
    if total.requires_grad:
        total = total.clamp(min=torch.finfo(total.dtype).tiny)  # the root's derivative at 0 is infinite
    return total.sqrt()


def _by_place(tensors: Sequence[Tensor]) -> Collection[Sequence[Tensor]]:
    """The tensors as real ones, in lists that lie on one device, or over one mesh."""
    if set(map(type, tensors)) == {Tensor} and len(set(map(Tensor.get_device, tensors))) == 1:
        return [list(map(as_real, tensors)) if any(map(Tensor.is_complex, tensors)) else tensors]  # and soon found
    lists: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault((tensor.device, mesh_of(tensor)), []).append(as_real(tensor))
    return lists.values()


def clip_coefficient(norm: Number | None, max_norm: float) -> Number:
    """Row 3, c = min(1, max_norm / (N + 1e-6)), and 1 for a max_norm of 0: torch.nn.utils.clip_grad_norm_'s formula."""
    if norm is None or max_norm == 0:
        return 1.0
    coefficient = max_norm / (norm + 1e-6)
    if isinstance(coefficient, Tensor):
        return coefficient.clamp(max=1.0)
    return 1.0 if coefficient > 1.0 else coefficient  # NaN stays NaN, as it does there


def is_finite(norm: Number) -> bool | Tensor:
    """Whether no gradient holds NaN or infinity, and Σg² did not overflow; a 0-d tensor where the norm is one."""
    return torch.isfinite(norm) if isinstance(norm, Tensor) else math.isfinite(norm)
