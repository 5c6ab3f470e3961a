"""A record of what the optimizer did, to look at: as a picture, in TensorBoard, as a table."""

from __future__ import annotations

import csv
import math
import os
from typing import TYPE_CHECKING, Any

from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from . import trainers
from .arguments import check_count
from .capture import is_capturing
from .grokadamw import GrokAdamW
from .numbers import as_float

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Monitor"]

_SATURATED, _IMPROVED = 0.1, 0.5  # of the first training loss, of the largest evaluation loss


class Monitor:
    """Keeps the losses recorded last, lr and ``GrokAdamW.metrics`` of every so many steps, until ``close``.

    ```python
    monitor = Monitor(optimizer, every=10)
    ...  # train
    monitor.plot("run.png")
    ```

    Reading them waits for the device, so on a GPU ``every`` should not be 1. While a CUDA graph is captured nothing is
    kept, and its replays are not heard of.

    Args:
        optimizer: a GrokAdamW, or what a framework or this package has wrapped around one.
        every: steps from one record to the next, ≥ 1.
        capacity: records at most, ≥ 2. Before there are more, every second one is dropped, and from then on every
            second one that was due is kept: so any number of steps fits.

    Raises:
        TypeError, ValueError: an argument is not what is written above.
    """

    def __init__(self, optimizer: Optimizer, every: int = 10, capacity: int = 4096) -> None:
        check_count("every", every, at_least=1)
        check_count("capacity", capacity, at_least=2)
        found = trainers.grokadamw_in(optimizer)
        if found is None:
            raise TypeError(f"optimizer is a {type(optimizer).__name__}, and has no GrokAdamW in it: give a GrokAdamW")
        self._optimizer, self._every, self._capacity = found, every, capacity
        self._steps = 0
        self._written = -math.inf  # the step up to which TensorBoard has it all
        self._rows: list[dict[str, float]] = []
        self._onset = _Onset()
        self._hook = found.register_step_post_hook(self._after_step)

    @_disable_dynamo
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._optimizer.stepped or is_capturing(self._optimizer):
            return
        self._steps += 1
        if self._steps % self._every == 0:
            if len(self._rows) == self._capacity:
                del self._rows[::2]
                self._every *= 2
            if self._steps % self._every == 0:
                self._keep(_row(self._optimizer))

    def _keep(self, row: dict[str, float]) -> None:
        while self._rows and self._rows[-1]["step"] >= row["step"]:  # of a checkpoint that was gone back to
            self._rows.pop()
        self._written = min(self._written, self._rows[-1]["step"] if self._rows else -math.inf)
        self._rows.append(row)
        self._onset.hear(row)

    @property
    def rows(self) -> list[dict[str, float]]:
        """The records, in order: ``step``, ``train_loss``, ``eval_loss``, ``lr`` (of the first group), and metrics().

        NaN stands for what was not known then.
        """
        return [dict(row) for row in self._rows]

    @property
    def grokked_at(self) -> int | None:
        """The step of the first record at which evaluation had improved after training was saturated.

        That is: the training loss has been at a tenth of its first value or below, and the evaluation loss, which had
        not come down by then, is at half of its largest value or below. None if that did not happen.
        """
        return self._onset.at

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw losses, signal and α, gradient norm and clip coefficient over the steps, and β1 of each layer.

        Args:
            path: where to save it, too; matplotlib tells the format by the name.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Monitor.plot needs matplotlib: pip install 'grokadamw[monitor]'") from error
        figure = Figure(figsize=(8, 9), layout="constrained")
        losses, memory, norms, layers = figure.subplots(4, 1)
        curves = [
            (losses, "C0", "train_loss", "training loss"),
            (losses, "C1", "eval_loss", "evaluation loss"),
            (memory, "C0", "signal", "signal GS"),
            (memory.twinx(), "C1", "alpha", "filter memory α"),
            (norms, "C0", "grad_norm", "gradient norm N"),
            (norms.twinx(), "C1", "clip_coefficient", "clip coefficient c"),
        ]
        for axes, color, name, label in curves:
            values = [row[name] for row in self._rows]
            axes.plot([row["step"] for row in self._rows], values, color=color, label=label, linewidth=1)
            if name in ("train_loss", "eval_loss", "grad_norm") and any(value > 0 for value in values):
                axes.set_yscale("log")
            if axes is not losses:
                axes.set_ylabel(label, color=color)
            if axes in (memory, norms):
                axes.sharex(losses)
                axes.set_xlabel("step")
        if self.grokked_at is not None:
            for axes in (losses, memory, norms):
                axes.axvline(self.grokked_at, color="grey", linestyle=":", label=f"grokked at {self.grokked_at:,}")
        losses.legend(fontsize="small")
        table = self._optimizer.layer_table()
        layers.plot([row.layer for row in table], [row.beta1 for row in table], "o-", markersize=4, linewidth=1)
        layers.set(xlabel="layer", ylabel="β1", ylim=(0, 1))
        layers.xaxis.get_major_locator().set_params(integer=True)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def to_tensorboard(self, writer: SummaryWriter, prefix: str = "grokadamw/") -> None:
        """Write what was not written yet, as scalars of these names, to a ``torch.utils.tensorboard.SummaryWriter``."""
        for row in self._rows:
            if row["step"] > self._written:
                for name, value in row.items():
                    if name != "step" and not math.isnan(value):
                        writer.add_scalar(prefix + name, value, int(row["step"]))
                self._written = row["step"]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a line a record; what was not known is left empty."""
        names = dict.fromkeys(name for row in self._rows or [_row(self._optimizer)] for name in row)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows({name: "" if math.isnan(x) else x for name, x in row.items()} for row in self._rows)

    def to_pandas(self) -> DataFrame:
        """A row a record, indexed by step.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise ImportError("Monitor.to_pandas needs pandas: pip install 'grokadamw[monitor]'") from error
        table = DataFrame(self._rows, columns=None if self._rows else ["step"])
        return table.astype({"step": int}).set_index("step")

    def close(self) -> None:
        """Keep no more. What was kept stays."""
        self._hook.remove()


class _Onset:
    """`Monitor.grokked_at`, found as the records come, as some are dropped later."""

    def __init__(self) -> None:
        self.at: int | None = None
        self._first = math.nan  # training loss
        self._largest = -math.inf  # evaluation loss
        self._saturated = False
        self._is_late: bool | None = None  # whether evaluation had not come down by then

    def hear(self, row: dict[str, float]) -> None:
        train_loss, eval_loss = row["train_loss"], row["eval_loss"]
        if math.isnan(self._first):
            self._first = train_loss
        self._saturated |= train_loss <= _SATURATED * self._first
        if math.isnan(eval_loss):
            return
        self._largest = max(self._largest, eval_loss)
        improved = eval_loss <= _IMPROVED * self._largest
        if self._saturated and self._is_late is None:
            self._is_late = not improved
        if self._is_late and improved and self.at is None:
            self.at = int(row["step"])


def _row(optimizer: GrokAdamW) -> dict[str, float]:
    metrics, groups = optimizer.metrics(), optimizer.param_groups
    said = {name: [g[name] for g in groups if g[name] is not None] for name in ("train_loss", "eval_loss")}
    losses = {name: as_float(values[0]) if values else math.nan for name, values in said.items()}
    return {"step": metrics.pop("step"), **losses, "lr": as_float(groups[0]["lr"]), **metrics}
