"""Timing of single kernels, with an event before and after each launch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from grokadamw.backends import gpu

NAMES = ("squares", "judge", "update", "update_coded")


class Timed:
    """A replacement for the kernels' module that keeps the events of each launch, and the kernel compiled for it."""

    def __init__(self, kernels: Any) -> None:
        self.tl = kernels.tl
        self.events: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.compiled: dict[str, Any] = {}
        for name in NAMES:
            setattr(self, name, _Kernel(self, name, getattr(kernels, name)))

    def milliseconds(self, name: str) -> list[float]:
        """Return the milliseconds of each launch so far, and forget them. The device must be done with them."""
        return [start.elapsed_time(end) for start, end in self.events.pop(name, [])]


class _Kernel:
    def __init__(self, timed: Timed, name: str, kernel: Any) -> None:
        self.timed, self.name, self.kernel = timed, name, kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.timed.compiled[self.name] = self.kernel[grid](*arguments, **options)
            end.record()
            self.timed.events[self.name].append((start, end))

        return launch


@contextmanager
def timed() -> Iterator[Timed]:
    """Time all launches inside."""
    stand_in = Timed(gpu.kernels())
    with patch.object(gpu, "kernels", lambda: stand_in):
        yield stand_in
