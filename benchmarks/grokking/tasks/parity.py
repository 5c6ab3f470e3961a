"""Sparse parity: the product of three signs among 43 (arXiv:2207.08799)."""

from __future__ import annotations

import torch
from torch import nn

from . import Data, Task, split, starts

BITS, RELEVANT, TRAIN, HELD_OUT = 43, 3, 2000, 4000


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(BITS, 256), nn.ReLU(), nn.Linear(256, 2))


def data(seed: int) -> Data:
    bits = torch.randint(2, (TRAIN + HELD_OUT, BITS), generator=torch.Generator().manual_seed(seed))
    return split(2.0 * bits - 1, bits[:, :RELEVANT].sum(1) % 2, TRAIN, seed)


TASKS = [
    Task(
        "parity",
        f"the parity of {RELEVANT} of {BITS} bits from {TRAIN:,} examples, a hidden layer of 256",
        starts(model, data, 256),
        budget=10000,
        evaluate_every=50,
    )
]
