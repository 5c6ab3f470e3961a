"""Pictures of runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .experiment import Curve
from .runs import Row, Run
from .tasks import Task


def curves(task: Task, found: dict[Run, Curve], path: Path) -> None:
    """Scores over the steps, on a logarithmic axis, a colour a method, a line a seed; under them α, if there is one."""
    names = list(dict.fromkeys(run.method for run in found))
    adaptive = any(not math.isnan(alpha) for curve in found.values() for alpha in curve.alpha)
    figure = Figure(figsize=(8, 5.5 if adaptive else 4), layout="constrained")
    axes = figure.subplots(1 + adaptive, 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + adaptive])[:, 0]
    for run, curve in found.items():
        color = f"C{names.index(run.method)}"
        axes[0].plot(curve.steps, curve.report, color=color, linewidth=1)
        axes[0].plot(curve.steps, curve.train, color=color, linestyle=":", linewidth=1)
        if adaptive:
            axes[1].plot(curve.steps, curve.alpha, color=color, linewidth=1)
    for i, name in enumerate(names):
        axes[0].plot([], [], color=f"C{i}", label=name)
    axes[0].plot([], [], color="grey", label="held out")
    axes[0].plot([], [], color="grey", linestyle=":", label="training")
    axes[0].legend(loc="upper left", fontsize="small")
    axes[0].set(xscale="log", ylabel="score", title=task.about)
    if math.isfinite(task.solved):
        axes[0].axhline(task.solved, color="grey", linewidth=0.5)
        axes[0].set(ylim=(-0.02, 1.02))
    if adaptive:
        axes[1].set(ylabel="α")
    axes[-1].set(xlabel="step")
    figure.savefig(path, dpi=120)


def quartiles(found: dict[str, list[Row]], names: list[str], path: Path) -> None:
    """Steps to sustained: a box of quartiles and the runs, for each method and task; failures at the budget."""
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
        axes.plot([], [], color=f"C{i}", label=name)
    axes.set(yscale="log", ylabel=f"steps to 95%, sustained; {budget:,}: failed", xlim=(-0.6, len(names) - 0.4))
    axes.set_xticks(range(len(names)), names)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def maps(
    found: dict[str, list[Row]], names: list[str], lrs: tuple[float, ...], decays: tuple[float, ...], path: Path
) -> None:
    """lr × wd, the methods side by side, a row a task: the mean of steps, and how many runs grokked."""
    figure = Figure(figsize=(2.6 * max(len(found), 1), 2.4 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(found), squeeze=False, sharex=True, sharey=True)
    for j, (name, rows) in enumerate(found.items()):
        for i, task in enumerate(names):
            values = [[math.nan] * len(decays) for _ in lrs]
            for a, lr in enumerate(lrs):
                for b, decay in enumerate(decays):
                    there = [r for r in rows if (r.task, r.lr, r.weight_decay) == (task, lr, decay)]
                    good = [r.sustained for r in there if r.sustained]
                    if good:
                        values[a][b] = sum(good) / len(good)
                    text = f"{values[a][b]:.0f}\n" if good else ""
                    axes[i, j].text(b, a, f"{text}{len(good)}/{len(there)}", ha="center", va="center", fontsize=8)
            axes[i, j].imshow(values, cmap="viridis_r", vmin=200, vmax=1500, alpha=0.6, aspect="auto")
            axes[i, j].set_xticks(range(len(decays)), [f"{decay:g}" for decay in decays])
            axes[i, j].set_yticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
            axes[i, 0].set_ylabel(f"{task}: lr")
        axes[0, j].set_title(name, fontsize=9)
        axes[-1, j].set_xlabel("weight decay")
    figure.savefig(path, dpi=120)
