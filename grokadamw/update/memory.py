"""Where tensors lie in memory, for implementations that get addresses, and must know what is there.

Addresses are those of a moment: whoever keeps them compares before using them.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..numbers import mesh_of
from . import native
from .reference import Tensors, written

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the native kernel's order


def why_not(row: Sequence[Tensor], step: Tensor) -> str | None:
    """Why no implementation that gets addresses can take a parameter; None where one can.

    Args:
        row: the parameter, its gradient, m, v and, where there is one, μ.
        step: its step count.
    """
    dtypes = [x.dtype for x in row[:3]]
    if any(x.dtype != dtypes[2] for x in row[3:]) or not set(dtypes) <= set(DTYPES):
        return f"dtypes {', '.join(str(x.dtype) for x in row)}"
    if torch.float64 in dtypes and len(set(dtypes)) > 1:
        return f"dtypes {', '.join(map(str, dtypes))}"
    if mesh_of(row[0]) is not None and any(x.placements != row[0].placements for x in row):  # type: ignore[attr-defined]
        return f"a DTensor whose gradient or state is not placed as it is, {row[0].placements}"  # type: ignore[attr-defined]
    row = [plain([x])[0] for x in row]
    odd = [type(x).__name__ for x in row if type(x) not in (Tensor, nn.Parameter)]
    if odd:
        return f"a tensor subclass, {odd[0]}"
    if any(x.device != row[0].device for x in (*row, step)) or step.dtype != torch.float32 or step.numel() != 1:
        return f"gradient or state are not on {row[0].device}, or the step count is not float32"
    if not lie_alike(row):
        return "memory with gaps, or a gradient with other strides"
    return None


class Where(NamedTuple):
    """Where the tensors of a list lie, 8 bytes for each address; and how large they are."""

    params: bytes
    exp_avgs: bytes
    exp_avg_sqs: bytes
    grok_emas: bytes | None
    steps: bytes
    ends: bytes  # elements of all tensors up to and with each
    grads: bytes


def where(tensors: Tensors) -> Where:
    """The addresses of this moment."""
    params, mu = plain(tensors.params), tensors.grok_emas
    return Where(
        addresses(params),
        addresses(plain(tensors.exp_avgs)),
        addresses(plain(tensors.exp_avg_sqs)),
        None if mu is None else addresses(plain(mu)),
        addresses(tensors.steps),
        ends_of(params),
        addresses(plain(tensors.grads)),
    )


def plain(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, or a DTensor's part that is here."""
    return [x._local_tensor for x in tensors] if mesh_of(tensors[0]) is not None else tensors  # type: ignore[attr-defined]


def lie_alike(row: Sequence[Tensor]) -> bool:
    """Whether the same place in memory is the same element of each, and every place up to the last is one."""
    if any(x.shape != row[0].shape or x.is_neg() for x in row):
        return False
    return all(x.is_contiguous() for x in row) or (
        has_no_gaps(row[0]) and all(x.stride() == row[0].stride() for x in row)
    )


def has_no_gaps(x: Tensor) -> bool:
    """Whether every place in memory up to the last is one element, in whatever order."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def row_width(param: Tensor, longest: int) -> int:
    """Return the elements of a row of a parameter that `why_not` has cleared; 0 if kernels cannot limit its rows.

    They limit rows of at most `longest` elements, each of which lies in one piece, one row after the other.
    """
    if param.dim() < 2 or mesh_of(param) is not None or not param.numel():
        return 0
    width = param.numel() // param.shape[0]
    in_order = param.shape[0] == 1 or param.stride(0) == width
    return width if in_order and width <= longest else 0


def share_memory(*lists: Tensors) -> bool:
    """Whether memory that a step writes belongs to two of the tensors."""
    grads = [x for tensors in lists for x in plain(tensors.grads)]
    ranges = Ranges([x for tensors in lists for column in written(tensors) for x in plain(column)], grads)
    return ranges.overlap or ranges.meet(addresses(grads))


class Ranges:
    """The memory that a step writes, to see whether gradients lie in it, which it reads meanwhile."""

    def __init__(self, written: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        pairs = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in written if x.numel())
        self.overlap = any(end > start for (_, end), (start, _) in zip(pairs, pairs[1:], strict=False))
        self._count, self._sizes = len(pairs), packed([grad.nbytes for grad in grads])
        self._starts, self._ends = (packed([pair[i] for pair in pairs]) for i in (0, 1))

    def meet(self, grads: bytes) -> bool:
        """Whether one of the gradients, which lie there, has memory in common with what is written."""
        found, count = native.kernel(), len(grads) // 8
        if not isinstance(found, str):
            return bool(found.meet(self._count, self._starts, self._ends, count, grads, self._sizes))
        starts, ends = (struct.unpack(f"{self._count}Q", x) for x in (self._starts, self._ends))
        for at, size in zip(*(struct.unpack(f"{count}Q", x) for x in (grads, self._sizes)), strict=True):
            before = bisect_left(starts, at + size)  # ranges that begin before it ends; they are sorted, and apart
            if size and before and ends[before - 1] > at:
                return True
        return False


def addresses(tensors: Sequence[Tensor]) -> bytes:
    """Where they lie, 8 bytes for each."""
    return packed(list(map(Tensor.data_ptr, tensors)))


def packed(numbers: Collection[int]) -> bytes:
    """8 bytes for each, as C wants them."""
    return struct.pack(f"{len(numbers)}Q", *numbers)


def ends_of(tensors: Sequence[Tensor]) -> bytes:
    return struct.pack(f"{len(tensors)}q", *accumulate(map(Tensor.numel, tensors)))
