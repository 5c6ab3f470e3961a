"""What the last step did, for people to read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import layers
from .signals import Signals
from .update.reference import Number


class LastStep(NamedTuple):
    """The numbers of one step, as it used them."""

    signal: Number | None = None  # GS_t
    alphas: Sequence[Number] = ()  # α_t of each group
    norms: Sequence[Number | None] = ()  # N: the same for all, or in compat that of each tensor
    clips: Sequence[Number] = ()  # c


def as_floats(
    last: LastStep, groups: Sequence[dict[str, Any]], states: Iterable[dict[str, Any]], signals: Signals
) -> dict[str, float]:
    """See `GrokAdamW.metrics`."""
    norms = [_read(norm) for norm in last.norms if norm is not None]
    if groups[0]["compat"] is None:
        norms = norms[:1]  # one norm for all
    beta1s = [beta1 for group in groups for beta1 in layers.beta1s(group)]
    return {
        "step": max((float(state["step"]) for state in states if "step" in state), default=0.0),
        "signal": math.nan if last.signal is None else _read(last.signal),
        **{f"signal/{name}": _read(value) for name, value in signals.values.items()},
        "alpha": min(map(_read, last.alphas), default=math.nan),
        "grad_norm": math.hypot(*norms) if norms else math.nan,
        "clip_coefficient": min(map(_read, last.clips), default=math.nan),
        "skipped_steps": float(groups[0]["skipped_steps"]),
        "signal_failures": float(signals.failures),
        "beta1_min": min(beta1s, default=math.nan),
        "beta1_max": max(beta1s, default=math.nan),
    }


def _read(number: Number) -> float:
    return number.item() if isinstance(number, Tensor) else number
