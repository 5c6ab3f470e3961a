"""The update on the CPU without a compiler: blocks that fit into the cache; torch's fused AdamW does exp_avg to update.

Each block is read from memory once and written once, although several operations process it. torch._fused_adamw_ is a
private function: `why_not` finds out if torch lacks it, or if it cannot do what the options ask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .foreach import amplified, sum_of_squares
from .types import Batch, Scalars, written

__all__ = ["step", "sum_of_squares", "why_not"]

_BLOCK = 1 << 17  # elements; five operands and scratch take 3 MiB of float32
_SMALL = 1 << 12  # elements; for smaller tensors calls cost more than memory traffic, and foreach makes fewer calls


def why_not(tensors: Sequence[Tensor], raw_second_moment: bool, eps_before_correction: bool) -> str | None:
    """Return why this backend cannot take a parameter that `memory.why_not` has cleared, or None if it can."""
    if not hasattr(torch, "_fused_adamw_"):
        return "this torch has no fused AdamW"
    if raw_second_moment or eps_before_correction:
        return "torch's fused AdamW has no such second moment or bias correction"
    if any(x.dtype != tensors[0].dtype for x in tensors) or tensors[0].dtype not in (torch.float32, torch.float64):
        return "torch's fused AdamW takes no such mixture of dtypes"
    if tensors[0].numel() < _SMALL:
        return "a tensor this small is quicker in a list with others"
    return None


class _Block(NamedTuple):
    """Flat pieces of tensors that share one β1, at most _BLOCK elements in all, with the step counts of the tensors."""

    beta1: float
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    grok_emas: list[Tensor]
    steps: list[Tensor]


def step(batch: Batch, n: Scalars) -> None:
    """Do the stages slow_grad to update for every tensor, in place."""
    if n.finite is not None and not n.finite:
        return
    clip = -float(n.clip) if n.maximize else float(n.clip)
    torch._foreach_add_(batch.steps, torch.tensor(1.0, device="cpu"))
    for block in _blocks(batch, n.beta1):
        g = block.grads if clip == 1 else torch._foreach_mul(block.grads, clip)
        if block.grok_emas:
            torch._foreach_lerp_(block.grok_emas, g, 1 - float(n.alpha))  # slow_grad
            g = amplified(g, block.grok_emas, (count.item() for count in block.steps), n)  # amplify
        torch._fused_adamw_(  # exp_avg to update
            block.params,
            g,
            block.exp_avgs,
            block.exp_avg_sqs,
            [],
            block.steps,
            lr=float(n.lr),
            beta1=block.beta1,
            beta2=n.beta2,
            weight_decay=float(n.weight_decay),
            eps=n.eps,
            amsgrad=False,
            maximize=False,
        )
    for column in written(batch):  # the fused AdamW does not do this itself
        torch.autograd.graph.increment_version(column)


def _blocks(batch: Batch, beta1: Sequence[float]) -> Iterator[_Block]:
    block, size = _Block(0.0, [], [], [], [], [], []), 0
    for i, count in enumerate(batch.steps):
        columns = [torch.split(_flat(column[i]), _BLOCK) for column in batch[:5] if column is not None]
        for pieces in zip(*columns, strict=True):
            if block.beta1 != beta1[i] or size + pieces[0].numel() > _BLOCK:
                if size:
                    yield block
                block, size = _Block(beta1[i], [], [], [], [], [], []), 0
            for column, piece in zip(block[1:6], pieces, strict=False):  # without μ there is one piece fewer
                column.append(piece)
            block.steps.append(count)
            size += pieces[0].numel()
    if size:
        yield block


def _flat(tensor: Tensor) -> Tensor:
    """Return the elements as a vector, in memory order."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))
