"""The stage limit_rows: how far a parameter's rows may move in a step, and how long they may be.

In torch's operations, on every device. The kernels of `cpu` and `gpu` limit most rows as they update them; this is the
definition that they are tested against, and limits the rest.
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
    no norm. Elements that are not finite neither move nor count as having moved.
    """
    for param, old in zip(rows.params, before, strict=bool(before)):
        real, dtype = as_real(param), wide(as_real(param).dtype)
        moved = torch.nan_to_num(real.to(dtype) - as_real(old).to(dtype), 0.0, 0.0, 0.0)
        share = _share(_norms(moved) / (rows.change * _norms(as_real(old)).clamp(min=SHORT)), True)
        real.add_(moved * (share - 1).to(dtype))
    for param in rows.params if rows.norm else ():
        real = as_real(param)
        long = real.clone() if torch.is_grad_enabled() else real  # which a backward pass through the step reads
        share = _share(_norms(long) / rows.norm, rows.finite).to(wide(real.dtype))
        if long is real:
            real.mul_(share)
        else:
            real.copy_(long * share)


def _share(times: Tensor, finite: bool | Tensor) -> Tensor:
    """What a row is multiplied with that is so many times too long: 1 if it is not, or nobody knows."""
    is_long = (times > 1) & (times < torch.inf)
    return torch.where(is_long if finite is True else is_long & finite, 1 / times.clamp(min=1), 1.0)


def _norms(values: Tensor) -> Tensor:
    """Of each row, (rows, 1, …), in a dtype in which no square overflows."""
    dtype = torch.promote_types(values.dtype, accumulator(values.device))
    return summed(torch.linalg.vector_norm(values, dim=tuple(range(1, values.dim())), keepdim=True, dtype=dtype))
