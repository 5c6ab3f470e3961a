"""Shared by the callbacks for training frameworks: finding the optimizer, and reading its metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from . import zero
from ._warn import warn
from .grokadamw import GrokAdamW

_LOGGED = ("alpha", "boost", "signal", "grad_norm", "clip_coefficient", "skipped_steps")


def grokadamw_in(optimizer: Any) -> GrokAdamW | None:
    """Return the GrokAdamW inside the wrappers of frameworks, torch and this package; None if there is none."""
    while not isinstance(optimizer, GrokAdamW):
        # torch's wrappers, such as ZeroRedundancyOptimizer, have an `optim`
        optimizer = getattr(optimizer, "optimizer", None) or getattr(optimizer, "optim", None)
        if optimizer is None:
            return None
    return optimizer


def readings(optimizer: GrokAdamW) -> dict[str, float]:
    """Return the metrics() that are worth plotting and known, under names that begin with grok_."""
    metrics = optimizer.metrics()
    return {f"grok_{name}": metrics[name] for name in _LOGGED if not math.isnan(metrics[name])}


def smallest_with(optimizer: GrokAdamW, model: nn.Module) -> nn.Module:
    """Return the smallest module of a model that has all parameters of the optimizer; the model if none has."""
    wanted = {param for group in zero.groups_of_all_ranks(optimizer) for param in group["params"]}
    smallest = model
    for module in model.modules():  # a module comes before those inside it
        if wanted <= set(module.parameters()):
            smallest = module
    return smallest


def name_layers(optimizer: GrokAdamW, model: nn.Module) -> None:
    """Take layers from the model; if it lacks parameters of the optimizer, warn and leave the layers as they are."""
    try:
        optimizer.set_layers(model)
    except ValueError as error:
        warn(f"layers stay as they were ({error})", UserWarning)


def group_sizes(optimizer: GrokAdamW) -> list[int]:
    """Return how many parameters each group has: if that changes, groups need layers again."""
    return [len(group["params"]) for group in zero.groups_of_all_ranks(optimizer)]


def check_theirs(options: Mapping[str, Any]) -> None:
    """Raise ValueError for options that the Trainer's own arguments set."""
    for name in ("lr", "weight_decay"):
        if name in options:
            raise ValueError(f"{name}={options[name]!r} is the Trainer's: give it in TrainingArguments")


def hears_losses(optimizer: GrokAdamW) -> bool:
    """Return True if losses change what the optimizer does: a signal compares them, and an option uses the signal."""
    adapts = any(group["lamb"] or group["signal_boost"] for group in optimizer.param_groups)
    return adapts and any(optimizer._run.signals.takes_losses)


def say_who_clips(optimizer: GrokAdamW, limit: float, name: str) -> None:
    """Warn if the framework clips gradients to another limit before the optimizer clips them."""
    own = [float(group["gradient_clipping"]) for group in optimizer.param_groups if group["gradient_clipping"]]
    if not own or not limit or limit == min(own):
        return
    acts = name if limit <= min(own) else "gradient_clipping"
    warn(
        f"gradients are clipped twice, to {name}={limit:g} and by the optimizer to gradient_clipping={min(own):g}. "
        f"Only {acts} takes effect, and metrics()['grad_norm'] is the norm in between. Set one of them to 0",
        UserWarning,
    )
