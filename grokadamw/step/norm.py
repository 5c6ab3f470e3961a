"""The stages norm and clip: the norm of all gradients, the clip coefficients, and a check that all are finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._numbers import Number, accumulator, as_float, as_number, as_real, product, reads_are_free
from ..backends import gpu
from ..distributed import share_of, sum_over_ranks
from ..shards import Shards, divisions, local_parts
from .batches import Batches, Given

SumOfSquares = Callable[[Sequence[Tensor]], Tensor]


class GradStats(NamedTuple):
    """Measurements of the gradients. The lists have one entry per batch."""

    norms: list[Number | None]  # N of all gradients (with compat, of the tensor's own); None if unused
    clips: list[Number]  # c
    factors: list[Number]  # c divided by the loss scale
    finite: bool | Tensor  # True if the step may be written; a tensor if reading it would make the host wait
    skipped: Tensor | None = None  # if `finite` is a tensor: does this step count as skipped? GradScaler's do not


def measure(
    found: Batches,
    limits: Sequence[float],
    given: Given,
    nonfinite: str,
    sum_of_squares: Any = None,
    *,
    apart: bool = False,
    home: torch.device | None = None,
) -> GradStats:
    """Measure the gradients, on any devices, by `found.squares` if there is such a function, or by `sum_of_squares`.

    Args:
        limits: `gradient_clipping` for each batch.
        apart: True if each batch has a norm of its own.
        home: the device where numbers stay that the host cannot read without waiting; None for Python numbers.
    """
    scale, found_inf = given.scale, given.found_inf
    norms: list[Number | None]
    if not norm_is_wanted(limits, nonfinite):
        norms = [None] * len(limits)
    elif found.squares is not None:
        squares, shards = found.squares(), found.grads[0][0]
        if shards is not None:
            squares = shards.total([squares]).item()
        if given.shard_group is not None:
            summand = share_of(squares, shards, given.shard_group)
            squares = sum_over_ranks([summand], given.groups, given.shard_group).item()
        norms = [math.sqrt(squares)] * len(limits)
    elif apart:
        norms = [_norm([(batch.shards, batch.grads)], sum_of_squares, home) for batch in found.batches]
    else:
        norms = [_norm(found.grads, sum_of_squares, home, given.groups, given.shard_group)] * len(limits)
    if scale is not None:
        unscale = 1 / as_number(scale, "grad_scale")
        norms = [None if norm is None else product(norm, unscale) for norm in norms]
    clips = [clip_coefficient(norm, limit) for norm, limit in zip(norms, limits, strict=True)]
    factors = clips if scale is None else [product(clip, unscale) for clip in clips]
    finite: bool | Tensor = True
    skipped = None
    if nonfinite != "propagate" and norms and norms[0] is not None:
        finite = torch.isfinite(norms[0]) if isinstance(norms[0], Tensor) else math.isfinite(norms[0])
        skipped = torch.logical_not(finite) if isinstance(finite, Tensor) else None
    if found_inf is not None:
        none_found = found_inf.reshape(()) == 0
        if isinstance(finite, Tensor):
            none_found = none_found.to(finite.device)
            skipped = torch.logical_and(torch.logical_not(finite), none_found)
        finite = none_found if finite is True else torch.logical_and(none_found, torch.as_tensor(finite))
    return GradStats(norms, clips, factors, finite, skipped)


def judge(
    found: Batches, limits: Sequence[float], given: Given, nonfinite: str, counter: Callable[[torch.device], Tensor]
) -> GradStats | None:
    """Do `measure` in two launches on the one GPU that holds all gradients; return None if that is impossible.

    `counter` returns the count of skipped steps on a device, which this function increases.
    """
    scale, found_inf = given.scale, given.found_inf
    if len(found.grads) != 1 or found.grads[0][0] is not None:
        return None
    grads = found.grads[0][1]
    scalers = [x for x in (scale, found_inf) if x is not None]
    if any(not isinstance(x, Tensor) or x.dtype != torch.float32 or x.device != grads[0].device for x in scalers):
        return None
    if not (found.can_be_judged or gpu.can_sum(grads)):
        return None
    skipped = counter(grads[0].device) if nonfinite == "skip" else None
    if skipped is not None and skipped.device != grads[0].device:
        return None
    wants_norm = norm_is_wanted(limits, nonfinite)
    at, tables = found.at, found.tables
    verdict = gpu.judge(grads, limits, scale, found_inf, skipped, wants_norm=wants_norm, at=at, tables=tables)
    norms: list[Number | None] = [verdict.norm if wants_norm else None] * len(limits)
    finite = verdict.finite if nonfinite == "skip" or found_inf is not None else True
    return GradStats(norms, [*verdict.clips], [*verdict.factors], finite)


def norm_is_wanted(limits: Sequence[float], nonfinite: str) -> bool:
    """Return True if anything needs N."""
    return nonfinite != "propagate" or any(limit > 0 for limit in limits)


def global_norm(
    tensors: Sequence[Tensor],
    sum_of_squares: SumOfSquares,
    home: torch.device | None,
    groups: Sequence[Mapping[str, Any]] = (),
    shard_group: Any = None,
) -> Number:
    """Return N = √Σg² over all elements of all tensors, on any devices: a float, or with home a 0-d tensor there.

    `groups` hold all parameters, because this rank may lack gradients that other ranks have. DTensors are summed over
    the ranks that share them, and everything over the shard_group, if there is one.
    """
    lists = [(shards, list(map(as_real, parts))) for shards, parts in local_parts(tensors, divisions(groups))]
    return _norm(lists, sum_of_squares, home, groups, shard_group)


def _norm(
    lists: Sequence[tuple[Shards | None, Sequence[Tensor]]],
    sum_of_squares: SumOfSquares,
    home: torch.device | None,
    groups: Sequence[Mapping[str, Any]] = (),
    shard_group: Any = None,
) -> Number:
    sums: list[Tensor] = []
    for shards, tensors in lists:
        by_device: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            by_device.setdefault(tensor.device, []).append(tensor)
        here = list(map(sum_of_squares, by_device.values()))
        if shards is not None:
            here = [shards.total(here)]
        sums += here if shard_group is None else [share_of(total, shards, shard_group) for total in here]
    if shard_group is not None:  # sum last, and even if this rank has no gradients: all ranks must take part
        sums = [sum_over_ranks(sums, groups, shard_group)]
    if home is None:
        return math.sqrt(sum(total.item() for total in sums))
    total = torch.stack([total.to(home) for total in sums]).sum()
    if total.requires_grad:
        total = total.clamp(min=torch.finfo(total.dtype).tiny)  # the square root's derivative at 0 is infinite
    return total.sqrt()


def clip_coefficient(norm: Number | None, max_norm: float) -> Number:
    """Return c = min(1, max_norm / (N + 1e-6)), and 1 for a max_norm of 0: torch.nn.utils.clip_grad_norm_'s formula."""
    if norm is None or max_norm == 0:
        return 1.0
    coefficient = max_norm / (norm + 1e-6)
    if isinstance(coefficient, Tensor):
        return coefficient.clamp(max=1.0)
    return 1.0 if coefficient > 1.0 else coefficient  # NaN stays NaN, as in torch


class NormSoFar:
    """N for gradients that arrive one after the other and are clipped before all of them have arrived.

    It is the larger of two norms: that of the gradients so far, and `last`, the norm of the previous pass.
    """

    def __init__(self, last: Number) -> None:
        self._last = last
        self._squares: Number | None = None
        self._is_whole: bool | Tensor = True  # True if all norms so far were finite

    def add(self, norm: Number | None) -> None:
        """Add the norm of further gradients. Leave out one that is not finite: its parameter is skipped, or lost."""
        if norm is None:
            return
        before = 0.0 if self._squares is None else self._squares
        if isinstance(norm, Tensor):
            is_finite = torch.isfinite(norm)
            self._squares = _on(norm.device, before) + torch.where(is_finite, norm * norm, 0.0)
            self._is_whole = is_finite & _on(norm.device, self._is_whole)
        elif math.isfinite(norm):
            self._squares = before + norm * norm
        else:
            self._squares, self._is_whole = before, False

    @property
    def value(self) -> Number | None:
        """The norm of the gradients so far; None if none was measured."""
        return None if self._squares is None else self._squares**0.5

    @property
    def to_remember(self) -> Number:
        """The norm to pass on as the next `last`: `value`, or `last` if no gradient came or not all were finite."""
        norm = self.value
        if isinstance(norm, Tensor) and isinstance(self._is_whole, Tensor):
            return torch.where(self._is_whole, norm, _on(norm.device, self._last))
        return self._last if norm is None or not self._is_whole else norm

    def clip(self, limit: float, device: torch.device | None = None) -> Number:
        """Return c; if a device is given, as a number for parameters on that device."""
        so_far, last = self.value, self._last
        if not isinstance(so_far, Tensor) and not isinstance(last, Tensor):
            return clip_coefficient(None if so_far is None else max(so_far, last), limit)
        like = so_far if isinstance(so_far, Tensor) else torch.as_tensor(last)
        numbers = (0.0 if so_far is None else so_far), last
        both = [torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in numbers]
        c = clip_coefficient(torch.maximum(*both), limit)
        if device is None or not isinstance(c, Tensor):
            return c
        return as_float(c) if reads_are_free(device) else c.to(device, accumulator(device))


def _on(device: torch.device, value: Any) -> Any:
    """Return a tensor on that device, or a Python number as it is."""
    return value.to(device) if isinstance(value, Tensor) else value
