"""What the stages have in common: the device, and how turns are timed."""

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
# whether what the kernels write is there to be looked at
COMPUTES = not REHEARSES or INTERPRETS
ROUNDS = 2 if REHEARSES else 7
TURN = 0.002 if REHEARSES else 0.03  # seconds that a turn takes at least, if it can in MOST_STEPS
FEWEST_STEPS, MOST_STEPS = (1, 10) if REHEARSES else (5, 100)  # the host's first step is not hidden behind another
WARMUP = 3  # steps

Step = Callable[[], Any]


def begin() -> None:
    """Call it before anything else: a rehearsal has a driver of its own."""
    if REHEARSES:
        from . import rehearsal

        rehearsal.begin()


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Inside, tensors on the CPU are the CPU's, in a rehearsal too."""
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
    """Warm up, and see how many steps a turn takes."""
    last = [milliseconds(step) for _ in range(WARMUP)][-1]
    return max(FEWEST_STEPS, min(MOST_STEPS, round(1000 * TURN / max(last, 1e-3))))


def rounds_of(turns: dict[str, Callable[[], Any]]) -> Iterator[dict[str, Any]]:
    """Let all take their turns, in a new order each round; what they said in the rounds so far, after each of them."""
    said: dict[str, list[Any]] = {name: [] for name in turns}
    order, generator = list(turns), random.Random(0)
    for _ in range(ROUNDS):
        generator.shuffle(order)
        for name in order:
            said[name].append(turns[name]())
        yield said


def quartiles(values: list[float]) -> list[float]:
    """The first, the median, and the third."""
    if len(values) == 1:
        values = 2 * values
    return [round(value, 5) for value in statistics.quantiles(values, n=4, method="inclusive")]


def release() -> None:
    """Give back memory that nothing refers to."""
    gc.collect()
    torch.cuda.empty_cache()
