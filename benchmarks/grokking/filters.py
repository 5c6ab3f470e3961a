"""Grokfast's first experiment, as published, with the filters of this package.

    python -m benchmarks.grokking.filters [--steps 1000] [--seed 0] [--out demo]

Model, data, order of batches and settings are those of Grokfast (arXiv:2405.20233, table 1, and its repository): Adam
with coupled weight decay, evaluated on the whole other half once an epoch of ten steps. The published steps to 95% are
910 for the EMA, 790 for the moving average, and 39,890 for Adam alone, without weight decay. Prints the steps that it
takes here, and writes filters-seed0.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from grokadamw.grokfast import Grokfast, GrokfastMA

from .demo import BATCH, BETAS, SOLVED, accuracy
from .modular import VOCABULARY, P

WARMUP = 10


class Block(nn.Module):
    """As published: what is added to is the normed input, and not the input itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """(batch, 4) tokens → (batch, 99) logits of the answer. Modules are made in the published order, for its seeds."""

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(5, width)
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.logits(self.norm(self.blocks(x)[:, -1]))


class Arm(NamedTuple):
    """A filter and its settings, and the published steps to 95%."""

    name: str
    settings: str
    make: Callable[[nn.Module], Optimizer]
    published: int


def adam(model: nn.Module, weight_decay: float) -> Optimizer:
    return Adam(model.parameters(), lr=1e-3, betas=BETAS, weight_decay=weight_decay)


ARMS = [
    Arm("Grokfast(Adam)", "α 0.98, λ 2, wd 0.005", lambda model: Grokfast(adam(model, 0.005), 0.98, 2.0), 910),
    Arm("GrokfastMA(Adam)", "w 100, λ 5, wd 0.01", lambda model: GrokfastMA(adam(model, 0.01), 100, 5.0), 790),
]


def train(arm: Arm, seed: int, max_steps: int) -> Iterator[tuple[int, float]]:
    """Yields steps and validation accuracy after each epoch."""
    torch.manual_seed(seed)
    model = Decoder()
    x, y = torch.cartesian_prod(torch.arange(P), torch.arange(1, P)).T
    equals, times = torch.full_like(x, P), torch.full_like(x, P + 1)
    data = torch.stack([x, times, y, equals, x * y % P], dim=1)
    training, validation = data[torch.randperm(len(data))].chunk(2)
    optimizer = arm.make(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / WARMUP))
    step = 0
    while step < max_steps:
        training = training[torch.randperm(len(training))]
        for batch in training.split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[:, :-1]), batch[:, -1]).backward()
            optimizer.step()
            schedule.step()
            step += 1
        with torch.no_grad():
            logits = torch.cat([model(batch[:, :-1]) for batch in validation.split(BATCH)])
        yield step, accuracy(logits, validation[:, -1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Grokfast's first experiment, as published.")
    parser.add_argument("--steps", type=int, default=1000, help="the most that a run may take (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of model, split and batches (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    table = Table("", "settings", "steps to 95%", "published", title="Grokfast's first experiment", box=None)
    results = []
    for arm in ARMS:
        steps, accuracies, reached = [], [], None
        epochs = -(-options.steps // -(-(P * (P - 1) // 2) // BATCH))
        for step, validation in track(train(arm, options.seed, options.steps), arm.name, epochs, console=console):
            steps.append(step)
            accuracies.append(validation)
            if reached is None and validation >= SOLVED:
                reached = step
        table.add_row(arm.name, arm.settings, f"{reached or f'> {options.steps}'}", f"{arm.published}")
        results.append({"arm": arm.name, "settings": arm.settings, "published": arm.published, "steps_to_95": reached})
        results[-1] |= {"steps": steps, "validation": accuracies}
    path = options.out / f"filters-seed{options.seed}.json"
    path.write_text(json.dumps({"seed": options.seed, "max_steps": options.steps, "arms": results}) + "\n")
    console.print(table)


if __name__ == "__main__":
    main()
