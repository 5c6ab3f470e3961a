"""Code that the stages share: the device, and the timing of turns."""

from __future__ import annotations

import gc
import os
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

REHEARSES = os.environ.get("REHEARSE") == "1"
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if REHEARSES else "cuda"
# whether the kernels write results that can be checked
COMPUTES = not REHEARSES or INTERPRETS
ROUNDS = 2 if REHEARSES else 7
TURN = 0.002 if REHEARSES else 0.03  # seconds that a turn takes at least, within MOST_STEPS
FEWEST_STEPS, MOST_STEPS = (1, 10) if REHEARSES else (5, 100)  # several: a turn's first step shows its host time
WARMUP = 3  # steps

Step = Callable[[], Any]


def begin() -> None:
    """Install the driver of a rehearsal. Call this before anything else."""
    if REHEARSES:
        from . import rehearsal

        rehearsal.begin()


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Let tensors on the CPU use the CPU's code inside, also in a rehearsal."""
    if not REHEARSES:
        yield
        return
    from . import rehearsal

    with rehearsal.paused():
        yield


def device_name() -> str:
    return "no GPU, a rehearsal" if REHEARSES else torch.cuda.get_device_name()


def milliseconds(step: Step, steps: int = 1) -> float:
    """Return the mean milliseconds of a step, over several in a row, by the device's clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(steps):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / steps


def steps_of_a_turn(step: Step) -> int:
    """Warm up, and return how many steps a turn takes."""
    last = [milliseconds(step) for _ in range(WARMUP)][-1]
    return max(FEWEST_STEPS, min(MOST_STEPS, round(1000 * TURN / max(last, 1e-3))))


def rounds_of(turns: dict[str, Callable[[], Any]]) -> Iterator[dict[str, Any]]:
    """Take all turns, in a new order each round. Yield, after each round, what the turns have returned so far."""
    said: dict[str, list[Any]] = {name: [] for name in turns}
    order, generator = list(turns), random.Random(0)
    for _ in range(ROUNDS):
        generator.shuffle(order)
        for name in order:
            said[name].append(turns[name]())
        yield said


def quartiles(values: list[float]) -> list[float]:
    """Return the first quartile, the median and the third quartile."""
    if len(values) == 1:
        values = 2 * values
    return [round(value, 5) for value in statistics.quantiles(values, n=4, method="inclusive")]


def release() -> None:
    """Give back memory that nothing refers to."""
    gc.collect()
    torch.cuda.empty_cache()
