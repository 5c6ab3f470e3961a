"""GrokAdamW with its defaults and with its preset, and what remains of that with each of its parts left out."""

from __future__ import annotations

from typing import Any

from torch import nn

from grokadamw import GrokAdamW

from . import Method


def plain(model: nn.Module, **settings: Any) -> GrokAdamW:
    return GrokAdamW(model.named_parameters(), **settings)


def preset(name: str, about: str, **options: Any) -> Method:
    return Method(name, about, GrokAdamW.for_grokking, lr=1e-3, weight_decay=3.0, options=options)


METHODS = [
    Method("grokadamw", "GrokAdamW with its defaults", plain, lr=3e-3, weight_decay=1.0),
    preset("grokadamw-grokking", "GrokAdamW.for_grokking"),
    preset("grokadamw-grokking-no-filter", "without the filter", lamb=0.0),
    preset("grokadamw-grokking-no-gamma", "without γ", gamma=0.0),
    preset("grokadamw-grokking-no-cap", "without the cap on rows", max_row_norm=0.0),
    preset("grokadamw-grokking-fixed-alpha", "without a signal", grokking_signal_fns=[]),
    preset("grokadamw-grokking-no-clipping", "without clipping", gradient_clipping=0.0),
    preset("grokadamw-grokking-raw", 'with second_moment="raw"', second_moment="raw"),
]
