"""The Grokfast filters, in front of torch's optimizers (arXiv:2405.20233)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from grokadamw import Grokfast, GrokfastMA

from . import Method


def ema(model: nn.Module, alpha: float, lamb: float, **settings: Any) -> Optimizer:
    return Grokfast(Adam(model.parameters(), **settings), alpha, lamb)


def ema_decoupled(model: nn.Module, alpha: float, lamb: float, **settings: Any) -> Optimizer:
    return Grokfast(AdamW(model.parameters(), **settings), alpha, lamb)


def ma(model: nn.Module, window_size: int, lamb: float, **settings: Any) -> Optimizer:
    return GrokfastMA(Adam(model.parameters(), **settings), window_size, lamb)


EMA = {"alpha": 0.98, "lamb": 2.0}

METHODS = [
    Method("grokfast", "Grokfast's EMA and Adam, as published", ema, weight_decay=0.005, options=EMA),
    Method(
        "grokfast-ma",
        "Grokfast's moving average and Adam, as published",
        ma,
        weight_decay=0.01,
        options={"window_size": 100, "lamb": 5.0},
    ),
    Method(
        "grokfast-adamw",
        "Grokfast's EMA and AdamW, gradients clipped to norm 1",
        ema_decoupled,
        lr=3e-3,
        weight_decay=1.0,
        options=EMA,
        clip=1.0,
    ),
]
