"""Stage 2: measure how long a step takes on the device and on the host.

    python3 -m benchmarks.on_gpu.times FILE [--only formats]

Arms take turns of a few steps, in a new order each round. A row has the first quartile, the median and the third
quartile. FILE is rewritten after each round. Arms that run out of memory are left out, and their rows say so.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grokadamw import GrokAdamW
from grokadamw.backends import native
from grokadamw.backends.gpu_tables import SHAPES

from .. import peers
from ..peers import CLIPPED, FUSED, PROPAGATE, Arm, Shapes, Step, Tensors
from . import common
from .common import DEVICE, REHEARSES, milliseconds, quartiles, rounds_of
from .kernels import timed
from .record import Record, first_line

COPIED = 100_000 if REHEARSES else 100_000_000  # float32 elements
COPIES = 20  # in a turn: a single copy would be bound by its launch
HOST_STEPS = 3 if REHEARSES else 20  # in a turn
MODELS: dict[str, Callable[[], Shapes]] = {
    "GPT-2, 124 M in 148": peers.gpt2,
    "1 B in 300": lambda: [(1024, 3255)] * 300,
}
# only for the limits on rows: several rows per program, straight and odd, and rows that take two passes
ROWS: dict[str, Callable[[], Shapes]] = {
    f"rows of {width}": lambda width=width: [(38_400_000 // width, width)] * 4  # type: ignore[misc]
    for width in (12, 37, 100, 3072)
}
# rows of whole blocks, as in most models, and rows whose last block is shorter
OF_FORMATS: dict[str, Callable[[], Shapes]] = {
    "GPT-2, 124 M in 148": peers.gpt2,
    "1 B in 300 of 1024 × 3264": lambda: [(1024, 3264)] * 300,
    "100 M in 30 of 1024 × 3255": lambda: [(1024, 3255)] * 30,
}


def in_formats(dtype: torch.dtype, make: Callable[..., Step] = peers.preset, **options: Any) -> Callable[..., Step]:
    """Return a maker of steps for parameters and gradients of a dtype, and state in fewer bits."""

    def made(params: list[nn.Parameter]) -> Step:
        own = [nn.Parameter(p.detach().to(dtype)) for p in params]
        for p, given in zip(own, params, strict=True):
            assert given.grad is not None
            p.grad = given.grad.to(dtype)
        return make(own, **options)

    return made


def without_clipping(params: list[nn.Parameter], **options: Any) -> Step:
    return peers.grokadamw(**PROPAGATE, **options)(params)


ARMS = [
    FUSED,
    CLIPPED,
    Arm("GrokAdamW, no clipping", peers.grokadamw(**PROPAGATE), kept=12, traffic=36, ours=True),
    Arm("GrokAdamW, clip 1", peers.grokadamw(), kept=12, traffic=40, clips=True, ours=True),
    Arm("GrokAdamW, the preset", peers.preset, kept=12, clips=True, ours=True),
]
INT8: dict[str, Any] = {"state_dtype": "int8"}
BITS_24: dict[str, Any] = INT8 | {"master_weight_bits": 24}
# bytes per element: its number and low bits, read and written; the gradient, read; three states, in their format
FORMATS = [
    FUSED,
    ARMS[2],
    Arm(
        "bfloat16 states",
        in_formats(torch.float32, without_clipping, state_dtype="bfloat16"),
        kept=6,
        traffic=8 + 4 + 3 * 4,
        ours=True,
    ),
    Arm(
        "int8 states",
        in_formats(torch.float32, without_clipping, **INT8),
        kept=4,
        traffic=8 + 4 + 3 * (2 + 8 / 64),
        ours=True,
    ),
    Arm(
        "bfloat16 weights of 24 bits, int8 states",
        in_formats(torch.bfloat16, without_clipping, **BITS_24),
        kept=5,
        traffic=4 + 2 + 2 + 3 * (2 + 8 / 64),
        ours=True,
    ),
    Arm("the preset, int8 states", in_formats(torch.float32, **INT8), kept=4, clips=True, ours=True),
    Arm("the preset, 24 bits, int8 states", in_formats(torch.bfloat16, **BITS_24), kept=5, clips=True, ours=True),
]
# bytes that a kernel moves per float32 parameter; for `judge` per chunk
BYTES = {"squares": 4, "update": 36, "judge": 8}


def shapes_of(title: str) -> Shapes:
    shapes = (MODELS | ROWS | OF_FORMATS)[title]()
    return [tuple(-(-n // 32) for n in shape) for shape in shapes] if REHEARSES else shapes


def copier() -> Step:
    source, target = (torch.ones(COPIED, device=DEVICE) for _ in range(2))
    return lambda: target.copy_(source)


def of_models(record: Record) -> None:
    rows: list[dict[str, Any]] = []
    for title in MODELS | ROWS:
        earlier = list(rows)
        for of_model in rows_of_model(title, ARMS if title in MODELS else ARMS[-2:]):
            rows = earlier + of_model
            record.write(steps=rows)
        common.release()


def of_formats(record: Record) -> None:
    """Time steps with low-bit state and weights."""
    rows: list[dict[str, Any]] = []
    for title in OF_FORMATS:
        earlier = list(rows)
        for of_model in rows_of_model(title, FORMATS):
            rows = earlier + of_model
            record.write(formats=rows)
        common.release()


def rows_of_model(title: str, given: Sequence[Arm]) -> Iterator[list[dict[str, Any]]]:
    """Yield a row for each arm, after each round. An arm that does not fit into memory has a row that says so."""
    shapes = shapes_of(title)
    elements = sum(map(math.prod, shapes))
    arms: dict[str, tuple[Arm, Step, int]] = {}
    skipped = []
    try:
        tensors = Tensors(shapes, DEVICE)
        copy = copier()
    except torch.OutOfMemoryError as error:
        yield [{"model": title, "arm": "all", "skipped": first_line(error)}]
        return
    for arm in given:
        try:
            step = arm.make(tensors.params(arm))
            arms[arm.name] = arm, step, common.steps_of_a_turn(step)
        except torch.OutOfMemoryError as error:
            skipped.append({"model": title, "arm": arm.name, "skipped": first_line(error)})
        common.release()
    turns = {name: (lambda step=step, n=n: milliseconds(step, n)) for name, (_, step, n) in arms.items()}
    turns["copy"] = lambda: milliseconds(copy, COPIES)
    for said in rounds_of(turns):
        copied = [8e-6 * COPIED / ms for ms in said["copy"]]
        rows = [{"model": title, "arm": "copy", "ms": quartiles(said["copy"]), "gb_per_s": quartiles(copied)}]
        for name, (arm, _, steps) in arms.items():
            row = {"model": title, "arm": name, "parameters": elements, "steps": steps, "ms": quartiles(said[name])}
            if FUSED.name in said:
                row["of_fused"] = quartiles([a / b for a, b in zip(said[name], said[FUSED.name], strict=True)])
            if arm.traffic:
                speeds = [1e-6 * arm.traffic * elements / ms for ms in said[name]]
                row["gb_per_s"] = quartiles(speeds)
                row["of_copy"] = quartiles([a / b for a, b in zip(speeds, copied, strict=True)])
            rows.append(row)
        yield rows + skipped


def of_kernels(record: Record) -> None:
    """Measure each kernel's time and bandwidth in steps that follow each other without a pause."""
    rows: list[dict[str, Any]] = []
    for title in MODELS:
        try:
            rows += rows_of_kernels(title)
        except torch.OutOfMemoryError as error:
            rows.append({"model": title, "kernel": "all", "skipped": first_line(error)})
        record.write(kernels=rows)
        common.release()


def rows_of_kernels(title: str) -> list[dict[str, Any]]:
    shapes = shapes_of(title)
    params = Tensors(shapes, DEVICE).params(ARMS[-1])
    step, copy = GrokAdamW(params, gamma=1e-3).step, copier()
    chunks = sum(-(-math.prod(shape) // SHAPES[4].chunk) for shape in shapes)
    for _ in range(common.WARMUP):
        step()
    with timed() as kernels:
        for _ in range(COPIES):
            copy()  # keeps the device busy while the host runs ahead
        for _ in range(10):
            step()
        torch.cuda.synchronize()
        rows = []
        for name in BYTES:
            ms = kernels.milliseconds(name)
            moved = BYTES[name] * (chunks if name == "judge" else sum(map(math.prod, shapes)))
            speeds = quartiles([1e-6 * moved / time for time in ms])
            rows.append({"model": title, "kernel": name, "ms": quartiles(ms), "gb_per_s": speeds})
    return rows


def small(count: int) -> list[nn.Parameter]:
    """Return tensors of 100 elements, with gradients."""
    params = [nn.Parameter(torch.randn(100, device=DEVICE)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones_like(p)
    return params


def in_groups(params: list[nn.Parameter], groups: int) -> list[dict[str, Any]]:
    size = -(-len(params) // groups)
    return [{"params": params[i : i + size], "weight_decay": 0.01} for i in range(0, len(params), size)]


def host_us(step: Step, params: Sequence[nn.Parameter] = ()) -> list[float]:
    """Return the microseconds until a step returns that waits for nothing. `params` get new gradients before it."""
    times = []
    for _ in range(HOST_STEPS):
        made: list[Tensor] = [torch.ones_like(p) for p in params]  # at new addresses, as the old ones still exist
        for p, grad in zip(params, made, strict=True):
            p.grad = grad
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        times.append(1e6 * (time.perf_counter() - began))
    torch.cuda.synchronize()
    return times


def replay(optimizer: Any) -> Step:
    """Return the replay of a step's graph."""
    for _ in range(common.WARMUP):
        optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return lambda of=optimizer: graph.replay()  # keeps the optimizer: the graph reads its tensors


def of_host(record: Record) -> None:
    rows: list[dict[str, Any]] = []
    makers: dict[str, Callable[..., Any]] = {
        "GrokAdamW": GrokAdamW,
        FUSED.name: lambda params, **options: torch.optim.AdamW(params, fused=True, **options),
    }
    cases = [(count, 1) for count in (1, 300, 1000)] + [(300, groups) for groups in (24, 300)]
    for count, groups in cases:
        turns: dict[str, Callable[[], list[float]]] = {}
        for name, make in makers.items():
            of_name = host_turns(make, count, groups)
            turns |= {f"{name}, {way}": turn for way, turn in of_name.items()}
        said: dict[str, list[list[float]]] = {}
        for said in rounds_of(turns):
            of_case = [
                {"tensors": count, "groups": groups, "arm": name, "us": quartiles([x for turn in turns for x in turn])}
                for name, turns in said.items()
            ]
            record.write(host=rows + of_case)
        rows += of_case
        common.release()


def host_turns(make: Callable[..., Any], count: int, groups: int) -> dict[str, Callable[[], list[float]]]:
    """Return turns: with the same gradients, with new ones as after set_to_none, and for one group a graph's replay."""

    def started(**options: Any) -> tuple[list[nn.Parameter], Any]:
        params = small(count)
        optimizer = make(in_groups(params, groups), **options)
        for _ in range(common.WARMUP):
            optimizer.step()
        return params, optimizer

    _, kept = started()
    params, anew = started()
    turns = {"gradients kept": lambda: host_us(kept.step), "set_to_none": lambda: host_us(anew.step, params)}
    if groups == 1:
        replayed = replay(started(capturable=True)[1])
        turns["a graph's replay"] = lambda: host_us(replayed)
    return turns


def shown(row: dict[str, Any]) -> str:
    """Return a row's medians in a line."""
    medians = {key: f"{value[1]:.4g}" if isinstance(value, list) else value for key, value in row.items()}
    return "  ".join(f"{key} {value}" for key, value in medians.items())


def few_steps() -> None:
    """Take five steps of 124 M parameters, for a profiler."""
    common.begin()
    params = Tensors(shapes_of("GPT-2, 124 M in 148"), DEVICE).params(ARMS[-1])
    optimizer = GrokAdamW(params, gamma=1e-3)
    for _ in range(5):
        optimizer.step()
    torch.cuda.synchronize()


PARTS = {"models": of_models, "formats": of_formats, "kernels": of_kernels, "host": of_host}


def main(path: str, only: str | None = None) -> None:
    common.begin()
    warnings.simplefilter("ignore")  # about β1 in a thousand layers, which is intended
    record = Record(path)
    has_library = native.signature() is not None
    record.write(device=common.device_name(), rounds=common.ROUNDS, native_library=has_library)
    failed = []
    for part in (of_models, of_kernels, of_host) if only is None else [PARTS[only]]:
        try:
            part(record)
        except Exception as error:  # the other parts may still succeed
            failed.append(f"{part.__name__}: {first_line(error)}")
            record.write(failed=failed)
            traceback.print_exc()
    for name in ("host", "kernels", "formats", "steps"):  # the most important rows come last
        print(*map(shown, record.results.get(name, [])), sep="\n")
    counts = ", ".join(
        f"{len(record.results.get(name, []))} {name}" for name in ("steps", "formats", "kernels", "host")
    )
    without = "" if has_library else "; without the native library, which stage 0 builds: a slow host"
    record.write(summary=f"rows: {counts}{without}")
    sys.exit("\n".join(failed) or 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.on_gpu.times")
    parser.add_argument("file")
    parser.add_argument("--only", choices=PARTS, help="formats are timed only if asked for")
    chosen = parser.parse_args()
    main(chosen.file, chosen.only)
