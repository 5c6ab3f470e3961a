"""GrokAdamW with its defaults, with its preset for grokking, and with parts of the preset."""

from __future__ import annotations

from typing import Any

from torch import nn

from grokadamw import GrokAdamW
from grokadamw.groups import WITH_NORMS
from grokadamw.signals import AccuracyGap

from . import Method

LR, DECAY = WITH_NORMS["lr"], WITH_NORMS["weight_decay"]
BOOST = {"decay_boost": WITH_NORMS["decay_boost"]}


def make(model: nn.Module, **settings: Any) -> GrokAdamW:
    return GrokAdamW(model.named_parameters(), **settings)


def by_accuracy(model: nn.Module, **settings: Any) -> GrokAdamW:
    return GrokAdamW.for_grokking(model, grokking_signal_fns=AccuracyGap(), **settings)


def rising_decay(model: nn.Module, weight_decay: float, **settings: Any) -> GrokAdamW:
    """Return the preset, whose decay rises from a quarter of `weight_decay` to all of it, like its own from 1 to 4."""
    return GrokAdamW.for_grokking(model, weight_decay=weight_decay / 4, **BOOST, **settings)


def norms_decay(model: nn.Module, weight_decay: float, share: float, **settings: Any) -> GrokAdamW:
    """Return the preset with another share of weight decay for norms."""
    optimizer = GrokAdamW.for_grokking(model, weight_decay=weight_decay, **settings)
    for group in optimizer.param_groups:
        if group["weight_decay"] == weight_decay / 3:
            group["weight_decay"] = share * weight_decay
    return optimizer


def same_lr(model: nn.Module, lr: float, weight_decay: float, **settings: Any) -> GrokAdamW:
    """Return the preset with the same learning rate and weight decay for embeddings as for weights."""
    optimizer = GrokAdamW.for_grokking(model, lr=lr, weight_decay=weight_decay, **settings)
    for group in optimizer.param_groups:
        if group["lr"] != lr:
            group.update(lr=lr, weight_decay=weight_decay)
    return optimizer


METHODS = [
    Method("grokadamw", "GrokAdamW with its defaults", make, lr=3e-3, weight_decay=1.0),
    Method("grokadamw-grokking", "GrokAdamW.for_grokking", GrokAdamW.for_grokking, LR, DECAY, with_its_decay=BOOST),
    Method(
        "grokadamw-by-accuracy",
        "GrokAdamW.for_grokking, whose signal is the gap between accuracies",
        by_accuracy,
        LR,
        DECAY,
        with_its_decay=BOOST,
    ),
    Method(
        "grokadamw-no-filter",
        "GrokAdamW.for_grokking without filter and signal",
        GrokAdamW.for_grokking,
        LR,
        DECAY,
        {"lamb": 0.0, "grokking_signal_fns": []},
    ),
    Method(
        "adamw-row-limits",
        "GrokAdamW.for_grokking without filter, signal and γ: AdamW with limited rows and a higher lr for embeddings",
        GrokAdamW.for_grokking,
        LR,
        DECAY,
        {"lamb": 0.0, "gamma": 0.0, "grokking_signal_fns": []},
    ),
    Method(
        "grokadamw-short-rows",
        "GrokAdamW with rows no longer than 1, γ 0.3, α 0.9",
        make,
        1e-3,
        3.0,
        {"max_row_norm": 1.0, "gamma": 0.3, "alpha_init": 0.9},
    ),
    Method(
        "grokadamw-norm-decay",
        "GrokAdamW.for_grokking, norms with another share of weight decay, or none",
        norms_decay,
        LR,
        DECAY,
        {"share": 0.0},
    ),
    Method(
        "grokadamw-same-lr",
        "GrokAdamW.for_grokking, embeddings learn as slowly as weights",
        same_lr,
        LR,
        DECAY,
    ),
    Method(
        "grokadamw-rising-decay",
        "GrokAdamW.for_grokking, decay rising to wd by its signal",
        rising_decay,
        LR,
        4 * DECAY,
    ),
]
