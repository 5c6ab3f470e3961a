"""Kills a rank under torchrun at any moment: all ranks start again, and resume from the last checkpoint."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from . import elastic_run
from .models import same
from .pages import ROOT
from .test_distributed import in_processes

RANKS = 2


def started(folder: Path, restarts: int) -> subprocess.Popen[bytes]:
    folder.mkdir()
    of_torch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", f"--max-restarts={restarts}"]
    command = [sys.executable, "-m", *of_torch, "tests/elastic_run.py", str(folder)]
    # restarted ranks must not find each other's old addresses: https://github.com/pytorch/pytorch/issues/135712
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, **own_store, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("pid-?"))]


def wait_for_new(folder: Path, old: list[int], run: subprocess.Popen[bytes]) -> list[int]:
    """Return the process ids of newly started ranks, or an empty list once the run is over."""
    while run.poll() is None:
        found = pids(folder)
        if len(found) == RANKS and not {*found} & {*old}:
            return found
        time.sleep(0.01)
    return []


def killed(folder: Path, kills: int, seconds: float, rng: random.Random) -> tuple[Any, int]:
    """Return the result of a run, and how often one of its ranks was killed (at most `kills` times)."""
    run, old, count = started(folder, kills), list[int](), 0
    try:
        while count < kills and (old := wait_for_new(folder, old, run)):
            time.sleep(rng.random() * seconds)
            if (folder / "end.pt").exists():
                break
            try:
                os.kill(rng.choice(old), signal.SIGKILL)
                count += 1
            except ProcessLookupError:  # the rank had finished
                break
        assert run.wait(timeout=60) == 0, (folder / "log").read_text()[-3000:]
    finally:
        run.kill()
    return torch.load(folder / "end.pt"), count


@pytest.mark.long
def test_a_rank_that_is_killed_changes_nothing(tmp_path: Path) -> None:
    kills = 20
    in_processes(functools.partial(elastic_run.train, tmp_path), tmp_path)
    *expected, seconds = torch.load(tmp_path / "end.pt")
    rng, total, runs = random.Random(0), 0, 0
    while total < kills:
        # kill in the first half of a run, because a restarted run has less left to do
        (*end, _), count = killed(tmp_path / f"run-{runs}", min(kills - total, 5), seconds / 2, rng)
        assert same(end, expected)
        total, runs = total + count, runs + 1
    print(f"{total} kills in {runs} runs of {seconds:.1f} s: all end as the uninterrupted one, to the bit")
