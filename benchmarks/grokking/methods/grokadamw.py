"""GrokAdamW with its defaults, and with its preset for grokking."""

from __future__ import annotations

from typing import Any

from torch import nn

from grokadamw import GrokAdamW

from . import Method


def make(model: nn.Module, **settings: Any) -> GrokAdamW:
    return GrokAdamW(model.named_parameters(), **settings)


def adamw(model: nn.Module, max_row_norm: float, **settings: Any) -> GrokAdamW:
    """GrokAdamW without filter and γ is AdamW; with gradients clipped to norm 1 and short rows."""
    return make(model, lamb=0.0, gamma=0.0, grokking_signal_fns=[], max_row_norm=max_row_norm, **settings)


METHODS = [
    Method("adamw-short-rows", "AdamW, all rows no longer than 1", adamw, 3e-3, 1.0, {"max_row_norm": 1.0}),
    Method("grokadamw", "GrokAdamW with its defaults", make, lr=3e-3, weight_decay=1.0),
    Method("grokadamw-grokking", "GrokAdamW.for_grokking", GrokAdamW.for_grokking, lr=1e-3, weight_decay=3.0),
]
