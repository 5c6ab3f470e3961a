"""Record losses and the optimizer's metrics during training, for a plot, TensorBoard or a table."""

from __future__ import annotations

import csv
import math
import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from . import _trainers as trainers
from ._checks import check_count, check_number
from ._numbers import as_float
from .grokadamw import GrokAdamW
from .param_groups import RECORDED, recorded
from .state.slots import states_of
from .step.capture import is_capturing
from .step.metrics import step_counts

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Monitor"]

_IN_A_ROW = 6  # evaluations that have to be good, as in the report of the grokking benchmarks
_ROUNDING = 1e-6  # 0.95 in float32 is a little less than 0.95


class Monitor:
    """Records losses, accuracies, lr and ``GrokAdamW.metrics`` every few steps, until ``close``.

    ```python
    monitor = Monitor(optimizer, every=10)
    ...  # train
    monitor.plot("run.png")
    ```

    Reading these values waits for the device, so on a GPU ``every`` should not be 1. Each
    ``optimizer.record(eval_acc=…)`` is read, too, for ``grokked_at``. Steps are those of the parameter that has taken
    the most, as in ``metrics()``. Nothing is recorded while a CUDA graph is captured or replayed. A deep copy or an
    unpickled monitor has its own optimizer, and records that one; ``copy.copy`` records the same one.

    Args:
        optimizer: a GrokAdamW, or one that a framework or this package has wrapped.
        every: steps from one record to the next, ≥ 1. Records are at multiples of it, even in a resumed run.
        capacity: the largest number of records, ≥ 2. Whenever there would be more, ``every`` doubles, and only records
            at its multiples are kept, so that any number of steps fits.
        solved: the lowest evaluation accuracy, in [0, 1], that counts as good, for ``grokked_at``.

    Raises:
        TypeError, ValueError: an argument is not as described above.
    """

    def __init__(self, optimizer: Optimizer, every: int = 10, capacity: int = 4096, solved: float = 0.95) -> None:
        every, capacity = check_count("every", every, at_least=1), check_count("capacity", capacity, at_least=2)
        check_number("solved", solved, at_most=1)
        found = trainers.grokadamw_in(optimizer)
        if found is None:
            lacks = f"is of type {type(optimizer).__name__}, and has no GrokAdamW in it: give one"
            if optimizer is None:
                lacks = "is None: a Trainer makes it when training begins; call trainer.create_optimizer() before"
            raise TypeError(f"optimizer {lacks}")
        self._optimizer, self._every, self._capacity = found, every, capacity
        self._solved = float(solved)
        self._steps = self._steps_taken()  # counted from here on: reading them at each step would wait for a GPU
        self._written = -math.inf  # the step up to which TensorBoard has all records
        self._rows: list[dict[str, float]] = []
        # (steps of all parameters together, step, is good); none is added after six good ones
        self._evaluations: list[tuple[int, int, bool]] = []
        self._is_closed = False
        self._listen()

    def _listen(self) -> None:
        optimizer = self._optimizer
        self._hooks = [
            optimizer.register_step_post_hook(_weakly(self._after_step)),
            optimizer.register_load_state_dict_post_hook(_weakly(self._after_loading)),
        ]
        self._listener = _weakly(self._after_evaluation)
        optimizer._run.evaluation_listeners.append(self._listener)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_hooks", "_listener")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _hooks=[], _listener=None)
        self._rows, self._evaluations = [*self._rows], [*self._evaluations]  # a shallow copy must not share them
        if not self._is_closed:
            self._listen()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._optimizer.stepped or is_capturing(self._optimizer):
            return
        self._steps += 1
        if self._steps % self._every == 0:
            self._steps = self._steps_taken()  # fewer if a step found no gradient, or parameters take turns
            is_new = not self._rows or self._rows[-1]["step"] != self._steps
            if is_new and self._steps % self._every == 0:
                self._keep(_row(self._optimizer))

    def _after_evaluation(self) -> None:
        """Judge an evaluation at once, while the step count is that of the evaluated model."""
        if is_capturing(self._optimizer):
            return
        accuracy = recorded(self._optimizer.param_groups, "eval_acc")
        assert accuracy is not None
        counts = self._step_counts()
        total = sum(counts)  # changes with each step, even while the parameter with the most steps is frozen
        if self._evaluations and self._evaluations[-1][0] == total:  # only the last evaluation of a model counts
            self._evaluations.pop()
        if self.grokked_at is None:
            is_good = as_float(accuracy) >= self._solved - _ROUNDING
            self._evaluations.append((total, max(counts, default=0), is_good))
            del self._evaluations[: -max(self._capacity, _IN_A_ROW)]

    def _after_loading(self, optimizer: Optimizer) -> None:
        counts = self._step_counts()
        self._steps = max(counts, default=0)
        while self._evaluations and self._evaluations[-1][0] > sum(counts):
            self._evaluations.pop()

    def _step_counts(self) -> list[int]:
        counts = step_counts(states_of(self._optimizer.param_groups, self._optimizer.state))
        return [0 if math.isnan(count) else int(count) for count in counts]

    def _steps_taken(self) -> int:
        return max(self._step_counts(), default=0)

    def _keep(self, row: dict[str, float]) -> None:
        while self._rows and self._rows[-1]["step"] >= row["step"]:  # after going back to a checkpoint
            self._rows.pop()
        self._written = min(self._written, self._rows[-1]["step"] if self._rows else -math.inf)
        while len(self._rows) >= self._capacity:  # more than once if steps are missing, as after loading a later one
            self._every *= 2
            self._rows = [kept for kept in self._rows if kept["step"] % self._every == 0]
        if row["step"] % self._every == 0:
            self._rows.append(row)

    @property
    def rows(self) -> list[dict[str, float]]:
        """The records, in order.

        Each has ``step``; the last recorded ``train_loss``, ``eval_loss``, ``train_acc`` and ``eval_acc``; ``lr`` of
        the first group; and the optimizer's ``metrics()``. NaN means that a value was not known at that step. If the
        step count falls, as after loading an earlier checkpoint or clearing the optimizer's state, the next record
        replaces those of later steps.
        """
        return [dict(row) for row in self._rows]

    @property
    def grokked_at(self) -> int | None:
        """The step of the first of six evaluations in a row whose accuracy was at least ``solved``; None otherwise.

        An evaluation is a call of ``optimizer.record(eval_acc=…)`` since the monitor was created, whatever ``every``
        is. A second one without a step in between replaces the first. Loading a checkpoint of an earlier step drops the
        evaluations after it.

        The value is None before the sixth good evaluation, and if only losses are recorded, because an evaluation loss
        can halve long before the answers are right. The training accuracy does not count. If evaluation improved along
        with training, nothing was grokked, but a step is still returned; ``train_acc`` in ``rows`` tells the two cases
        apart.
        """
        last = self._evaluations[-_IN_A_ROW:]
        return last[0][1] if len(last) == _IN_A_ROW and all(good for *_, good in last) else None

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Plot losses, signal and α, gradient norm and clip coefficient over the steps, and β1 of each layer.

        If the signal has raised lr or weight decay, their factors are plotted instead of α (weight decay's is dashed).
        Accuracies, if recorded, are dashed, on their own axis next to that of the losses.

        Args:
            path: the file to save the figure to; its suffix sets the format. None: the figure is only returned.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Monitor.plot needs matplotlib: pip install 'grokadamw[monitor]'") from error
        figure = Figure(figsize=(8, 9), layout="constrained")
        losses, memory, norms, layers = figure.subplots(4, 1)
        boosted = any(row["boost"] > 1 or row["decay_boost"] > 1 for row in self._rows)
        effect, of_effect = memory.twinx(), ("boost", "factor of lr") if boosted else ("alpha", "filter memory α")
        curves = [
            (losses, "C0", "train_loss", "training loss"),
            (losses, "C1", "eval_loss", "evaluation loss"),
            (memory, "C0", "signal", "signal s"),
            (effect, "C1", *of_effect),
            (norms, "C0", "grad_norm", "gradient norm N"),
            (norms.twinx(), "C1", "clip_coefficient", "clip coefficient c"),
        ]
        steps = [row["step"] for row in self._rows]
        for axes, color, name, label in curves:
            values = [row[name] for row in self._rows]
            axes.plot(steps, values, color=color, label=label, linewidth=1)
            if name in ("train_loss", "eval_loss", "grad_norm") and any(value > 0 for value in values):
                axes.set_yscale("log")
            if axes is not losses:
                axes.set_ylabel(label, color=color)
            if axes in (memory, norms):
                axes.sharex(losses)
                axes.set_xlabel("step")
        if boosted:
            effect.plot(steps, [row["decay_boost"] for row in self._rows], color="C1", linewidth=1, linestyle="--")
            effect.set_ylabel("factors of lr, decay (- -)", color="C1")
            if all(0 <= row["signal"] <= 1 for row in self._rows if not math.isnan(row["signal"])):
                memory.set_ylim(0, 1.02)  # else the signal and the factor of lr are one line
        losses.set_ylabel("loss")
        handles = list(losses.lines)
        if any(not math.isnan(row[name]) for row in self._rows for name in ("train_acc", "eval_acc")):
            accuracies = losses.twinx()
            for color, name, label in (
                ("C0", "train_acc", "training accuracy"),
                ("C1", "eval_acc", "evaluation accuracy"),
            ):
                values = [row[name] for row in self._rows]
                accuracies.plot(steps, values, color=color, label=label, linewidth=1, linestyle="--")
            accuracies.set(ylabel="accuracy (dashed)", ylim=(0, 1.02))
            handles += accuracies.lines
        if self.grokked_at is not None:
            label = f"accuracy ≥ {self._solved:g} from {self.grokked_at:,}"
            for axes in (norms, memory, losses):
                mark = axes.axvline(self.grokked_at, color="grey", linestyle=":", label=label)
            handles.append(mark)
        losses.legend(handles=handles, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
        table = self._optimizer.layer_table()
        layers.plot([row.layer for row in table], [row.beta1 for row in table], "o-", markersize=4, linewidth=1)
        layers.set(xlabel="layer", ylabel="β1", ylim=(0, 1))
        layers.xaxis.get_major_locator().set_params(integer=True)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def to_tensorboard(self, writer: SummaryWriter, prefix: str = "grokadamw/") -> None:
        """Write all new records as scalars to a ``torch.utils.tensorboard.SummaryWriter``."""
        for row in self._rows:
            if row["step"] > self._written:
                for name, value in row.items():
                    if name != "step" and not math.isnan(value):
                        writer.add_scalar(prefix + name, value, int(row["step"]))
                self._written = row["step"]

    def _names(self) -> list[str]:
        """Return the names of all columns, even before the first record."""
        return [*dict.fromkeys(name for row in self._rows or [_row(self._optimizer)] for name in row)]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a CSV file with one line per record. Unknown values are left empty."""
        names = self._names()
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows({name: "" if math.isnan(x) else x for name, x in row.items()} for row in self._rows)

    def to_pandas(self) -> DataFrame:
        """Return a DataFrame with one row per record, indexed by step.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise ImportError("Monitor.to_pandas needs pandas: pip install 'grokadamw[monitor]'") from error
        table = DataFrame(self._rows, columns=self._names(), dtype=float)
        return table.astype({"step": int}).set_index("step")

    def close(self) -> None:
        """Stop recording. The records so far are kept."""
        self._is_closed = True
        for hook in self._hooks:
            hook.remove()
        listeners = self._optimizer._run.evaluation_listeners
        if self._listener in listeners:
            listeners.remove(self._listener)


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Return a function that calls a method while its object lives. (The object then holds what holds the function.)"""
    reference = weakref.WeakMethod(method)

    @_disable_dynamo
    def call(*args: Any) -> None:
        if (found := reference()) is not None:
            found(*args)

    return call


def _row(optimizer: GrokAdamW) -> dict[str, float]:
    metrics, groups = optimizer.metrics(), optimizer.param_groups
    said = {name: recorded(groups, name) for name in RECORDED}
    numbers = {name: math.nan if value is None else as_float(value) for name, value in said.items()}
    return {"step": metrics.pop("step"), **numbers, "lr": as_float(groups[0]["lr"]), **metrics}
