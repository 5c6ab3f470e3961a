"""What the signal acts on: α, lr with max_row_change, weight_decay, and λ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._numbers import Number, as_float, number_on
from . import capture

BOOSTS = ("signal_boost", "decay_boost")  # the options that say how much
Places: TypeAlias = dict[tuple[int, str], Tensor]  # by group, and "alpha" or the option


class Effect(NamedTuple):
    """What the signal makes of a group's numbers."""

    alpha: Number  # α_t
    boost: Number = 1.0  # the factor of lr and max_row_change
    decay_boost: Number = 1.0  # the factor of weight_decay


def are_boosted(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Return True if the signal boosts anything in any of these groups."""
    return any(group[name] for group in groups for name in BOOSTS)


def effect_on(group: Mapping[str, Any], alpha: Number, signal: Number | None) -> Effect:
    """Return what a signal means for a group with this α; factors of 1 without a usable signal."""
    share = 0.0 if signal is None else _share(signal)
    return Effect(alpha, *(1.0 + group[name] * share if group[name] else 1.0 for name in BOOSTS))


def in_places(places: Places, i: int, group: dict[str, Any], effect: Effect) -> Effect:
    """Write the i-th group's numbers into the tensors that a CUDA graph reads, and return these."""
    numbers = []
    for name, number in zip(("alpha", *BOOSTS), effect, strict=True):
        is_read = name == "alpha" or group[name] or (i, name) in places  # a boost even after it was switched off
        numbers.append(capture.in_place(places, (i, name), group, number) if is_read else number)
    return Effect(*numbers)


def amplification(signal: Number | None) -> float:
    """Return what `amplify_by_signal` multiplies λ by: the signal, limited to [0, 1]; 0 without a usable signal."""
    return 0.0 if signal is None else as_float(_share(signal))


def boosted(
    group: Mapping[str, Any], effect: Effect, device: torch.device, differentiable: bool
) -> tuple[Number, Number, Number]:
    """Return lr, max_row_change and weight_decay of a group, multiplied by its boosts, for parameters on a device."""
    lr, change, decay = group["lr"], float(group["max_row_change"]), float(group["weight_decay"])
    lr = lr if type(lr) is float else number_on(device, lr, differentiable)
    boosts = (effect.boost, effect.decay_boost)
    if not any(isinstance(boost, Tensor) or boost != 1.0 for boost in boosts):
        return lr, change, decay
    of_lr, of_decay = (number_on(device, boost, differentiable) for boost in boosts)
    return lr * of_lr, change * of_lr if change else 0.0, decay * of_decay if decay else 0.0


def _share(signal: Number) -> Number:
    """Return a signal, limited to [0, 1]; 0 for NaN."""
    if isinstance(signal, Tensor):
        return torch.nan_to_num(signal, nan=0.0).clamp(0, 1)
    return min(max(signal, 0.0), 1.0) if signal == signal else 0.0
