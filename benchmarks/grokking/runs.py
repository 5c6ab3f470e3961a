"""Many runs in parallel, one thread each. Their rows go into one CSV file, which also tells which runs are done."""

from __future__ import annotations

import csv
import datetime
import json
import math
import multiprocessing
import os
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import nn
from torch.optim import Optimizer

from ..step_time import processor
from . import methods, tasks
from .experiment import Curve, run

COLUMNS = (
    "{task.description}",
    BarColumn(bar_width=10),
    MofNCompleteColumn(),
    "{task.fields[shown]}",
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)
ROOT = Path(__file__).parent.parent.parent
CSV = ROOT / "benchmarks" / "results" / "grokking.csv"


News: TypeAlias = "tuple[Run, int, str]"  # steps taken, and what to show
news: Queue[News]  # each worker's messages to its parent


@dataclass(frozen=True)
class Run:
    """The settings of a run. Runs with equal settings take the same steps."""

    task: str
    method: str
    seed: int
    lr: float
    weight_decay: float
    options: str = "{}"  # JSON: options that differ from the method's own
    budget: int = 3000  # steps
    afterwards: int = 0  # steps after the task is learnt

    @classmethod
    def of(
        cls,
        task: str,
        method: str,
        seed: int,
        lr: float | None = None,
        weight_decay: float | None = None,
        options: Mapping[str, Any] | None = None,
        budget: int | None = None,
        afterwards: int = 0,
    ) -> Run:
        """Return a run. None stands for the task's or the method's own setting."""
        t, m = tasks.load()[task], methods.load()[method]
        for name in {"lr", "weight_decay"} & set(options or {}):
            raise ValueError(f"{name} is not one of the options, which differ from a method's own: give it by itself")
        if weight_decay is None:
            options = {**m.with_its_decay, **(options or {})}
        return cls(
            task,
            method,
            seed,
            m.lr if lr is None else lr,
            m.weight_decay if weight_decay is None else weight_decay,
            json.dumps(options or {}, sort_keys=True),
            budget or t.budget,
            afterwards,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of its optimizer that differ from the method's own."""
        options = {name: value for name, value in json.loads(self.options).items() if name != "clip"}
        betas = tasks.load()[self.task].betas
        return {"betas": betas, "lr": self.lr, "weight_decay": self.weight_decay, **options}

    @property
    def clip(self) -> float:
        """The norm that the training loop clips to; 0 for no clipping."""
        clip: float = json.loads(self.options).get("clip", methods.load()[self.method].clip)
        return clip or tasks.load()[self.task].clip

    def optimizer(self, model: nn.Module) -> Optimizer:
        return methods.load()[self.method].optimizer(model, **self.settings)


@dataclass(frozen=True)
class Row(Run):
    """A run and its results. Steps are those of the first of six good evaluations in a row; None stands for never."""

    train: int | None = None  # training score
    first: int | None = None  # the first good evaluation, which may not last
    sustained: int | None = None
    seconds: float | None = None  # until `sustained`, without evaluations; depends on the machine and on what else runs
    steps: int = 0  # taken in all
    lowest: float | None = None  # the lowest score since `sustained`
    best: float = 0.0
    best_at: int | None = None  # the step of the best score; empty in rows that are older than this column
    last: float = 0.0
    last_train: float = 0.0
    minutes: float = 0.0  # of a core, with evaluations; 0 on a GPU, which many runs share
    commit: str = ""
    date: str = ""
    machine: str = ""

    @cached_property
    def run(self) -> Run:
        return Run(**{f.name: getattr(self, f.name) for f in fields(Run)})


def execute(asked: Run, on_evaluation: Callable[[Curve], None] = lambda curve: None) -> tuple[Row, Curve]:
    """Execute a run in this process."""
    task = tasks.load()[asked.task]
    version = commit()  # of the code that is loaded now
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layer")  # a low β1 is intended
        how: dict[str, Any] = {"clip": asked.clip, "on_evaluation": on_evaluation}
        curve = run(task, asked.optimizer, asked.seed, asked.budget, asked.afterwards, **how)
    minutes = (time.process_time() - start) / 60
    return row_of(asked, curve, minutes, version, f"{processor()}, torch {torch.__version__}"), curve


def row_of(asked: Run, curve: Curve, minutes: float, version: str, machine: str, timed: bool = True) -> Row:
    """Return the row of a run that has ended."""
    best = curve.best(curve.report)
    train, first, sustained = curve.sustained(curve.train), curve.first(curve.report), curve.sustained(curve.report)

    def at(index: int | None) -> int | None:
        return None if index is None else curve.steps[index]

    return Row(
        **asdict(asked),
        train=at(train),
        first=at(first),
        sustained=at(sustained),
        seconds=None if sustained is None or not timed else round(curve.seconds[sustained], 2),
        steps=curve.steps[-1],
        lowest=None if sustained is None else round(min(curve.report[sustained:]), 4),
        best=-math.inf if best is None else round(curve.report[best], 4),
        best_at=at(best),
        last=round(curve.report[-1], 4),
        last_train=round(curve.train[-1], 4),
        minutes=round(minutes, 3),
        commit=version,
        date=datetime.date.today().isoformat(),
        machine=machine,
    )


@cache
def commit() -> str:
    """Return the checkout's commit, with a + if the package or the bench has changed since; empty outside of git."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    changed = git("status", "--porcelain", "--", "grokadamw", "benchmarks/grokking")
    return git("rev-parse", "--short=9", "HEAD") + ("+" if changed else "")


def read(path: Path) -> list[Row]:
    """Return the file's rows, none if there is no file."""
    if not path.exists():
        return []
    kinds: dict[str, Callable[[str], Any]] = {f.name: KINDS[str(f.type)] for f in fields(Row)}
    reader = csv.DictReader(whole_lines(path).splitlines())
    if reader.fieldnames != list(kinds):
        raise ValueError(f"{path} has other columns than a row of now: give another file, or bring it into that form")
    return [Row(**{key: kinds[key](value) for key, value in row.items()}) for row in reader]


def whole_lines(path: Path) -> str:
    """Return the file's text without a last line that was cut off while it was written."""
    text = path.read_text()
    return text[: text.rfind("\n") + 1]


KINDS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "int | None": lambda text: int(text) if text else None,
    "float | None": lambda text: float(text) if text else None,
}


def append(path: Path, row: Row) -> None:
    """Write a row to disk before returning, so that a process that is killed loses only the runs under way."""
    whole = len(whole_lines(path).encode()) if path.exists() else 0
    with path.open("r+" if whole else "w", newline="") as file:
        file.truncate(whole)
        file.seek(whole)
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        if not whole:
            writer.writeheader()
        writer.writerow(asdict(row))
        file.flush()
        os.fsync(file.fileno())


def execute_all(asked: Iterable[Run], path: Path, jobs: int | None, console: Console) -> dict[Run, Curve]:
    """Execute runs, `jobs` at a time (None: one a core). Each run's row is in the file when it ends.

    Raises:
        Exception: the first one that a run raised, with that run in its notes, after all other runs have ended.
    """
    todo = list(dict.fromkeys(asked))
    curves: dict[Run, Curve] = {}
    failure: BaseException | None = None
    # spawn processes, as a forked one has none of torch's threads
    context = multiprocessing.get_context("spawn")
    told: Queue[News] = context.Queue()
    workers = ProcessPoolExecutor(jobs or os.cpu_count(), context, begin, (told,))
    with Progress(*COLUMNS, console=console) as progress, workers:
        every = progress.add_task("all runs", total=len(todo), shown="")
        bars: dict[Run, TaskID] = {}
        futures = {workers.submit(work, planned): planned for planned in todo}
        while futures:
            finished = wait(futures, timeout=0.5, return_when=FIRST_COMPLETED).done
            while not told.empty():
                planned, step, shown = told.get()
                if planned not in futures.values():
                    continue  # the run has ended, and its news comes late
                if planned not in bars:
                    title = f"{planned.task} {planned.method}, seed {planned.seed}"
                    bars[planned] = progress.add_task(title, total=planned.budget, shown="")
                progress.update(bars[planned], completed=step, shown=shown)
            for future in finished:
                planned = futures.pop(future)
                if planned in bars:
                    progress.remove_task(bars.pop(planned))
                if error := future.exception():
                    error.add_note(f"in {planned}")
                    failure = failure or error
                else:
                    row, curves[planned] = future.result()
                    append(path, row)
                progress.advance(every)
    if failure:
        raise failure
    return {planned: curves[planned] for planned in todo}


def begin(told: Queue[News]) -> None:
    """Prepare a worker: one thread. Ctrl-C, and the end of its parent, end the worker and not just its run."""
    global news
    news = told
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def work(asked: Run) -> tuple[Row, Curve]:
    """Execute a run in a worker, and tell the parent of its progress."""

    def tell(curve: Curve) -> None:
        news.put((asked, curve.steps[-1], f"train {curve.train[-1]:5.2f}  report {curve.report[-1]:5.2f}"))

    news.put((asked, 0, "starting"))  # shows a bar before the first evaluation, which may take minutes
    return execute(asked, tell)
