"""Row 11: how long a parameter's rows may be. One implementation, in torch's operations, for every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cap_rows(params: Sequence[Tensor], limit: float, finite: bool | Tensor) -> None:
    """θ_r ← θ_r · min(1, limit / ‖θ_r‖) for each row r, in place.

    Args:
        params: of two dimensions or more; a row is a slice along the first. Of DTensors the whole row counts.
        finite: where False, a flag on a device too, nothing changes.
    """
    for param in params:
        narrow = param.dtype in (torch.float16, torch.bfloat16)
        dims = tuple(range(1, param.dim()))
        norms = torch.linalg.vector_norm(param, dim=dims, keepdim=True, dtype=torch.float32 if narrow else None)
        factors = limit / norms.clamp(min=limit)
        if finite is not True:
            factors = torch.where(torch.as_tensor(finite, device=param.device), factors, 1.0)
        param.mul_(factors.to(param.dtype))
