"""Stage 5: time the kernels in other shapes. A shape is how much a program does at a time.

    python3 -m benchmarks.on_gpu.sweep FILE [--only formats]

Candidates take turns, in a new order each round. FILE is rewritten after each round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from grokadamw.backends import gpu
from grokadamw.backends.gpu_tables import CODED, JUDGE_BLOCK, JUDGE_THREADS, SHAPES, Shape, Tables
from grokadamw.backends.types import Batch, Coded, Scalars
from grokadamw.options import STATES
from grokadamw.state import formats

from . import common
from .common import DEVICE, REHEARSES, quartiles, rounds_of
from .kernels import Timed, timed
from .record import Record, first_line
from .times import BYTES, COPIES, copier, shown

ELEMENTS = 1 << (18 if REHEARSES else 28)  # all chunk sizes divide this
LAUNCHES = 5  # in a turn
# the shapes in use come first; each thread has chunk / (8 or 4 elements) / (32 warps) loads of 16 bytes in flight
SQUARES = [
    SHAPES[4],
    Shape(4096, 2048, 4),
    Shape(8192, 1024, 4),
    Shape(8192, 2048, 8),
    Shape(16384, 2048, 8),  # 16 wide loads
    Shape(16384, 4096, 8),
]
UPDATE = [
    SHAPES[4],
    Shape(2048, 1024, 4),
    Shape(4096, 1024, 8),
    Shape(4096, 2048, 8),
    Shape(8192, 1024, 4),
    Shape(8192, 2048, 8),
]
LIMITED = [SHAPES[4], Shape(2048, 1024, 4), Shape(8192, 1024, 4), Shape(4096, 2048, 4)]  # these get twice the warps
IN_FORMATS = [
    CODED,
    Shape(2048, 512, 4),
    Shape(4096, 512, 2),
    Shape(4096, 1024, 8),
    Shape(4096, 2048, 4),
    Shape(4096, 2048, 8),
    Shape(8192, 2048, 8),
]
JUDGE = [
    Shape(JUDGE_BLOCK, JUDGE_BLOCK, JUDGE_THREADS // 32),
    Shape(8192, 8192, 16),
    Shape(4096, 4096, 32),
    Shape(1024, 1024, 4),
]
NUMBERS = Scalars([0.9], [0.9], 0.999, 1e-3, 1e-8, False, 0.01, 0.98, 2.0, 0, 1.0, False, False, None)


def norm(grad: Tensor) -> Callable[[Tables], Any]:
    """Return a run of `squares` and `judge`."""
    return lambda tables: gpu.judge([grad], [1.0], None, None, None, needs_norm=True, tables=tables)


def update(theta: Tensor, grad: Tensor, width: int = 0) -> Callable[[Tables], Any]:
    """Return a run of `update`. If a width is given, all rows have it and are limited."""
    m, v, mu = (torch.zeros(len(theta), device=DEVICE) for _ in range(3))
    tensors = Batch([theta], [grad], [m], [v], [mu], [torch.zeros((), device=DEVICE)], row_widths=[width])
    numbers = NUMBERS._replace(max_row_change=0.035 if width else 0.0)
    return lambda tables: gpu.steps([(tensors, numbers)], tables)


def update_coded(theta: Tensor, grad: Tensor, options: dict[str, Any], width: int = 0) -> Callable[[Tables], Any]:
    """Return a run of `update_coded` on a matrix whose states and weights are kept under these options."""
    param = theta.view(-1, 1024)
    kept = [formats.new(param, name, options, torch.float32) for name in STATES]
    low = formats.low_dtype(param, options)
    extras = [
        [state[f"{name}_scale"]] if f"{name}_scale" in state else None for name, state in zip(STATES, kept, strict=True)
    ]
    lows = None if low is None else [torch.zeros_like(param, dtype=low)]
    lists = [[state[name]] for name, state in zip(STATES, kept, strict=True)]
    tensors = Batch(
        *([param], [grad.view(-1, 1024)], *lists, [torch.zeros((), device=DEVICE)]),
        row_widths=[width],
        indices=(0,),
        coded=Coded(*extras, lows, False),
    )
    numbers = NUMBERS._replace(max_row_change=0.035 if width else 0.0)
    return lambda tables: gpu.steps([(tensors, numbers)], tables)


class Sweep:
    """The candidate shapes of one kernel, for one dtype."""

    def __init__(
        self,
        kernel: str,
        dtype: torch.dtype,
        shapes: list[Shape],
        run: Callable[[Tables], Any],
        about: str = "",
        moved: float | None = None,  # bytes per element
    ) -> None:
        self.kernel, self.dtype, self.run, self.copy, self.title = kernel, dtype, run, copier(), kernel + about
        self.moved = moved
        self.shapes = {str(tuple(shape)): shape for shape in shapes}
        self.about: dict[str, dict[str, Any]] = {}

    def turn(self, shape: Shape, kernels: Timed) -> list[float]:
        """Return the milliseconds of each launch."""
        if self.kernel == "judge":
            change: Any = patch.multiple(gpu, JUDGE_BLOCK=shape.block, JUDGE_THREADS=32 * shape.warps)
        elif self.kernel == "update_coded":
            change = patch("grokadamw.backends.gpu_tables.CODED", shape)
        else:
            change = patch.dict(SHAPES, dict.fromkeys(SHAPES, shape))
        with change:
            self.run(tables := Tables())  # makes the tables, while the device waits
            for _ in range(COPIES):
                self.copy()  # keeps the device busy while the host runs ahead
            for _ in range(LAUNCHES):
                self.run(tables)
        torch.cuda.synchronize()
        return kernels.milliseconds(self.kernel)[1:]

    def rows(self, write: Callable[[list[dict[str, Any]]], None]) -> None:
        with timed() as kernels:
            works = {}
            for name, shape in self.shapes.items():
                row = {"kernel": self.title, "dtype": str(self.dtype), "chunk, block, warps": name}
                try:
                    self.turn(shape, kernels)  # compiles it
                except Exception as error:
                    self.about[name] = row | {"failed": first_line(error)}
                    continue
                code = kernels.compiled[self.kernel]
                self.about[name] = row | {"registers": code.n_regs, "spilled": code.n_spills}
                works[name] = shape
            for said in rounds_of({name: (lambda s=s: self.turn(s, kernels)) for name, s in works.items()}):
                write([row | self.found(said.get(name)) for name, row in self.about.items()])

    def found(self, turns: list[list[float]] | None) -> dict[str, Any]:
        if turns is None:
            return {}
        ms = quartiles([x for turn in turns for x in turn])
        if self.kernel == "judge":
            return {"ms": ms}
        moved = ELEMENTS * (BYTES[self.kernel] if self.moved is None else self.moved)
        if self.dtype == torch.bfloat16 and self.moved is None:  # 2 bytes less for g, θ read and θ written
            moved -= 2 * ELEMENTS if self.kernel == "squares" else 6 * ELEMENTS
        return {"ms": ms, "gb_per_s": [round(1e-6 * moved / time, 1) for time in reversed(ms)]}


def of_kernels() -> Iterator[list[Sweep]]:
    for dtype in (torch.float32, torch.bfloat16):
        theta, grad = (torch.randn(ELEMENTS, device=DEVICE).mul_(0.02).to(dtype) for _ in range(2))
        sweeps = [
            Sweep("squares", dtype, SQUARES, norm(grad)),
            Sweep("update", dtype, UPDATE, update(theta, grad)),
        ]
        if dtype == torch.float32:
            sweeps.append(Sweep("judge", dtype, JUDGE, norm(grad)))
            for width in (64, 1024, 4096):
                title = f", rows of {width} limited"
                sweeps.append(Sweep("update", dtype, LIMITED, update(theta, grad, width), title))
        yield sweeps


def of_formats() -> Iterator[list[Sweep]]:
    of_codes = 3 * (2 + 8 / 64)
    for dtype, kind, low_bits, moved in (
        (torch.float32, "bfloat16", None, 24.0),
        (torch.float32, "int8", None, 12 + of_codes),
        (torch.bfloat16, "int8", 24, 8 + of_codes),
    ):
        theta, grad = (torch.randn(ELEMENTS, device=DEVICE).mul_(0.02).to(dtype) for _ in range(2))
        options = {"state_dtype": kind, "master_weight_bits": low_bits, "rounding": "nearest"}
        sweeps = []
        for width in (0, 1024) if kind == "int8" else (0,):
            about = f", {kind}{f', {low_bits} bits' if low_bits else ''}{', rows limited' if width else ''}"
            run = update_coded(theta, grad, options, width)
            sweeps.append(Sweep("update_coded", dtype, IN_FORMATS[:4] if width else IN_FORMATS, run, about, moved))
        yield sweeps


def main(path: str, only: str | None = None) -> None:
    common.begin()
    record = Record(path)
    record.write(device=common.device_name(), elements=ELEMENTS)
    rows: list[dict[str, Any]] = []
    for sweeps in of_kernels() if only is None else of_formats():
        for sweep in sweeps:
            earlier = list(rows)

            def write(of_sweep: list[dict[str, Any]], earlier: list[dict[str, Any]] = earlier) -> None:
                record.write(rows=earlier + of_sweep)

            sweep.rows(write)
            rows = record.results["rows"]
            print(*map(shown, rows[len(earlier) :]), sep="\n")
        sweeps.clear()
        del sweep
        common.release()
    failed = [row for row in rows if "failed" in row]
    record.write(summary=f"{len(rows) - len(failed)} of {len(rows)} candidates ran")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.on_gpu.sweep")
    parser.add_argument("file")
    parser.add_argument("--only", choices=["formats"], help="what is kept in fewer bits, instead of all else")
    chosen = parser.parse_args()
    main(chosen.file, chosen.only)
