"""What tensors look like: device, dtype, shape, strides, and where they lie; to see at each step whether they still do.

Asking Python costs half a microsecond for each tensor, more than the step of a small one. Where the native kernel was
built, and torch has DLPack's table of C functions (2.10 and newer), one call asks them all.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from operator import attrgetter, eq
from typing import Any

from torch import Tensor

from .update import memory, native

_READ: tuple[Callable[[Tensor], Any], ...] = (attrgetter("dtype"), Tensor.size, Tensor.stride, Tensor.get_device)


class Looks:
    """How a list of tensors looks, which are no subclasses, and where they lie: `addresses`, 8 bytes for each."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._look, self._count = native.look(), len(tensors)
        if self._look is None:
            self._read = [list(map(read, tensors)) for read in _READ]
            self.addresses = memory.addresses(tensors)
            return
        self._words = (ctypes.c_int64 * sum(2 + 2 * x.dim() for x in tensors))()
        self._hints = (ctypes.c_void_p * len(tensors))(*map(id, tensors))
        room = ctypes.create_string_buffer(8 * len(tensors))
        self._look(tensors, len(tensors), self._hints, self._words, room, False, False)
        self.addresses = room.raw

    def hold(self, tensors: list[Tensor]) -> bool:
        """Whether as many tensors look so, and lie where those lay."""
        if len(tensors) != self._count:  # which C does not ask
            return False
        if self._look is None:
            return self._look_so(tensors) and memory.addresses(tensors) == self.addresses
        return bool(self._look(tensors, len(tensors), self._hints, self._words, self.addresses, True, True))

    def of(self, tensors: list[Tensor]) -> bytes | None:
        """Where as many tensors lie, if they look so; else None."""
        if len(tensors) != self._count:
            return None
        if self._look is None:
            return memory.addresses(tensors) if self._look_so(tensors) else None
        room = ctypes.create_string_buffer(8 * len(tensors))
        same = self._look(tensors, len(tensors), self._hints, self._words, room, True, False)
        return room.raw if same else None

    def _look_so(self, tensors: list[Tensor]) -> bool:
        # no list is made of it: the garbage collector would come, and go through all there is
        return all(all(map(eq, map(read, tensors), then)) for read, then in zip(_READ, self._read, strict=True))
