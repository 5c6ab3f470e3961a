"""The layout and addresses of tensors, for backends that read and write memory by address.

An address is valid only for a moment: code that keeps one must compare it again before using it. Reading it from Python
takes half a microsecond a tensor, more than the step of a small one. If the native kernel was built and torch has
DLPack's table of C functions (2.10 and newer), one call reads all tensors.
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

from ..state.formats import has_no_gaps, has_rows, width_of
from . import native
from .types import Addresses, Batch, written

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the native kernel's order
_FLOATS = {torch.float32, torch.bfloat16, torch.float16}
_CODED = {torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int16}  # of states and low bits
_LOOKS: tuple[Callable[[Tensor], Any], ...] = (
    *(type, attrgetter("dtype"), Tensor.size, Tensor.stride, Tensor.get_device),
    lambda x: x._is_zerotensor() or not x.data_ptr(),  # has no memory
)


class TensorSignature:
    """The type, device, dtype, shape and strides of each tensor of a list, and the addresses of the first `fixed` ones.

    Tensors must be of type Tensor or Parameter. A tensor without memory has another signature than one with memory.
    """

    def __init__(self, tensors: list[Tensor], fixed: int) -> None:
        self._native, self._count, self._fixed = native.signature(), len(tensors), fixed
        if self._native is None:
            self._read = [list(map(read, tensors)) for read in _LOOKS]
            self._addresses = addresses(tensors[:fixed])
            return
        self._lengths = [3 + 2 * x.dim() for x in tensors]
        self._words = (ctypes.c_int64 * sum(self._lengths))()
        self._hints = (ctypes.c_void_p * len(tensors))(*map(id, tensors))
        self._at = (ctypes.c_char * (8 * len(tensors)))()
        self._native(tensors, len(tensors), fixed, self._hints, self._words, self._at, False)

    def looks(self) -> list[Any]:
        """Return a value for each tensor. Values are equal if type, device, dtype, shape and strides are equal."""
        if self._native is None:
            return list(zip(*self._read, strict=True))
        words, ends = bytes(self._words), list(accumulate(self._lengths))
        return [words[8 * start : 8 * end] for start, end in zip([0, *ends], ends, strict=False)]

    def other_addresses(self, tensors: list[Tensor]) -> bytes | None:
        """Return the addresses of these tensors except the first `fixed`; None if a signature has changed."""
        if len(tensors) != self._count:  # C does not check this
            return None
        if self._native is not None:
            same = self._native(tensors, len(tensors), self._fixed, self._hints, self._words, self._at, True)
            return self._at.raw[8 * self._fixed :] if same else None
        # make no list: that could start the garbage collector, which visits all objects
        same = all(all(map(eq, map(read, tensors), then)) for read, then in zip(_LOOKS, self._read, strict=True))
        same = same and addresses(tensors[: self._fixed]) == self._addresses
        return addresses(tensors[self._fixed :]) if same else None


def memory_is_all(compiling: bool) -> bool:
    """Return True if nothing traces, transforms or fakes operations on tensors: their memory is all that counts."""
    return not (
        compiling
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_freed(x: Tensor) -> bool:
    """Return True for a plain tensor whose elements have no memory."""
    if type(x) not in (Tensor, nn.Parameter) or x.is_meta or x.layout != torch.strided:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return x.numel() > 0 and x.untyped_storage().nbytes() == 0


def why_not(tensors: Sequence[Tensor], step: Tensor, coded: bool) -> str | None:
    """Return why no backend that takes addresses can take a parameter, or None if one can; arguments as in `choose`."""
    dtypes = [x.dtype for x in tensors]
    if coded:
        fits = {*dtypes[:2]} <= _FLOATS and {*dtypes[2:]} <= _CODED
    else:
        are_double = {dtype == torch.float64 for dtype in dtypes}
        fits = {*dtypes} <= {*DTYPES} and len({*dtypes[2:]}) == 1 and len(are_double) == 1
    if not fits:
        return f"dtypes {', '.join(map(str, dtypes))}"
    odd = [type(x).__name__ for x in tensors if type(x) not in (Tensor, nn.Parameter)]
    if odd:
        return f"a tensor subclass, {odd[0]}"
    if any(x.device != tensors[0].device for x in (*tensors, step)) or step.dtype != torch.float32 or step.numel() != 1:
        return f"gradient or state are not on {tensors[0].device}, or the step count is not float32"
    if not lie_alike(tensors):
        return "memory with gaps, or a gradient with other strides"
    return "rows that do not follow one another in memory" if coded and not has_rows(tensors[0]) else None


def where(batch: Batch) -> Addresses:
    """Return the current addresses of a batch."""
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


def lie_alike(tensors: Sequence[Tensor]) -> bool:
    """Return True if all tensors have their elements in the same order in memory, without gaps."""
    if any(x.shape != tensors[0].shape or x.is_neg() for x in tensors):
        return False
    return all(x.is_contiguous() for x in tensors) or (
        has_no_gaps(tensors[0]) and all(x.stride() == tensors[0].stride() for x in tensors)
    )


def row_width(param: Tensor, longest: int) -> int:
    """Return the elements in a row of a parameter that `why_not` has cleared; 0 if kernels cannot limit its rows.

    They can if a row has at most `longest` elements and lies in one piece, and the rows follow one another in memory.
    """
    width = width_of(param) if param.dim() > 1 and param.numel() else 0
    return width if width <= longest and has_rows(param) else 0


def share_memory(*batches: Batch) -> bool:
    """Return True if two of the batches' tensors share memory that a step writes."""
    grads = [x for batch in batches for x in batch.grads]
    ranges = Ranges([x for batch in batches for column in written(batch) for x in column], grads)
    return ranges.overlap or ranges.meet(addresses(grads))


class Ranges:
    """The memory that a step writes, to check that no gradient lies in it."""

    def __init__(self, written: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        spans = zip(map(Tensor.data_ptr, written), map(attrgetter("nbytes"), written), strict=True)
        pairs = sorted([(start, start + size) for start, size in spans if size])
        starts, ends = [start for start, _ in pairs], [end for _, end in pairs]
        self.overlap = any(map(gt, ends, starts[1:]))
        self._count, self._sizes = len(pairs), packed(list(map(attrgetter("nbytes"), grads)))
        self._starts, self._ends = packed(starts), packed(ends)

    def meet(self, grads: bytes) -> bool:
        """Return True if a gradient overlaps memory that is written. `grads` are the gradients' addresses."""
        kernel, count = native.kernel(), len(grads) // 8
        if not isinstance(kernel, str):
            return bool(kernel.meet(self._count, self._starts, self._ends, count, grads, self._sizes))
        starts, ends = (struct.unpack(f"{self._count}Q", x) for x in (self._starts, self._ends))
        for at, size in zip(*(struct.unpack(f"{count}Q", x) for x in (grads, self._sizes)), strict=True):
            before = bisect_left(starts, at + size)  # how many sorted, disjoint ranges begin before the gradient ends
            if size and before and ends[before - 1] > at:
                return True
        return False


def addresses(tensors: Sequence[Tensor]) -> bytes:
    """Return the tensors' addresses, 8 bytes each."""
    return packed(list(map(Tensor.data_ptr, tensors)))


def packed(numbers: Collection[int]) -> bytes:
    """Return the numbers as an array for C, 8 bytes each."""
    return struct.pack(f"{len(numbers)}Q", *numbers)


def ends_of(tensors: Sequence[Tensor]) -> bytes:
    """Return, for each tensor, the number of elements of all tensors up to and including it."""
    return struct.pack(f"{len(tensors)}q", *accumulate(map(Tensor.numel, tensors)))
