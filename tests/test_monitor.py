"""Tests of Monitor: its rows, `grokked_at`, copies, pictures and tables."""

from __future__ import annotations

import copy
import csv
import gc
import math
import pickle
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.grokking.experiment import Curve
from grokadamw import Accumulate, GrokAdamW
from grokadamw.monitor import Monitor

from .models import batch, network, same, train


def monitored(every: int = 1, capacity: int = 4096, **options: Any) -> tuple[Any, GrokAdamW, Monitor]:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), lr=0.01, **options)
    return model, optimizer, Monitor(optimizer, every, capacity)


def with_losses(losses: list[tuple[float, float]], capacity: int = 4096) -> Monitor:
    """Return a monitor of steps before which these training and evaluation losses were recorded."""
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


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(2, 6), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 90)), max_size=4))
def test_records_are_at_multiples_of_their_distance_also_after_jumps(
    every: int, capacity: int, jumps: list[tuple[int, int]]
) -> None:
    """A checkpoint of another step may be loaded into a running optimizer."""
    optimizer = GrokAdamW([torch.nn.Parameter(torch.ones(1))])
    monitor = Monitor(optimizer, np.uint8(every), np.uint8(capacity))  # type: ignore[arg-type]
    for steps, at in [*jumps, (30, 0)]:
        for _ in range(steps):
            take_step(optimizer)
        kept = [int(row["step"]) for row in monitor.rows]
        assert len(kept) <= capacity
        assert kept == sorted({*kept})
        assert all(step % monitor._every == 0 for step in kept)
        if optimizer.state:
            saved = optimizer.state_dict()
            saved["state"][0]["step"] = torch.tensor(float(at))
            optimizer.load_state_dict(saved)


def test_evaluations_are_bounded_too() -> None:
    params = [torch.nn.Parameter(torch.ones(2))]
    optimizer = GrokAdamW(params)
    monitor = Monitor(optimizer, capacity=8)
    for step in range(100):
        params[0].grad = torch.ones(2)
        optimizer.step()
        optimizer.record(eval_acc=float(step >= 94))
    monitor.rows[0]["step"] = -1.0  # `rows` is a copy
    monitor.rows.clear()
    assert [row["step"] for row in monitor.rows][0] > 0
    assert len(monitor._evaluations) == 8
    assert monitor.grokked_at == 95


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


def test_going_back_to_a_checkpoint() -> None:
    """Rows after the checkpoint are dropped."""
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


def take_step(optimizer: GrokAdamW) -> None:
    """Take a step with an optimizer of a single parameter."""
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones_like(param)
    optimizer.step()


def evaluated(accuracies: Iterable[float | None], apart: int = 10, **options: Any) -> tuple[GrokAdamW, Monitor]:
    """Return a run and its monitor, with `apart` steps before each accuracy. None means no evaluation."""
    optimizer = GrokAdamW([torch.nn.Parameter(torch.ones(1))])
    monitor = Monitor(optimizer, **options)
    for accuracy in accuracies:
        for _ in range(apart):
            take_step(optimizer)
        optimizer.record(eval_acc=accuracy)
    return optimizer, monitor


def sustained(accuracies: list[float], apart: int = 10, solved: float = 0.95) -> int | None:
    """Return the step of grokking by the report's rule, for the steps that `evaluated` takes."""
    curve = Curve(solved)
    at = curve.sustained(accuracies)
    return None if at is None else (at + 1) * apart


@pytest.mark.parametrize(
    ("accuracies", "halved_at", "reached_at"),
    [
        ([0.01] * 20 + [0.3] * 16 + [0.45] * 20 + [0.9] * 5 + [0.96] * 10, 370, 620),
        ([0.01] * 40 + [0.3] * 29 + [0.49] * 81, 700, None),
        ([0.01] * 15 + [0.3] * 11 + [0.47] * 20 + [0.97] * 20, 270, 470),
    ],
)
def test_half_of_the_evaluation_loss_is_not_grokking(
    accuracies: list[float], halved_at: int, reached_at: int | None
) -> None:
    """These are three real runs. The training loss has long been low when the evaluation loss halves."""
    optimizer = GrokAdamW([torch.nn.Parameter(torch.ones(1))])
    monitor, deaf = Monitor(optimizer), Monitor(GrokAdamW([torch.nn.Parameter(torch.ones(1))]))
    for i, accuracy in enumerate(accuracies):
        step = 10 * (i + 1)
        losses = {"train_loss": 4.0 if i == 0 else 0.01, "eval_loss": 6.0 if step < halved_at else 2.9}
        for _ in range(10):
            take_step(optimizer)
            take_step(deaf._optimizer)
        optimizer.record(**losses, train_acc=float(i > 0), eval_acc=accuracy)
        deaf._optimizer.record(**losses)
    assert accuracies[halved_at // 10 - 1] < 0.5
    assert monitor.grokked_at == reached_at == sustained(accuracies)
    assert deaf.grokked_at is None  # from losses alone it claims nothing
    assert all(math.isnan(row["eval_acc"]) for row in deaf.rows)


@pytest.mark.parametrize(
    ("accuracies", "at"),
    [
        ([], None),
        ([0.95] * 5, None),  # not six yet
        ([0.95] * 6, 10),
        ([0.2] + [0.95] * 6, 20),
        ([0.95] * 5 + [0.94] + [0.95] * 5, None),  # a dip restarts the count
        ([0.95] * 5 + [0.94] + [0.95] * 6, 70),
        ([1.0] * 6 + [0.1] * 9 + [1.0] * 6, 10),  # the first time counts
        ([0.2, 1.0, None, None, 1.0, 1.0, None, 1.0, 1.0, 1.0], 20),  # steps without an evaluation do not count
        ([torch.tensor(0.95)] * 6, 10),  # in float32 a little less
        ([torch.tensor(0.9499)] * 9, None),
    ],
)
def test_six_good_evaluations_in_a_row(accuracies: list[Any], at: int | None) -> None:
    assert evaluated(accuracies)[1].grokked_at == at


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.5, 0.94, 0.95, 0.95, 0.95, 1.0, 1.0, 1.0]), max_size=30),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(2, 9),
    st.sampled_from([0.5, 0.95, 1.0]),
)
def test_grokking_is_the_reports_rule(
    accuracies: list[float], apart: int, every: int, capacity: int, solved: float
) -> None:
    """`grokked_at` follows the report's rule whichever rows are kept."""
    _, monitor = evaluated(accuracies, apart, every=every, capacity=capacity, solved=solved)
    assert monitor.grokked_at == sustained(accuracies, apart, solved)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([*["good"] * 8, "bad", "no evaluation", "back"]), st.integers(0, 9)),
        max_size=40,
    )
)
@example([("good", 0)] * 7 + [("back", 3)])
@example([("good", 0)] * 5 + [("back", 3)] + [("no evaluation", 0)] * 2 + [("good", 0)] * 3)
def test_evaluations_after_a_checkpoint_that_was_gone_back_to_did_not_happen(acts: list[tuple[str, int]]) -> None:
    optimizer, monitor = evaluated([])
    saved = [copy.deepcopy(optimizer.state_dict())]
    heard: dict[int, bool] = {}  # step → was it good
    for act, steps in acts:
        if act == "back":
            del saved[max(1, len(saved) - steps) :]
            optimizer.load_state_dict(copy.deepcopy(saved[-1]))
            heard = {step: good for step, good in heard.items() if step < len(saved)}
        else:
            take_step(optimizer)
            saved.append(copy.deepcopy(optimizer.state_dict()))
            if act != "no evaluation":
                heard[len(saved) - 1] = act == "good"
                optimizer.record(eval_acc=float(act == "good"))
        first = Curve(1.0).sustained([float(good) for good in heard.values()])
        assert monitor.grokked_at == (None if first is None else list(heard)[first])


def test_one_model_is_evaluated_once() -> None:
    optimizer, monitor = evaluated([1.0])
    for _ in range(9):
        optimizer.record(eval_acc=1.0)
    assert monitor.grokked_at is None
    for accuracy in (1.0, 1.0, 1.0, 1.0):
        take_step(optimizer)
        optimizer.record(eval_acc=accuracy)
    take_step(optimizer)
    optimizer.record(eval_acc=0.2)
    assert monitor.grokked_at is None
    optimizer.record(eval_acc=1.0)  # the last evaluation of a model counts
    assert monitor.grokked_at == 10


def test_evaluations_count_while_the_parameter_with_the_most_steps_is_frozen() -> None:
    """A head is trained first, and then the body alone: the largest step count does not change for a while."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = GrokAdamW(params)
    monitor = Monitor(optimizer)
    for trained, accuracy in ((0, 0.5), (1, 0.99)):
        for step in range(60):
            params[trained].grad, params[1 - trained].grad = torch.ones(2), None
            optimizer.step()
            if step % 10 == 9:
                optimizer.record(eval_acc=accuracy)
    assert monitor.grokked_at == 60
    optimizer.record(eval_acc=0.5)  # replaces the last evaluation, as no step came in between
    assert monitor.grokked_at is None


def test_evaluations_stay_if_state_is_reset() -> None:
    optimizer, monitor = evaluated([1.0] * 6)
    assert monitor.grokked_at == 10
    optimizer.state.clear()
    take_step(optimizer)
    optimizer.record(eval_acc=0.5)
    assert monitor.grokked_at == 10


def test_losses_and_training_are_no_evaluations() -> None:
    optimizer, monitor = evaluated([1.0])
    for _ in range(10):
        take_step(optimizer)
        optimizer.record(train_loss=0.1, eval_loss=0.1, train_acc=1.0)
    assert monitor.grokked_at is None
    assert monitor.rows[-1]["eval_acc"] == 1.0


def test_a_resumed_run_hears_what_comes_after() -> None:
    optimizer, _ = evaluated([0.2] + [1.0] * 3)
    other, monitor = evaluated([])
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["eval_acc"] == 1.0
    for _ in range(6):
        take_step(other)
        assert monitor.grokked_at is None
        other.record(eval_acc=1.0)
    assert monitor.grokked_at == 41


def test_it_does_not_keep_an_optimizer_in_memory() -> None:
    model, optimizer, monitor = monitored()
    model(batch(0)[0]).sum().backward()
    optimizer.step()
    assert len(monitor.rows) == 1
    gone = weakref.ref(optimizer), weakref.ref(monitor)
    gc.disable()
    try:
        del model, optimizer, monitor
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_monitors_end_and_copies_have_none() -> None:
    optimizer, monitor = evaluated([1.0] * 5)
    second = Monitor(optimizer)
    copied = copy.deepcopy(optimizer)
    take_step(copied)
    copied.record(eval_acc=1.0)
    assert monitor.grokked_at is None
    second.close()
    second.close()
    take_step(optimizer)
    optimizer.record(eval_acc=1.0)
    assert monitor.grokked_at == 10
    monitor.close()
    optimizer.load_state_dict(evaluated([])[0].state_dict())
    assert monitor.grokked_at == 10


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda kept: pickle.loads(pickle.dumps(kept)),
}


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, lambda optimizer: Accumulate(optimizer, 1)])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_goes_on_with_its_own_optimizer(how: str, wrap: Any) -> None:
    """A monitor that is copied together with its optimizer follows the copy."""
    model = network()
    optimizer = wrap(GrokAdamW(model.named_parameters(), lr=0.01))
    monitor = Monitor(optimizer, every=2)

    def run(runs: list[Any], steps: range) -> None:
        for model, optimizer, monitor in runs:
            for step in steps:
                monitor._optimizer.record(eval_acc=1.0)
                train(model, range(step, step + 1), lambda step, loss, optimizer=optimizer: optimizer.step())

    run([(model, optimizer, monitor)], range(3))
    copied = COPIES[how]((model, optimizer, monitor))
    assert copied[2]._optimizer is getattr(copied[1], "optimizer", copied[1])
    run([(model, optimizer, monitor), copied], range(3, 8))
    assert [row["step"] for row in monitor.rows] == [2, 4, 6, 8]
    assert same(copied[2].rows, monitor.rows)
    assert copied[2].grokked_at == monitor.grokked_at == 0
    copied[2].close()
    run([(model, optimizer, monitor), copied], range(8, 10))
    assert len(copied[2].rows) == 4
    assert len(monitor.rows) == 5
    for kept in (copied, COPIES[how](copied)):
        assert kept[2]._optimizer._run.evaluation_listeners == []  # closed stays closed
        assert not kept[2]._optimizer._optimizer_step_post_hooks


def test_a_shallow_copy_shares_the_optimizer_and_nothing_else() -> None:
    optimizer, monitor = evaluated([1.0] * 5)
    copied = copy.copy(monitor)
    copied.close()
    take_step(optimizer)
    optimizer.record(eval_acc=1.0)
    assert (monitor.grokked_at, copied.grokked_at) == (10, None)
    again = copy.copy(monitor)
    for _ in range(9):
        take_step(optimizer)
    assert [row["step"] for row in again.rows] == [row["step"] for row in monitor.rows] == list(range(10, 61, 10))
    assert len(copied.rows) == 5


@pytest.mark.parametrize("capacity", [4, 6, 7, 4096])
@pytest.mark.parametrize("before_loading", [False, True])
def test_rows_of_a_resumed_run_line_up(before_loading: bool, capacity: int) -> None:
    """Rows also line up if the run has gone back, and if every second row is dropped."""
    optimizer, whole = evaluated([None] * 18, apart=1, every=5)
    other = GrokAdamW([torch.nn.Parameter(torch.ones(1))])
    made = [Monitor(other, 5, capacity)] if before_loading else []
    saved = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(copy.deepcopy(saved))
    monitor = made[0] if made else Monitor(other, 5, capacity)
    for _ in range(60):
        take_step(optimizer)
        take_step(other)
    apart = {4: 20, 6: 10, 7: 10, 4096: 5}
    steps = [row["step"] for row in monitor.rows]
    assert steps == [step for step in range(20, 79, 5) if step % apart[capacity] == 0]
    assert {*steps} <= {row["step"] for row in whole.rows}
    other.load_state_dict(saved)
    for _ in range(60):
        take_step(other)
    assert [row["step"] for row in monitor.rows] == steps


def test_evaluations_behind_a_wrapper() -> None:
    model = network()
    optimizer = Accumulate(GrokAdamW(model.named_parameters(), lr=0.01), 3)
    monitor = Monitor(optimizer)
    train(model, range(18), lambda step, loss: (optimizer.step(), optimizer.optimizer.record(eval_acc=1.0)))
    assert monitor.grokked_at == 0  # the first micro-batch of a cycle changes nothing
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, range(3), lambda step, loss: optimizer.step())
    optimizer.optimizer.record(eval_acc=0.2)
    optimizer.load_state_dict(saved)
    assert monitor.grokked_at == 0


def test_rows_have_what_was_recorded() -> None:
    optimizer, monitor = evaluated([], every=1)
    take_step(optimizer)
    optimizer.record(train_acc=0.5)
    take_step(optimizer)
    optimizer.record(eval_acc=torch.tensor(0.25))
    take_step(optimizer)
    rows = [{name: row[name] for name in ("train_acc", "eval_acc")} for row in monitor.rows]
    expected = [(math.nan, math.nan), (0.5, math.nan), (0.5, 0.25)]
    for row, (train_acc, eval_acc) in zip(rows, expected, strict=True):
        assert row == pytest.approx({"train_acc": train_acc, "eval_acc": eval_acc}, nan_ok=True)


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
    assert losses.get_ylabel() == "loss"
    assert [text.get_text() for text in losses.get_legend().get_texts()] == ["training loss", "evaluation loss"]


def test_a_picture_of_what_the_preset_does() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = GrokAdamW([param], signal_boost=4.0, decay_boost=3.0, grokking_signal_fns=lambda: 0.5)
    monitor = Monitor(optimizer, every=1)
    for _ in range(2):
        take_step(optimizer)
    effect = monitor.plot().axes[4]
    assert [list(line.get_ydata()) for line in effect.lines] == [[3.0, 3.0], [2.5, 2.5]]
    assert effect.get_ylabel() == "factors of lr, decay (- -)"


def test_a_picture_of_accuracies() -> None:
    optimizer, monitor = evaluated([0.25] + [1.0] * 6)
    take_step(optimizer)
    for _ in range(9):
        take_step(optimizer)
    figure = monitor.plot()
    accuracies = figure.axes[6]
    training, evaluation = accuracies.lines
    assert list(evaluation.get_xdata()) == [row["step"] for row in monitor.rows]
    assert list(evaluation.get_ydata())[1:] == [0.25] + [1.0] * 6
    assert all(math.isnan(value) for value in training.get_ydata())
    assert accuracies.get_ylabel() == "accuracy (dashed)"
    losses = figure.axes[0]
    assert [line.get_xdata()[0] for line in losses.lines if "from" in line.get_label()] == [20]
    said = [text.get_text() for text in losses.get_legend().get_texts()]
    assert said[-3:] == ["training accuracy", "evaluation accuracy", "accuracy ≥ 0.95 from 20"]


def test_a_picture_of_nothing() -> None:
    assert len(monitored()[2].plot().axes) == 6


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model, optimizer, monitor = monitored()
    other = Monitor(optimizer, every=1)
    with SummaryWriter(tmp_path) as writer:
        train(model, range(3), lambda step, loss: optimizer.step())
        monitor.to_tensorboard(writer)
        optimizer.record(train_loss=1.0, eval_loss=2.0)
        train(model, range(2), lambda step, loss: optimizer.step())
        monitor.to_tensorboard(writer)
        monitor.to_tensorboard(writer)
        other.to_tensorboard(writer, prefix="other/")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    norms = [(event.step, event.value) for event in events.Scalars("grokadamw/grad_norm")]
    assert [step for step, _ in norms] == [1, 2, 3, 4, 5]
    assert [event.step for event in events.Scalars("other/grad_norm")] == [1, 2, 3, 4, 5]
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
    nothing.to_csv(tmp_path / "nothing.csv")
    assert (tmp_path / "nothing.csv").read_text().startswith("step,train_loss,")
    empty = nothing.to_pandas()
    assert len(empty) == 0
    assert [empty.index.name, *empty] == (tmp_path / "nothing.csv").read_text().strip().split(",")
    assert (empty.dtypes == table.dtypes[empty.columns]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 1.5}, "every=1.5"),
        ({"capacity": 1}, "capacity=1"),
        ({"solved": 95}, r"solved=95 is out of range: give a number in \[0, 1\]"),
        ({"solved": -0.1}, "solved=-0.1"),
        ({"solved": None}, "solved=None is not a number"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Monitor(GrokAdamW([torch.zeros(1)]), **options)


def test_another_optimizer() -> None:
    with pytest.raises(TypeError, match="optimizer is None: a Trainer makes it when training begins; call trainer"):
        Monitor(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer is of type SGD"):
        Monitor(torch.optim.SGD([torch.zeros(1)]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["ZeRO", "averaged", "ZeRO, accumulated"])
@pytest.mark.usefixtures("one_rank")
def test_torchs_wrappers(how: str) -> None:
    """torch's wrappers call the inner optimizer `optim`, and this package's call it `optimizer`."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

    model = network()
    if how == "averaged":
        optimizer: Any = PostLocalSGDOptimizer(GrokAdamW(model.parameters()), PeriodicModelAverager(period=2))
    else:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), GrokAdamW)
    wrapped = Accumulate(optimizer, 1) if how == "ZeRO, accumulated" else optimizer
    monitor = Monitor(wrapped, every=1)
    optimizer.optim.record(train_loss=0.5, eval_loss=1.0)
    train(model, range(3), lambda step, loss: wrapped.step())
    assert [row["step"] for row in monitor.rows] == [1, 2, 3]
    assert [row["eval_loss"] for row in monitor.rows] == [1.0] * 3
    with pytest.raises(TypeError, match="optimizer is of type ZeroRedundancyOptimizer, and has no GrokAdamW in it"):
        Monitor(ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD))


def test_a_compiled_step() -> None:
    model, optimizer, monitor = monitored()
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(3):
        x, y = batch(i)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        step()
    assert [row["step"] for row in monitor.rows] == [1, 2, 3]


@pytest.mark.filterwarnings("ignore:a step found no gradient")
@pytest.mark.parametrize("count", [1, 2])
def test_records_are_at_multiples_of_every_whichever_steps_have_gradients(count: int) -> None:
    """A single parameter has a gradient in every other step. Two parameters take turns."""
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(count)]
    optimizer = GrokAdamW(params)
    monitor = Monitor(optimizer, every=5)
    for i in range(40):
        for j, p in enumerate(params):
            p.grad = torch.ones(1) if i % 2 == j else None
        optimizer.step()
    assert [row["step"] for row in monitor.rows] == [5, 10, 15, 20]
