"""The stages norm, and slow_grad to update, one tensor at a time: what faster implementations are tested against.

The stages are those of the table in CONTRIBUTING.md. Nothing here knows of groups, signals, names or hooks:
lists of real tensors and numbers come in, and parameters, state and step counts are written in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..numbers import Number, accumulator, whole


class Tensors(NamedTuple):
    """Parallel lists, one entry a parameter: on one device, with one dtype for parameters, gradients and state each.

    Arithmetic is done in the state's dtype. Complex tensors come as their real views.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    grok_emas: list[Tensor] | None  # None: no slow gradient is kept, slow_grad is left out and amplify is ĝ = c g
    steps: list[Tensor]  # 0-d, the steps taken before this one
    kept: Any = None  # what the implementation keeps of these lists between steps; see `memory.where`
    row_widths: list[int] | None = None  # elements of a row, for an implementation that limits rows; 0: not of this one


def written(tensors: Tensors, moves: bool = True) -> list[list[Tensor]]:
    """The lists that a step writes to; without those that only the last of several micro-batches does."""
    columns = (tensors.params, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.grok_emas, tensors.steps)
    averages = (tensors.exp_avgs, tensors.exp_avg_sqs, tensors.grok_emas)
    return [column for column in (columns if moves else averages) if column is not None]


class MicroStep(NamedTuple):
    """One of several micro-batches of a step, which adds a k-th of its gradient to the averages."""

    of: int  # k
    decays: bool  # these tensors' first in the cycle: averages decay
    moves: bool  # the cycle's last: μ joins m, θ moves, and the step is counted


class Numbers(NamedTuple):
    """What the stages slow_grad to limit_rows need besides the tensors; lists are parallel to them."""

    beta1: Sequence[float]  # β1_l, one a tensor
    bias_beta1: Sequence[float]  # the β1 that the update corrects m with, one a tensor
    beta2: float
    lr: Number
    eps: float
    eps_before_correction: bool  # ε joins √v before v's bias correction, as in release 0.1.2
    weight_decay: float
    alpha: Number  # α_t
    lamb: float  # λ
    amplify_after: int  # λ acts on a tensor's steps after this many
    clip: Number  # c
    raw_second_moment: bool  # v of (c g)² instead of ĝ²
    maximize: bool
    finite: Tensor | None  # 0-d bool: where it is False, nothing is written. None: the caller has looked already
    micro_step: MicroStep = MicroStep(1, True, True)  # of more than one: where `finite` is False, the gradient is 0
    max_row_change: float = 0.0  # for the tensors that have `row_widths`; see rows.py
    max_row_norm: float = 0.0


def limited_widths(tensors: Tensors, numbers: Numbers) -> list[int]:
    """Return the elements of a row for each tensor; 0 for those whose rows this step does not limit."""
    limited = numbers.micro_step.moves and (numbers.max_row_change or numbers.max_row_norm)
    return list(tensors.row_widths) if limited and tensors.row_widths else [0] * len(tensors.params)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Σ g² over all elements of tensors on one device, squared and summed in float64, in list order: a 0-d tensor."""
    dtype = accumulator(tensors[0].device)
    return whole(torch.stack([tensor.to(dtype).square().sum() for tensor in tensors]).sum())


def step(tensors: Tensors, numbers: Numbers) -> None:
    """Do the stages slow_grad to update for every tensor, in place."""
    for i, theta in enumerate(tensors.params):
        m, v, count = tensors.exp_avgs[i], tensors.exp_avg_sqs[i], tensors.steps[i]
        mu = tensors.grok_emas[i] if tensors.grok_emas else None
        g = tensors.grads[i].to(m.dtype)
        finite = numbers.finite if numbers.micro_step.of == 1 else None
        t = count.to(accumulator(count.device)) + 1
        # a derivative may need θ as it was before it is written over
        start = theta.to(m.dtype, copy=torch.is_grad_enabled())
        new = _new_values(start, g, m, v, mu, t, numbers.beta1[i], numbers.bias_beta1[i], numbers)
        pairs = list(zip((m, v, mu, theta, count), (*new, t), strict=True))
        for old, value in pairs if numbers.micro_step.moves else pairs[:3]:
            if old is not None and value is not None:
                # a product with 0 or 1 would not do: NaN and infinity survive it
                old.copy_(value if finite is None else torch.where(finite, value, old))


def _new_values(
    theta: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    mu: Tensor | None,
    t: Tensor,
    beta1: float,
    bias_beta1: float,
    n: Numbers,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(m, v, μ, θ) after step t, from those before it."""
    k, decays, moves = n.micro_step
    keep_mu, keep_m, keep_v = (n.alpha, beta1, n.beta2) if decays else (1, 1, 1)
    g = n.clip * (-g if n.maximize else g) / k
    if n.finite is not None and k > 1:
        g = torch.where(n.finite, g, 0)  # after c, which is NaN where they are
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
