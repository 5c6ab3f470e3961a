"""Callback for Hugging Face's Trainer: it records losses and accuracies, sets layers, and logs metrics.

```python
Trainer(model, TrainingArguments(optim="grokadamw", ...), callbacks=[GrokAdamWCallback()], ...)
```

`for_grokking` makes the Trainer use the preset, with the learning rate and weight decay of TrainingArguments.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
import weakref
from collections.abc import Callable, Iterable
from traceback import walk_stack
from typing import Any

import torch

from . import _trainers as trainers
from . import zero
from ._arguments import is_given, lost, unused
from ._hints import meant
from ._warn import is_new, warn
from .grokadamw import GrokAdamW
from .options import OPTIONS, TAKE, check_settings
from .param_groups import recorded
from .step.alpha import Combine, Signal, Signals

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler
    from transformers.trainer_utils import IntervalStrategy
except ImportError as error:
    what = f"grokadamw.huggingface needs transformers ({error}): pip install 'grokadamw[huggingface]'"
    raise ImportError(what) from error

__all__ = ["GrokAdamWCallback", "for_grokking"]


def for_grokking(arguments: TrainingArguments, **options: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the preset ``GrokAdamW.for_grokking`` as the Trainer's ``optimizer_cls_and_kwargs``.

    ```python
    arguments = TrainingArguments(learning_rate=3e-3, weight_decay=1.0, ...)
    Trainer(model, arguments, optimizer_cls_and_kwargs=for_grokking(arguments, decay_boost=3), ...)
    ```

    Args:
        arguments: the same TrainingArguments object that you pass to the Trainer. Its learning rate and weight decay
            are passed to ``GrokAdamW.for_grokking`` when the Trainer creates the optimizer, so
            ``hyperparameter_search`` can vary them. Its schedule multiplies the learning rate of every group.
        options: further arguments of ``GrokAdamW.for_grokking``. Pass ``decay_boost``: without it the weight decay is
            constant, as it comes from the arguments. docs/huggingface.md says which numbers suit which model.

    Raises:
        TypeError: arguments are not TrainingArguments.
        ValueError: the learning rate or weight decay is the Trainer's default, which is for fine-tuning; or one of them
            is among the options.
    """
    if not isinstance(arguments, TrainingArguments):
        what = f"the class {arguments.__name__}" if isinstance(arguments, type) else f"a {type(arguments).__name__}"
        raise TypeError(f"arguments is {what}: give for_grokking the TrainingArguments that the Trainer gets")
    trainers.check_not_the_trainers(options)
    for name in ("learning_rate", "weight_decay"):
        if not is_given(arguments, name):
            raise ValueError(
                f"{name}={getattr(arguments, name):g} is the Trainer's default, which is for fine-tuning: begin with "
                "TrainingArguments(learning_rate=3e-3, weight_decay=1.0) and for_grokking(…, decay_boost=3), which the "
                "preset was tested with; if the model has no norms, with those of GrokAdamW.for_grokking's docstring"
            )
    return functools.partial(_preset, arguments), options


def _preset(arguments: TrainingArguments, *groups: Any, **options: Any) -> Callable[..., GrokAdamW]:
    """Return the function that makes the preset. The Trainer calls a factory without arguments, unlike a class."""
    if groups:
        raise TypeError(
            "this release of transformers makes optimizers without the model: give "
            "Trainer(optimizers=(GrokAdamW.for_grokking(model, lr=…, weight_decay=…, decay_boost=…), None))"
        )
    return functools.partial(GrokAdamW.for_grokking, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)


class GrokAdamWCallback(TrainerCallback):
    """Trainer callback that records losses and accuracies, sets layers, and logs metrics.

    - Layers are taken from the model's modules, for decay and no-decay groups, and for groups that are added later.
    - The loss of every evaluation during training, and the last training loss logged before it, are passed to the
      signals, which adapt α and, with the preset, the size of updates and weight decay.
    - Accuracies are passed on, too, if you give their keys: ``AccuracyGap`` and ``Monitor.grokked_at`` need them.
    - Every log of the training loss also has ``grok_alpha``, ``grok_boost``, ``grok_decay_boost``, ``grok_signal``,
      ``grok_grad_norm``, ``grok_clip_coefficient`` and ``grok_skipped_steps``, as far as they are known: on the
      console, in the history and wherever the Trainer reports to.

    It warns once about each of these problems:

    - The Trainer clips gradients to another norm than the optimizer, to no effect, or in each micro-batch separately.
    - An argument does not reach the optimizer, such as an unknown name in ``optim_args``, or ``adam_beta1``.
    - Nothing is evaluated, or no training loss is logged from one evaluation to the next.
    - A checkpoint is saved at a step that is not logged. The Trainer forgets the losses since the last log, so a
      resumed run records another mean.
    - A metric that the callback needs is missing.

    Stateful signals begin each run in the state that they had when the first run began; a resumed run takes their state
    from the checkpoint.

    Args:
        eval_loss: the name of the loss in the evaluation's metrics, ``"eval_<name>_loss"`` for one of several sets.
        eval_acc: the name of the accuracy there, a fraction in [0, 1]: ``"eval_accuracy"`` if ``compute_metrics``
            returns an ``"accuracy"``. None: no accuracy.
        train_acc: the key of the training accuracy, a fraction in [0, 1], in anything that the Trainer logs: by
            ``trainer.log``, or as ``"eval_<name>_accuracy"`` by an evaluation on training data. None: no accuracy.
        signals, combine: as for ``GrokAdamW.set_signals``; None keeps the optimizer's own.
        options: further options for all groups, such as ``betas``, which ``optim_args`` cannot carry: any argument of
            ``GrokAdamW`` that a group may set, except lr, weight decay, foreach, fused and capturable. Pass options of
            the whole optimizer, such as a window, by ``Trainer(optimizer_cls_and_kwargs=(GrokAdamW, {...}))``.

    Raises:
        TypeError, ValueError: an option is not allowed; or, when training begins, the optimizer is not a GrokAdamW; or,
            later, an accuracy is not in [0, 1].
    """

    def __init__(
        self,
        eval_loss: str = "eval_loss",
        *,
        eval_acc: str | None = None,
        train_acc: str | None = None,
        signals: Signal | Iterable[Signal] | None = None,
        combine: Combine | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(eval_loss, str):
            raise TypeError(f"eval_loss={trainers.shown(eval_loss)} is not the name of a metric, as in 'eval_loss'")
        for name, value in (("eval_acc", eval_acc), ("train_acc", train_acc)):
            if not isinstance(value, str | None):
                what = f"{name}={trainers.shown(value)}"
                raise TypeError(f"{what} is not the name of a metric: give one, as 'eval_accuracy', or leave it out")
        trainers.check_not_the_trainers(options)
        for name, value in options.items():
            if name not in OPTIONS or name == "layer":  # layer is for one group, not for all
                instead = meant(name, OPTIONS.keys() - {"layer"})
                raise TypeError(
                    f"{name}={trainers.shown(value)} is not an argument of GrokAdamW that its parameter groups may set"
                    + (f": give {instead}" if instead else "")
                )
            if OPTIONS[name].on_load != TAKE:  # a checkpoint is loaded before training begins
                raise ValueError(
                    f"{name}={value!r} cannot be set once there is an optimizer: give signals as signals=, and other "
                    "settings of the whole optimizer by Trainer(optimizer_cls_and_kwargs=(GrokAdamW, {...}))"
                )
        checked = GrokAdamW([torch.zeros(1)], **options).defaults
        if signals is None and combine is not None:
            raise ValueError(f"combine={combine!r} without signals: give the signals that it combines")
        if signals is not None:
            try:
                signals = Signals(signals, "mean" if combine is None else combine).functions
            except (TypeError, ValueError) as error:
                raise type(error)(str(error).replace("grokking_signal_fns", "signals")) from None
        self._signals, self._combine = signals, combine
        self._options = {name: checked[name] for name in options}
        evaluated = {"eval_loss": eval_loss, "eval_acc": eval_acc}
        self._evaluated = {name: key for name, key in evaluated.items() if key is not None}
        self._train_acc = train_acc
        self._optimizer: GrokAdamW | None = None  # set only during training
        self._trained: weakref.ref[GrokAdamW] | None = None  # the optimizer of the last run
        self._at_first: list[Any] | None = None  # the signals' states when the first run began
        self._group_sizes: list[int] = []  # when layers were last taken from the model
        self._goes_on = True  # False in a resumed run, until its first step begins
        self._logged_at = 0
        self._skipped, self._is_nan = 0.0, False  # steps skipped before the last log; its loss was NaN
        self._logs_before = 0  # the number of logs at the last recorded evaluation
        self._without_loss = 0  # evaluations since then without a new training loss
        self._recorded: Any = None  # the training loss of that evaluation
        self._train_accuracy: float | None = None  # the last logged one that is not NaN
        self._evaluated_at = -1  # the step of the last evaluation with an accuracy
        self._metrics: set[str] = set()  # names of all metrics of evaluations so far
        self._found: set[str] = set()  # the values that this run has logged
        self._said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizer": None, "_trained": None}  # a weak reference cannot be pickled

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        found = trainers.grokadamw_in(optimizer)
        if found is None:
            raise TypeError(
                f"GrokAdamWCallback found {type(getattr(optimizer, 'optimizer', optimizer)).__name__}, and no "
                'GrokAdamW: train with TrainingArguments(optim="grokadamw"), or leave the callback out'
            )
        for group in found.param_groups:
            check_settings({**group, **self._options}, found.defaults)
        if self._signals is not None:
            self._begin_signals(found)
        for group in (*found.param_groups, *zero.groups_of_all_ranks(found)):  # a step uses the latter's options
            group.update(self._options)
        found.defaults.update(self._options)  # for groups that are added during training
        trainers.name_layers(found, model)
        self._group_sizes = trainers.group_sizes(found)
        self._optimizer, self._trained, self._logged_at = found, weakref.ref(found), state.global_step
        self._skipped, self._is_nan = found.metrics()["skipped_steps"], False
        logs, key = state.log_history, self._evaluated["eval_loss"]  # the logs of a resumed run, or empty
        self._logs_before = next((i for i in range(len(logs), 0, -1) if key in logs[i - 1]), 0)
        self._recorded = recorded(found.param_groups, "train_loss")
        self._goes_on = state.global_step == 0
        accuracies = [log[self._train_acc] for log in logs if self._train_acc in log]
        self._train_accuracy = next((x for x in reversed(accuracies) if not math.isnan(x)), None)
        self._evaluated_at, self._without_loss = -1, 0
        self._metrics.clear()
        self._found.clear()
        self._go_first()
        is_evaluated = args.eval_strategy != "no" or args.eval_on_start
        if not is_evaluated:
            found._run.signals.silence_missing()  # the warning below says why
        if is_new("arguments", self._said):
            trainers.say_who_clips(optimizer, args.max_grad_norm, "max_grad_norm")
            is_resumed = state.global_step > 0
            dropped = lost(args.optim_args, found, is_resumed, self._options)
            for sentence in (*dropped, *unused(args, found, is_resumed)):
                warn(sentence, UserWarning)
            if not is_evaluated and ("eval_acc" in self._evaluated or trainers.uses_losses(found)):
                warn(
                    'eval_strategy="no": no evaluation is planned, so signals that compare losses or accuracies stay '
                    "silent, and neither α nor the boost adapts, unless a callback evaluates, or you call "
                    'optimizer.record. Give eval_strategy="steps" and an eval_dataset, or turn signals off: '
                    "GrokAdamWCallback(signals=[])",
                    UserWarning,
                )

    def _begin_signals(self, optimizer: GrokAdamW) -> None:
        """Register the signals. If the optimizer is not the last run's, reset them to their first state."""
        stateful = [signal for signal in self._signals or () if hasattr(signal, "state_dict")]
        if self._at_first is None:
            self._at_first = [copy.deepcopy(signal.state_dict()) for signal in stateful]
        elif self._trained is None or self._trained() is not optimizer:
            for signal, state in zip(stateful, self._at_first, strict=True):
                signal.load_state_dict(copy.deepcopy(state))
        optimizer.set_signals(self._signals, self._combine)

    def _go_first(self) -> None:
        """Move this callback before those that report, because they read a log when they are called.

        A callback has no reference to its handler, so this looks for the handler on the call stack.
        """
        for frame, _ in walk_stack(sys._getframe()):
            handler = frame.f_locals.get("self")
            if isinstance(handler, CallbackHandler) and self in handler.callbacks:
                handler.callbacks = [self, *(other for other in handler.callbacks if other is not self)]
                return

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if self._optimizer is None:
            return
        if self._train_acc in logs and self._goes_on:
            self._found.add("train_acc")
            found = trainers.without_nan({"train_acc": logs[self._train_acc]}, self._said)
            self._train_accuracy = found.get("train_acc", self._train_accuracy)
            if "eval_acc" not in self._evaluated or self._evaluated_at == state.global_step:
                self._record(self._optimizer, train_acc=self._train_accuracy)
        if "loss" not in logs:
            return
        new = trainers.readings(self._optimizer)
        # the Trainer logs 0 for steps whose losses are all NaN, unless logging_nan_inf_filter=False
        skipped = new.get("grok_skipped_steps", 0.0)
        self._is_nan = logs["loss"] == 0 and args.logging_nan_inf_filter and skipped > self._skipped
        self._skipped = skipped
        logs.update(new)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(new)
        self._logged_at = state.global_step

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        if self._optimizer is None or not self._goes_on:  # eval_on_start: a checkpoint has the losses
            return
        found: dict[str, float | None] = {name: metrics[key] for name, key in self._evaluated.items() if key in metrics}
        self._found.update(found)
        self._metrics.update(metrics)
        # only here: a training loss or accuracy that comes later must not be compared with this evaluation
        if "eval_loss" in found:
            found["train_loss"] = self._new_loss(args, state, self._optimizer)
        if "eval_acc" in found:
            found["train_acc"], self._evaluated_at = self._train_accuracy, state.global_step
        self._record(self._optimizer, **found)
        self._recorded = recorded(self._optimizer.param_groups, "train_loss")

    def _record(self, optimizer: GrokAdamW, **values: Any) -> None:
        optimizer.record(**trainers.without_nan(values, self._said))

    def _new_loss(self, args: TrainingArguments, state: TrainerState, optimizer: GrokAdamW) -> float | None:
        """Return the last training loss that was logged; None, with a warning, if none was since the last evaluation.

        There is no warning if the user has recorded one, if no step was taken since then, or if no step follows.
        """
        logs, before = state.log_history, self._logs_before
        self._logs_before = len(logs)
        new: list[float] = [log["loss"] for log in logs[before:] if "loss" in log]
        self._without_loss = 0 if new else self._without_loss + 1
        if new:
            return math.nan if self._is_nan else new[-1]
        last_step = logs[before - 1]["step"] if before else 0
        is_own = recorded(optimizer.param_groups, "train_loss") is not self._recorded
        goes_on = last_step < state.global_step < state.max_steps
        logging, evaluation = (IntervalStrategy(x).value for x in (args.logging_strategy, args.eval_strategy))
        # a callback asked for this evaluation, and the schedule itself is right: a single one does no harm
        is_extra = logging == evaluation == "steps" and state.logging_steps <= state.eval_steps
        goes_on &= not is_extra or self._without_loss > 1
        if goes_on and not is_own and trainers.uses_losses(optimizer) and is_new("no new loss", self._said):
            optimizer._run.signals.silence_missing()
            rarely = f"logging_steps={args.logging_steps:g}" if logging == "steps" else f'logging_strategy="{logging}"'
            stale = "stay silent" if self._recorded is None else "compare its loss with an older one"
            steps = "" if logging == "steps" else 'logging_strategy="steps" and '
            ways_out = {"epoch": 'logging_strategy="epoch"', "steps": f"{steps}logging_steps={args.eval_steps} or less"}
            way_out = f"give {ways_out.get(evaluation, 'smaller logging_steps')}"
            if is_extra:
                way_out = "set control.should_log where a callback sets control.should_evaluate"
            warn(
                f"{rarely}: no training loss was logged between step {last_step} and the evaluation at step "
                f"{state.global_step}, so signals that compare losses {stale}. Log at least as often as you evaluate: "
                f"{way_out}",
                UserWarning,
            )
        return None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._optimizer is None:  # the callback was added during training
            self.on_train_begin(args, state, control, **kwargs)
        self._goes_on = True
        for name, key in self._evaluated.items():  # by now all sets have been evaluated
            # warn only if the Trainer has evaluated: its metrics begin with eval_, while a user's metrics need not
            if any(metric.startswith(("eval_", f"{key.partition('_')[0]}_")) for metric in self._metrics):
                self._warn_if_missing(name, key)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._optimizer is None or self._group_sizes == (sizes := trainers.group_sizes(self._optimizer)):
            return
        self._group_sizes = sizes  # a group was added
        trainers.name_layers(self._optimizer, kwargs["model"])

    def _warn_if_missing(self, name: str, key: str) -> None:
        """Warn once if no evaluation had a metric with this key."""
        is_used = name != "eval_loss" or self._optimizer is None or trainers.uses_losses(self._optimizer)
        if name in self._found | self._said or not is_used:
            return
        metrics = sorted(self._metrics - {"epoch"})
        if name == "eval_loss":
            metrics = [metric for metric in metrics if metric.endswith("loss")]
        instead = f"'eval_{key}'" if f"eval_{key}" in metrics else "the name of one"
        self._warn(name, key, f"and the evaluation has {', '.join(metrics) or 'no loss'}", instead)

    def _warn(self, name: str, key: str, what: str, instead: str = "the name of one") -> None:
        if not is_new(name, self._said):
            return
        silent = "signals of losses" if name == "eval_loss" else "AccuracyGap and Monitor.grokked_at"
        warn(
            f"GrokAdamWCallback waits for {key!r}, {what}: {silent} stay silent; pass {instead} as {name}=", UserWarning
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_last = state.global_step >= state.max_steps
        is_logged = self._logged_at == state.global_step
        if self._optimizer is None or is_last or is_logged or args.save_only_model:
            return  # a checkpoint of the model alone does not resume the optimizer
        if recorded(self._optimizer.param_groups, "train_loss") is None or not trainers.uses_losses(self._optimizer):
            return
        if not is_new("saves", self._said):
            return
        warn(
            f"a checkpoint is saved at step {state.global_step}, and the training loss was last logged at step "
            f"{self._logged_at}: a run resumed from it records another mean of the losses, and its α and boost "
            "differ. Choose save_steps as a multiple of logging_steps",
            UserWarning,
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._train_acc is not None and "train_acc" not in self._found:
            self._warn("train_acc", self._train_acc, "and no log had it")
        for name, key in self._evaluated.items():
            if self._metrics:
                self._warn_if_missing(name, key)
        self._optimizer = None
