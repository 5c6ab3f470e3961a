"""Grokfast's two filter functions, with the names, arguments and usage of https://github.com/ironjr/grokfast.

Call them between ``backward()`` and ``step()``; they modify the gradients in place. The optimizers in `grokfast` do the
same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_count, check_number
from ._numbers import as_real, resolved, wide
from .shards import mesh_of, part
from .state import window
from .state.slots import check_grad, overlaps

__all__ = ["gradfilter_ema", "gradfilter_ma"]


@torch.no_grad()
def gradfilter_ema(
    m: nn.Module, grads: dict[str, Tensor] | None = None, alpha: float = 0.98, lamb: float = 2.0
) -> dict[str, Tensor]:
    """Amplify the slow part of a model's gradients in place: add λ times their exponential moving average μ.

    With a GradScaler, call ``unscale_`` first, and skip this call if it found infinity: infinity and NaN stay in μ.

    ```python
    grads = None
    for x, y in batches:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        grads = gradfilter_ema(model, grads)
        optimizer.step()
    ```

    Args:
        m: the model. Parameters that are frozen or have no gradient are left out. A parameter's filter starts at its
            first gradient.
        grads: the return value of the last call; None at first. It is modified in place.
        alpha: α in [0, 1].
        lamb: λ ≥ 0.

    Returns:
        μ by parameter name, in the gradient's shape and dtype, but at least float32.

    Raises:
        TypeError, ValueError: an argument is not as described above, or `grads` belongs to other parameters.
        RuntimeError: a gradient is sparse. In every case, no gradient was changed.
    """
    check_number("alpha", alpha, at_most=1)
    check_number("lamb", lamb)
    found = _gradients(m)
    memory: dict[str, Tensor] = _memory(m, grads)
    for name, grad in found.items():
        if name in memory:
            _check_kept(f"grads[{name!r}]", memory[name], grad.shape)
    new = {name: grad for name, grad in found.items() if name not in memory}
    memory.update({name: grad.to(wide(grad.dtype), copy=True) for name, grad in new.items()})
    for names in _alike(found):
        old = [name for name in names if name not in new]
        if old:
            torch._foreach_lerp_([memory[n] for n in old], [found[n].to(memory[n].dtype) for n in old], 1 - alpha)
        torch._foreach_add_([found[n] for n in names], [memory[n] for n in names], alpha=lamb)
    return memory


@torch.no_grad()
def gradfilter_ma(
    m: nn.Module,
    grads: dict[str, Any] | None = None,
    window_size: int = 100,
    lamb: float = 5.0,
    filter_type: str = "mean",
    warmup: bool = True,
    trigger: bool = False,
) -> dict[str, Any]:
    """Amplify the slow part of a model's gradients in place: add λ times the mean of the last w gradients.

    A call takes the same time for any w. Use it like `gradfilter_ema`; NaN and infinity stay for up to 2 w calls.

    Args:
        m: the model. Parameters that are frozen or have no gradient are left out. A parameter's filter starts at its
            first gradient.
        grads: the return value of the last call; None at first. It is modified in place.
        window_size: w ≥ 1, how many gradients to keep.
        lamb: λ ≥ 0.
        filter_type: ``"mean"``, or ``"sum"``.
        warmup: add nothing until a parameter has had w gradients. If False, the mean or sum so far is added, and
            `trigger` is ignored.
        trigger: keep gradients, but add nothing.

    Returns:
        For each parameter name, a dict with ``ring`` (w, *shape), in the gradient's dtype (float32 for float16),
        ``ring_sum`` and ``ring_lap`` (shape), at least float32, and ``ring_count``, 0-d int64. Complex gradients are
        kept as two real numbers per element.

    Raises:
        TypeError, ValueError: an argument is not as described above, or `grads` belongs to other parameters or to
            another window.
        RuntimeError: a gradient is sparse. In every case, no gradient was changed.
    """
    check_window(window_size, filter_type)
    check_number("lamb", lamb)
    given = _gradients(m)
    found = {name: as_real(grad) for name, grad in given.items()}
    memory = _memory(m, grads)
    for name, grad in found.items():
        kept = memory.get(name)
        if isinstance(kept, deque):  # as returned by the published function
            if kept.maxlen != window_size:
                raise ValueError(
                    f"grads[{name!r}] is of window_size={kept.maxlen}: give that, or None to start from scratch"
                )
            for old in kept:
                _check_kept(f"grads[{name!r}]", old, given[name].shape)
        elif kept is not None:
            ring = kept.get("ring") if isinstance(kept, Mapping) else kept
            _check_kept(f"grads[{name!r}]['ring']", ring, (window_size, *grad.shape))
    for name, grad in found.items():
        kept = memory.get(name)
        if not isinstance(kept, Mapping):
            memory[name] = window.named(window.new(grad, window_size, None, torch.device("cpu")), "")
            for old in kept or ():
                window.push([window.of(memory[name], "")], [as_real(old)])
    for names in _alike(found):
        windows = [window.of(memory[name], "") for name in names]
        window.push(windows, [found[name] for name in names])
        for name, filled in zip(names, windows, strict=True):
            count = min(int(filled.seen), window_size)
            if not warmup or (count == window_size and not trigger):
                found[name].add_(filled.total, alpha=lamb / count if filter_type == "mean" else lamb)
    return memory


def check_window(window_size: int, filter_type: str) -> None:
    """Raise TypeError or ValueError if the arguments that define a filter's window are not allowed."""
    check_count("window_size", window_size, at_least=1)
    if filter_type not in ("mean", "sum"):
        raise ValueError(f"filter_type={filter_type!r} is unknown: give 'mean' or 'sum'")


def _gradients(m: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a model's parameters by name."""
    if not isinstance(m, nn.Module):
        raise TypeError(f"m is a {type(m).__name__}, and not a torch.nn.Module: give the model itself")
    found, places = {}, set[tuple[Any, Any]]()
    for name, param in m.named_parameters():
        if param.requires_grad and param.grad is not None:
            try:
                check_grad(param, param.grad)
            except RuntimeError as error:
                raise RuntimeError(f"{name}: {error}") from None
            grad = resolved(param.grad).resolve_neg()  # a gradient that can be modified
            own = part(grad)
            place = own.untyped_storage()._cdata, own.storage_offset()
            if place in places or overlaps(own):  # a sum's summands share one gradient: do not amplify it twice
                grad = grad.clone()
            places.add(place)
            if grad is not param.grad:
                param.grad = grad
            found[name] = grad.detach()
    return found


def _alike(grads: Mapping[str, Tensor]) -> Iterable[list[str]]:
    """Group the names of gradients that one torch._foreach operation can take together."""
    lists: dict[Any, list[str]] = {}
    for name, grad in grads.items():
        lists.setdefault((grad.device, mesh_of(grad), grad.dtype), []).append(name)
    return lists.values()


def _memory(m: nn.Module, grads: Any) -> dict[str, Any]:
    """Check and return `grads`, the return value of the last call; return an empty dict if it is None."""
    if grads is None:
        return {}
    if not isinstance(grads, dict):
        raise TypeError(
            f"grads is a {type(grads).__name__}: give what the last call returned, or None to start from scratch"
        )
    names = [name for name, _ in m.named_parameters()]
    if grads and not set(grads) & set(names):
        raise ValueError(
            f"grads is of other parameters ({next(iter(grads))}, …) than m's ({next(iter(names), 'none')}, …): "
            "give the same model in the same wrapper, or None to start from scratch"
        )
    return grads


def _check_kept(what: str, value: Any, shape: Iterable[int]) -> None:
    if not isinstance(value, Tensor) or value.shape != torch.Size(shape):
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise ValueError(
            f"{what} has {found}, and not shape {tuple(shape)}: give what the last call of this function for this "
            "model and this window_size returned, or None to start from scratch"
        )
