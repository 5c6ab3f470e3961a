"""GrokAdamW with each of its parts left out, on the demonstration's task: which of them does the work?

    python -m benchmarks.grokking.parts [--steps 1000] [--seeds 3] [--out demo]

The settings are the demonstration's. Prints the steps to 95% validation accuracy, first and sustained, and writes
parts.json.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from grokadamw import GrokAdamW

from .demo import ARMS, BETAS, Arm, train


def grok(name: str, **changes: Any) -> Arm:
    """The demonstration's GrokAdamW, but for some arguments."""

    def make(model: nn.Module) -> GrokAdamW:
        options = {"lr": 3e-3, "weight_decay": 1.0, "gamma": 0.3, "betas": BETAS} | changes
        return GrokAdamW(model.named_parameters(), **options)

    return Arm(name, "", make)


PARTS = [
    ARMS[1],
    grok("GrokAdamW"),
    grok("without the filter", lamb=0.0),
    grok("without γ", gamma=0.0),
    grok("with the default γ, 0.1", gamma=0.1),
    grok("without a signal", grokking_signal_fns=[]),
    grok("without clipping", gradient_clipping=0.0),
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="GrokAdamW with each of its parts left out.")
    parser.add_argument("--steps", type=int, default=1000, help="the most that a run may take (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    runs = [(arm, seed) for arm in PARTS for seed in range(options.seeds)]
    results: dict[str, list[dict[str, int | None]]] = {arm.name: [] for arm in PARTS}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layer 3")  # its low β1 is meant
        for arm, seed in track(runs, "training", console=console):
            curve = train(arm, seed, options.steps, lambda curve: None)
            results[arm.name].append({"validation": curve.reached(curve.validation), "sustained": curve.sustained()})
            (options.out / "parts.json").write_text(json.dumps({"max_steps": options.steps, "arms": results}) + "\n")
    table = Table(title="Steps to 95% validation accuracy, first / sustained")
    table.add_column("arm")
    for seed in range(options.seeds):
        table.add_column(f"seed {seed}", justify="right")
    for name, reached in results.items():
        table.add_row(name, *(f"{each['validation'] or '-'} / {each['sustained'] or '-'}" for each in reached))
    console.print(table)


if __name__ == "__main__":
    main()
