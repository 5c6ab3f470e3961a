"""For Hugging Face's Trainer: losses and accuracies for the signals, layers from the model, and readings in the logs.

```python
Trainer(model, TrainingArguments(optim="grokadamw", ...), callbacks=[GrokAdamWCallback()], ...)
```

`for_grokking` makes the preset for it, with the Trainer's own learning rate and weight decay.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch

from . import _trainers as trainers
from ._hints import meant
from ._warn import warn
from .grokadamw import GrokAdamW
from .options import OPTIONS, TAKE, check_settings
from .step.alpha import Combine, Signal, Signals

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler
except ImportError as error:
    raise ImportError("grokadamw.huggingface needs transformers: pip install 'grokadamw[huggingface]'") from error

__all__ = ["GrokAdamWCallback", "for_grokking"]

# what the Trainer takes from optim_args for this optimizer; all others it drops without a word
_IN_OPTIM_ARGS = ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping")


def for_grokking(arguments: TrainingArguments, **options: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the preset ``GrokAdamW.for_grokking``, for the Trainer to make of the model that it trains.

    ```python
    arguments = TrainingArguments(learning_rate=3e-3, weight_decay=1.4, lr_scheduler_type="constant", ...)
    Trainer(model, arguments, optimizer_cls_and_kwargs=for_grokking(arguments), ...)
    ```

    Args:
        arguments: the Trainer's. Their learning rate and weight decay go to ``GrokAdamW.for_grokking``. Their schedule
            multiplies the learning rate of every group.
        options: what else ``GrokAdamW.for_grokking`` is to get.

    Raises:
        ValueError: learning rate or weight decay are the Trainer's defaults, which are for fine-tuning; or they are
            among the options.
    """
    trainers.check_theirs(options)
    for name in ("learning_rate", "weight_decay"):
        if not _is_given(arguments, name):
            raise ValueError(
                f"{name}={getattr(arguments, name):g} is the Trainer's default, which is for fine-tuning: begin with "
                "TrainingArguments(learning_rate=3e-3, weight_decay=1.4), which the preset was tested with "
                "(2e-3 and 0.5 if the model has no norm layers)"
            )
    return _preset, {"lr": arguments.learning_rate, "weight_decay": arguments.weight_decay, **options}


def _is_given(arguments: TrainingArguments, name: str) -> bool:
    """Return True if an argument is not the default one."""
    defaults = {field.name: field.default for field in dataclasses.fields(arguments)}
    return bool(getattr(arguments, name) != defaults[name])


def _lost(optim_args: str | None, optimizer: GrokAdamW) -> Iterator[str]:
    """Yield a sentence for each entry of ``optim_args`` that did not reach the optimizer."""
    for entry in (optim_args or "").replace(" ", "").split(","):
        name, _, value = entry.partition("=")
        if name in _IN_OPTIM_ARGS:
            used = f"{float(optimizer.defaults[name]):g}"
            with contextlib.suppress(ValueError):  # where nobody read it, it need not be a number
                value = f"{float(value):g}"
            if value != used:
                yield (
                    f"optim_args has {entry}, and the optimizer has {used}: the Trainer reads optim_args only where "
                    'optim="grokadamw" makes the optimizer. Give it where yours is made'
                )
        elif name:
            instead = meant(name, _IN_OPTIM_ARGS)
            others = f"it takes {', '.join(_IN_OPTIM_ARGS)}; give others to GrokAdamWCallback"
            way_out = f"did you mean {instead}?" if instead in _IN_OPTIM_ARGS else others
            yield f"optim_args has {name!r}, which the Trainer drops: {way_out}"


def _unused(arguments: TrainingArguments, optimizer: GrokAdamW) -> Iterator[str]:
    """Yield a sentence for each number of the arguments that the optimizer does not have."""
    callback, maker = "give {} to GrokAdamWCallback", "give {} where the optimizer is made, or for_grokking(arguments)"
    betas, eps = optimizer.param_groups[0]["betas"], optimizer.param_groups[0]["eps"]
    decays = [optimizer.defaults["weight_decay"], *(group["weight_decay"] for group in optimizer.param_groups)]
    for name, used, way_out in (
        ("adam_beta1", betas[:1], callback.format("betas")),
        ("adam_beta2", betas[1:], callback.format("betas")),
        ("adam_epsilon", [eps], callback.format("eps")),
        ("learning_rate", [optimizer.defaults["lr"]], maker.format("lr")),
        ("weight_decay", decays, maker.format("it")),
    ):
        given = getattr(arguments, name)
        if _is_given(arguments, name) and given not in (numbers := [float(x) for x in used]):
            yield f"{name}={given:g} does not reach the optimizer, which has {max(numbers):g}: {way_out}"


def _preset(*groups: Any, **options: Any) -> Callable[..., GrokAdamW]:
    """Return what makes the preset of a model: the Trainer calls what is no optimizer's class without arguments."""
    if groups:
        raise TypeError(
            "this release of transformers makes optimizers without the model: give "
            "Trainer(optimizers=(GrokAdamW.for_grokking(model, lr=…, weight_decay=…), None))"
        )
    return GrokAdamW.for_grokking


class GrokAdamWCallback(TrainerCallback):
    """Makes the Trainer and a GrokAdamW work together, whatever the Trainer has wrapped around it.

    - Layers are the model's modules, over decay and no-decay groups.
    - The loss of every evaluation during training, and the training loss of the last log before it, go to the signals:
      α, and with the preset the length of steps, adapt.
    - Accuracies go there, too, where their keys are given: ``AccuracyGap`` and ``Monitor.grokked_at`` need them.
    - Every log of the training loss has ``grok_alpha``, ``grok_boost``, ``grok_signal``, ``grok_grad_norm``,
      ``grok_clip_coefficient`` and ``grok_skipped_steps`` beside it, as far as they are known: for the console, the
      history and what is reported to.

    It warns, once, where the Trainer clips gradients to another norm; where the arguments hold what the optimizer did
    not get, such as unknown names in ``optim_args``, or ``adam_beta1``; where nothing is evaluated; where a checkpoint
    is saved at a step that is not logged (the Trainer forgets the losses since the last log, and a resumed run then
    hears of another mean); and where a metric that it waits for does not come. Signals that remember something begin
    each run with what they knew when the first began; a resumed one goes on with the checkpoint's.

    Args:
        eval_loss: which of the evaluation's metrics is the loss, ``"eval_<name>_loss"`` for one of several sets.
        eval_acc: which of them is the accuracy, a share in [0, 1]: ``"eval_accuracy"``, if ``compute_metrics`` returns
            an ``"accuracy"``. None is none.
        train_acc: the key of the training accuracy, a share in [0, 1], in anything that the Trainer logs: by
            ``trainer.log``, or by an evaluation of training data, as ``"eval_<name>_accuracy"``. None is none.
        signals, combine: as ``GrokAdamW.set_signals``'s; None leaves the optimizer those that it has.
        options: what else the optimizer's groups are to hold, such as ``betas``, which ``optim_args`` cannot carry:
            any argument of ``GrokAdamW`` that a group may set, but lr and weight decay. What holds for
            the whole optimizer, as a window does, is given with
            ``Trainer(optimizer_cls_and_kwargs=(GrokAdamW, {...}))``.

    Raises:
        TypeError, ValueError: an option is not allowed; or, when training begins, the optimizer is no GrokAdamW; or,
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
            raise TypeError(f"eval_loss={eval_loss!r} is not the name of a metric, as in 'eval_loss'")
        for name, value in (("eval_acc", eval_acc), ("train_acc", train_acc)):
            if not isinstance(value, str | None):
                raise TypeError(
                    f"{name}={value!r} is not the name of a metric: give one, as 'eval_accuracy', or leave it out"
                )
        trainers.check_theirs(options)
        for name, value in options.items():
            if name not in OPTIONS or name == "layer":  # which is for one group of several
                raise TypeError(f"{name}={value!r} is no argument of GrokAdamW's that its parameter groups may set")
            if OPTIONS[name].on_load != TAKE:  # a checkpoint is loaded before training begins
                raise ValueError(
                    f"{name}={value!r} cannot be set once there is an optimizer: give signals as signals=, and what "
                    "else holds for the whole optimizer by Trainer(optimizer_cls_and_kwargs=(GrokAdamW, {...}))"
                )
        checked = GrokAdamW([torch.zeros(1)], **options).defaults
        if signals is None and combine is not None:
            raise ValueError(f"combine={combine!r} without signals: give those that it is to combine")
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
        self._optimizer: GrokAdamW | None = None  # while it trains
        self._trained: weakref.ref[GrokAdamW] | None = None  # the optimizer of the last run
        self._at_first: list[Any] = []  # what the signals remembered when the first run began
        self._goes_on = True  # steps have been taken, or there is no checkpoint that they go on from
        self._logged_at = 0
        self._metrics: set[str] = set()  # what evaluations had
        self._said: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        found = trainers.grokadamw_in(optimizer)
        if found is None:
            raise TypeError(
                f"GrokAdamWCallback found a {type(getattr(optimizer, 'optimizer', optimizer)).__name__}, and no "
                'GrokAdamW: train with TrainingArguments(optim="grokadamw"), or leave the callback out'
            )
        for group in found.param_groups:
            check_settings({**group, **self._options}, found.defaults)
        if self._signals is not None:
            self._begin_signals(found)
        for group in found.param_groups:
            group.update(self._options)
        trainers.name_layers(found, model)
        self._optimizer, self._trained, self._logged_at = found, weakref.ref(found), state.global_step
        self._goes_on = state.global_step == 0
        self._metrics.clear()
        self._go_first()
        is_evaluated = args.eval_strategy != "no" or args.eval_on_start
        if not is_evaluated:
            found._run.signals.say_no_more()  # as what follows says why
        if "arguments" not in self._said:
            self._said.add("arguments")
            trainers.say_who_clips(found, args.max_grad_norm, "max_grad_norm")
            for sentence in (*_lost(args.optim_args, found), *_unused(args, found)):
                warn(sentence, UserWarning)
            if not is_evaluated and ("eval_acc" in self._evaluated or trainers.hears_losses(found)):
                warn(
                    'eval_strategy="no": no evaluation is planned, so signals that compare losses or accuracies stay '
                    'silent, and neither α nor the boost adapts. Give eval_strategy="steps" and an eval_dataset, or '
                    "do without: GrokAdamWCallback(signals=[])",
                    UserWarning,
                )

    def _begin_signals(self, optimizer: GrokAdamW) -> None:
        """Register them. For another optimizer than the last run's they are to be as they were at first."""
        remember = [signal for signal in self._signals or () if hasattr(signal, "state_dict")]
        if self._trained is None:
            self._at_first = [copy.deepcopy(signal.state_dict()) for signal in remember]
        elif self._trained() is not optimizer:
            for signal, state in zip(remember, self._at_first, strict=True):
                signal.load_state_dict(copy.deepcopy(state))
        optimizer.set_signals(self._signals, self._combine)

    def _go_first(self) -> None:
        """Move before the callbacks that report, as these read a log when it is their turn.

        A callback is not told who calls it; so it looks for its caller.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame := frame and frame.f_back:
            handler = frame.f_locals.get("self")
            if isinstance(handler, CallbackHandler) and self in handler.callbacks:
                handler.callbacks = [self, *(other for other in handler.callbacks if other is not self)]
                return

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if self._optimizer is None:
            return
        if self._train_acc in logs and self._goes_on:
            self._optimizer.record(train_acc=logs[self._train_acc])
            self._said.add("train_acc")
        if "loss" not in logs:
            return
        new = trainers.readings(self._optimizer)
        logs.update(new)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(new)
        self._logged_at = state.global_step

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        if self._optimizer is None or not self._goes_on:  # by eval_on_start: the checkpoint knows the last one
            return
        found: dict[str, float | None] = {name: metrics[key] for name, key in self._evaluated.items() if key in metrics}
        self._said.update(found)
        self._metrics.update(metrics)
        if "eval_loss" in found:  # a training loss that falls until the next evaluation is not to be compared with it
            found["train_loss"] = next((log["loss"] for log in reversed(state.log_history) if "loss" in log), None)
        self._optimizer.record(**found)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._goes_on = True
        for name, key in self._evaluated.items():  # all sets of an evaluation have been
            if name in self._said:
                continue
            prefix = key.partition("_")[0]
            metrics = sorted(each for each in self._metrics if each.startswith(f"{prefix}_"))
            if metrics:
                if name == "eval_loss":
                    metrics = [each for each in metrics if each.endswith("loss")]
                self._warn(name, key, f"and the evaluation has {', '.join(metrics) or 'no loss'}")

    def _warn(self, name: str, key: str, what: str) -> None:
        self._said.add(name)
        silent = "signals of losses" if name == "eval_loss" else "AccuracyGap and Monitor.grokked_at"
        warn(
            f"GrokAdamWCallback waits for {key!r}, {what}: {silent} stay silent; give the name of one as {name}=",
            UserWarning,
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_last = state.global_step >= state.max_steps
        if self._optimizer is None or is_last or self._logged_at == state.global_step or "saves" in self._said:
            return
        self._said.add("saves")
        warn(
            f"a checkpoint is saved at step {state.global_step}, and the training loss was last logged at step "
            f"{self._logged_at}: a run resumed from it hears of another mean of the losses, and its α and boost "
            "differ. Choose save_steps as a multiple of logging_steps",
            UserWarning,
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._train_acc is not None and "train_acc" not in self._said:
            self._warn("train_acc", self._train_acc, "and no log had it")
        self._optimizer = None
