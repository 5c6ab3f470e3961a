"""The stages norm, and slow_grad to update, one tensor at a time: the definition for the other backends' tests.

The stages are those of the table in CONTRIBUTING.md. This file knows nothing about groups, signals, names or hooks: it
gets a batch and scalars, and writes parameters, state and step counts in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._numbers import accumulator
from .types import Batch, Scalars


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ g² over all elements of tensors on one device, squared and summed in float64, in list order, as 0-d."""
    dtype = accumulator(tensors[0].device)
    return torch.stack([tensor.to(dtype).square().sum() for tensor in tensors]).sum()


def step(batch: Batch, n: Scalars) -> None:
    """Do the stages slow_grad to update for every tensor, in place."""
    for i, theta in enumerate(batch.params):
        m, v, count = batch.exp_avgs[i], batch.exp_avg_sqs[i], batch.steps[i]
        mu = batch.grok_emas[i] if batch.grok_emas else None
        g = batch.grads[i].to(m.dtype)
        writable = n.writable()
        t = count.to(accumulator(count.device)) + 1
        # autograd may need the θ that is about to be overwritten
        start = theta.to(m.dtype, copy=torch.is_grad_enabled())
        new = _new_values(start, g, m, v, mu, t, n.beta1[i], n.bias_beta1[i], n)
        pairs = list(zip((m, v, mu, theta, count), (*new, t), strict=True))
        for old, value in pairs if n.micro_step.moves else pairs[:3]:
            if old is not None and value is not None:
                # not a product with 0 or 1, which NaN and infinity would survive
                old.copy_(value if writable is None else torch.where(writable, value, old))


def _new_values(
    theta: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    mu: Tensor | None,
    t: Tensor,
    beta1: float,
    bias_beta1: float,
    n: Scalars,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return (m, v, μ, θ) after step t, computed from their values before it."""
    k, decays, moves, _ = n.micro_step
    keep_mu, keep_m, keep_v = (n.alpha, beta1, n.beta2) if decays else (1, 1, 1)
    g = n.clip * (-g if n.maximize else g) / k
    if n.finite is not None and k > 1:
        g = torch.where(n.finite, g, 0)  # after multiplying by c: it is NaN if a gradient is
    g_hat = g
    if mu is not None:
        mu = keep_mu * mu + (1 - n.alpha) * g  # slow_grad
        lamb = n.lamb * (t > n.amplify_after).to(t.dtype) if moves else 0
        g_hat = g + lamb * mu  # amplify
    m = keep_m * m + (1 - beta1) * g_hat  # exp_avg
    v = keep_v * v + (1 - n.beta2) * k * (g if n.raw_second_moment else g_hat).square()  # exp_avg_sq
    # the update, in torch.optim.AdamW's order: decay, then step
    root = (1 - n.beta2**t).sqrt()
    denominator = (v.sqrt() + n.eps) / root if n.eps_before_correction else v.sqrt() / root + n.eps
    theta = theta * (1 - n.lr * n.weight_decay) - n.lr / (1 - bias_beta1**t) * (m / denominator)
    return m, v, mu, theta
