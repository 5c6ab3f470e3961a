"""The progress within a step of several micro-batches, and the numbers that the first of them fixed.

Source: Su Jianlin, https://kexue.fm/archives/8634.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._warn import is_new, warn
from ..distributed import ranks
from ..param_groups import CycleNumbers
from ..state.slots import State
from .effects import Effect


class Cycle:
    """The progress of a GrokAdamW with ``accumulation_steps`` k within a step, read from its groups and state."""

    def __init__(self, k: int, groups: list[dict[str, Any]], state: Mapping[Tensor, State]) -> None:
        self.k, self._groups, self._state = k, groups, state
        self.nth = groups[0]["micro_step"]
        self.is_last = self.nth + 1 >= k
        params = [param for group in groups for param in group["params"]] if self.is_last else []
        # parameters that have no gradient now, but must move because they had one earlier in the cycle
        self.missing = {p for p in params if p.grad is None and state.get(p, {}).get("micro_step")}

    def numbers(
        self, effects: Sequence[Effect], amplification: float
    ) -> tuple[list[dict[str, Any]], list[Effect], float]:
        """Return the numbers that this cycle fixed at its first micro-batch: groups, their effects, and λ's factor."""
        if self.nth == 0:
            for group, effect in zip(self._groups, effects, strict=True):
                group["cycle"] = tuple(CycleNumbers.of(group, amplification, *effect))
        cycles = [CycleNumbers(*group["cycle"]) for group in self._groups]
        groups = self._groups
        if self.nth > 0:
            groups = [
                {**group, "lamb": fixed.lamb, "betas": (fixed.beta1, fixed.beta2), "gamma": fixed.gamma}
                for group, fixed in zip(groups, cycles, strict=True)
            ]
        effects = [Effect(fixed.alpha, fixed.boost, fixed.decay_boost) for fixed in cycles]
        return groups, effects, float(cycles[0].amplification)

    def end(self, params: Iterable[Tensor]) -> bool:
        """Count this micro-batch, in which `params` had gradients, and return True if it was the last."""
        for param in params:
            state = self._state[param]
            state["micro_step"] = 0 if self.is_last else state.get("micro_step", 0) + 1
        for group in self._groups:
            group["micro_step"] = 0 if self.is_last else self.nth + 1
        return bool(self.is_last)


def warn_if_not_zeroed(groups: Iterable[Mapping[str, Any]], said: set[str]) -> None:
    """Warn once if gradients were not zeroed since the last micro-batch, whose gradients then count again.

    backward() adds to an old gradient in place, which raises its version by 1. Zeroing makes a new tensor, or raises
    the version once more. One parameter shows it, unless its gradient is zero: a micro-batch may not use it. With
    several ranks, DDP may write to gradients, too.
    """
    grad = next((p.grad for group in groups for p in group["params"] if p.grad is not None), None)
    if grad is None or grad.layout != torch.strided or grad.is_inference() or ranks() > 1:
        return
    before, grad._grokadamw_version = getattr(grad, "_grokadamw_version", None), grad._version
    if before is not None and grad._version == before + 1 and grad.any() and is_new("not zeroed", said):
        warn(
            "the gradients were not zeroed since the last micro-batch, so that its gradients count again: call "
            "optimizer.zero_grad() before every micro-batch, instead of once per step. (If you zero them through "
            "p.grad.data, which autograd does not see, ignore this.)",
            UserWarning,
        )
