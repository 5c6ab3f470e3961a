"""The numbers that the signal changes: α, lr with max_row_change, weight_decay, and λ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._numbers import Number, accumulator, as_float, number_on

BOOSTS = ("signal_boost", "decay_boost")  # the options that say how strongly the signal acts
Places: TypeAlias = dict[tuple[int, str], Tensor]  # by the index of the group, and "alpha" or the option's name


class Effect(NamedTuple):
    """The numbers of a group that follow the signal."""

    alpha: Number  # α_t
    boost: Number = 1.0  # the factor of lr and max_row_change
    decay_boost: Number = 1.0  # the factor of weight_decay


def are_boosted(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Return True if a boost is on in any of these groups."""
    return any(group[name] for group in groups for name in BOOSTS)


def effect_on(group: Mapping[str, Any], alpha: Number, signal: Number | None) -> Effect:
    """Return the effect of a signal on a group with this α. Without a usable signal the factors are 1."""
    share = 0.0 if signal is None else _share(signal)
    return Effect(alpha, *(1.0 + group[name] * share if group[name] else 1.0 for name in BOOSTS))


def in_places(places: Places, i: int, group: dict[str, Any], effect: Effect) -> Effect:
    """Return the i-th group's effect; if the group is capturable, in the tensors that its CUDA graph reads."""
    if not group["capturable"] or not group["params"]:
        return effect
    device, numbers = group["params"][0].device, list[Number]()
    for name, number in zip(("alpha", *BOOSTS), effect, strict=True):
        if name == "alpha" or group[name] or (i, name) in places:  # a graph still reads a boost that is now off
            if (i, name) not in places:
                places[i, name] = torch.zeros((), dtype=accumulator(device), device=device)
            place = places[i, name]
            number = place.copy_(number, non_blocking=True) if isinstance(number, Tensor) else place.fill_(number)
        numbers.append(number)
    return Effect(*numbers)


def amplification(signal: Number | None) -> float:
    """Return the factor of λ under `amplify_by_signal` or `amplify_when`: s in [0, 1], or 0 without a usable signal."""
    return 0.0 if signal is None else as_float(_share(signal))


def boosted(
    group: Mapping[str, Any], effect: Effect, device: torch.device, differentiable: bool
) -> tuple[Number, Number, Number]:
    """Return a group's lr, max_row_change and weight_decay, multiplied by its boosts, for parameters on a device."""
    lr, change, decay = group["lr"], float(group["max_row_change"]), float(group["weight_decay"])
    lr = lr if type(lr) is float else number_on(device, lr, differentiable)
    boosts = (effect.boost, effect.decay_boost)
    if not any(isinstance(boost, Tensor) or boost != 1.0 for boost in boosts):
        return lr, change, decay
    of_lr, of_decay = (number_on(device, boost, differentiable) for boost in boosts)
    return lr * of_lr, change * of_lr if change else 0.0, decay * of_decay if decay else 0.0


def _share(signal: Number) -> Number:
    """Return a signal clamped to [0, 1], or 0 for NaN."""
    if isinstance(signal, Tensor):
        return torch.nan_to_num(signal, nan=0.0).clamp(0, 1)
    return min(max(signal, 0.0), 1.0) if signal == signal else 0.0
