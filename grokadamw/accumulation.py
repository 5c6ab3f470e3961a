"""Gradient accumulation inside the optimizer (Su Jianlin, https://kexue.fm/archives/6794).

`Accumulate` collects the gradients of several micro-batches in a buffer, for any optimizer. The step is exactly that of
one large batch. For GrokAdamW's own ``accumulation_steps`` see `step/micro_batches.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._checks import check_count, check_limit
from ._hints import with_hints
from ._numbers import as_real, reads_are_free, wide
from ._wrapper import Part, Wrapper, by_kind
from ._wrapper_base import check_saved
from .backends import fastest_sum_of_squares
from .checkpoints import OF_ACCUMULATE, OF_FILTERS
from .shards import divisions
from .state.loading import check_count_loaded
from .state.slots import State
from .step.micro_batches import warn_if_not_zeroed
from .step.norm import clip_coefficient, global_norm

__all__ = ["Accumulate"]


class Accumulate(Wrapper):
    """Gradient accumulation for any optimizer. Call ``step()`` after each micro-batch; every k-th call updates weights.

    At every k-th call, the inner optimizer gets the mean of the k gradients. It clips once, steps once, and evaluates
    its signals once, as for one batch k times as large.

    ```python
    optimizer = Accumulate(torch.optim.AdamW(model.parameters()), steps=10)
    for x, y in micro_batches:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        if optimizer.stepped:
            scheduler.step()
    optimizer.flush()
    ```

    Zero the gradients before every micro-batch, and do not divide the losses by k. Groups and state belong to the inner
    optimizer, ``optimizer.optimizer``. A step in which GradScaler finds infinity does not count as a micro-batch.
    GradScaler leaves unscaling to this optimizer, so that frameworks do not clip micro-batches. Source: Su Jianlin,
    https://kexue.fm/archives/6794.

    Args:
        optimizer: any optimizer, except one that evaluates its closure several times in a step (as LBFGS does), is
            differentiable, or accumulates gradients itself (``accumulation_steps``).
        steps: k ≥ 1, micro-batches per step.
        gradient_clipping: largest norm ≥ 0 of the mean gradient, by ``clip_grad_norm_``'s formula; 0 is off. If a
            GrokAdamW inside has a ``shard_group``, the norm is over all ranks of the group. If your loop clips
            gradients, it clips each micro-batch instead.

    The groups hold ``accumulated_steps``, the micro-batches so far in the cycle, and ``accumulation_cycle``, k.
    ``state[p]`` gets ``accumulated``, the sum of its gradients (in the parameter's shape and dtype, but at least
    float32; for a complex parameter, two real numbers per element), and ``accumulated_grads``, their number.

    Raises:
        TypeError, ValueError: an argument is not as described above. The message names it and its value.
    """

    _state_names = ("accumulated", "accumulated_grads")
    _prefixes: tuple[str, ...] = OF_ACCUMULATE
    _settings = ("_steps", "_clipping", "_last", "_prefixes")
    _runs = ("accumulated_steps",)
    _mark, _level = "accumulation_cycle", 2
    _always_unscales = True  # so that `stepped` becomes False on overflow, and a loop cannot clip micro-batches

    @with_hints
    def __init__(self, optimizer: Optimizer, steps: int, gradient_clipping: float = 0.0) -> None:
        check_count("steps", steps, at_least=1)
        check_limit("gradient_clipping", gradient_clipping)
        self._steps, self._clipping = steps, gradient_clipping
        # in a dict, because Lightning's copy of this object has its own attributes
        self._last: dict[str, Any] = {"stepped": False, "said": set()}
        super().__init__(optimizer, {"accumulated_steps": 0, "accumulation_cycle": steps})
        if any("grokfast_filter" in group for group in self.param_groups):  # inside, maybe in another library's wrapper
            self._prefixes = (*OF_ACCUMULATE, *OF_FILTERS)

    def _check_innermost(self, inner: Optimizer) -> None:
        super()._check_innermost(inner)
        if (k := inner.defaults.get("accumulation_steps", 1)) > 1:
            raise ValueError(
                f"Accumulate around a GrokAdamW with accumulation_steps={k}: both accumulate, and `stepped` would be "
                "True at steps that move nothing. Leave one of them out"
            )

    def _described(self) -> str:
        return f"steps={self._steps}, gradient_clipping={self._clipping}"

    def _skip(self) -> None:
        self._last["stepped"] = False

    @property
    def stepped(self) -> bool:
        """True if the last ``step()`` or ``flush()`` stepped the inner optimizer. Step the scheduler only then."""
        return bool(self._last["stepped"])

    def flush(self) -> None:
        """End an incomplete cycle: step with the mean of the micro-batches since the last step, if there are any.

        This calls the step hooks of ``optimizer.optimizer``, but not those of this wrapper.
        """
        self._fill_groups()
        self._check_kept()
        self._last["stepped"] = False
        with torch.no_grad():
            if (count := self._count()) > 0:
                self._step_with([], count)

    def discard(self) -> None:
        """Drop the micro-batches since the last step, for example if the inner optimizer refused them."""
        for state in self.state.values():
            if isinstance(state, dict) and state.get("accumulated_grads"):
                state["accumulated"].zero_()
                state["accumulated_grads"] = 0
        for group in self.param_groups:
            group["accumulated_steps"] = 0

    def _count(self) -> int:
        """Return the number of micro-batches so far in the cycle."""
        return max((int(group["accumulated_steps"]) for group in self.param_groups), default=0)

    def _make_state(self, parts: list[Part]) -> None:
        for part in parts:
            if "accumulated" not in self.state.get(part.param, {}):
                total = torch.zeros_like(part.grad, dtype=wide(part.grad.dtype))
                self.state[part.param].update(accumulated=total, accumulated_grads=0)
            self._widen(part, "accumulated")

    def _take(self, parts: list[Part]) -> None:
        self._last["stepped"] = False
        warn_if_not_zeroed(self.param_groups, self._last["said"])
        count = self._count() + 1
        if count >= self._steps:
            self._step_with(parts, count)
            return
        self._make_state(parts)
        for _, alike in by_kind(parts, lambda part: None):
            totals = [self.state[part.param]["accumulated"] for part in alike]
            torch._foreach_add_(totals, [part.grad for part in alike])
        for part in parts:
            self.state[part.param]["accumulated_grads"] += 1
        for group in self.param_groups:
            group["accumulated_steps"] = count

    def _step_with(self, parts: list[Part], count: int) -> None:
        """Step the inner optimizer with the mean of `count` micro-batches; `parts` is the last of them."""
        last = {part.param: part.grad for part in parts}
        summed = []
        for group in self.param_groups:
            for param in group["params"]:
                state, grad = self.state.get(param, {}), last.get(param)
                if state.get("accumulated_grads"):
                    total = state["accumulated"]
                    summed.append(Part(param, total.clone() if grad is None else total + grad, state, group))
                elif grad is not None:
                    dtype = wide(grad.dtype) if count > 1 else grad.dtype
                    summed.append(Part(param, grad.to(dtype, copy=True), state, group))
        lists = [[part.grad for part in alike] for _, alike in by_kind(summed, lambda part: None)]
        for grads in lists:
            torch._foreach_div_(grads, count)
        groups, shard_group = self.param_groups, self._shard_group
        if self._clipping > 0 and (summed or shard_group is not None or divisions(groups)):  # all ranks must take part
            devices = (grad.device for grads in lists for grad in grads)
            home = next((device for device in devices if not reads_are_free(device)), None)
            norm = global_norm([part.grad for part in summed], fastest_sum_of_squares, home, groups, shard_group)
            clip = clip_coefficient(norm, self._clipping)
            for grads in lists:
                torch._foreach_mul_(grads, clip.to(grads[0]) if isinstance(clip, Tensor) else clip)
        self._inner_step(summed, [part.grad for part in summed])
        self.discard()
        self._last["stepped"] = True

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            begun, steps = group.get("accumulated_steps", 0), group.get("accumulation_cycle")
            check_count_loaded("accumulated_steps", begun)
            if begun and steps != self._steps:
                raise ValueError(
                    f"state_dict was saved after {begun} of {steps} micro-batches, and the optimizer takes "
                    f"{self._steps}: construct it with steps={steps}. Between cycles a new Accumulate may use any "
                    "number"
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._last["stepped"] = False
        for group in self.param_groups:
            group["accumulation_cycle"] = self._steps

    def _check_state(self, param: Tensor, state: State) -> None:
        check_saved("accumulated", state["accumulated"], as_real(param).shape)
