"""The experiment bench: train tasks with several optimizers, and compare when they generalise.

    python -m benchmarks.grokking list
    python -m benchmarks.grokking run --task mul97 --method adamw grokadamw --seeds 0 1 2
    python -m benchmarks.grokking evidence --dry-run
    python -m benchmarks.grokking report

`run` trains, shows its progress, prints a table, and writes the curves as a picture and the runs to a CSV file.
`evidence` does the runs of the report that benchmarks/results/grokking.csv does not have yet. You can stop it at any
time, and start it again to go on. With --dry-run it only lists the missing runs. `report` makes the report from the
file.
"""

from __future__ import annotations

import argparse
import ast
import math
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from . import estimates, evidence, methods, on_gpu, pictures, report, tasks
from .runs import CSV, Row, Run, execute_all, read


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def main(arguments: list[str] | None = None) -> None:
    options, parser = parsed(arguments)
    console = Console()
    if options.command == "list":
        listing(console)
    elif options.command == "run":
        try:  # an error here comes before there is anything to lose
            asked = checked(options)
            options.out.mkdir(parents=True, exist_ok=True)
        except (TypeError, ValueError, OSError) as error:
            parser.error(str(error))
        run(options, asked, console)
    elif options.command == "evidence" and options.dry_run:
        forecast(read(CSV), options.jobs or os.cpu_count() or 1, console)
    elif options.command == "evidence" and options.gpu:
        on_gpu.execute_all(lambda: filter(on_gpu.takes, evidence.missing(read(CSV))), CSV, options.jobs, console)
    elif options.command == "evidence":
        while todo := evidence.todo(read(CSV)):  # later runs are chosen by the results of earlier ones
            execute_all(todo, CSV, options.jobs, console)
    else:
        report.main(read(CSV), CSV.parent)


def parsed(arguments: list[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    description, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.grokking",
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="tasks and methods, with sizes and typical times")
    one = commands.add_parser("run", help="train, and draw what happened")
    one.add_argument("--task", required=True, choices=tasks.load(), metavar="TASK", help="what to learn: see `list`")
    one.add_argument(
        "--method",
        required=True,
        nargs="+",
        choices=methods.load(),
        metavar="METHOD",
        help="one or more optimizers to compare: see `list`",
    )
    one.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the runs (default: 0)")
    one.add_argument("--lr", type=float, help="learning rate of all methods (default: each method's own)")
    one.add_argument("--weight-decay", type=float, help="of all methods (default: each method's own)")
    one.add_argument(
        "--set",
        type=setting,
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="other arguments of the optimizers, such as lamb=1.0",
    )
    one.add_argument("--steps", type=int, help="the most that a run may take (default: the task's)")
    one.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for the picture and the CSV file (default: %(default)s)"
    )
    more_runs = commands.add_parser("evidence", help="go on with the runs of the report")
    more_runs.add_argument(
        "--dry-run", action="store_true", help="train nothing: print which runs are missing, and how long they take"
    )
    more_runs.add_argument("--gpu", action="store_true", help="AdamW's and GrokAdamW's alone, many at a time on a GPU")
    commands.add_parser("report", help="tables and pictures of what there is")
    for command in (one, more_runs):
        command.add_argument(
            "--jobs",
            type=int,
            help="runs at a time, one thread each (default: one a core; on a GPU 4, of twelve runs each)",
        )
    return parser.parse_args(arguments), parser


def listing(console: Console) -> None:
    table = Table("task", "", box=None)
    for name in ("parameters", "examples", "steps", "minutes"):
        table.add_column(name, justify="right")
    typical = estimates.minutes_by_task(read(CSV))
    for task in tasks.load().values():
        minutes = f"{typical[task.name]:.2g}" if task.name in typical else "–"
        table.add_row(task.name, task.about, *sizes(task), f"{task.budget:,}", minutes)
    console.print(table)
    console.print(
        "examples: for training; steps: at most; minutes: of a core, the median of the runs in benchmarks/results\n"
    )
    table = Table("method", "", box=None)
    for name in ("lr", "weight decay"):
        table.add_column(name, justify="right")
    for method in methods.load().values():
        table.add_row(method.name, method.about, f"{method.lr:g}", f"{method.weight_decay:g}")
    console.print(table)


def sizes(task: tasks.Task) -> tuple[str, str]:
    """Return the numbers of parameters and training examples, or dashes if finding them out takes minutes."""
    try:
        start = None if task.name == evidence.FINETUNING else task.start(0)  # it takes minutes the first time
    except (FileNotFoundError, ModuleNotFoundError):
        start = None
    if start is None:
        return "–", "–"
    return f"{sum(p.numel() for p in start.model.parameters()):,}", f"{len(start.data.train):,}"


def forecast(rows: list[Row], jobs: int, console: Console) -> None:
    """Print the missing runs, as far as they are known, and their time."""
    missing = evidence.missing(rows)
    table = Table("task", "method", box=None)
    for name in ("runs", "hours of a core"):
        table.add_column(name, justify="right")
    hours, unknown = 0.0, 0
    for pair in dict.fromkeys((run.task, run.method) for run in missing):
        asked = [run for run in missing if (run.task, run.method) == pair]
        known = [minutes for run in asked if (minutes := estimates.minutes(run, rows)) is not None]
        hours += sum(known) / 60
        unknown += len(asked) - len(known)
        table.add_row(*pair, str(len(asked)), f"{sum(known) / 60:.2f}" if known else "–")
    console.print(table)
    console.print(
        f"{len(missing)} runs, about {hours:.1f} hours of a core: {hours / jobs:.1f} hours with {jobs} at a time.\n"
        f"The time of {unknown} of them is not known, as their tasks have not run yet, and not in that sum. Runs that "
        "are chosen by what these find are not counted.",
        highlight=False,
        soft_wrap=True,
    )


def checked(options: argparse.Namespace) -> list[Run]:
    """Return the runs that are asked for.

    Raises:
        TypeError, ValueError: an optimizer, or a run, does not take these options.
    """
    if min(options.seeds) < 0:
        raise ValueError(f"--seeds {min(options.seeds)}: give numbers of at least 0")
    asked = []
    for method in options.method:
        lr, decay, more = options.lr, options.weight_decay, dict(options.set)
        if methods.load()[method].with_its_decay and lr is None and decay is None:
            lr, decay, its_decay = evidence.own(options.task)  # they depend on the model
            more = its_decay | more
        asked += [Run.of(options.task, method, seed, lr, decay, more, options.steps) for seed in options.seeds]
    for planned in asked:
        planned.optimizer(nn.Linear(2, 2))
    return asked


def run(options: argparse.Namespace, asked: list[Run], console: Console) -> None:
    csv, picture = options.out / "grokking.csv", options.out / f"{options.task}.png"
    curves = execute_all(asked, csv, options.jobs, console)
    task = tasks.load()[options.task]
    title = f"{task.about}: steps to {task.solved:.0%}" if math.isfinite(task.solved) else task.about
    table = Table(title=title, box=None)
    for name in ("method", "seed", "training", "first", "sustained", "seconds", "best", "at step"):
        table.add_column(name, justify="left" if name == "method" else "right")
    rows = {row.run: row for row in read(csv)}
    for planned in asked:
        row = rows[planned]
        steps = ["–" if step is None else f"{step:,}" for step in (row.train, row.first, row.sustained)]
        seconds = "–" if row.seconds is None else f"{row.seconds:.0f}"
        best = [f"{row.best:.3f}", "–" if row.best_at is None else f"{row.best_at:,}"]
        table.add_row(planned.method, str(planned.seed), *steps, seconds, *best)
    console.print(table)
    pictures.curves(task, curves, picture)
    console.print(f"curves  {picture}\nruns    {csv}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
