"""Measure the time that the filters cost: in a training step of a small transformer, and each filter alone.

    python -m benchmarks.filter_time [--rounds 30] [--out benchmarks/results]
    python -m benchmarks.filter_time --table benchmarks/results/filter_time-cpu.json

Windows are full. Arms take turns, in a new order each round, and a ratio compares two turns of the same round. Prints
medians, and writes them to filter_time-cpu.json. The second form prints the table of docs/grokfast.md from such a file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.nn import functional as F
from torch.optim import Adam

from grokadamw import GrokAdamW
from grokadamw.grokfast import Grokfast, GrokfastMA, gradfilter_ema, gradfilter_ma

from . import RESULTS
from .grokking.tasks import Split, load
from .peers import imported, version
from .step_time import processor

PEER = "pytorch-optimizer"
COMPARED = {"training": "GrokAdamW", "alone": "gradfilter_ema"}


class Arm(NamedTuple):
    """An optimizer's step, or a filter alone."""

    name: str
    make: Callable[[nn.Module], Callable[[], Any]]
    window: int = 0


def stepping(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[nn.Module], Callable[[], Any]]:
    return lambda model: make(model).step


def filtering(function: Callable[..., Any], **options: Any) -> Callable[[nn.Module], Callable[[], Any]]:
    """Return a filter alone. With its small λ gradients stay small, although no backward pass rewrites them."""

    def make(model: nn.Module) -> Callable[[], Any]:
        memory = function(model, None, lamb=1e-9, **options)
        return lambda: function(model, memory, lamb=1e-9, **options)

    return make


def peers_filter(model: nn.Module) -> Callable[[], Any]:
    published = imported(PEER, "pytorch_optimizer.optimizer.grokfast").gradfilter_ma
    return filtering(published, window_size=100)(model)


TRAINING = [
    Arm("GrokAdamW", stepping(lambda model: GrokAdamW(model.named_parameters(), gamma=0.01))),
    Arm(
        "GrokAdamW, window_size=100",
        stepping(lambda model: GrokAdamW(model.named_parameters(), gamma=0.01, window_size=100)),
        100,
    ),
    Arm("Grokfast(Adam)", stepping(lambda model: Grokfast(Adam(model.parameters())))),
    Arm("GrokfastMA(Adam), w 100", stepping(lambda model: GrokfastMA(Adam(model.parameters()), 100)), 100),
    Arm("Adam", stepping(lambda model: Adam(model.parameters()))),
]
ALONE = [
    Arm("gradfilter_ema", filtering(gradfilter_ema)),
    Arm("gradfilter_ma, w 100", filtering(gradfilter_ma, window_size=100), 100),
    Arm("gradfilter_ma, w 1,000", filtering(gradfilter_ma, window_size=1000), 1000),
    Arm("pytorch-optimizer's gradfilter_ma, w 100", peers_filter, 100),
]


def training_step(model: nn.Module, step: Callable[[], Any], batch: Split) -> Callable[[], None]:
    def run() -> None:
        loss = F.cross_entropy(model(batch.inputs), batch.targets)
        model.zero_grad()
        loss.backward()
        step()

    return run


def ready(arms: list[Arm], with_backward: bool) -> dict[str, Callable[[], Any]]:
    """Return each arm's turn, with its window full. Leave out arms whose package is not installed."""
    task = load()["mul97"]
    turns = {}
    for arm in arms:
        model, _, batches = task.start(0)
        batch = next(batches)
        training_step(model, lambda: None, batch)()  # makes gradients
        try:
            step = arm.make(model)
        except ImportError:
            continue
        for _ in range(arm.window + 1):
            step()
        turns[arm.name] = training_step(model, step, batch) if with_backward else step
    return turns


def measured(turns: dict[str, Callable[[], Any]], rounds: int, steps: int, console: Console) -> dict[str, list[float]]:
    """Return the seconds of a call by arm, one entry per round."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    generator = random.Random(0)
    for _ in track(range(rounds), "taking turns", console=console):
        names = list(turns)
        generator.shuffle(names)
        for name in names:
            turns[name]()
            began = time.perf_counter()
            for _ in range(steps):
                turns[name]()
            seconds[name].append((time.perf_counter() - began) / steps)
    return seconds


def summary(seconds: dict[str, list[float]], compared: str) -> dict[str, dict[str, float]]:
    return {
        name: {
            "ms": round(1e3 * statistics.median(times), 4),
            "ratio": round(statistics.median(a / b for a, b in zip(times, seconds[compared], strict=True)), 4),
        }
        for name, times in seconds.items()
    }


def table(results: dict[str, Any]) -> str:
    """Return the table of docs/grokfast.md."""
    lines = ["|  | ms | × |", "| --- | ---: | ---: |"]
    for kind, title in (("training", "a training step"), ("alone", "the filter alone")):
        lines.append(f"| **{title}** | | |")
        lines += [f"| {name} | {x['ms']:.2f} | {x['ratio']:.2f} |" for name, x in results[kind].items()]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What the filters cost.")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each arm (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--table", type=Path, help="print the table of a file of results, and measure nothing")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(json.loads(options.table.read_text())), end="")
        return
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "peer": {PEER: version(PEER)},
        "rounds": options.rounds,
    }
    for kind, arms, steps in (("training", TRAINING, 3), ("alone", ALONE, 20)):
        seconds = measured(ready(arms, kind == "training"), options.rounds, steps, console)
        results[kind] = summary(seconds, COMPARED[kind])
    (options.out / "filter_time-cpu.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(table(results), markup=False, highlight=False)


if __name__ == "__main__":
    main()
