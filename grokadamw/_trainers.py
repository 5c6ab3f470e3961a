"""Helpers of the callbacks, Monitor and precision: find a wrapped GrokAdamW, read metrics, set layers, and warn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from . import zero
from ._hints import meant
from ._numbers import as_number
from ._warn import is_new, warn
from .accumulation import Accumulate
from .grokadamw import GrokAdamW
from .layers import unwrapped
from .step.effects import are_boosted

_LOGGED = ("alpha", "boost", "decay_boost", "signal", "grad_norm", "clip_coefficient", "skipped_steps")


def _optimizers_in(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and each optimizer inside it, through the wrappers of frameworks, torch and this package."""
    while optimizer is not None:
        yield optimizer
        if isinstance(optimizer, GrokAdamW):
            return
        # torch's wrappers, such as ZeroRedundancyOptimizer, have an `optim`
        optimizer = getattr(optimizer, "optimizer", None) or getattr(optimizer, "optim", None)


def grokadamw_in(optimizer: Any) -> GrokAdamW | None:
    """Return the GrokAdamW inside the wrappers of frameworks, torch and this package; None if there is none."""
    return next((inner for inner in _optimizers_in(optimizer) if isinstance(inner, GrokAdamW)), None)


def readings(optimizer: GrokAdamW) -> dict[str, float]:
    """Return the metrics that are worth plotting and not NaN, under names that begin with grok_."""
    metrics = optimizer.metrics()
    return {f"grok_{name}": metrics[name] for name in _LOGGED if not math.isnan(metrics[name])}


def smallest_with(optimizer: GrokAdamW, model: nn.Module) -> nn.Module:
    """Return the smallest module that has all parameters of the optimizer; the whole model if there is none."""
    wanted = {param for group in zero.groups_of_all_ranks(optimizer) for param in group["params"]}
    smallest = model
    for module in model.modules():  # a module comes before its submodules
        if wanted <= set(module.parameters()):
            smallest = module
    return smallest


def _named_in(optimizer: GrokAdamW, model: nn.Module) -> nn.Module | None:
    """Return the module whose names of parameters the optimizer has; None if it has no names, or others."""
    named = zero.groups_of_all_ranks(optimizer)
    names = unwrapped(name for group in named for name in group.get("param_names", ()))
    params = [param for group in named for param in group["params"]]
    if len(names) != len(params):
        return None
    wanted = dict(zip(params, names, strict=True))
    for module in model.modules():
        own = list(module.named_parameters())
        if wanted.items() <= dict(zip((param for _, param in own), unwrapped(n for n, _ in own), strict=True)).items():
            return module
    return None


def name_layers(optimizer: GrokAdamW, model: nn.Module) -> None:
    """Set the layers from the model, or from the module in it from which the optimizer has its parameters' names.

    So a frozen teacher alongside a student does not count if the optimizer got the student's names. If the model lacks
    parameters of the optimizer, warn and leave the layers unchanged.
    """
    try:
        optimizer.set_layers(_named_in(optimizer, model) or model)
    except ValueError as error:
        warn(f"layers stay as they were ({error})", UserWarning)


def group_sizes(optimizer: GrokAdamW) -> list[int]:
    """Return the number of parameters of each group. If it changes, the layers must be set again."""
    return [len(group["params"]) for group in zero.groups_of_all_ranks(optimizer)]


def check_not_the_trainers(options: Mapping[str, Any]) -> None:
    """Raise ValueError for options that the Trainer's own arguments set."""
    for name, value in options.items():
        if meant(name, ("lr", "weight_decay")):
            raise ValueError(f"{name}={shown(value)} is the Trainer's: give it in TrainingArguments")


def shown(value: Any) -> str:
    """Return a value's text for an error message; only its type if the text is long, as for an optimizer."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"<{type(value).__name__}>"


def without_nan(values: Mapping[str, Any], said: set[str]) -> dict[str, Any]:
    """Return values for `record` without accuracies that are NaN; warn once about each. `said` has earlier warnings.

    A number on a GPU is not checked, because that would wait for the device.
    """
    found = dict(values)
    for name in ("train_acc", "eval_acc"):
        if (value := found.get(name)) is None:
            continue
        number = as_number(value, name)
        if isinstance(number, float) and math.isnan(number):
            del found[name]
            if is_new(f"{name} is NaN", said):
                warn(
                    f"{name}=nan is not recorded: the metric divided 0 by 0, or the model's outputs are NaN. "
                    "AccuracyGap and Monitor.grokked_at keep the earlier accuracies",
                    UserWarning,
                )
    return found


def uses_losses(optimizer: GrokAdamW) -> bool:
    """Return True if losses affect the optimizer: a signal takes them, and an option uses the signal."""
    adapts = are_boosted(optimizer.param_groups) or any(group["lamb"] for group in optimizer.param_groups)
    return adapts and any(optimizer._run.signals.takes_losses)


def say_who_clips(optimizer: Any, limit: float, name: str, *, by_norm: bool = True) -> None:
    """Warn if a framework's gradient clipping has no effect, clips micro-batches, or differs from the optimizer's.

    Args:
        optimizer: the optimizer that the framework steps; it may be or contain a GrokAdamW.
        limit: the framework's limit, 0 for none. `name` is the argument that sets it.
        by_norm: True if the limit is for the norm, False if it is for each element.
    """
    found = grokadamw_in(optimizer)
    if found is None or not limit:
        return
    own = min((x for group in found.param_groups if (x := float(group["gradient_clipping"]))), default=0.0)
    if found._run.in_backward is not None:
        if limit != own or not by_norm:
            warn(
                f"{name}={limit:g} has no effect: step_in_backward has used the gradients before they could be "
                f"clipped. Give {name}=0; to clip, give GrokAdamW a gradient_clipping, and step_in_backward "
                'clip_by="last"',
                UserWarning,
            )
    elif any(isinstance(inner, Accumulate) and inner._steps > 1 for inner in _optimizers_in(optimizer)):
        warn(
            f"{name}={limit:g} clips the gradients of each micro-batch, before Accumulate takes their mean, so the "
            f"step is not that of one large batch. Give {name}=0; the optimizer's gradient_clipping clips the mean",
            UserWarning,
        )
    elif by_norm and own and limit != own:
        acts = name if limit < own else "gradient_clipping"
        warn(
            f"gradients are clipped twice, to {name}={limit:g} and by the optimizer to gradient_clipping={own:g}. "
            f"Only {acts} takes effect, and metrics()['grad_norm'] is the norm in between. Set one of them to 0",
            UserWarning,
        )
