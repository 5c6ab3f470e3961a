"""What tensors look like and where they lie, for backends that get addresses and must know what is there.

Addresses are those of a moment: whoever keeps them compares before using them. Asking Python costs half a microsecond
for each tensor, more than the step of a small one. Where the native kernel was built, and torch has DLPack's table of C
functions (2.10 and newer), one call asks all of them.
"""

from __future__ import annotations

import ctypes
import struct
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from operator import attrgetter, eq, gt
from typing import Any

import torch
from torch import Tensor, nn

from ..state.formats import has_no_gaps, has_rows
from . import native
from .types import Addresses, Batch, written

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the native kernel's order
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LOOKS: tuple[Callable[[Tensor], Any], ...] = (attrgetter("dtype"), Tensor.size, Tensor.stride, Tensor.get_device)


class TensorSignature:
    """The device, dtype, shape, strides and address of each tensor of a list; none of them may be of a subclass."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._look, self._count = native.look(), len(tensors)
        self._room = ctypes.c_char * (8 * len(tensors))
        if self._look is None:
            self._read = [list(map(read, tensors)) for read in _LOOKS]
            self.addresses = addresses(tensors)
            return
        self._lengths = [2 + 2 * x.dim() for x in tensors]
        self._words = (ctypes.c_int64 * sum(self._lengths))()
        self._hints = (ctypes.c_void_p * len(tensors))(*map(id, tensors))
        room = self._room()
        self._look(tensors, len(tensors), self._hints, self._words, room, False, False)
        self.addresses = room.raw

    def looks(self) -> list[Any]:
        """Return a value for each tensor that is the same for all that look alike, wherever they lie."""
        if self._look is None:
            return list(zip(*self._read, strict=True))
        words, ends = bytes(self._words), list(accumulate(self._lengths))
        return [words[8 * start : 8 * end] for start, end in zip([0, *ends], ends, strict=False)]

    def holds(self, tensors: list[Tensor]) -> bool:
        """Return True if as many tensors look the same, and lie where those lay."""
        if len(tensors) != self._count:  # which C does not ask
            return False
        if self._look is None:
            return self._look_same(tensors) and addresses(tensors) == self.addresses
        return bool(self._look(tensors, len(tensors), self._hints, self._words, self.addresses, True, True))

    def addresses_of(self, tensors: list[Tensor]) -> bytes | None:
        """Return where as many tensors lie if they look the same, otherwise None."""
        if len(tensors) != self._count:
            return None
        if self._look is None:
            return addresses(tensors) if self._look_same(tensors) else None
        room = self._room()
        same = self._look(tensors, len(tensors), self._hints, self._words, room, True, False)
        return room.raw if same else None

    def _look_same(self, tensors: list[Tensor]) -> bool:
        # no list is made of it: the garbage collector would come, and go through all there is
        return all(all(map(eq, map(read, tensors), then)) for read, then in zip(_LOOKS, self._read, strict=True))


def memory_is_all(compiling: bool) -> bool:
    """Return True if nothing traces, transforms or fakes what is done with tensors, so that their memory says all."""
    return not (
        compiling
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def why_not(row: Sequence[Tensor], step: Tensor, coded: bool = False) -> str | None:
    """Return why no backend that gets addresses can take a parameter, as in `choose`; None where one can."""
    dtypes = [x.dtype for x in row]
    if coded:
        fits = {*dtypes[:2]} <= {*_FLOATS} and {*dtypes[2:]} <= {
            torch.float32,
            torch.bfloat16,
            torch.int8,
            torch.uint8,
            torch.int16,
        }
    else:
        are_double = {dtype == torch.float64 for dtype in dtypes}
        fits = {*dtypes} <= {*DTYPES} and len({*dtypes[2:]}) == 1 and len(are_double) == 1
    if not fits:
        return f"dtypes {', '.join(map(str, dtypes))}"
    odd = [type(x).__name__ for x in row if type(x) not in (Tensor, nn.Parameter)]
    if odd:
        return f"a tensor subclass, {odd[0]}"
    if any(x.device != row[0].device for x in (*row, step)) or step.dtype != torch.float32 or step.numel() != 1:
        return f"gradient or state are not on {row[0].device}, or the step count is not float32"
    if not lie_alike(row) or (coded and not has_rows(row[0])):
        return "memory with gaps, or a gradient with other strides"
    return None


def where(batch: Batch) -> Addresses:
    """Return the addresses of this moment."""
    mu = batch.grok_emas
    return Addresses(
        addresses(batch.params),
        addresses(batch.exp_avgs),
        addresses(batch.exp_avg_sqs),
        None if mu is None else addresses(mu),
        addresses(batch.steps),
        ends_of(batch.params),
        addresses(batch.grads),
    )


def lie_alike(row: Sequence[Tensor]) -> bool:
    """Return True if the same place in memory is the same element of each, and every place up to the last is one."""
    if any(x.shape != row[0].shape or x.is_neg() for x in row):
        return False
    return all(x.is_contiguous() for x in row) or (
        has_no_gaps(row[0]) and all(x.stride() == row[0].stride() for x in row)
    )


def row_width(param: Tensor, longest: int) -> int:
    """Return the elements of a row of a parameter that `why_not` has cleared; 0 if kernels cannot limit its rows.

    They limit rows of at most `longest` elements, each of which lies in one piece, one row after the other.
    """
    if param.dim() < 2 or not param.numel():
        return 0
    width = param.numel() // param.shape[0]
    in_order = param.shape[0] == 1 or param.stride(0) == width
    return width if in_order and width <= longest else 0


def share_memory(*batches: Batch) -> bool:
    """Return True if memory that a step writes belongs to two of the tensors."""
    grads = [x for batch in batches for x in batch.grads]
    ranges = Ranges([x for batch in batches for column in written(batch) for x in column], grads)
    return ranges.overlap or ranges.meet(addresses(grads))


class Ranges:
    """The memory that a step writes, to see whether gradients lie in it, which it reads meanwhile."""

    def __init__(self, written: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        found = zip(map(Tensor.data_ptr, written), map(attrgetter("nbytes"), written), strict=True)
        pairs = sorted([(start, start + size) for start, size in found if size])
        starts, ends = [start for start, _ in pairs], [end for _, end in pairs]
        self.overlap = any(map(gt, ends, starts[1:]))
        self._count, self._sizes = len(pairs), packed(list(map(attrgetter("nbytes"), grads)))
        self._starts, self._ends = packed(starts), packed(ends)

    def meet(self, grads: bytes) -> bool:
        """Return True if one of the gradients, which lie there, has memory in common with what is written."""
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
    """Return where the tensors lie, 8 bytes for each."""
    return packed(list(map(Tensor.data_ptr, tensors)))


def packed(numbers: Collection[int]) -> bytes:
    """Return 8 bytes for each number, as C wants them."""
    return struct.pack(f"{len(numbers)}Q", *numbers)


def ends_of(tensors: Sequence[Tensor]) -> bytes:
    """Return how many elements all tensors up to and including each have."""
    return struct.pack(f"{len(tensors)}q", *accumulate(map(Tensor.numel, tensors)))
