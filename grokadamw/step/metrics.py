"""The numbers of the last step, for people to read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from .. import layers
from .._numbers import Number, as_float
from .alpha import Signals
from .effects import Effect


class LastStep(NamedTuple):
    """The numbers that one step used."""

    signal: Number | None = None  # s_t
    effects: Sequence[Effect] = ()  # one for each group
    norm: Number | None = None  # N; None if nothing needed it
    clips: Sequence[Number] = ()  # c for each batch, or for each group if ranks or passes have other batches


def as_floats(
    last: LastStep, groups: Sequence[dict[str, Any]], states: Iterable[dict[str, Any]], signals: Signals
) -> dict[str, float]:
    """Return the values that `GrokAdamW.metrics` lists."""
    beta1s = [beta1 for group in groups for beta1 in layers.beta1s(group)]
    return {
        "step": max(step_counts(states), default=0.0),
        "signal": math.nan if last.signal is None else as_float(last.signal),
        **{f"signal/{name}": as_float(signals.values.get(name, math.nan)) for name in signals.names},
        "alpha": min((as_float(effect.alpha) for effect in last.effects), default=math.nan),
        "boost": max((as_float(effect.boost) for effect in last.effects), default=math.nan),
        "decay_boost": max((as_float(effect.decay_boost) for effect in last.effects), default=math.nan),
        "grad_norm": math.nan if last.norm is None else as_float(last.norm),
        "clip_coefficient": min(map(as_float, last.clips), default=math.nan),
        "skipped_steps": float(max((group["skipped_steps"] for group in groups), default=0)),
        "signal_failures": float(signals.failures),
        "beta1_min": min(beta1s, default=math.nan),
        "beta1_max": max(beta1s, default=math.nan),
    }


def step_counts(states: Iterable[dict[str, Any]]) -> list[float]:
    """Return the step count of each parameter that has state, with one read per device; NaN on the meta device."""
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for state in states:
        if "step" in state:
            step = torch.as_tensor(state["step"], dtype=torch.float32).reshape(())  # it may have been set by hand
            by_device.setdefault(step.device, []).append(step)
    counts = list[float]()
    for device, here in by_device.items():
        counts += [math.nan] * len(here) if device.type == "meta" else torch.stack(here).tolist()
    return counts
