"""Row 11: how long a parameter's rows may be. One implementation, in torch's operations, for every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..numbers import accumulator, wide


def cap_rows(params: Sequence[Tensor], limit: float, finite: bool | Tensor) -> None:
    """θ_r ← θ_r · min(1, limit / ‖θ_r‖) for each row r, in place.

    Args:
        params: of two dimensions or more; a row is a slice along the first. Of DTensors the whole row counts.
        finite: where False, a flag on a device too, nothing changes.
    """
    for param in params:
        before = param.clone() if torch.is_grad_enabled() else param  # which a backward pass through the step reads
        dtype = torch.promote_types(param.dtype, accumulator(param.device))  # where no square overflows
        norms = torch.linalg.vector_norm(before, dim=tuple(range(1, param.dim())), keepdim=True, dtype=dtype)
        factors = (limit / norms.clamp(min=limit)).to(wide(param.dtype.to_real()))
        if finite is not True:
            factors = torch.where(torch.as_tensor(finite, device=param.device), factors, 1.0)
        if before is param:
            param.mul_(factors)
        else:
            param.copy_(before * factors)
