"""Callback for Lightning: it records losses and accuracies, sets layers, and logs metrics.

```python
Trainer(callbacks=[GrokAdamWCallback()], ...).fit(module)
```
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from . import _trainers as trainers
from ._numbers import accumulator
from ._warn import is_new, warn
from .grokadamw import GrokAdamW
from .param_groups import RECORDED, recorded
from .step.effects import are_boosted

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
    except ImportError as error:
        what = f"grokadamw.lightning needs lightning ({error}): pip install 'grokadamw[lightning]'"
        raise ImportError(what) from error

__all__ = ["GrokAdamWCallback"]


class GrokAdamWCallback(Callback):
    """Lightning callback that records losses and accuracies, sets layers, and logs metrics for GrokAdamW.

    It works with automatic and with manual optimization.

    - Layers are taken from the module, also for groups that are added during training. With several optimizers, each
      takes them from the smallest module that contains all of its parameters.
    - The losses of every validation and of the training batch before it are passed to the signals, which adapt α and,
      with the preset, the size of updates and weight decay.
    - Accuracies are passed on, too, if you give their names: ``AccuracyGap`` and ``Monitor.grokked_at`` need them.
    - ``grok_alpha``, ``grok_boost``, ``grok_decay_boost``, ``grok_signal``, ``grok_grad_norm``,
      ``grok_clip_coefficient`` and ``grok_skipped_steps`` are logged every ``log_every_n_steps``, as far as they are
      known; those of a second optimizer as ``grok_alpha_1``, ….

    It warns once about each of these problems: Lightning clips gradients to another norm than the optimizer, to no
    effect, or in each micro-batch separately; no validation is planned; averaged weights are validated with a boost; a
    value that the callback needs is not logged.

    Pass signals to the optimizer itself, in ``configure_optimizers``.

    Args:
        eval_loss: the name under which ``validation_step`` logs the loss.
        train_loss: the name under which ``training_step`` logs the loss. None: the loss that it returns. A loss that is
            only logged per epoch (``on_step=False``) is recorded when its epoch ends.
        eval_acc, train_acc: the names under which these methods log accuracies, fractions in [0, 1]. None: no accuracy.

    Raises:
        TypeError, ValueError: an argument is not a name; or, when training begins, no optimizer is a GrokAdamW; or,
            later, an accuracy is not in [0, 1].
    """

    def __init__(
        self,
        eval_loss: str = "val_loss",
        train_loss: str | None = None,
        *,
        eval_acc: str | None = None,
        train_acc: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(eval_loss, str):
            raise TypeError(f"eval_loss={trainers.shown(eval_loss)} is not the name of a loss, as in eval_loss='loss'")
        for name, value in (("train_loss", train_loss), ("eval_acc", eval_acc), ("train_acc", train_acc)):
            if not isinstance(value, str | None):
                what = f"{name}={trainers.shown(value)}"
                raise TypeError(f"{what} is not a name: give the name that you log it under, or leave it out")
        self._train_loss, self._train_acc = train_loss, train_acc
        evaluated = {"eval_loss": eval_loss, "eval_acc": eval_acc}
        self._evaluated = {name: key for name, key in evaluated.items() if key is not None}
        self._optimizers: list[GrokAdamW] = []
        self._group_sizes: dict[int, list[int]] = {}  # of each optimizer, when its layers were last set
        self._logged_at = 0
        self._last_train_loss: torch.Tensor | None = None
        self._epochs_loss: Any = None  # the value of train_loss when the epoch began
        self._is_late = False  # True while train_loss is still the one from before this epoch
        self._waits_for_loss = False  # True if this epoch was validated before its train_loss was logged
        self._train_accuracy: Any = None  # the last logged one that is not NaN
        self._loaded: dict[str, Any] = {}  # train_loss and train_acc from a checkpoint, until training begins
        self._validated_at = -1  # the step of the last validation with an accuracy
        self._before: dict[str, Any] = {}  # metrics before a validation; Lightning keeps old ones
        self._logged: set[str] = set()  # the names of the values that have been logged
        self._said: set[str] = set()

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint, which differs between callbacks with other arguments."""
        return self._generate_state_key(train_loss=self._train_loss, train_acc=self._train_acc, **self._evaluated)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = {}  # from an earlier run; Lightning loads the checkpoint of this one after setup

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = [trainers.grokadamw_in(optimizer) for optimizer in trainer.optimizers]
        self._optimizers = [optimizer for optimizer in found if optimizer is not None]
        if not self._optimizers:
            kinds = [type(optimizer).__name__ for optimizer in trainer.optimizers]
            names = ", ".join(kind for kind in kinds if kind != "_MockOptimizer") or "no optimizer"
            raise TypeError(
                f"GrokAdamWCallback found {names}, and no GrokAdamW: return one from configure_optimizers, or leave "
                "the callback out"
            )
        self._group_sizes.clear()
        self._name_layers(trainer, pl_module)
        self._logged_at = trainer.global_step
        self._last_train_loss, self._train_accuracy = (
            None if (value := self._loaded.get(name)) is None else value.to(pl_module.device)
            for name in ("train_loss", "train_acc")
        )
        self._loaded = {}
        self._epochs_loss, self._validated_at = None, -1
        self._is_late = self._waits_for_loss = False
        self._logged.clear()
        limit = trainer.gradient_clip_val
        if limit and is_new("clips", self._said):
            by_norm = trainer.gradient_clip_algorithm != "value"
            for optimizer in trainer.optimizers[:1]:  # with several, Lightning leaves clipping to the module
                trainers.say_who_clips(optimizer, float(limit), "gradient_clip_val", by_norm=by_norm)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # its connector sets it
        classes = {kind.__name__ for callback in callbacks for kind in type(callback).__mro__}
        boosts = any(are_boosted(optimizer.param_groups) for optimizer in self._optimizers)
        if "WeightAveraging" in classes and boosts and is_new("averages", self._said):
            warn(
                "validation measures averaged weights, which lag behind the trained ones: the signal mistakes this for "
                "memorisation, so updates stay large, or decay strong. Leave the averaging out, or give the "
                "optimizer signal_boost=0 and decay_boost=0",
                UserWarning,
            )
        if not trainer.enable_validation:
            for optimizer in self._optimizers:
                optimizer._run.signals.silence_missing()  # the warning below says why
            if ("eval_acc" in self._evaluated or self._uses_losses()) and is_new("no validation", self._said):
                warn(
                    "no validation is planned, so signals that compare losses or accuracies stay silent, and neither α "
                    "nor the boost adapts, unless you call optimizer.record yourself. Give the module a "
                    "validation_step, and fit data for it, or make the optimizer with grokking_signal_fns=[]",
                    UserWarning,
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the training loss and accuracy that wait for the next validation."""
        found = {"train_loss": self._last_train_loss, "train_acc": self._train_accuracy}
        return {name: torch.as_tensor(value).clone() for name, value in found.items() if value is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Lightning does so between `setup` and the start of training."""
        self._loaded = dict(state_dict)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._name_layers(trainer, pl_module)

    def _name_layers(self, trainer: Trainer, module: LightningModule) -> None:
        """Set the layers from the module for each optimizer that is new, or has new groups or parameters."""
        several = len(trainer.optimizers) > 1
        for i, optimizer in enumerate(self._optimizers):
            sizes = trainers.group_sizes(optimizer)
            if self._group_sizes.get(i) != sizes:
                self._group_sizes[i] = sizes
                trainers.name_layers(optimizer, trainers.smallest_with(optimizer, module) if several else module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._waits_for_loss = False
        if self._train_loss is not None:
            self._epochs_loss = trainer.callback_metrics.get(self._train_loss)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._train_loss is not None:
            loss = trainer.callback_metrics.get(self._train_loss)
            self._is_late = loss is self._epochs_loss  # Lightning keeps old values
        else:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            if loss is not None and torch.as_tensor(loss).numel() != 1:  # as manual optimization may return
                loss = None
            if loss is not None and pl_module.automatic_optimization:
                loss = loss * trainer.accumulate_grad_batches  # Lightning has divided the loss by it
        if loss is not None:
            self._logged.add("train_loss")
            self._last_train_loss = torch.as_tensor(loss).detach()
        if self._train_acc in trainer.callback_metrics:
            self._take_accuracy(trainer.callback_metrics[self._train_acc], trainer)
        step = trainer.global_step
        # ask the connector, as Lightning's callbacks do: it counts batches, and global_step all optimizers' steps
        if trainer._logger_connector.should_update_logs and step != self._logged_at:
            self._logged_at = step
            for i, optimizer in enumerate(self._optimizers):
                which = f"_{i}" if i else ""
                pl_module.log_dict({f"{name}{which}": x for name, x in trainers.readings(optimizer).items()})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the accuracy and the loss that are logged per epoch; the loss only if a validation came before it."""
        keys = {"train_loss": self._train_loss, "train_acc": self._train_acc}
        metrics = trainer.callback_metrics
        found = {name: metrics[key] for name, key in keys.items() if key in metrics}
        if found.get("train_loss") is self._epochs_loss:  # Lightning keeps old values
            found.pop("train_loss", None)
        self._logged.update(found)
        found = self._mean_over_ranks(found, trainer)
        if "train_acc" in found:
            self._take_accuracy(found["train_acc"], trainer)
        if "train_loss" in found:
            self._last_train_loss = torch.as_tensor(found["train_loss"]).detach()
            if self._waits_for_loss:
                self._record(train_loss=found["train_loss"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._optimizers or trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        found: dict[str, Any] = {
            name: metrics[key]
            for name, key in self._evaluated.items()
            if key in metrics and metrics[key] is not self._before.get(key)
        }
        self._before = {}
        self._logged.update(found, ["validation"])
        # only here: a training loss or accuracy that comes later must not be compared with this evaluation
        if "eval_loss" in found:
            found["train_loss"] = self._last_train_loss
            self._waits_for_loss = self._is_late
        if "eval_acc" in found:
            found["train_acc"], self._validated_at = self._train_accuracy, trainer.global_step
        self._record(**self._mean_over_ranks(found, trainer))
        for name, key in self._evaluated.items():
            if key not in metrics:
                self._warn(name, key, trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._optimizers = []  # a later `trainer.validate` is not a part of training

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in RECORDED:  # a user may have recorded a value
            if any(recorded(optimizer.param_groups, name) is not None for optimizer in self._optimizers):
                self._logged.add(name)
        for name, key in self._evaluated.items():
            if name not in self._logged and trainer.enable_validation:
                self._warn(name, key, trainer)
        if "train_loss" not in self._logged:
            self._warn("train_loss", self._train_loss, trainer)
        if self._train_acc is not None and "train_acc" not in self._logged:
            self._warn("train_acc", self._train_acc, trainer)
        self._optimizers = []

    def _take_accuracy(self, value: Any, trainer: Trainer) -> None:
        """Record the training accuracy, unless it has to wait for the next validation."""
        self._logged.add("train_acc")
        found = trainers.without_nan({"train_acc": value}, self._said)
        self._train_accuracy = found.get("train_acc", self._train_accuracy)
        if "eval_acc" not in self._evaluated or self._validated_at == trainer.global_step:
            self._record(train_acc=self._train_accuracy)

    def _uses_losses(self) -> bool:
        return any(map(trainers.uses_losses, self._optimizers))

    def _record(self, **values: Any) -> None:
        found = trainers.without_nan(values, self._said)
        for optimizer in self._optimizers:
            optimizer.record(**found)

    def _mean_over_ranks(self, values: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
        """Return the mean of each value over the ranks that have it, because a checkpoint keeps only one rank's values.

        All ranks must call this, even one without values.
        """
        if trainer.world_size == 1:
            return values
        names = ("train_loss", "train_acc", *self._evaluated)
        found = [(0.0, 0.0) if (value := values.get(name)) is None else (float(value), 1.0) for name in names]
        device = trainer.strategy.root_device
        sums = torch.tensor(found, dtype=accumulator(device), device=device)
        totals = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        return {name: total / count for name, (total, count) in zip(names, totals, strict=True) if count}

    def _warn(self, name: str, key: str | None, trainer: Trainer) -> None:
        """Warn once about a value that was not logged, if it would have an effect."""
        if (name.endswith("loss") and not self._uses_losses()) or not is_new(name, self._said):
            return
        logged = sorted(other for other in trainer.callback_metrics if not other.startswith("grok_"))
        waited, why = f"waited for {name}={key!r}", f"what was logged is {', '.join(logged) or 'nothing'}"
        way_out = "log it under this name, or give another"
        if key is None:
            waited, why = "waited for training_step's loss", f"it returned no number, and {why}"
            way_out = "return it, or log it, and give its name as train_loss="
        if name in self._evaluated and "validation" not in self._logged:
            why, way_out = "no validation took place", "validate more often, as by val_check_interval"
        silent = "signals of losses" if name.endswith("loss") else "AccuracyGap and Monitor.grokked_at"
        warn(f"GrokAdamWCallback {waited}, but {why}: {silent} stay silent; {way_out}", UserWarning)
