"""Tests of compat="0.1.2" against release 0.1.2 from the registry, which runs in a separate process."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grokadamw import GrokAdamW

from . import published_run

PUBLISHED = Path(sys.prefix) / "published"
SHAPES = [[(8, 5), (8,), (8, 8)], [(8,), (3, 8), (3,)]]  # a network of three layers, in two groups
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "clipping": {"options": {"gradient_clipping": 0.05}},
    "no clipping": {"options": {"gradient_clipping": 0.0}},
    "groups": {"group_options": [{"lr": 3e-3, "gamma": 0.3}, {"betas": (0.8, 0.99), "lamb": 0.5, "weight_decay": 0.5}]},
    "missing gradients": {"missing": True},
    "signals": {"signals": ["rising", "constant"], "options": {"grokking_signal_decay_rate": 0.5}},
    "a negative signal": {"signals": ["negative"]},
    "no signals": {"signals": []},
    "a signal that is not a number": {"signals": ["nan", "constant"]},
    "losses of each group": {"losses": 1.0, "options": {"grokking_signal_decay_rate": 0.5}},
    "losses that are not numbers": {"losses": float("nan")},
    "no filter": {"options": {"lamb": 0.0}},
    "a filter that is switched on": {"options": {"lamb": 0.0}, "switches_on_at": 10},
    "large epsilon": {"options": {"eps": 1e-2}},
    "everything": {
        "options": {"gradient_clipping": 0.2, "lr": 5e-3},
        "group_options": [{"gamma": 0.2}, {"alpha_init": 0.9}],
        "signals": ["rising", "negative"],
        "missing": True,
    },
}


def problem(
    options: dict[str, Any] | None = None,
    group_options: list[dict[str, Any]] | None = None,
    signals: list[str] | None = None,
    missing: bool = False,
    losses: float | None = None,  # the first group's training loss at step 1
    switches_on_at: int | None = None,  # λ is 2 from this step on
    steps: int = 50,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def random() -> list[list[torch.Tensor]]:
        return [[torch.randn(shape, generator=generator) for shape in group] for group in SHAPES]

    values, grads = random(), [random() for _ in range(steps)]
    if missing:
        for step, groups in enumerate(grads):
            groups[step % 2][step % 3] = None  # type: ignore[call-overload]
    return {
        "options": options or {},
        "group_options": group_options or [{}, {}],
        "signals": signals,
        "switches_on_at": switches_on_at,
        "values": values,
        "grads": grads,
        "losses": [
            [(losses / t, losses), (2 * losses / t, losses * (2 + 1 / t))] if losses else [(None, None)] * 2
            for t in range(1, steps + 1)
        ],
    }


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[list[torch.Tensor]]]]:
    """Return the weights that release 0.1.2 computes in each case, after each step."""
    assert PUBLISHED.is_dir(), (
        f"release 0.1.2 is missing: run `make test`, or pip install --no-deps --target {PUBLISHED} grokadamw==0.1.2"
    )
    folder = tmp_path_factory.mktemp("published")
    torch.save({name: problem(**case) for name, case in CASES.items()}, folder / "problems.pt")
    subprocess.run(
        [sys.executable, published_run.__file__, "problems.pt", "results.pt"],
        env={**os.environ, "PYTHONPATH": str(PUBLISHED)},
        cwd=folder,
        check=True,
    )
    results: dict[str, list[list[list[torch.Tensor]]]] = torch.load(folder / "results.pt")
    return results


@pytest.mark.parametrize("case", CASES)
def test_the_same_weights_as_the_release(case: str, published: Any) -> None:
    expected = published[case]
    for options in ({}, {"foreach": True}, {"foreach": False}):
        make = functools.partial(GrokAdamW, compat="0.1.2", **options)
        ours = published_run.run(problem(**CASES[case]), make)
        for step, (a, b) in enumerate(zip(ours, expected, strict=True)):
            for x, y in zip([p for group in a for p in group], [p for group in b for p in group], strict=True):
                torch.testing.assert_close(
                    x, y, rtol=0, atol=1e-6, equal_nan=True, msg=lambda m, step=step: f"step {step + 1}: {m}"
                )


def test_it_is_not_what_the_default_computes(published: Any) -> None:
    ours = published_run.run(problem(), GrokAdamW)
    difference = max(
        (a - b).abs().max().item()
        for x, y in zip(ours[-1], published["defaults"][-1], strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert difference > 1e-3


def test_state_is_in_the_parameters_dtype() -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = GrokAdamW([p], compat="0.1.2")
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert {optimizer.state[p][key].dtype for key in ("exp_avg", "exp_avg_sq", "grok_ema")} == {torch.bfloat16}


def test_nothing_is_skipped() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p], compat="0.1.2")
    p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert p.isnan().all()
    assert optimizer.metrics()["skipped_steps"] == 0


def test_metrics_are_of_all_tensors() -> None:
    first, second = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = GrokAdamW([first, second], compat="0.1.2", gradient_clipping=2.0)
    first.grad, second.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    optimizer.step()
    assert optimizer.metrics()["grad_norm"] == 5
    assert optimizer.metrics()["clip_coefficient"] == pytest.approx(0.5)
