"""Three optimizers on one task: who generalises, and when.

    python -m benchmarks.grokking.demo [--steps 2000] [--seed 0] [--out demo]

Trains the transformer of `modular.py` on half of all products modulo 97 with AdamW at torch's default decay, with a
well tuned AdamW, and with GrokAdamW: the same model, split, batches and seed. Prints a table of the steps to 95%
accuracy, and writes the curves as demo-seed0.json and demo-seed0.png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import grokadamw
from grokadamw import GrokAdamW

from .modular import Split, Transformer, products

BATCH, WARMUP = 512, 10
EVALUATE_EVERY = 10
SOLVED, IN_A_ROW = 0.95, 6  # an arm stops once this many evaluations in a row are at 95% or above

BETAS = (0.9, 0.98)  # of the published recipe, for all arms


class Arm(NamedTuple):
    """An optimizer and its settings."""

    name: str
    settings: str
    make: Callable[[nn.Module], torch.optim.Optimizer]
    clip: float = 0.0  # torch's clip_grad_norm_ before the step; 0 is off


ARMS = [
    Arm("AdamW", "lr 1e-3, wd 0.01", lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, betas=BETAS)),
    Arm(
        "AdamW, tuned",
        "lr 3e-3, wd 1, clip 1",
        lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3, betas=BETAS, weight_decay=1.0),
        clip=1.0,
    ),
    Arm(
        "GrokAdamW",
        "lr 3e-3, wd 1, γ 0.3",
        lambda model: GrokAdamW(model.named_parameters(), lr=3e-3, betas=BETAS, weight_decay=1.0, gamma=0.3),
    ),
]


@dataclass
class Curve:
    """What one arm did; lists are parallel, one entry an evaluation."""

    arm: str
    settings: str
    steps: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)  # accuracy on the batches since the last evaluation
    validation: list[float] = field(default_factory=list)  # accuracy on the part that no signal sees
    signal: list[float] = field(default_factory=list)  # NaN where the optimizer has none
    alpha: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def reached(self, accuracies: list[float]) -> int | None:
        """The first step at 95%, or None."""
        return next((step for step, accuracy in zip(self.steps, accuracies, strict=True) if accuracy >= SOLVED), None)

    def sustained(self) -> int | None:
        """The first step of six evaluations in a row at 95% validation accuracy, or None."""
        for i in range(len(self.steps) - IN_A_ROW + 1):
            if min(self.validation[i : i + IN_A_ROW]) >= SOLVED:
                return self.steps[i]
        return None


def accuracy(logits: Tensor, answers: Tensor) -> float:
    return (logits.argmax(dim=-1) == answers).float().mean().item()


def train(arm: Arm, seed: int, max_steps: int, on_evaluation: Callable[[Curve], None]) -> Curve:
    """Train one arm until it has solved the task, or for max_steps."""
    curve = Curve(arm.name, arm.settings)
    data = products(seed)
    torch.manual_seed(seed)
    model = Transformer()
    optimizer = arm.make(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    batches = shuffled(data.train, seed)
    recent: list[float] = []
    start = time.perf_counter()
    for step in range(1, max_steps + 1):
        tokens, answers = next(batches)
        logits = model(tokens)
        loss = F.cross_entropy(logits, answers)
        optimizer.zero_grad()
        loss.backward()
        if arm.clip:
            nn.utils.clip_grad_norm_(model.parameters(), arm.clip)
        optimizer.step()
        schedule.step()
        recent.append(accuracy(logits, answers))
        if step % EVALUATE_EVERY == 0:
            with torch.no_grad():
                if isinstance(optimizer, GrokAdamW):
                    eval_loss = F.cross_entropy(model(data.signal.tokens), data.signal.answers)
                    optimizer.record(train_loss=loss, eval_loss=eval_loss)
                # batch by batch, which stays in the cache
                report = torch.cat([model(tokens) for tokens in data.report.tokens.split(BATCH)])
                validation = accuracy(report, data.report.answers)
            metrics = optimizer.metrics() if isinstance(optimizer, GrokAdamW) else {}
            curve.steps.append(step)
            curve.train.append(sum(recent) / len(recent))
            curve.validation.append(validation)
            curve.signal.append(metrics.get("signal", torch.nan))
            curve.alpha.append(metrics.get("alpha", torch.nan))
            curve.seconds = time.perf_counter() - start
            recent.clear()
            on_evaluation(curve)
            if curve.sustained() is not None:
                break
    return curve


def shuffled(split: Split, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for ever, in a new order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for batch in torch.randperm(len(split.answers), generator=generator).split(BATCH):
            yield split.tokens[batch], split.answers[batch]


def table(curves: list[Curve], max_steps: int) -> Table:
    """Steps to 95%, one row an arm; sustained is the start of six evaluations in a row."""

    def shown(step: int | None) -> str:
        return f"> {max_steps:,}" if step is None else f"{step:,}"

    result = Table(title="Steps to 95% accuracy, multiplication mod 97", box=None)
    for name in ("arm", "settings", "training", "validation", "sustained", "time"):
        result.add_column(name, justify="left" if name in ("arm", "settings") else "right")
    for curve in curves:
        steps = curve.reached(curve.train), curve.reached(curve.validation), curve.sustained()
        result.add_row(curve.arm, curve.settings, *map(shown, steps), f"{curve.seconds:.0f} s")
    return result


def draw(curves: list[Curve], path: Path) -> None:
    """Accuracies over the steps, on a logarithmic axis, and α under them."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for i, curve in enumerate(curves):
        above.plot(curve.steps, curve.validation, color=f"C{i}", label=f"{curve.arm} ({curve.settings})")
        above.plot(curve.steps, curve.train, color=f"C{i}", linestyle=":", linewidth=1)
        below.plot(curve.steps, curve.alpha, color=f"C{i}")
    above.axhline(SOLVED, color="grey", linewidth=0.5, label="95%")
    above.set(
        xscale="log", ylabel="accuracy", ylim=(-0.02, 1.02), title="Multiplication mod 97, half of it for training"
    )
    above.plot([], [], color="grey", label="validation")
    above.plot([], [], color="grey", linestyle=":", label="training")
    above.legend(loc="upper left", fontsize="small")
    below.set(xlabel="step", ylabel="α of GrokAdamW")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Three optimizers on one task: who generalises, and when.")
    parser.add_argument("--steps", type=int, default=2000, help="the most that an arm may take (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of model, split and batches (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < EVALUATE_EVERY:
        parser.error(
            f"--steps {options.steps}: the first evaluation comes at step {EVALUATE_EVERY}; give at least that"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)  # before there is anything to lose
    except OSError as error:
        parser.error(f"--out {options.out}: not a folder that can be made ({error}); name another")
    console = Console()
    columns = ["{task.description:12}", BarColumn(bar_width=10), "{task.completed:5.0f}", "{task.fields[shown]}"]
    with Progress(*columns, console=console) as progress:

        def run(arm: Arm) -> Curve:
            task = progress.add_task(arm.name, total=options.steps, shown="")

            def show(curve: Curve) -> None:
                shown = f"train {curve.train[-1]:4.0%}  validation {curve.validation[-1]:4.0%}"
                if not math.isnan(curve.alpha[-1]):
                    shown += f"  signal {curve.signal[-1]:.2f}  α {curve.alpha[-1]:.3f}"
                progress.update(task, completed=curve.steps[-1], shown=shown)

            return train(arm, options.seed, options.steps, show)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "layer 3")  # its low β1 is meant
            curves = [run(arm) for arm in ARMS]
    console.print(table(curves, options.steps))
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "grokadamw": grokadamw.__version__, "python": platform.python_version()}
    results = {
        "date": datetime.date.today().isoformat(),
        "machine": machine | versions,
        "seed": options.seed,
        "max_steps": options.steps,
        "arms": [
            {
                "steps_to_95": {
                    "training": c.reached(c.train),
                    "validation": c.reached(c.validation),
                    "sustained": c.sustained(),
                },
                **asdict(c),
            }
            for c in curves
        ],
    }
    path = options.out / f"demo-seed{options.seed}.json"
    path.write_text(json.dumps(results).replace("NaN", "null") + "\n")
    draw(curves, path.with_suffix(".png"))
    console.print(f"curves   {path.with_suffix('.png')}\nnumbers  {path}", highlight=False)


if __name__ == "__main__":
    main()
