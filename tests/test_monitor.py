"""Monitor: what it keeps, and what becomes of it."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grokadamw import Accumulate, GrokAdamW
from grokadamw.monitor import Monitor

from .models import batch, network, train


def monitored(every: int = 1, capacity: int = 4096, **options: Any) -> tuple[Any, GrokAdamW, Monitor]:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), lr=0.01, **options)
    return model, optimizer, Monitor(optimizer, every, capacity)


def with_losses(losses: list[tuple[float, float]], capacity: int = 4096) -> Monitor:
    """A monitor of steps before which these training and evaluation losses were recorded."""
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = GrokAdamW([param])
    monitor = Monitor(optimizer, every=1, capacity=capacity)
    for train_loss, eval_loss in losses:
        optimizer.record(train_loss=train_loss, eval_loss=eval_loss)
        param.grad = torch.ones(1)
        optimizer.step()
    return monitor


def test_it_keeps_what_the_optimizer_says() -> None:
    model, optimizer, monitor = monitored(every=2)
    said = []

    def take_step(step: int, loss: Any) -> None:
        optimizer.record(train_loss=loss, eval_loss=2.0 + step)
        optimizer.step()
        if step % 2:
            said.append(optimizer.metrics())

    train(model, range(6), take_step)
    assert [row["step"] for row in monitor.rows] == [2, 4, 6]
    for row, metrics in zip(monitor.rows, said, strict=True):
        assert row["lr"] == 0.01
        assert {name: row[name] for name in metrics} == metrics
    assert [row["eval_loss"] for row in monitor.rows] == [3.0, 5.0, 7.0]
    assert all(0 < row["signal"] < 1 for row in monitor.rows)
    monitor.close()
    train(model, range(6), take_step)
    assert len(monitor.rows) == 3


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 9), st.integers(0, 60))
def test_memory_is_bounded_and_records_stay_evenly_spaced(every: int, capacity: int, steps: int) -> None:
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = GrokAdamW([param])
    monitor = Monitor(optimizer, every, capacity)
    for _ in range(steps):
        param.grad = torch.ones(1)
        optimizer.step()
    kept = [int(row["step"]) for row in monitor.rows]
    assert len(kept) <= capacity
    apart = kept[0] if kept else every
    assert apart // every in (2**n for n in range(10))
    assert kept == list(range(apart, steps + 1, apart))
    assert len(kept) >= min(steps // every, capacity // 2)


def test_micro_batches_are_no_steps() -> None:
    model, optimizer, monitor = monitored(accumulation_steps=2, second_moment="raw")
    train(model, range(6), lambda step, loss: optimizer.step())
    assert [row["step"] for row in monitor.rows] == [1, 2, 3]


@pytest.mark.filterwarnings("ignore:a step was skipped")
def test_skipped_steps_are_none_either() -> None:
    model, optimizer, monitor = monitored()

    def take_step(step: int, loss: Any) -> None:
        if step == 1:
            next(model.parameters()).grad.fill_(math.nan)
        optimizer.step()

    train(model, range(3), take_step)
    assert [(row["step"], row["skipped_steps"]) for row in monitor.rows] == [(1, 0), (2, 1)]


def test_going_back_to_a_checkpoint(tmp_path: Path) -> None:
    """What came after it did not happen."""
    model, optimizer, monitor = monitored()
    written: list[tuple[str, int]] = []

    class Writer:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, step))

    train(model, range(3), lambda step, loss: optimizer.step())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.5
    train(model, range(3), lambda step, loss: optimizer.step())
    monitor.to_tensorboard(Writer())  # type: ignore[arg-type]
    optimizer.load_state_dict(
        saved | {"state": {k: dict(v, step=torch.tensor(3.0)) for k, v in saved["state"].items()}}
    )
    train(model, range(2), lambda step, loss: optimizer.step())
    assert [(row["step"], row["lr"]) for row in monitor.rows] == [(1, 0.01), (2, 0.01), (3, 0.01), (4, 0.5), (5, 0.5)]
    written.clear()
    monitor.to_tensorboard(Writer())  # type: ignore[arg-type]
    assert [step for name, step in written if name == "grokadamw/lr"] == [4, 5]


def test_behind_a_wrapper() -> None:
    model = network()
    optimizer = Accumulate(GrokAdamW(model.named_parameters(), lr=0.01), 3)
    monitor = Monitor(optimizer, every=1)
    train(model, range(6), lambda step, loss: optimizer.step())
    assert [row["step"] for row in monitor.rows] == [1, 2]


@pytest.mark.parametrize(
    ("losses", "at"),
    [
        ([(4.0, 4.0), (0.3, 5.0), (0.1, 6.0), (0.1, 3.5), (0.1, 3.0), (0.1, 0.1)], 5),
        ([(4.0, 4.0), (2.0, 2.0), (0.3, 0.4), (0.1, 0.1)], None),  # evaluation follows
        ([(4.0, 4.0), (0.3, 5.0), (0.1, 6.0)], None),  # not yet
        ([(4.0, 9.0), (3.0, 1.0), (0.3, 6.0), (0.3, 5.0), (0.2, 4.0)], 5),
        ([(4.0, math.nan), (0.3, math.nan), (0.3, 4.0), (0.3, 1.0)], 4),
        ([(4.0, 4.0)] + 9 * [(0.3, 6.0)] + 30 * [(0.2, 1.0)], 11),  # though records are dropped
        ([], None),
    ],
)
def test_where_grokking_set_in(losses: list[tuple[float, float]], at: int | None) -> None:
    assert with_losses(losses, capacity=16).grokked_at == at


def test_a_picture(tmp_path: Path) -> None:
    monitor = with_losses([(4.0, 4.0), (0.3, 5.0), (0.1, 6.0), (0.1, 0.1)])
    figure = monitor.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
    losses, signals, norms, layers, alphas, clips = figure.axes
    assert list(losses.lines[1].get_ydata()) == [4.0, 5.0, 6.0, 0.1]
    for axes, name in ((signals, "signal"), (alphas, "alpha"), (norms, "grad_norm"), (clips, "clip_coefficient")):
        assert list(axes.lines[0].get_xdata()) == [1, 2, 3, 4]
        assert list(axes.lines[0].get_ydata()) == [row[name] for row in monitor.rows]
    assert list(layers.lines[0].get_ydata()) == [0.9]
    assert "grokked at 4" in [text.get_text() for text in losses.get_legend().get_texts()]


def test_a_picture_of_nothing() -> None:
    assert len(monitored()[2].plot().axes) == 6


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model, optimizer, monitor = monitored()
    with SummaryWriter(tmp_path) as writer:
        train(model, range(3), lambda step, loss: optimizer.step())
        monitor.to_tensorboard(writer)
        optimizer.record(train_loss=1.0, eval_loss=2.0)
        train(model, range(2), lambda step, loss: optimizer.step())
        monitor.to_tensorboard(writer)
        monitor.to_tensorboard(writer)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    norms = [(event.step, event.value) for event in events.Scalars("grokadamw/grad_norm")]
    assert [step for step, _ in norms] == [1, 2, 3, 4, 5]
    assert [value for _, value in norms] == pytest.approx([row["grad_norm"] for row in monitor.rows], rel=1e-6)
    assert [event.step for event in events.Scalars("grokadamw/signal")] == [4, 5]  # nothing was recorded before


def test_tables(tmp_path: Path) -> None:
    model, optimizer, monitor = monitored()
    train(model, range(2), lambda step, loss: optimizer.step())
    optimizer.record(train_loss=1.0, eval_loss=2.0)
    train(model, range(1), lambda step, loss: optimizer.step())
    monitor.to_csv(tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["signal"] for line in lines] == ["", "", "0.5"]
    assert [float(line["grad_norm"]) for line in lines] == [row["grad_norm"] for row in monitor.rows]
    pytest.importorskip("pandas")
    table = monitor.to_pandas()
    assert list(table.index) == [1, 2, 3]
    assert math.isnan(table.loc[1, "signal/loss_gap"])
    assert table.loc[3, "signal/loss_gap"] == 0.5
    nothing = monitored()[2]
    assert len(nothing.to_pandas()) == 0
    nothing.to_csv(tmp_path / "nothing.csv")
    assert (tmp_path / "nothing.csv").read_text().startswith("step,train_loss,")


@pytest.mark.parametrize(("every", "capacity", "name"), [(0, 10, "every=0"), (1, 1, "capacity=1"), (1.5, 10, "every")])
def test_bad_arguments(every: Any, capacity: Any, name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        Monitor(GrokAdamW([torch.zeros(1)]), every, capacity)


def test_another_optimizer() -> None:
    with pytest.raises(TypeError, match="optimizer is a SGD"):
        Monitor(torch.optim.SGD([torch.zeros(1)]))


def test_a_compiled_step() -> None:
    model, optimizer, monitor = monitored()
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(3):
        x, y = batch(i)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        step()
    assert [row["step"] for row in monitor.rows] == [1, 2, 3]
