"""Many runs: in parallel, one thread each, and into one CSV file, which is also what knows which are done."""

from __future__ import annotations

import csv
import datetime
import json
import multiprocessing
import os
import platform
import queue
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn

from . import methods, tasks
from .experiment import Curve, run

COLUMNS = (
    "{task.description}",
    BarColumn(bar_width=10),
    MofNCompleteColumn(),
    "{task.fields[shown]}",
    TimeElapsedColumn(),
)
CSV = Path(__file__).parent.parent / "results" / "grokking.csv"


@dataclass(frozen=True)
class Run:
    """What is asked for. Two runs that are equal would give the same steps."""

    task: str
    method: str
    seed: int
    lr: float
    weight_decay: float
    options: str = "{}"  # JSON, what differs from the method's own
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
        """None is what the task, or the method, says."""
        t, m = tasks.load()[task], methods.load()[method]
        lr, weight_decay = m.lr if lr is None else lr, m.weight_decay if weight_decay is None else weight_decay
        return cls(
            task,
            method,
            seed,
            lr,
            weight_decay,
            json.dumps(options or {}, sort_keys=True),
            budget or t.budget,
            afterwards,
        )


@dataclass(frozen=True)
class Row(Run):
    """And what came of it. Steps are those of the first of six good evaluations in a row; None is never."""

    train: int | None = None  # training score
    first: int | None = None  # the first good evaluation, which may not last
    sustained: int | None = None
    seconds: float | None = None  # until `sustained`, without evaluations; machines and neighbours differ
    steps: int = 0  # taken in all
    lowest: float | None = None  # the lowest score since `sustained`
    best: float = 0.0
    last: float = 0.0
    last_train: float = 0.0
    minutes: float = 0.0  # of a core, with evaluations
    commit: str = ""
    date: str = ""
    machine: str = ""

    @property
    def run(self) -> Run:
        return Run(**{f.name: getattr(self, f.name) for f in fields(Run)})


def execute(asked: Run, on_evaluation: Callable[[Curve], None] = lambda curve: None) -> tuple[Row, Curve]:
    """In this process."""
    task, method = tasks.load()[asked.task], methods.load()[asked.method]
    settings = {"lr": asked.lr, "weight_decay": asked.weight_decay, **json.loads(asked.options)}
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layer")  # a low β1 is meant
        curve = run(task, method, settings, asked.seed, asked.budget, asked.afterwards, on_evaluation)
    minutes = (time.perf_counter() - start) / 60
    train, first, sustained = curve.sustained(curve.train), curve.first(curve.report), curve.sustained(curve.report)

    def at(index: int | None) -> int | None:
        return None if index is None else curve.steps[index]

    row = Row(
        **asdict(asked),
        train=at(train),
        first=at(first),
        sustained=at(sustained),
        seconds=None if sustained is None else round(curve.seconds[sustained], 2),
        steps=curve.steps[-1],
        lowest=None if sustained is None else round(min(curve.report[sustained:]), 4),
        best=round(max(curve.report), 4),
        last=round(curve.report[-1], 4),
        last_train=round(curve.train[-1], 4),
        minutes=round(minutes, 3),
        commit=commit(),
        date=datetime.date.today().isoformat(),
        machine=f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
    )
    return row, curve


def commit() -> str:
    """Of this checkout, with a + where something in it has been changed since."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=9", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def read(path: Path) -> list[Row]:
    """The file's rows, none if there is no file."""
    if not path.exists():
        return []
    kinds: dict[str, Callable[[str], Any]] = {f.name: KINDS[str(f.type)] for f in fields(Row)}
    with path.open(newline="") as file:
        return [Row(**{key: kinds[key](value) for key, value in row.items()}) for row in csv.DictReader(file)]


KINDS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "int | None": lambda text: int(text) if text else None,
    "float | None": lambda text: float(text) if text else None,
}


def append(path: Path, row: Row) -> None:
    """On disk when this returns, so that an end of the process at any time costs the runs under way and no more."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))
        file.flush()
        os.fsync(file.fileno())


def execute_all(asked: Iterable[Run], path: Path, jobs: int | None, console: Console) -> dict[Run, Curve]:
    """`jobs` at a time (None: one a core). Each has its row in the file when it ends."""
    todo = list(dict.fromkeys(asked))
    curves: dict[Run, Curve] = {}
    failure: BaseException | None = None
    # processes are spawned, as a forked one has none of torch's threads
    context = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(jobs or os.cpu_count(), context, torch.set_num_threads, (1,))
    with context.Manager() as manager, Progress(*COLUMNS, console=console) as progress, workers:
        news: queue.Queue[tuple[Run, int, str]] = manager.Queue()  # type: ignore[assignment]
        every = progress.add_task("all runs", total=len(todo), shown="")
        bars: dict[Run, TaskID] = {}
        futures = {workers.submit(work, each, news): each for each in todo}
        while futures:
            finished = wait(futures, timeout=0.5, return_when=FIRST_COMPLETED).done
            while not news.empty():
                each, step, shown = news.get()
                if each not in bars:
                    title = f"{each.task} {each.method}, seed {each.seed}"
                    bars[each] = progress.add_task(title, total=each.budget, shown="")
                progress.update(bars[each], completed=step, shown=shown)
            for future in finished:
                each = futures.pop(future)
                if each in bars:
                    progress.remove_task(bars.pop(each))
                if future.cancelled():
                    continue
                if error := future.exception():
                    failure = failure or error
                    for other in futures:
                        other.cancel()  # but for those under way, whose rows are written
                    continue
                row, curves[each] = future.result()
                append(path, row)
                progress.advance(every)
    if failure:
        raise failure
    return curves


def work(asked: Run, news: queue.Queue[tuple[Run, int, str]]) -> tuple[Row, Curve]:
    """In a process of its own."""

    def tell(curve: Curve) -> None:
        news.put((asked, curve.steps[-1], f"train {curve.train[-1]:5.2f}  report {curve.report[-1]:5.2f}"))

    return execute(asked, tell)
