"""The methods: optimizers. Each file here has a list METHODS; a new method is a new file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Method:
    """An optimizer, and the settings that it has unless a run says otherwise."""

    name: str
    about: str
    make: Callable[..., Optimizer]  # (model, lr=…, weight_decay=…, betas=…, **options)
    lr: float = 1e-3
    weight_decay: float = 0.01
    options: Mapping[str, Any] = field(default_factory=dict)
    clip: float = 0.0  # torch's clip_grad_norm_ before each step, unless a run says otherwise; 0 is off
    with_its_decay: Mapping[str, Any] = field(default_factory=dict)  # options with the method's own weight decay

    def optimizer(self, model: nn.Module, **settings: Any) -> Optimizer:
        return self.make(model, **{"lr": self.lr, "weight_decay": self.weight_decay, **self.options, **settings})


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups, as in many training scripts: matrices decay, biases and norms do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


@cache
def load() -> dict[str, Method]:
    """Return all methods, by name."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return {method.name: method for module in modules for method in module.METHODS}
