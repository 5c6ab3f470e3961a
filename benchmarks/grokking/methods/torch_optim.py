"""Torch's own optimizers."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from . import Method, groups


def adamw(model: nn.Module, **settings: Any) -> Optimizer:
    return AdamW(model.parameters(), **settings)


def adamw_matrices(model: nn.Module, weight_decay: float, **settings: Any) -> Optimizer:
    return AdamW(groups(model, weight_decay), **settings)


def adam(model: nn.Module, **settings: Any) -> Optimizer:
    return Adam(model.parameters(), **settings)


METHODS = [
    Method("adamw", "AdamW, gradients clipped to norm 1", adamw, lr=3e-3, weight_decay=1.0, clip=1.0),
    Method(
        "adamw-matrices",
        "AdamW, gradients clipped to norm 1; biases and norms do not decay",
        adamw_matrices,
        3e-3,
        3.0,
        clip=1.0,
    ),
    Method("adam", "Adam without weight decay: the baseline of Grokfast's tables", adam, weight_decay=0.0),
]
