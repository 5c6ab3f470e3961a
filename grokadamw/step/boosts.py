"""What the signal acts on besides α: lr with max_row_change, weight_decay, and λ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._numbers import Number, as_float
from . import capture

BOOSTS = ("signal_boost", "decay_boost")  # the options that say how much
Places: TypeAlias = dict[tuple[int, str], Tensor]  # by group and option


class Boosts(NamedTuple):
    """The factors of a group's numbers."""

    lr: Number = 1.0  # also of max_row_change
    decay: Number = 1.0


def is_boosted(group: Mapping[str, Any]) -> bool:
    return any(group[name] for name in BOOSTS)


def boosts_of(group: Mapping[str, Any], signal: Number | None) -> Boosts:
    """Return the factors that a signal means for a group; 1 without a usable signal."""
    share = 0.0 if signal is None else _share(signal)
    return Boosts(*(1.0 + group[name] * share if group[name] else 1.0 for name in BOOSTS))


def in_places(places: Places, i: int, group: dict[str, Any], boosts: Boosts) -> Boosts:
    """Write the i-th group's factors into the tensors that a CUDA graph reads, and return these."""
    for name, factor in zip(BOOSTS, boosts, strict=True):
        if group[name] or (i, name) in places:  # a graph reads it, even if it was switched off
            capture.in_place(places, (i, name), group, factor)
    return placed(places, i, boosts)


def placed(places: Places, i: int, boosts: Boosts) -> Boosts:
    """Return the i-th group's factors, as tensors where a CUDA graph reads them."""
    return Boosts(*(places.get((i, name), factor) for name, factor in zip(BOOSTS, boosts, strict=True)))


def amplification(signal: Number | None) -> float:
    """Return what `amplify_by_signal` multiplies λ by: the signal, limited to [0, 1]; 0 without a usable signal."""
    return 0.0 if signal is None else as_float(_share(signal))


def _share(signal: Number) -> Number:
    """Return a signal, limited to [0, 1]; 0 for NaN."""
    if isinstance(signal, Tensor):
        return torch.nan_to_num(signal, nan=0.0).clamp(0, 1)
    return min(max(signal, 0.0), 1.0) if signal == signal else 0.0
