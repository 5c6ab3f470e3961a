"""Execution of many runs at a time on one GPU, because a single run is much too small for it.

The steps of a run are replays of a CUDA graph on a stream of its own. A process goes from run to run: it launches a
run's steps up to the next evaluation, and serves the other runs while the GPU works on them. A seed gives the same data
and initial weights as on the CPU. Dropout's random numbers differ: they depend on the other runs of the process.
"""

from __future__ import annotations

import gc
import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from pathlib import Path
from queue import Empty
from typing import TypeAlias

import torch
from rich.console import Console
from rich.progress import Progress

from . import tasks
from .experiment import Curve, evaluations
from .runs import COLUMNS, Row, Run, append, commit, row_of

AT_ONCE = 12  # runs per process
METHODS = ("adamw", "grokadamw")  # prefixes of the methods that can be captured

Todo: TypeAlias = "Queue[Run | None]"
Done: TypeAlias = "Queue[Row | str]"


def takes(asked: Run) -> bool:
    return asked.method.startswith(METHODS)


def execute_all(missing: Callable[[], Iterable[Run]], path: Path, jobs: int | None, console: Console) -> None:
    """Execute all missing runs. A row is written when its run ends, so `missing` may choose runs by earlier rows.

    Args:
        missing: returns the runs that have no row, the most wanted first.
        path: the CSV file.
        jobs: how many processes share the GPU. None: 4.
        console: where progress is shown.

    Raises:
        RuntimeError: a run failed. The error has the first failure's message, and is raised after all runs have ended.
    """
    jobs = jobs or 4
    context = multiprocessing.get_context("spawn")
    todo: Todo = context.Queue()
    done: Done = context.Queue()
    workers = [context.Process(target=work, args=(todo, done), daemon=True) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    asked: set[Run] = set()
    finished, failures = 0, []
    with Progress(*COLUMNS, console=console) as progress:
        bar = progress.add_task("all runs", total=None, shown="")
        while True:
            left = [run for run in dict.fromkeys(missing()) if run not in asked]
            progress.update(bar, completed=finished, total=len(asked) + len(left))
            for run in left[: jobs * AT_ONCE - (len(asked) - finished)]:
                asked.add(run)
                todo.put(run)
            if finished == len(asked):
                break
            for found in ended(done, workers):
                finished += 1
                if isinstance(found, str):
                    failures.append(found)
                else:
                    append(path, found)
    for _ in workers:
        todo.put(None)
    if failures:
        raise RuntimeError(failures[0])


def ended(done: Done, workers: list[BaseProcess]) -> list[Row | str]:
    """Wait until one or more runs have ended, and return the row, or the error, of each."""
    found: list[Row | str] = []
    while not found:
        try:
            found.append(done.get(timeout=5))
            while True:
                found.append(done.get_nowait())
        except Empty:
            if not found and not all(worker.is_alive() for worker in workers):
                raise RuntimeError("a process has died, and its runs have not ended") from None
    return found


def work(todo: Todo, done: Done) -> None:
    """Execute runs in this process until there are no more."""
    warnings.filterwarnings("ignore", "layer")  # a low β1 is intended
    torch.set_num_threads(1)
    gc.freeze()
    gc.disable()  # no memory may be freed while a graph is captured
    version, machine = commit(), f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    active: list[tuple[Run, torch.cuda.Stream, Iterator[Curve]]] = []
    curves: dict[Run, Curve] = {}
    more = True
    while more or active:
        while more and len(active) < AT_ONCE:
            try:
                asked = todo.get(block=not active)
            except Empty:
                break
            more = asked is not None
            if asked is not None:
                how = (tasks.load()[asked.task], asked.optimizer, asked.seed, asked.budget, asked.afterwards)
                curve = evaluations(*how, clip=asked.clip, device="cuda")
                active.append((asked, torch.cuda.Stream(), curve))
        for member in list(active):
            asked, stream, curve = member
            try:
                with torch.cuda.stream(stream):
                    curves[asked] = next(curve)
            except StopIteration:
                done.put(row_of(asked, curves.pop(asked), 0.0, version, machine, timed=False))
            except Exception as error:
                done.put(f"{asked}: {type(error).__name__}: {error}")
            else:
                continue
            active.remove(member)
            del member, curve
            gc.collect()
