"""Runs of the grokking bench on a GPU, where each step replays a CUDA graph."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("rich")
from benchmarks.grokking import experiment, tasks  # noqa: E402
from benchmarks.grokking.runs import Run  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("method", ["adamw", "grokadamw-grokking"])
def test_a_run_is_that_of_the_cpu(method: str) -> None:
    """Both agree for 100 steps, until rounding errors grow. An epoch ends within them, with a smaller batch."""
    asked = Run.of("add97/post-norm", method, 0, budget=100)
    how = (tasks.load()[asked.task], asked.optimizer, asked.seed, asked.budget)
    here = experiment.run(*how, clip=asked.clip)
    with torch.cuda.stream(torch.cuda.Stream()):
        *_, there = experiment.evaluations(*how, clip=asked.clip, device="cuda")
    assert there.steps == here.steps == list(range(10, 101, 10))
    torch.testing.assert_close(there.train, here.train, rtol=0, atol=0.03)
    torch.testing.assert_close(there.report, here.report, rtol=0, atol=0.03)
    torch.testing.assert_close(there.alpha, here.alpha, rtol=0.01, atol=0, equal_nan=True)
    assert there.train[-1] > 0.2  # it learns
