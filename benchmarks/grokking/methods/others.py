"""What others report as good: a cap on the rows' norms (Clip to Grok), OrthoGrad (arXiv:2501.04697), Muon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from . import Method


def inner_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Those of linear layers, but of the last one, which makes the logits."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [module.weight for module in linear[:-1]]


def row_norm_cap(model: nn.Module, cap: float, **settings: Any) -> Optimizer:
    """AdamW; after each step rows of the inner matrices that are longer than `cap` are shortened to it."""
    optimizer = AdamW(model.parameters(), **settings)

    @torch.no_grad()
    def shorten(*_: Any) -> None:
        for weight in inner_matrices(model):
            weight.mul_((cap / weight.norm(dim=1, keepdim=True)).clamp(max=1.0))

    optimizer.register_step_post_hook(shorten)
    return optimizer


def orthograd(model: nn.Module, **settings: Any) -> Optimizer:
    """AdamW; each gradient without its part along the weights, and as long as it was."""
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
    """Muon for the inner matrices, AdamW for everything else, each with its own learning rate."""

    def __init__(self, model: nn.Module, muon: dict[str, Any], adamw: dict[str, Any]) -> None:
        matrices = inner_matrices(model)
        others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
        self.parts: list[Optimizer] = [AdamW(others, **adamw)]
        if matrices:
            self.parts.insert(0, Muon(matrices, **muon))
        super().__init__(matrices + others, {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def muon(model: nn.Module, muon_lr: float, betas: tuple[float, float], lr: float, weight_decay: float) -> Optimizer:
    adamw = {"lr": lr, "weight_decay": weight_decay, "betas": betas}
    return MuonAndAdamW(model, {"lr": muon_lr, "weight_decay": weight_decay * lr / muon_lr}, adamw)


METHODS = [
    Method(
        "row-norm-cap", "AdamW, rows of inner matrices no longer than 1", row_norm_cap, 3e-3, 0.0, {"cap": 1.0}, 1.0
    ),
    Method("orthograd", "AdamW, gradients orthogonal to the weights", orthograd, 3e-3, 1.0, clip=1.0),
    Method("muon", "Muon for inner matrices, AdamW for the rest", muon, 3e-3, 1.0, {"muon_lr": 0.02}),
]
