"""The step for tensors kept in fewer bits than a step computes with, on any device: decode, step, encode.

A few rows at a time are decoded to float32, updated by `foreach`, and encoded again. That is slow. The kernels of `cpu`
and `gpu` do the same in one pass through memory, for the tensors that they can take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..options import STATES
from ..state import formats
from ..state.formats import as_rows, has_rows, same_order, width_of
from . import foreach, rows
from .types import Batch, Scalars

_PIECE = 1 << 18  # elements at a time


def row_width(param: Tensor, coded: bool) -> int:
    """Return the elements in a row, at least 1, or 0 if there are no rows: this backend limits all of them."""
    return max(1, width_of(param)) if param.dim() > 1 else 0


def step(batch: Batch, n: Scalars) -> None:
    """Do the stages slow_grad to limit_rows for every tensor, in place."""
    assert batch.coded is not None
    is_cut = batch.shards is not None and batch.shards.cut_rows
    for i, (param, count) in enumerate(zip(batch.params, batch.steps, strict=True)):
        kept: list[Any] = [None if column is None else column[i] for column in (*batch[:5], *batch.coded[:4])]
        if has_rows(param):
            kept[1] = _lying_like(param, kept[1])
            kept = [None if x is None else _in_rows(x, param) for x in kept]
        of_tensor = n._replace(beta1=n.beta1[i : i + 1], bias_beta1=n.bias_beta1[i : i + 1])
        draw = count.to(torch.int64) * n.micro_step.k + n.micro_step.nth
        before = batch.coded.blocks_before[i] if batch.coded.blocks_before else 0
        size, width, t = len(kept[0]), kept[0].numel() // max(1, len(kept[0])), count.clone()
        # ranks that hold parts of rows add up the norms of all rows at once
        few = max(1, size if is_cut else _PIECE // max(1, width))
        for start in range(0, max(1, size), few):
            some: list[Any] = [None if x is None else x[start : start + few] for x in kept]
            dither = formats.dither(start, some[0].shape, batch.indices[i], draw, before)
            t.copy_(count)
            _step(some, t, of_tensor, dither, batch, param.dim() > 1)
        count.copy_(t)


def _in_rows(x: Tensor, param: Tensor) -> Tensor:
    """Return a tensor that lies in memory like its parameter as (rows, width), or scales as (rows, blocks of a row)."""
    return as_rows(x) if x.shape == param.shape else formats.of_rows(x, as_rows(param))


def _lying_like(param: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient, or a copy of it, in the order of the parameter's memory."""
    return grad if same_order(grad, param) else torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def _step(
    some: list[Any], t: Tensor, n: Scalars, dither: Callable[[str], Tensor], batch: Batch, is_matrix: bool
) -> None:
    """Step some rows of a parameter whose step count is t: θ, g, m, v, μ, the scales of m, v and μ, and low bits."""
    assert batch.coded is not None
    param, grad, *coded, low = some
    theta = param if param.dtype == torch.float32 else formats.full(param, low)
    states = list(zip(STATES, coded[:3], coded[3:], strict=True))  # m, v and μ: their name, codes and scales
    m, v, mu = (
        x if x is None or x.dtype == torch.float32 else formats.decode(x, scale, name) for name, x, scale in states
    )
    plain = Batch([theta], [grad], [m], [v], None if mu is None else [mu], [t])
    plain = plain._replace(unlimited=[0] if is_matrix else [], shards=batch.shards)
    before = rows.before(plain, n)
    foreach.step(plain, n)
    rows.limit(plain, n, before)

    for value, (name, x, scale) in zip((m, v, mu), states, strict=True):
        if value is not x:
            codes, scales = formats.encode(value, x.dtype, name, dither(name))
            _store(x, codes, n.writable())
            if scale is not None:
                _store(scale, scales, n.writable())
    if theta is not param and n.micro_step.moves:
        rounded, bits = formats.split(
            theta, param.dtype, None if low is None else low.dtype, dither("param"), batch.coded.rounds
        )
        _store(param, rounded, n.writable())
        if low is not None:
            _store(low, bits, n.writable())


def _store(old: Tensor, new: Any, writable: Tensor | None) -> None:
    """Write a value, unless it comes from gradients that are not finite."""
    old.copy_(new if writable is None else torch.where(writable, new, old))
