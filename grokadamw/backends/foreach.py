"""The stages norm, and slow_grad to update, with torch._foreach_*: a few launches for a whole list, on any device.

The functions and their results are those of `reference`, up to rounding. Numbers that differ between tensors (β1_l, the
bias corrections) are passed as lists of scalars, so layers cost no launches. If reading a number would make the host
wait for the device, it stays there as a 0-d tensor, and a step that must not be written changes all values by 0. This
costs launches: t is then known only to the device and takes two for each tensor, as in torch's capturable AdamW, and
masking values that are not finite takes two more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._numbers import Number, accumulator, reads_are_free
from ..state import window
from .types import Batch, Scalars

_TensorList: TypeAlias = tuple[Tensor, ...] | list[Tensor]
_BLOCK = 1 << 18  # elements at a time on the CPU: 2 MiB of float64, which fit into the cache


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ g² over all elements of tensors on one device, squared and summed in float64, in fixed order, as 0-d."""
    dtype = accumulator(tensors[0].device)
    small, large = list(tensors), []
    if tensors[0].is_cpu:
        # torch's norm would first convert a whole large tensor to float64, which does not fit into the cache
        small, large = ([x for x in tensors if (x.numel() > _BLOCK) is is_large] for is_large in (False, True))
    blocks = [block for x in large for block in torch.split(x.reshape(-1), _BLOCK)]
    sums = [block.to(dtype).square().sum() for block in blocks]
    if small:
        sums.append(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(small, 2, dtype=dtype))).square())
    return torch.stack(sums).sum()


def step(batch: Batch, scalars: Scalars) -> None:
    """Do the stages slow_grad to update for every tensor, in place."""
    parts = _parts(batch.params)
    if len(parts) == 1:
        _step(batch, scalars)
        return
    for part in parts:
        columns = [None if column is None else column[part] for column in batch[:6]]
        numbers = scalars._replace(beta1=scalars.beta1[part], bias_beta1=scalars.bias_beta1[part])
        _step(Batch(*columns), numbers)  # type: ignore[arg-type]


def _parts(params: list[Tensor]) -> list[slice]:
    """Return the slices of the list, one for each call: on the CPU several, as a long list would leave the cache."""
    if not params[0].is_cpu or torch.compiler.is_compiling():
        return [slice(None)]
    parts = []
    start = size = 0
    for end, param in enumerate(params, start=1):
        size += param.numel()
        if size >= _BLOCK or end == len(params):
            parts.append(slice(start, end))
            start, size = end, 0
    return parts


def _step(batch: Batch, n: Scalars) -> None:
    dtype = batch.exp_avgs[0].dtype
    m, v, mu = batch.exp_avgs, batch.exp_avg_sqs, batch.grok_emas
    writable = n.writable()
    active: Number = 1.0 if writable is None else writable.to(dtype)
    t = _next(batch.steps, active)
    root, correction = _corrections(t, n)

    if n.micro_step.k > 1:
        _collect_(batch, n, t)
        if n.micro_step.moves:
            _move_(batch, n, t, root, correction, 1.0)
        return

    g = _clipped(batch, n)
    if n.finite is not None:
        g = [torch.where(n.finite, x, 0) for x in g]  # 0 times NaN would be NaN
    g_hat = g
    if mu is not None:
        _average_(mu, g, 1 - n.alpha, active)  # slow_grad
        g_hat = amplified(g, mu, t, n)
    _average_(m, g_hat, [1 - beta1 for beta1 in n.beta1], active)  # exp_avg
    squared = g if n.raw_second_moment else g_hat
    if isinstance(active, Tensor):
        _average_(v, torch._foreach_mul(squared, squared), 1 - n.beta2, active)  # exp_avg_sq
    else:  # as torch's AdamW does: an infinite v stays infinite, and lerp would make it NaN
        torch._foreach_mul_(v, n.beta2)
        torch._foreach_addcmul_(v, squared, squared, 1 - n.beta2)
    del g, g_hat, squared  # so that the update can use their memory
    _move_(batch, n, t, root, correction, active)


def _collect_(batch: Batch, n: Scalars, t: list[Any]) -> None:
    """Do the stages slow_grad to exp_avg_sq for a micro-batch, adding it to the averages in place."""
    m, v, mu, dtype = batch.exp_avgs, batch.exp_avg_sqs, batch.grok_emas, batch.exp_avgs[0].dtype
    k, decays, moves, _ = n.micro_step
    g: _TensorList = [grad.to(dtype) for grad in batch.grads]
    factor = (-1.0 if n.maximize else 1.0) / k
    if n.finite is not None:
        g = [torch.where(n.finite, x, 0) for x in _mul(g, n.clip)]  # after multiplying by c: it is NaN if a gradient is
    elif isinstance(n.clip, Tensor):
        g = _mul(g, n.clip)
    else:
        factor *= n.clip
    if decays:
        torch._foreach_mul_(m, list(n.beta1))
        torch._foreach_mul_(v, n.beta2)
        if mu is not None:
            torch._foreach_mul_(mu, n.alpha.to(dtype) if isinstance(n.alpha, Tensor) else n.alpha)
    if mu is not None:
        _add_(mu, g, (1 - n.alpha) * factor)  # slow_grad
    for beta1 in dict.fromkeys(n.beta1):  # one call per layer, which may have several tensors
        places = [i for i, other in enumerate(n.beta1) if other == beta1]
        first = [m[i] for i in places]
        _add_(first, [g[i] for i in places], (1 - beta1) * factor)  # exp_avg
        if mu is not None and moves:  # amplify
            for i in places:
                late = t[i] > n.amplify_after
                if isinstance(late, Tensor):  # when compiled, add_ loses a 0-d float64 on a CPU
                    torch._foreach_add_([m[i]], [mu[i] * (n.lamb * late.to(dtype)).to(dtype)], alpha=1 - beta1)
                elif late:
                    m[i].add_(mu[i], alpha=(1 - beta1) * float(n.lamb))
    torch._foreach_addcmul_(v, g, g, (1 - n.beta2) * k * factor**2)  # exp_avg_sq


def _add_(averages: _TensorList, values: _TensorList, weight: Number) -> None:
    if isinstance(weight, Tensor):
        torch._foreach_add_(averages, _mul(values, weight))
    else:
        torch._foreach_add_(averages, values, alpha=weight)


def _move_(batch: Batch, n: Scalars, t: list[Any], root: list[Any], correction: list[Any], active: Number) -> None:
    """Do the stage update: move the parameters."""
    m, v, dtype = batch.exp_avgs, batch.exp_avg_sqs, batch.exp_avgs[0].dtype
    theta = [param.to(dtype) for param in batch.params]
    denominator = torch._foreach_sqrt(v)
    if n.eps_before_correction:
        torch._foreach_add_(denominator, n.eps)
        torch._foreach_div_(denominator, root)
    else:
        torch._foreach_div_(denominator, root)
        torch._foreach_add_(denominator, n.eps)
    if not any(isinstance(number, Tensor) for number in (n.lr, n.weight_decay, active, t[0])):
        torch._foreach_mul_(theta, 1 - n.lr * n.weight_decay)
        torch._foreach_addcdiv_(theta, m, denominator, [-n.lr / c for c in correction])
    else:
        torch._foreach_mul_(denominator, correction)
        move: _TensorList = torch._foreach_div(m, denominator)
        _add_(move, theta, n.weight_decay)
        if isinstance(active, Tensor):
            move = [torch.where(active > 0, x, 0) for x in move]
        torch._foreach_sub_(theta, _mul(move, n.lr))
    for param, new in zip(batch.params, theta, strict=True):
        if param is not new:
            param.copy_(new)
    _advance(batch.steps, active)


def average(batch: Batch, n: Scalars) -> None:
    """Set μ to the mean of each window. All backends use this, and do the other stages with α = 1."""
    assert batch.grok_emas is not None
    window.average(batch.windows, _clipped(batch, n), batch.grok_emas, n.finite)


def _clipped(batch: Batch, n: Scalars) -> _TensorList:
    """Return c g in the dtype of the state, negated for `maximize`."""
    g: _TensorList = [grad.to(batch.exp_avgs[0].dtype) for grad in batch.grads]
    if n.maximize or not isinstance(n.clip, float) or n.clip != 1:
        g = _mul(g, -n.clip if n.maximize else n.clip)
    return g


def _next(steps: list[Tensor], active: Number) -> list[Any]:
    """Return each tensor's t at this step: Python numbers if reading them is free, else 0-d float64 tensors."""
    if not torch.compiler.is_compiling() and reads_are_free(steps[0].device) and isinstance(active, float):
        return [count.item() + 1 for count in steps]
    return list((torch.stack(steps).to(accumulator(steps[0].device)) + 1).unbind())


def _advance(steps: list[Tensor], active: Number) -> None:
    """Count this step."""
    if isinstance(active, Tensor):
        torch._foreach_add_(steps, [active.to(steps[0].dtype)] * len(steps))
    else:
        # on the CPU torch would wrap a Python 1 in a new tensor for each count
        one: Any = torch.tensor(1.0, device="cpu") if steps[0].is_cpu else 1
        torch._foreach_add_(steps, one)


def _corrections(t: list[Any], n: Scalars) -> tuple[list[Any], list[Any]]:
    """Return √(1 − β2^t) and 1 − β1^t of each tensor, as Python numbers or tensors like t."""
    if not isinstance(t[0], Tensor):
        return [(1 - n.beta2**x) ** 0.5 for x in t], [1 - beta1**x for beta1, x in zip(n.bias_beta1, t, strict=True)]
    root = list((1 - n.beta2 ** torch.stack(t)).sqrt().unbind())
    if torch.compiler.is_compiling():  # the compiler fuses these into one launch; it would make a logarithm a constant
        return root, [1 - beta1**x for beta1, x in zip(n.bias_beta1, t, strict=True)]
    # all tensors at once, as exp(t log β): for β^t a list of β would have to be sent to the device
    logs = [math.log(beta1) if beta1 else -math.inf for beta1 in n.bias_beta1]
    correction = -torch.stack(torch._foreach_mul(t, logs)).expm1()
    return root, list(correction.unbind())


def amplified(g: _TensorList, mu: list[Tensor], t: Iterable[Any], n: Scalars) -> _TensorList:
    """Return c g + λ μ in new tensors, with λ = 0 until t > amplify_after."""
    if n.amplify_after == 0 and not isinstance(n.lamb, Tensor):
        return torch._foreach_add(g, mu, alpha=n.lamb)
    if n.amplify_after == 0:
        added: _TensorList = _mul(mu, n.lamb)
    else:
        late, dtype = [count > n.amplify_after for count in t], mu[0].dtype
        factors = [(n.lamb * x.to(dtype)).to(dtype) if torch.is_tensor(x) else n.lamb * x for x in late]
        added = torch._foreach_mul(mu, factors)
    torch._foreach_add_(added, g)
    return added


def _mul(tensors: _TensorList, factor: Number) -> _TensorList:
    """Return factor · tensors in new tensors."""
    if isinstance(factor, Tensor):
        return torch._foreach_mul(tensors, factor.to(tensors[0].dtype))
    return torch._foreach_mul(tensors, factor)


def _average_(averages: list[Tensor], values: _TensorList, weight: Number | list[float], active: Number) -> None:
    """Set averages to (1 − weight) · averages + weight · values, in the fewest passes that the numbers allow."""
    if isinstance(weight, list) and not torch.compiler.is_compiling() and len(set(weight)) == 1:
        weight = weight[0]
    if isinstance(weight, list):
        difference: _TensorList = torch._foreach_sub(values, averages)
        torch._foreach_mul_(difference, weight)
        if isinstance(active, Tensor):
            torch._foreach_mul_(difference, active)
        torch._foreach_add_(averages, difference)
        return
    weight = weight * active
    if isinstance(weight, Tensor):
        torch._foreach_mul_(averages, (1 - weight).to(averages[0].dtype))
        torch._foreach_add_(averages, _mul(values, weight))
    else:
        torch._foreach_lerp_(averages, values, weight)
