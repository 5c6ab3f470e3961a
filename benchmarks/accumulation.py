"""Measure how much shorter steps are if moments collect micro-batches: accumulation_steps against Accumulate.

    python -m benchmarks.accumulation [--steps 400] [--out benchmarks/results]
    python -m benchmarks.accumulation --table benchmarks/results/accumulation.json

Accumulate trains the transformer of benchmarks/grokking on batches of 512, split into k micro-batches. A second
optimizer gets the same micro-gradients and collects them in its moments. Both have the same m but another v, so this
compares the length of m / √v over all parameters. It prints the ratios and writes accumulation.json. The second form
prints the table of docs/accumulation.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from torch.nn import functional as F

from grokadamw import Accumulate, GrokAdamW

from . import RESULTS
from .grokking.tasks import load

BATCH = 512
MICRO_BATCHES = (2, 8, 32)
AT = (10, 100, 400)  # steps


def length(optimizer: GrokAdamW) -> float:
    """Return the norm of m / √v over all parameters."""
    parts = (state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-12) for state in optimizer.state.values())
    return math.sqrt(sum(part.double().square().sum().item() for part in parts))


def ratios(k: int, steps: int, console: Console) -> dict[int, float]:
    """Return, by the number of steps, the length of a step with accumulation_steps=k over that of the exact step."""
    task = load()["mul97"]
    model, _, batches = task.start(0)
    shadow = copy.deepcopy(model)
    options: dict[str, Any] = {"lr": 1e-3, "betas": task.betas, "second_moment": "raw", "gamma": 0.0, "lamb": 0.0}
    options["gradient_clipping"] = 0.0
    exact = GrokAdamW(model.parameters(), **options)
    outer, collecting = Accumulate(exact, k), GrokAdamW(shadow.parameters(), accumulation_steps=k, **options)
    found = {}
    for step in track(range(1, steps + 1), f"{k} micro-batches", console=console):
        while len(batch := next(batches)) < BATCH:  # skip an epoch's last batch
            pass
        for x, y in zip(batch.inputs.chunk(k), batch.targets.chunk(k), strict=True):
            outer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            for p, q in zip(model.parameters(), shadow.parameters(), strict=True):
                q.grad = p.grad
            outer.step()
            collecting.step()
        if step in AT:
            found[step] = round(length(collecting) / length(exact), 3)
    return found


def table(results: dict[str, Any]) -> str:
    """Return the table of docs/accumulation.md."""
    lines = [f"| k | {' | '.join(f'step {step}' for step in AT)} | 1/√k |", f"| ---: |{' ---: |' * (len(AT) + 1)}"]
    for k, found in results["ratios"].items():
        cells = [f"{found[str(step)]:.2f}" if str(step) in found else "–" for step in AT]
        lines.append(f"| {k} | {' | '.join(cells)} | {int(k) ** -0.5:.2f} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How much shorter steps are when the moments collect micro-batches.")
    parser.add_argument("--steps", type=int, default=max(AT), help="that are taken (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--table", type=Path, help="print the table of a file of results, and measure nothing")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(json.loads(options.table.read_text())), end="")
        return
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    found = {str(k): ratios(k, options.steps, console) for k in MICRO_BATCHES}
    text = json.dumps({"batch": BATCH, "steps": options.steps, "ratios": found})
    (options.out / "accumulation.json").write_text(text + "\n")
    console.print(table(json.loads(text)), markup=False, highlight=False)


if __name__ == "__main__":
    main()
