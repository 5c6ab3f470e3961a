"""The stage limit_rows: limit how far a parameter's rows move in a step, and how long they get.

This module uses torch's operations and runs on every device. The kernels of `cpu` and `gpu` limit most rows while they
update them. This is the definition against which they are tested, and it limits the rows that they leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._numbers import accumulator, wide
from .types import Batch, Scalars

SHORT = 0.1  # a shorter row may move as far as one of this norm; otherwise a row of zeros could never move


def before(batch: Batch, scalars: Scalars) -> list[Tensor]:
    """Return copies, from before the step, of the parameters whose change `limit` will limit."""
    wanted = scalars.limits_change and scalars.micro_step.moves
    return [batch.params[i].clone() for i in batch.unlimited] if wanted else []


def limit(batch: Batch, scalars: Scalars, old_params: Sequence[Tensor]) -> None:
    """Limit the rows that the backend has left, after a step. `before` returned `old_params`.

    θ_r ← θ'_r + (θ_r − θ'_r) / max(1, ‖θ_r − θ'_r‖ / (change · max(‖θ'_r‖, 0.1))) for each row r, in place; then
    θ_r ← θ_r / max(1, ‖θ_r‖ / norm). A row within its limits stays as it is, bit for bit, and so does one whose norm
    is not finite. Elements that are not finite stay as they are, and do not count as having moved.
    """
    params = [batch.params[i] for i in batch.unlimited] if scalars.micro_step.moves else []
    add_up = batch.shards.sum if batch.shards is not None and batch.shards.cut_rows else None
    if scalars.limits_change:
        for param, old in zip(params, old_params, strict=True):
            dtype = wide(param.dtype)
            moved = torch.nan_to_num(param.to(dtype) - old.to(dtype), 0.0, 0.0, 0.0)
            longest = scalars.max_row_change * _norms(old, add_up).clamp(min=SHORT)
            share = _share(_norms(moved, add_up) / longest, None)
            param.add_(moved * (share - 1).to(dtype))
    if scalars.max_row_norm:
        for param in params:
            long = param.clone() if torch.is_grad_enabled() else param  # a backward pass through the step needs it
            share = _share(_norms(long, add_up) / scalars.max_row_norm, scalars.writable()).to(wide(param.dtype))
            if long is param:
                param.mul_(share)
            else:
                param.copy_(long * share)


def _share(times: Tensor, writable: Tensor | None) -> Tensor:
    """Return the factor for a row that is `times` times too long: 1 if it is not too long, or `times` is not finite."""
    is_long = (times > 1) & (times < torch.inf)
    return torch.where(is_long if writable is None else is_long & writable, 1 / times.clamp(min=1), 1.0)


def _norms(values: Tensor, add_up: Callable[..., Tensor] | None) -> Tensor:
    """Return the norm of each row, of shape (rows, 1, …), in a dtype in which no square overflows."""
    dtype = torch.promote_types(values.dtype, accumulator(values.device))
    norms = torch.linalg.vector_norm(values, dim=tuple(range(1, values.dim())), keepdim=True, dtype=dtype)
    return norms if add_up is None else add_up(norms.square(), rows=True).sqrt()
