"""Methods that others report as good: a cap on rows' norms (Clip to Grok), OrthoGrad (arXiv:2501.04697), Muon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from . import Method


def inner_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all linear layers but the last, which makes the logits."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [module.weight for module in linear[:-1]]


def row_norm_cap(model: nn.Module, cap: float, **settings: Any) -> Optimizer:
    """Return AdamW with a hook that shortens rows of inner matrices to `cap` after each step if they are longer."""
    optimizer = AdamW(model.parameters(), **settings)

    @torch.no_grad()
    def shorten(*_: Any) -> None:
        for weight in inner_matrices(model):
            weight.mul_((cap / weight.norm(dim=1, keepdim=True)).clamp(max=1.0))

    optimizer.register_step_post_hook(shorten)
    return optimizer


def orthograd(model: nn.Module, **settings: Any) -> Optimizer:
    """Return AdamW with a hook that removes each gradient's part along the weights, and restores its length."""
    optimizer = AdamW(model.parameters(), **settings)

    @torch.no_grad()
    def project(*_: Any) -> None:
        for p in model.parameters():
            if p.grad is not None:
                w, g = p.flatten(), p.grad.flatten()
                across = g - torch.dot(w, g) / torch.dot(w, w).clamp(min=1e-30) * w
                p.grad.copy_((across * (g.norm() / across.norm().clamp(min=1e-30))).view_as(p))

    optimizer.register_step_pre_hook(project)
    return optimizer


class MuonAndAdamW(Optimizer):
    """Muon for the inner matrices, AdamW for everything else. Muon's update is scaled to the size of AdamW's
    (arXiv:2502.16982, section 2.2), so that both can share one learning rate and weight decay."""

    def __init__(self, model: nn.Module, betas: tuple[float, float], **settings: Any) -> None:
        matrices = inner_matrices(model)
        others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
        self.parts: list[Optimizer] = [AdamW(others, betas=betas, **settings)]
        if matrices:
            self.parts.insert(0, Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings))
        super().__init__(matrices + others, {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


METHODS = [
    Method(
        "row-norm-cap", "AdamW, rows of inner matrices no longer than 1", row_norm_cap, 3e-3, 0.0, {"cap": 1.0}, 1.0
    ),
    Method("orthograd", "AdamW, gradients orthogonal to the weights", orthograd, 3e-3, 1.0, clip=1.0),
    Method("muon", "Muon for inner matrices, AdamW for the rest", MuonAndAdamW, 3e-3, 1.0, clip=1.0),
]
