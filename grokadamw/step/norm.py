"""The stages norm and clip: the norm of all gradients, the clip coefficients, and a check that all are finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from .._numbers import Number, accumulator, as_float, as_number, as_real, is_on_host, product, reads_are_free
from ..backends import foreach, gpu
from ..distributed import share_of, sum_over_ranks
from ..options import rules_of
from ..shards import Shards, divisions, local_parts
from .batches import Batches, Given

SumOfSquares = Callable[[Sequence[Tensor]], Tensor]


class GradStats(NamedTuple):
    """Measurements of the gradients."""

    norm: Number | None  # N; None if nothing needed it. With compat, over the tensors' own norms
    clips: list[Number]  # c for each batch, or group: see `LastStep`; only `metrics` shows it
    factors: list[Number]  # c for each batch, divided by the loss scale: gradients are multiplied by it
    finite: bool | Tensor  # True if the step may be written; a tensor if reading it would make the host wait


def stats(
    found: Batches,
    limits: Sequence[float],
    given: Given,
    nonfinite: str,
    needs_norm: bool,
    counter: Callable[[torch.device], Tensor],
) -> GradStats:
    """Measure the gradients in the fastest way, and count the step if it is skipped on a device.

    Args:
        limits: `gradient_clipping` for each batch.
        nonfinite: the option, or "propagate" if it has no effect.
        needs_norm: True if N must be measured.
        counter: returns the count of skipped steps, on the given device if possible.
    """
    options, each_tensor = given.options, rules_of(given.options).clips_each_tensor
    is_scaled = given.scale is not None or given.found_inf is not None
    # the native kernel knows all addresses, or nothing needs N: there is no choice to make
    if found.squares is not None or not (is_scaled or needs_norm):
        return _measure(found, limits, given, nonfinite, needs_norm)

    sum_of_squares = backends.sum_of_squares(options, given.compiling)
    home = next((device for device in found.devices if not is_on_host(device, options["differentiable"])), None)
    fastest = sum_of_squares is backends.fastest_sum_of_squares
    on_one_gpu = home is not None and len(found.devices) == 1 and not each_tensor
    judges = fastest and on_one_gpu and nonfinite != "raise" and given.shard_group is None
    # A graph reads the verdict at each replay: capture `judge` only with tables, which outlive the step.
    if judges and (found.tables or not given.capturing):
        judged = _judge(found, limits, given, nonfinite, needs_norm, counter)
        if judged is not None:
            return judged
    if fastest and given.capturing:  # the GPU's own sum would use tables that are gone after the call
        sum_of_squares = foreach.sum_of_squares
    return _measure(found, limits, given, nonfinite, needs_norm, sum_of_squares, home, counter)


def _measure(
    found: Batches,
    limits: Sequence[float],
    given: Given,
    nonfinite: str,
    needs_norm: bool,
    sum_of_squares: Any = None,
    home: torch.device | None = None,
    counter: Any = None,
) -> GradStats:
    """Do `stats` on any devices, by `found.squares` if there is such a function, or by `sum_of_squares`.

    Numbers that the host cannot read without waiting stay on the device `home`; None for Python numbers.
    """
    scale, found_inf = given.scale, given.found_inf
    total: Number | None = None
    norms: list[Number | None] = [None] * len(limits)
    if needs_norm and rules_of(given.options).clips_each_tensor:
        of_tensors = [_norm([(batch.shards, batch.grads)], sum_of_squares, home) for batch in found.batches]
        total, norms = _joined(of_tensors), list[Number | None](of_tensors)
    elif needs_norm:
        if found.squares is not None:
            total = _norm_by_address(found.squares, found.grads[0][0], given)
        else:
            total = _norm(found.grads, sum_of_squares, home, given.groups, given.shard_group)
        norms = [total] * len(limits)
    if scale is not None:
        unscale = 1 / as_number(scale, "grad_scale")
        total, *norms = (None if norm is None else product(norm, unscale) for norm in (total, *norms))
    clips = [clip_coefficient(norm, limit) for norm, limit in zip(norms, limits, strict=True)]
    factors = clips if scale is None else [product(clip, unscale) for clip in clips]
    finite: bool | Tensor = True
    if nonfinite != "propagate" and total is not None:
        finite = torch.isfinite(total) if isinstance(total, Tensor) else math.isfinite(total)
    skipped = torch.logical_not(finite) if isinstance(finite, Tensor) else None
    if found_inf is not None:
        none_found = found_inf.reshape(()) == 0
        if isinstance(finite, Tensor):
            none_found = none_found.to(finite.device)
            skipped = torch.logical_and(torch.logical_not(finite), none_found)
        finite = none_found if finite is True else torch.logical_and(none_found, torch.as_tensor(finite))
    if skipped is not None and torch._C._functorch.is_batchedtensor(skipped):
        raise RuntimeError(
            "nonfinite='skip' under torch.func.vmap: each example would skip steps of its own, and they share the "
            "count of steps; give nonfinite='propagate'"
        )
    if skipped is not None:  # steps in which GradScaler found infinity do not count as skipped
        count = counter(skipped.device)
        count.add_(skipped.to(count.device))  # in place, for CUDA graphs
    return GradStats(total, clips, factors, finite)


def _judge(
    found: Batches,
    limits: Sequence[float],
    given: Given,
    nonfinite: str,
    needs_norm: bool,
    counter: Callable[[torch.device], Tensor],
) -> GradStats | None:
    """Do `stats` in two launches on the one GPU that holds all gradients; return None if that is impossible."""
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
    at, tables = found.at, found.tables
    verdict = gpu.judge(grads, limits, scale, found_inf, skipped, needs_norm=needs_norm, at=at, tables=tables)
    finite = verdict.finite if nonfinite == "skip" or found_inf is not None else True
    return GradStats(verdict.norm if needs_norm else None, [*verdict.clips], [*verdict.factors], finite)


def _norm_by_address(sum_of_squares: Callable[[], float], shards: Shards | None, given: Given) -> float:
    """Return N by a function that knows the addresses of this rank's gradients, which `shards` divides over ranks."""
    squares = sum_of_squares()
    if shards is not None:
        squares = shards.total([squares]).item()
    if given.shard_group is not None:
        summand = share_of(squares, shards, given.shard_group)
        squares = sum_over_ranks([summand], given.groups, given.shard_group).item()
    return math.sqrt(squares)


def _joined(norms: Sequence[Number]) -> Number | None:
    """Return the norm of all elements of tensors from the norm of each; None if there are no tensors."""
    if not norms:
        return None
    tensors = [norm for norm in norms if isinstance(norm, Tensor)]
    return torch.linalg.vector_norm(torch.stack(tensors)) if tensors else math.hypot(*norms)


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
    """Do `global_norm` for lists of real tensors, each of which is divided over ranks in one way."""
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
