"""The experiment bench: which optimizer generalises when, on what?

    python -m benchmarks.grokking list
    python -m benchmarks.grokking run --task mul97 --method adamw grokadamw --seeds 3
    python -m benchmarks.grokking evidence
    python -m benchmarks.grokking report

`run` trains, shows how far it is, prints a table, and leaves the curves as a picture and the runs in a CSV file.
`evidence` does what the report is made of, as far as benchmarks/results/grokking.csv does not have it yet: stop it at
any time, and start it again to go on. `report` makes the report from that file.
"""

from __future__ import annotations

import argparse
import ast
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from . import evidence, methods, pictures, report, tasks
from .runs import CSV, Run, execute_all, read


def setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.grokking", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="tasks and methods")
    one = commands.add_parser("run", help="train, and draw what happened")
    one.add_argument("--task", required=True, choices=tasks.load(), metavar="TASK")
    one.add_argument("--method", required=True, nargs="+", choices=methods.load(), metavar="METHOD")
    one.add_argument("--seeds", type=int, default=1, help="how many, from 0 (default: %(default)s)")
    one.add_argument("--lr", type=float, help="learning rate (default: the method's)")
    one.add_argument("--weight-decay", type=float, help="(default: the method's)")
    one.add_argument("--set", type=setting, nargs="*", default=[], metavar="NAME=VALUE", help="of the optimizer")
    one.add_argument("--steps", type=int, help="the most that a run may take (default: the task's)")
    one.add_argument("--out", type=Path, default=Path("demo"), help="folder (default: %(default)s)")
    more = commands.add_parser("evidence", help="go on with the runs of the report")
    commands.add_parser("report", help="tables and pictures of what there is")
    for command in (one, more):
        command.add_argument("--jobs", type=int, help="runs at a time, one thread each (default: one a core)")
    options = parser.parse_args(arguments)
    console = Console()
    if options.command == "list":
        listing(console)
    elif options.command == "run":
        try:  # before there is anything to lose
            asked = checked(options)
            options.out.mkdir(parents=True, exist_ok=True)
        except (TypeError, ValueError, OSError) as error:
            parser.error(str(error))
        run(options, asked, console)
    elif options.command == "evidence":
        while todo := evidence.todo(read(CSV)):  # what is chosen depends on what was found
            execute_all(todo, CSV, options.jobs, console)
    else:
        report.main(read(CSV), CSV.parent)


def listing(console: Console) -> None:
    for title, things in ("task", tasks.load()), ("method", methods.load()):
        table = Table(box=None)
        table.add_column(title)
        for thing in things.values():
            table.add_row(thing.name, thing.about)
        console.print(table)


def checked(options: argparse.Namespace) -> list[Run]:
    """The runs that are asked for. TypeError or ValueError for what an optimizer, or a run, does not take."""
    if options.seeds < 1:
        raise ValueError(f"--seeds {options.seeds}: give at least 1")
    asked = [
        Run.of(options.task, method, seed, options.lr, options.weight_decay, dict(options.set), options.steps)
        for method in options.method
        for seed in range(options.seeds)
    ]
    for each in asked:
        each.optimizer(nn.Linear(2, 2))
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
    for each in asked:
        row = rows[each]
        steps = ["–" if step is None else f"{step:,}" for step in (row.train, row.first, row.sustained)]
        seconds = "–" if row.seconds is None else f"{row.seconds:.0f}"
        best = [f"{row.best:.3f}", "–" if row.best_at is None else f"{row.best_at:,}"]
        table.add_row(each.method, str(each.seed), *steps, seconds, *best)
    console.print(table)
    pictures.curves(task, curves, picture)
    console.print(f"curves  {picture}\nruns    {csv}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
