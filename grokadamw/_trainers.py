"""What the callbacks for training frameworks have in common: finding the optimizer, and reading it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ._warn import warn
from .grokadamw import GrokAdamW

_LOGGED = ("alpha", "boost", "signal", "grad_norm", "clip_coefficient", "skipped_steps")


def grokadamw_in(optimizer: Any) -> GrokAdamW | None:
    """Return the GrokAdamW behind what frameworks and this package wrap around one; None where there is another."""
    while not isinstance(optimizer, GrokAdamW):
        optimizer = getattr(optimizer, "optimizer", None)
        if optimizer is None:
            return None
    return optimizer


def readings(optimizer: GrokAdamW) -> dict[str, float]:
    """Return the metrics() that are worth a curve and known, under names of our own."""
    metrics = optimizer.metrics()
    return {f"grok_{name}": metrics[name] for name in _LOGGED if not math.isnan(metrics[name])}


def smallest_with(optimizer: GrokAdamW, model: nn.Module) -> nn.Module:
    """Return the smallest module of a model that has all parameters of the optimizer; the model, if none has."""
    wanted = {param for group in optimizer.param_groups for param in group["params"]}
    found = model
    for module in model.modules():  # what contains another comes before it
        if wanted <= set(module.parameters()):
            found = module
    return found


def name_layers(optimizer: GrokAdamW, model: nn.Module) -> None:
    """Layers from the model; where it lacks parameters of the optimizer they stay as they are, with a warning."""
    try:
        optimizer.set_layers(model)
    except ValueError as error:
        warn(f"layers stay as they were ({error})", UserWarning)


def check_theirs(options: Mapping[str, Any]) -> None:
    """Raise ValueError for what the Trainer's own arguments say."""
    for name in ("lr", "weight_decay"):
        if name in options:
            raise ValueError(f"{name}={options[name]!r} is the Trainer's: give it in TrainingArguments")


def hears_losses(optimizer: GrokAdamW) -> bool:
    """Return True if losses change what the optimizer does: a signal compares them, and something adapts to it."""
    adapts = any(group["lamb"] or group["signal_boost"] for group in optimizer.param_groups)
    return adapts and any(optimizer._run.signals.takes_losses)


def say_who_clips(optimizer: GrokAdamW, limit: float, name: str) -> None:
    """Warn where the framework clips to another limit before the optimizer does."""
    own = [float(group["gradient_clipping"]) for group in optimizer.param_groups if group["gradient_clipping"]]
    if not own or not limit or limit == min(own):
        return
    acts = name if limit <= min(own) else "gradient_clipping"
    warn(
        f"gradients are clipped twice, to {name}={limit:g} and by the optimizer to gradient_clipping={min(own):g}. "
        f"What acts is {acts}, and metrics()['grad_norm'] is the norm in between. Set one of them to 0",
        UserWarning,
    )
