"""Row 11: how far a parameter's rows may move in a step, and how long they may be.

One implementation, in torch's operations, for every device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..numbers import accumulator, as_real, summed, wide

SHORT = 0.1  # a row that is shorter may move as one of this length, or none would ever leave 0


class Rows(NamedTuple):
    """Parameters of two dimensions or more, whose rows, slices along the first, are limited. Of DTensors whole ones."""

    params: list[Tensor]
    change: float  # the largest, of a row's length; 0 is no limit
    norm: float  # the largest; 0 is no limit
    finite: bool | Tensor  # where False, a flag on a device too, nothing changes


def before(rows: Rows) -> list[Tensor]:
    """What `limit` needs to know: the parameters as they are before the step."""
    return [param.clone() for param in rows.params] if rows.change else []


def limit(rows: Rows, before: list[Tensor]) -> None:
    """θ_r ← θ'_r + (θ_r − θ'_r) / max(1, ‖θ_r − θ'_r‖ / (change · ‖θ'_r‖)) for each row r, in place; θ' is `before`'s.

    Then θ_r ← θ_r / max(1, ‖θ_r‖ / norm). What is within its limits stays as it is, bit for bit, and so does what has
    no norm, as of a NaN.
    """
    for i, param in enumerate(map(as_real, rows.params)):
        dtype = wide(param.dtype)
        value = param.to(dtype, copy=torch.is_grad_enabled())  # which a backward pass through the step reads
        if rows.change:
            old = as_real(before[i]).to(dtype)
            times = _norms(value - old) / (rows.change * _norms(old).clamp(min=SHORT))
            value = torch.where(times > 1, torch.lerp(old, value, (1 / times.clamp(min=1)).to(dtype)), value)
        if rows.norm:
            times = _norms(value) / rows.norm
            is_long = times > 1 if rows.finite is True else (times > 1) & rows.finite
            value = torch.where(is_long, value / times.clamp(min=1).to(dtype), value)
        param.copy_(value)


def _norms(values: Tensor) -> Tensor:
    """Of each row, (rows, 1, …), in a dtype in which no square overflows."""
    dtype = torch.promote_types(values.dtype, accumulator(values.device))
    return summed(torch.linalg.vector_norm(values, dim=tuple(range(1, values.dim())), keepdim=True, dtype=dtype))
