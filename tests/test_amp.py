"""Under GradScaler a step that overflows leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.amp import GradScaler

from grokadamw import GrokAdamW

from .models import IMPLEMENTATIONS, batch, network, running

SCALE = 2.0**16


def run(
    overflows: list[bool], amp: bool | None, *, poison: float = torch.inf, clip: bool = False, **options: Any
) -> tuple[Any, Any]:
    """Train with an overflowing step before each step for which the list says so; return everything and the metrics.

    `amp` says whether the optimizer unscales itself. None means that there is neither a GradScaler nor such a step.
    """
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), lr=0.01, **options)
    scaler = GradScaler("cpu", init_scale=SCALE, enabled=amp is not None)
    if amp is not None:
        optimizer._step_supports_amp_scaling = amp

    def take_step(i: int, overflow: bool) -> None:
        x, y = batch(i)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        scaler.scale(loss).backward()
        if overflow:
            list(model.parameters())[i % 6].grad.view(-1)[i % 3] = poison
        optimizer.record(train_loss=loss, eval_loss=loss * (1 + i % 3))
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()

    for i, overflow in enumerate(overflows):
        if overflow and amp is not None:
            take_step(i + 100, True)
        take_step(i, False)
    everything = [*model.parameters(), *(x for state in optimizer.state.values() for x in state.values())]
    return everything, optimizer.metrics()


def same(ours: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    assert len(ours[0]) == len(expected[0])
    assert all(torch.equal(a, b) for a, b in zip(ours[0], expected[0], strict=True))
    for key, value in expected[1].items():
        assert ours[1][key] == value or value != value, key


@pytest.mark.parametrize("amp", [True, False], ids=["the optimizer unscales", "GradScaler unscales"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "options",
    [{}, {"nonfinite": "raise"}, {"nonfinite": "propagate", "gradient_clipping": 0.0}, {"compat": "0.1.2"}],
    ids=str,
)
@settings(max_examples=3)
@given(overflows=st.lists(st.booleans(), min_size=1, max_size=8), poison=st.sampled_from([torch.inf, torch.nan]))
def test_bit_for_bit_the_run_without_those_steps(
    amp: bool, implementation: str, options: dict[str, Any], overflows: list[bool], poison: float
) -> None:
    if implementation == "gpu":  # the interpreter is slow
        overflows = overflows[:2]
    with running(implementation, chunk=64) as how:
        same(run(overflows, amp, poison=poison, **how, **options), run(overflows, None, **how, **options))


@pytest.mark.usefixtures("nothing_is_free_to_read")
@pytest.mark.parametrize("amp", [True, False])
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"nonfinite": "raise"}, {"nonfinite": "propagate", "gradient_clipping": 0.0}], ids=str
)
def test_where_reading_would_make_the_host_wait(amp: bool, foreach: bool, options: dict[str, Any]) -> None:
    """An overflow that GradScaler finds is not among the skipped steps that the metrics count."""
    expected = run([False] * 4, amp, foreach=foreach, **options)
    same(run([False, True, True, False], amp, foreach=foreach, **options), expected)
    assert expected[1]["skipped_steps"] == 0


@pytest.mark.parametrize("amp", [True, False])
def test_clipping_of_the_loop_comes_first(amp: bool) -> None:
    """If the loop unscales and clips before the step, as the Trainer does, nothing is left to unscale."""
    same(run([False, True, False], amp, clip=True), run([False] * 3, None, clip=True))


def test_the_gradients_are_read_only_where_the_optimizer_unscales() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p])
    optimizer._step_supports_amp_scaling = True
    scaler = GradScaler("cpu", init_scale=SCALE)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    assert (p.grad == SCALE).all()
    assert optimizer.metrics()["grad_norm"] == pytest.approx(3**0.5)
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")
