"""Pictures of runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .experiment import Curve
from .runs import Row, Run
from .tasks import Task, right

NAMES = {  # names of methods for readers who do not know the bench
    "adam": "Adam, no weight decay",
    "adamw": "AdamW, tuned",
    "grokadamw": "GrokAdamW, default settings",
    "grokadamw-grokking": "GrokAdamW preset",
}


def curves(task: Task, found: dict[Run, Curve], path: Path) -> None:
    """Draw scores over the steps: a colour for each method, a line for each seed."""
    names = list(dict.fromkeys(run.method for run in found))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for run, curve in found.items():
        color = f"C{names.index(run.method)}"
        axes.plot(curve.steps, curve.report, color=color, linewidth=1)
        axes.plot(curve.steps, curve.train, color=color, linestyle=":", linewidth=1)
    if math.isfinite(task.solved):
        axes.axhline(task.solved, color="grey", linewidth=0.5)
        axes.set_ylim(-0.02, 1.02)
    for i, name in enumerate(names):
        axes.plot([], [], color=f"C{i}", label=NAMES.get(name, name))
    axes.plot([], [], color="grey", label="held-out data")
    axes.plot([], [], color="grey", linestyle=":", label="training data")
    axes.legend(fontsize="small")
    axes.set(xlabel="step", ylabel="accuracy" if task.score is right else "score", title=task.about)
    axes.set_xlim(left=0)
    figure.savefig(path, dpi=120)


def quartiles(found: dict[str, list[Row]], names: list[str], path: Path) -> None:
    """Draw steps to sustained: quartiles and runs, for each method and task. Failed runs are drawn at the budget."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    budget = max((row.budget for rows in found.values() for row in rows), default=1)
    width = 0.8 / max(len(found), 1)
    for i, (name, rows) in enumerate(found.items()):
        steps = [[row.sustained or budget for row in rows if row.task == task] for task in names]
        at = [j + (i - (len(found) - 1) / 2) * width for j in range(len(names))]
        look: dict[str, Any] = {"color": f"C{i}"}
        axes.boxplot(
            steps,
            positions=at,
            widths=width * 0.8,
            showfliers=False,
            boxprops=look,
            whiskerprops=look,
            capprops=look,
            medianprops=look | {"linewidth": 2},
        )
        for x, values in zip(at, steps, strict=True):
            axes.plot([x] * len(values), values, ".", color=f"C{i}", alpha=0.5, markersize=4)
        axes.plot([], [], color=f"C{i}", label=NAMES.get(name, name))
    axes.set(yscale="log", ylabel=f"steps to 95%, sustained; {budget:,}: failed", xlim=(-0.6, len(names) - 0.4))
    axes.set_xticks(range(len(names)), names)
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=5)
    figure.savefig(path, dpi=120)


def maps(
    found: dict[str, list[Row]], names: list[str], lrs: tuple[float, ...], decays: tuple[float, ...], path: Path
) -> None:
    """Draw the mean of steps over lr × wd, and how many runs grokked: a row for each method, a column for each task."""
    figure = Figure(figsize=(3.6 * len(names), 2.1 * max(len(found), 1)), layout="constrained")
    axes = figure.subplots(max(len(found), 1), len(names), squeeze=False, sharex=True, sharey=True)
    for i, (name, rows) in enumerate(found.items()):
        for j, task in enumerate(names):
            values = [[math.nan] * len(decays) for _ in lrs]
            for a, lr in enumerate(lrs):
                for b, decay in enumerate(decays):
                    there = [r for r in rows if (r.task, r.lr, r.weight_decay) == (task, lr, decay)]
                    good = [r.sustained for r in there if r.sustained]
                    if good:
                        values[a][b] = sum(good) / len(good)
                    text = f"{values[a][b]:.0f}\n" if good else ""
                    axes[i, j].text(b, a, f"{text}{len(good)}/{len(there)}", ha="center", va="center", fontsize=9)
            axes[i, j].imshow(values, cmap="viridis_r", vmin=200, vmax=1500, alpha=0.6, aspect="auto")
            axes[i, j].set_xticks(range(len(decays)), [f"{decay:g}" for decay in decays])
            axes[i, j].set_yticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
            axes[i, j].set_title(f"{NAMES.get(name, name).removesuffix(', tuned')}: {task}", fontsize=9)
            axes[-1, j].set_xlabel("weight decay")
        axes[i, 0].set_ylabel("learning rate")
    figure.savefig(path, dpi=120)
