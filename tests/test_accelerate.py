"""Accelerate wraps the optimizer, whose arguments and behaviour must stay the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grokadamw import Accumulate, GrokAdamW
from grokadamw.signals import SlowGradient

from .models import batch, network, train

accelerate = pytest.importorskip("accelerate")

from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

STEPS = range(8)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Reset Accelerate's state, which belongs to the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def ratio(train_loss: float, eval_loss: float) -> float:
    return eval_loss / train_loss


def make(model: nn.Module) -> GrokAdamW:
    """Return an optimizer with arguments that a state dict does not carry."""
    return GrokAdamW(
        model.named_parameters(),
        lr=0.01,
        grokking_signal_fns=[ratio, SlowGradient(every=3)],
        combine="max",
        second_moment="raw",
        nonfinite="skip",
        window_size=3,
    )


def with_accelerate(model: nn.Module, optimizer: Any, accelerator: Any, steps: range = STEPS) -> None:
    for step in steps:
        x, y = batch(step)
        with accelerator.accumulate(model):
            loss = (model(x) - y).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_it_was_given_survives_prepare() -> None:
    plain = network()
    alone = make(plain)
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    optimizer = make(model)
    layers = [group["layers"] for group in optimizer.param_groups]
    model, wrapped = accelerator.prepare(model, optimizer)
    assert wrapped.optimizer is optimizer
    assert [group["layers"] for group in optimizer.param_groups] == layers == [[0, 0, 1, 1, 2, 2]]
    for recording in (alone, optimizer):
        recording.record(train_loss=1.0, eval_loss=3.0)
    train(plain, STEPS, lambda step, loss: alone.step())
    with_accelerate(model, wrapped, accelerator)
    assert_equal(model, plain)
    assert optimizer.metrics() == alone.metrics()
    assert optimizer.metrics()["signal"] == 3.0


def test_saving_and_resuming(tmp_path: Path) -> None:
    whole = network()
    alone = make(whole)
    alone.record(train_loss=1.0, eval_loss=3.0)
    train(whole, STEPS, lambda step, loss: alone.step())

    def prepared() -> tuple[Any, Any, Any]:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator, model = accelerate.Accelerator(cpu=True), network()
        return accelerator, *accelerator.prepare(model, make(model))

    accelerator, model, optimizer = prepared()
    optimizer.optimizer.record(train_loss=1.0, eval_loss=3.0)
    with_accelerate(model, optimizer, accelerator, STEPS[:5])
    accelerator.save_state(tmp_path)
    accelerator, model, optimizer = prepared()
    accelerator.load_state(tmp_path)
    with_accelerate(model, optimizer, accelerator, STEPS[5:])
    assert_equal(model, whole)


@pytest.mark.parametrize("by", ["accelerate", "Accumulate"])
def test_accumulation(by: str) -> None:
    """Accelerate accumulates by itself, or wraps `Accumulate`; both agree with `Accumulate` alone."""
    plain = network()
    alone = Accumulate(make(plain), 2)
    train(plain, STEPS, lambda step, loss: alone.step())
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2 if by == "accelerate" else 1)
    model = network()
    model, optimizer = accelerator.prepare(model, make(model) if by == "accelerate" else Accumulate(make(model), 2))
    with_accelerate(model, optimizer, accelerator)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_bfloat16() -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = network()
    model, optimizer = accelerator.prepare(model, make(model))
    with_accelerate(model, optimizer, accelerator)
    plain = network()
    alone = make(plain)

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(x).float()

    for step in STEPS:
        x, y = batch(step)
        alone.zero_grad()
        (autocast(x) - y).square().mean().backward()
        alone.step()
    assert_equal(model, plain)


@pytest.mark.parametrize("fused", [None, True])
def test_a_scaler_and_what_overflows(fused: bool | None) -> None:
    """Accelerate uses a GradScaler on GPUs alone, so the test hands it one on the CPU."""
    accelerate.Accelerator(cpu=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    model, plain = network(), network()
    inner, alone = (
        GrokAdamW(m.named_parameters(), lr=0.01, grokking_signal_fns=lambda: 0.5, fused=fused) for m in (model, plain)
    )
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    for step in STEPS:
        x, y = batch(step)
        optimizer.zero_grad()
        scaler.scale((model(x) - y).square().mean()).backward()
        if step == 3:
            next(model.parameters()).grad.fill_(torch.inf)
            before = [param.clone() for param in model.parameters()]
        optimizer.step()
        if step == 3:
            for a, b in zip(model.parameters(), before, strict=True):
                assert torch.equal(a, b)
            assert optimizer.step_was_skipped is (fused is None)  # with fused=True the optimizer itself skips
            continue
        assert not optimizer.step_was_skipped
        alone.zero_grad()
        (plain(x) - y).square().mean().backward()
        alone.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert inner.metrics()["signal"] == 0.5
    assert inner.metrics()["step"] == len(STEPS) - 1
