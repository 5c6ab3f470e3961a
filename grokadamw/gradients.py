"""The gradients as a whole: their norm, the clip coefficient, and whether they are finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .numbers import Number, as_number, as_real, mesh_of, product
from .update import gpu
from .update.gpu_tables import Tables


class Measured(NamedTuple):
    """What was found. The lists have an entry for each entry of work."""

    norms: list[Number | None]  # N, where anything asked for it: of all gradients, in compat of the tensor's
    clips: list[Number]  # c
    factors: list[Number]  # c divided by the loss scale
    finite: bool | Tensor  # whether the step may be written; a tensor where reading it would make the host wait
    skipped: Tensor | None  # on such a device: whether it may not, and GradScaler does not count that itself


def measure(
    lists: Sequence[Sequence[Tensor]],
    limits: Sequence[float],
    *,
    sum_of_squares: Callable[[Sequence[Tensor]], Tensor],
    known: Callable[[], float | None] | None,
    scale: Any,
    found_inf: Tensor | None,
    nonfinite: str,
    apart: bool,
    home: torch.device | None,
) -> Measured:
    """Measure the gradients with operations of torch, on any devices.

    Args:
        lists: the gradients of each entry of work.
        limits: its `gradient_clipping`.
        sum_of_squares: of a list on one device.
        known: Σ g² of all gradients, where there is a faster way to it.
        scale: what GradScaler has left in the gradients, None for 1.
        found_inf: GradScaler's, where the host cannot read it.
        nonfinite: as the optimizer's.
        apart: whether each list has a norm of its own.
        home: where numbers are kept that the host cannot read without waiting; None for Python's numbers.
    """
    unscale: Number = 1.0 if scale is None else 1 / as_number(scale, "grad_scale")
    norms = [
        None if norm is None else product(norm, unscale)
        for norm in _norms(lists, limits, sum_of_squares, known, nonfinite, apart, home)
    ]
    clips = [clip_coefficient(norm, limit) for norm, limit in zip(norms, limits, strict=True)]
    factors = [product(clip, unscale) for clip in clips]
    none_found = None if found_inf is None else found_inf.reshape(()) == 0
    if nonfinite == "propagate" or not norms or norms[0] is None:
        return Measured(norms, clips, factors, True if none_found is None else none_found, None)
    finite = is_finite(norms[0])
    if not isinstance(finite, Tensor):
        return Measured(
            norms,
            clips,
            factors,
            finite if none_found is None else torch.logical_and(none_found, torch.as_tensor(finite)),
            None,
        )
    skipped = torch.logical_not(finite)
    if none_found is not None:
        none_found = none_found.to(finite.device)
        finite, skipped = torch.logical_and(none_found, finite), torch.logical_and(skipped, none_found)
    return Measured(norms, clips, factors, finite, skipped)


def judge(
    lists: Sequence[Sequence[Tensor]],
    limits: Sequence[float],
    *,
    scale: Any,
    found_inf: Tensor | None,
    nonfinite: str,
    counter: Callable[[torch.device], Tensor],
    at: bytes | None,
    tables: Tables | None,
) -> Measured | None:
    """`measure` by two launches on the one GPU that has all gradients; None where it cannot be done so.

    Args:
        counter: of skipped steps, on a device: it is counted up here.
        at: where the gradients lie, if that is known.
        tables: of these gradients.
    """
    grads = [grad for mine in lists for grad in mine]
    if tables is None:
        grads = list(map(as_real, grads))
    wants_norm = norm_is_wanted(limits, nonfinite)
    if not grads or not gpu.is_for(grads[0].device):
        return None
    given = [x for x in (scale, found_inf) if x is not None]
    if any(not isinstance(x, Tensor) or x.dtype != torch.float32 for x in given):
        return None
    if any(x.device != grads[0].device for x in given) or (tables is None and not gpu.can_sum(grads)):
        return None
    skipped = counter(grads[0].device) if nonfinite == "skip" else None
    if skipped is not None and skipped.device != grads[0].device:
        return None
    verdict = gpu.judge(
        grads,
        limits,
        scale,
        found_inf,
        skipped,
        wants_norm=wants_norm,
        at=at,
        tables=tables,
    )
    norms: list[Number | None] = [verdict.norm if wants_norm else None] * len(lists)
    finite = verdict.finite if nonfinite == "skip" or found_inf is not None else True
    return Measured(norms, [*verdict.clips], [*verdict.factors], finite, None)


def _norms(
    lists: Sequence[Sequence[Tensor]],
    limits: Sequence[float],
    sum_of_squares: Callable[[Sequence[Tensor]], Tensor],
    known: Callable[[], float | None] | None,
    nonfinite: str,
    apart: bool,
    home: torch.device | None,
) -> list[Number | None]:
    if not norm_is_wanted(limits, nonfinite):
        return [None] * len(lists)
    if apart:
        return [global_norm(grads, sum_of_squares, home) for grads in lists]
    squares = known() if known and home is None else None
    if squares is None:
        return [global_norm([grad for grads in lists for grad in grads], sum_of_squares, home)] * len(lists)
    return [math.sqrt(squares)] * len(lists)


def norm_is_wanted(limits: Sequence[float], nonfinite: str) -> bool:
    """Whether anything asks for N."""
    return nonfinite != "propagate" or any(limit > 0 for limit in limits)


def global_norm(
    grads: Sequence[Tensor], sum_of_squares: Callable[[Sequence[Tensor]], Tensor], home: torch.device | None
) -> Number:
    """Return N = √Σg² over all elements of all gradients, on any devices: a float, or with home a 0-d tensor there."""
    sums = [sum_of_squares(tensors) for tensors in _by_place(grads)]
    if home is None:
        return math.sqrt(sum(total.item() for total in sums))
    total = torch.stack([total.to(home) for total in sums]).sum()
    if total.requires_grad:
        total = total.clamp(min=torch.finfo(total.dtype).tiny)  # the root's derivative at 0 is infinite
    return total.sqrt()


def _by_place(tensors: Sequence[Tensor]) -> Collection[Sequence[Tensor]]:
    """The tensors as real ones, in lists that lie on one device, or over one mesh."""
    if set(map(type, tensors)) == {Tensor} and len(set(map(Tensor.get_device, tensors))) == 1:
        return [list(map(as_real, tensors)) if any(map(Tensor.is_complex, tensors)) else tensors]  # and soon found
    lists: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault((tensor.device, mesh_of(tensor)), []).append(as_real(tensor))
    return lists.values()


def clip_coefficient(norm: Number | None, max_norm: float) -> Number:
    """Return c = min(1, max_norm / (N + 1e-6)), and 1 for a max_norm of 0: torch.nn.utils.clip_grad_norm_'s formula."""
    if norm is None or max_norm == 0:
        return 1.0
    coefficient = max_norm / (norm + 1e-6)
    if isinstance(coefficient, Tensor):
        return coefficient.clamp(max=1.0)
    return 1.0 if coefficient > 1.0 else coefficient  # NaN stays NaN, as it does there


def is_finite(norm: Number) -> bool | Tensor:
    """Whether no gradient holds NaN or infinity, and Σg² did not overflow; a 0-d tensor where the norm is one."""
    return torch.isfinite(norm) if isinstance(norm, Tensor) else math.isfinite(norm)
