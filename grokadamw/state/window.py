"""The mean of a parameter's last gradients, from a ring of them and its sum. A step costs the same for any length.

The sum is at least float32. Each step subtracts the oldest gradient from it and adds the newest, and rounding errors
would add up over a run. So a second sum collects the gradients of the current lap around the ring. At the end of a lap
it is the sum of the whole ring, from which nothing was ever subtracted, and it replaces the first sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._numbers import as_real, reads_are_free, wide
from ..shards import mesh_of


class Window(NamedTuple):
    """The window of one parameter, as real numbers."""

    ring: Tensor  # (size, *shape): the gradients, the n-th at n mod size; 0 in places that are still empty
    total: Tensor  # shape: the sum of the ring
    lap: Tensor  # shape: the sum of ring[0] up to the newest
    seen: Tensor  # 0-d int64: the number of gradients so far


def new(param: Tensor, size: int, dtype: torch.dtype | None, device: torch.device) -> Window:
    """Return an empty window of `size` gradients. `dtype_of` gives its ring's dtype; its count is on `device`."""
    dtype = dtype_of(param, dtype)
    like = as_real(param.detach())
    total, lap = (torch.zeros_like(like, dtype=wide(like.dtype)) for _ in range(2))
    if mesh_of(like) is None:
        # zeroed memory takes no room until it is written to
        ring = like.new_zeros((size, *like.shape), dtype=dtype)
    else:
        ring = torch.stack([torch.zeros_like(like, dtype=dtype)] * size)
    return Window(ring, total, lap, torch.zeros((), dtype=torch.int64, device=device))


def dtype_of(param: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a ring: `dtype`, or the parameter's; but float32 for float16, whose range is too small."""
    own = as_real(param.detach()).dtype
    return dtype or (torch.float32 if own == torch.float16 else own)


def named(window: Window, prefix: str) -> dict[str, Any]:
    """Return the window as entries of a state."""
    return dict(zip(names(prefix), window, strict=True))


def names(prefix: str) -> list[str]:
    """Return the names of a window's entries in a state."""
    return [f"{prefix}ring", f"{prefix}ring_sum", f"{prefix}ring_lap", f"{prefix}ring_count"]


def of(state: Mapping[str, Any], prefix: str) -> Window:
    """Return the window that is in a state."""
    return Window(*(state[name] for name in names(prefix)))


def fitted(state: Mapping[str, Any], prefix: str, param: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the tensors of the state's window whose dtype differs from a new window's, converted to that dtype.

    They differ once a parameter's dtype was changed. `dtype` is as for `dtype_of`.
    """
    ring, *sums, _ = names(prefix)
    if ring not in state:
        return {}
    dtypes = {ring: dtype_of(param, dtype), **dict.fromkeys(sums, wide(as_real(param.detach()).dtype))}
    return {name: state[name].to(expected) for name, expected in dtypes.items() if state[name].dtype != expected}


def average(
    windows: Sequence[Window], grads: Sequence[Tensor], averages: Sequence[Tensor], finite: Tensor | None
) -> None:
    """Put a real gradient into each window, and the means into `averages`, unless `finite` is a False tensor."""
    push(windows, grads, finite)
    found = [w.total / w.seen.clamp(1, len(w.ring)) for w in windows]
    if finite is not None:
        found = [torch.where(finite, mean, mu) for mean, mu in zip(found, averages, strict=True)]
    torch._foreach_copy_(list(averages), found)


def means(windows: Sequence[Window], grads: Sequence[Tensor]) -> list[Tensor]:
    """Return the means that the windows will have with these gradients: new tensors, in the dtype of the sums.

    The host reads the counts.
    """
    values = _stored(windows, grads)
    totals = list(torch._foreach_sub([w.total for w in windows], _rows(windows)))
    torch._foreach_add_(totals, values)
    for i, w in enumerate(windows):
        if _ends_lap(w):
            totals[i] = w.lap + values[i]
    torch._foreach_div_(totals, [float(min(int(w.seen) + 1, len(w.ring))) for w in windows])
    return totals


def push(windows: Sequence[Window], grads: Sequence[Tensor], finite: Tensor | None = None) -> None:
    """Replace the oldest gradient of each window by a real new one, unless `finite` is a False tensor."""
    values = _stored(windows, grads)
    is_known = not torch.compiler.is_compiling() and reads_are_free(windows[0].seen.device)
    if finite is not None or not is_known:
        for w, x in zip(windows, values, strict=True):
            _push_unread(w, x, torch.ones_like(w.seen, dtype=torch.bool) if finite is None else finite)
        return
    rows, totals, laps = _rows(windows), [w.total for w in windows], [w.lap for w in windows]
    torch._foreach_sub_(totals, rows)
    torch._foreach_add_(totals, values)
    torch._foreach_add_(laps, values)
    for w, row, x in zip(windows, rows, values, strict=True):
        row.copy_(x)
        if _ends_lap(w):
            w.total.copy_(w.lap)
            w.lap.zero_()
    torch._foreach_add_([w.seen for w in windows], 1)


def _push_unread(w: Window, x: Tensor, finite: Tensor) -> None:
    """Push a gradient without reading back the count."""
    place, is_end = (w.seen % len(w.ring)).reshape(1), w.seen % len(w.ring) == len(w.ring) - 1
    oldest = w.ring.index_select(0, place).squeeze(0)
    lap = w.lap + x
    total = torch.where(is_end, lap, w.total - oldest + x)
    w.ring.index_copy_(0, place, torch.where(finite, x, oldest).unsqueeze(0))
    news = [torch.where(finite, total, w.total), torch.where(finite, torch.where(is_end, 0, lap), w.lap)]
    torch._foreach_copy_([w.total, w.lap], news)  # when compiled, copy_ loses a 0-d float64 on a CPU
    w.seen.add_(finite)


def _stored(windows: Sequence[Window], grads: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients as rings keep them: a sum must later lose exactly the number that was added to it."""
    return [grad.to(w.ring.dtype) for w, grad in zip(windows, grads, strict=True)]


def _rows(windows: Sequence[Window]) -> list[Tensor]:
    """Return the row of each window's ring that the next gradient will replace."""
    return [w.ring[int(w.seen) % len(w.ring)] for w in windows]


def _ends_lap(w: Window) -> bool:
    return (int(w.seen) + 1) % len(w.ring) == 0
