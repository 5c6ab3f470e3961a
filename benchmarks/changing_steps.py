"""Measure the host's time of steps whose gradients, groups or numbers change, beside torch's fused AdamW.

    OMP_NUM_THREADS=1 python -m benchmarks.changing_steps [--steps 40] [--out benchmarks/results]

The cases are 200 tensors of 16 × 16 whose gradients come and go, as with heads that take turns, and 465 tensors, each
in a group of its own whose lr changes at each step, or in an optimizer of its own. Both arms take every step, one after
the other, and take turns at going first. Prints medians, and writes them to changing_steps.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from grokadamw import GrokAdamW

from . import RESULTS
from .step_time import machine

WARMUP = 8  # steps
Has = Callable[[int, int], bool]  # (step, index of a tensor) → whether the tensor has a gradient
ARMS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch AdamW, fused": lambda params: torch.optim.AdamW(params, fused=True),
    "GrokAdamW": lambda params: GrokAdamW(params, gamma=0.0),
}


class Case(NamedTuple):
    title: str
    tensors: int
    has: Has = lambda step, place: True
    groups: int = 1
    optimizers: int = 1


CASES = [
    Case("all of 200 tensors", 200),
    Case("one of 200 comes and goes", 200, lambda step, place: place > 0 or step % 2 == 1),
    Case("two halves in turn", 200, lambda step, place: (place < 100) == (step % 2 == 0)),
    Case("another half at random each step", 200, lambda step, place: random.Random(f"{step} {place}").random() < 0.5),
    Case("465 groups of one tensor, lr moves", 465, groups=465),
    Case("465 optimizers of one tensor", 465, optimizers=465),
]


def parts(params: Sequence[nn.Parameter], count: int) -> list[Sequence[nn.Parameter]]:
    size = -(-len(params) // count)
    return [params[i : i + size] for i in range(0, len(params), size)]


def milliseconds(case: Case, steps: int) -> dict[str, list[float]]:
    """Return the milliseconds of each step, by arm."""
    params = [nn.Parameter(torch.randn(16, 16)) for _ in range(case.tensors)]
    arms = {}
    for name, make in ARMS.items():
        copies = [nn.Parameter(param.detach().clone()) for param in params]
        made = [
            make([{"params": group} for group in parts(share, case.groups)]) for share in parts(copies, case.optimizers)
        ]
        arms[name] = copies, made
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for step in range(WARMUP + steps):
        for name in list(ARMS)[:: 1 if step % 2 else -1]:
            copies, optimizers = arms[name]
            for place, param in enumerate(copies):
                param.grad = torch.full_like(param, 0.1) if case.has(step, place) else None
            for optimizer in optimizers if case.groups > 1 else ():
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 / (1 + step)
            began = time.perf_counter()
            for optimizer in optimizers:
                optimizer.step()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: values[WARMUP:] for name, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.changing_steps", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="of each arm (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    given = parser.parse_args(arguments)
    table = Table("ms a step", *ARMS, "ratio", box=None)
    cases = {}
    for case in CASES:
        fused, ours = (statistics.median(values) for values in milliseconds(case, given.steps).values())
        cases[case.title] = {"fused_ms": round(fused, 3), "ours_ms": round(ours, 3), "ratio": round(ours / fused, 2)}
        table.add_row(case.title, f"{fused:.2f}", f"{ours:.2f}", f"{ours / fused:.2f}")
    Console().print(table)
    given.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine("cpu"), "steps": given.steps, "cases": cases}
    (given.out / "changing_steps.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
