"""The process is killed at any moment while it trains and checkpoints as in docs/pytorch.md, and is started again."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grokadamw import GrokAdamW
from grokadamw.signals import AccuracyGap, SlowGradient

from .models import same
from .pages import ROOT, code_blocks

STEPS = 40


def save(checkpoint: Any, path: Path) -> None:
    """Save with the function from docs/pytorch.md."""
    namespace: dict[str, Any] = {"torch": torch}
    (block,) = [block for block in code_blocks((ROOT / "docs/pytorch.md").read_text()) if "def save(" in block]
    exec(block[: block.index("\n\nsave(")], namespace)
    namespace["save"](checkpoint, path)


def train(folder: Path, in_fewer_bits: bool = False, stop: int = STEPS) -> None:
    """Train from the last checkpoint to the last step, and write a checkpoint after every step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1))
    gap = AccuracyGap()
    options: dict[str, Any] = {}
    if in_fewer_bits:
        model, options = model.bfloat16(), {"state_dtype": "int8", "master_weight_bits": 24}
    optimizer = GrokAdamW(
        model.named_parameters(), lr=0.01, grokking_signal_fns=[gap, SlowGradient(every=3)], **options
    )
    start = 0
    if (folder / "checkpoint.pt").exists():
        checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        start = checkpoint["step"]
    for step in range(start, stop):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
        optimizer.zero_grad()
        loss = (model(x).squeeze(1) - x[:, 0] * x[:, 1]).square().mean()
        loss.backward()
        if step % 4 == 0:
            gap.record(train=0.9, eval=0.1 + 0.01 * step)
        if step == 7:
            loss = loss * torch.nan
            next(model.parameters()).grad.fill_(torch.nan)  # this step is skipped
        optimizer.step()
        save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1},
            folder / "checkpoint.pt",
        )


def timed(context: Any, folder: Path, in_fewer_bits: bool) -> float:
    """Return the seconds that a process takes to train to the end."""
    began = time.perf_counter()
    process = context.Process(target=train, args=(folder, in_fewer_bits))
    process.start()
    process.join()
    return time.perf_counter() - began


@pytest.mark.parametrize(
    ("kills", "in_fewer_bits"),
    [(10, True), *(pytest.param(200, fewer, marks=pytest.mark.long) for fewer in (False, True))],
)
def test_no_kill_loses_a_checkpoint_or_changes_the_run(kills: int, in_fewer_bits: bool, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    context = multiprocessing.get_context("forkserver")
    timed(context, tmp_path, in_fewer_bits)  # this starts the server that the others are forked from
    all_steps, a_start = timed(context, whole, in_fewer_bits), timed(context, whole, in_fewer_bits)
    a_step = (all_steps - a_start) / STEPS
    uninterrupted = torch.load(whole / "checkpoint.pt")
    rng, killed, mid_write, runs = random.Random(0), 0, 0, 0
    while killed < kills:
        folder = tmp_path / f"run-{runs}"
        folder.mkdir()
        beside = folder / "checkpoint.pt.new"
        last = 0
        while last < STEPS:
            process = context.Process(target=train, args=(folder, in_fewer_bits))
            process.start()
            if killed < kills:
                process.join(rng.random() * (a_start + 15 * a_step))
                process.kill()  # does nothing if the process has ended
            process.join()
            if process.exitcode == -signal.SIGKILL:
                killed += 1
                mid_write += beside.exists()
                beside.unlink(missing_ok=True)
            else:
                assert process.exitcode == 0
            if (folder / "checkpoint.pt").exists():
                step = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]  # the file is whole
                assert step >= last  # and no older than the last one
                last = step
            else:
                assert last == 0
        assert same(torch.load(folder / "checkpoint.pt"), uninterrupted)
        runs += 1
    print(f"a start takes {1000 * a_start:.0f} ms, a step {1000 * a_step:.0f} ms")
    print(f"{killed} kills, {mid_write} of them while a checkpoint was written; {runs} runs: none lost, none differs")
