"""The preset with models whose weights are bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grokadamw import GrokAdamW

from . import Method
from .grokadamw import DECAY, LR


def of_bfloat16(model: nn.Module, **settings: Any) -> GrokAdamW:
    """Convert the model to bfloat16, except for its inputs and outputs, and return the preset for it."""
    model.to(torch.bfloat16)
    model.register_forward_pre_hook(lambda _, inputs: tuple(map(_narrow, inputs)))
    model.register_forward_hook(lambda *call: call[-1].float())
    return GrokAdamW.for_grokking(model, **settings)


def _narrow(x: Any) -> Any:
    return x.to(torch.bfloat16) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


METHODS = [
    Method("grokadamw-bfloat16", "GrokAdamW.for_grokking with a model of bfloat16 weights", of_bfloat16, LR, DECAY)
]
