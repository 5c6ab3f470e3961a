"""Tables that come with scikit-learn, with an MLP. Half of the rows are for training; the held-out loss is judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import Data, Split, Task, split, starts

Loss = Callable[..., Tensor]


def mlp(inputs: int, outputs: int) -> nn.Module:
    layers = nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, outputs)
    return nn.Sequential(*layers, nn.Flatten(0)) if outputs == 1 else nn.Sequential(*layers)


def data(name: str, seed: int) -> Data:
    """Return columns, and targets unless they are classes, with mean 0 and variance 1 on the training part."""
    from sklearn import datasets  # takes seconds, so it is imported only here

    found = getattr(datasets, f"load_{name}")()
    inputs, targets = torch.as_tensor(found.data, dtype=torch.float32), torch.as_tensor(found.target)
    parts = split(inputs, targets, len(targets) // 2, seed)
    scaled = [standard(part.inputs, parts.train.inputs) for part in parts]
    answers = [part.targets for part in parts]
    if targets.is_floating_point():
        answers = [standard(part.targets.float(), parts.train.targets.float()) for part in parts]
    return Data(*map(Split, scaled, answers))


def standard(values: Tensor, train: Tensor) -> Tensor:
    """Scale columns by the training part's mean and deviation. A column that is constant there is only shifted."""
    deviation = train.std(dim=0)
    return (values - train.mean(dim=0)) / torch.where(deviation > 0, deviation, 1.0)


def task(name: str, about: str, columns: int, outputs: int, loss: Loss) -> Task:
    def score(answers: Tensor, targets: Tensor) -> Tensor:
        return -loss(answers, targets, reduction="none")

    return Task(
        name.replace("_", "-"),
        about,
        starts(partial(mlp, columns, outputs), partial(data, name), 32),
        loss=loss,
        score=score,
        solved=math.inf,
        betas=(0.9, 0.999),
        budget=1000,
        evaluate_every=10,
    )


TASKS = [
    task("breast_cancer", "284 tumours, MLP with two layers of 256", 30, 2, F.cross_entropy),
    task("digits", "898 images of 8 × 8, MLP with two layers of 256", 64, 10, F.cross_entropy),
    task("diabetes", "221 patients, squared error, MLP with two layers of 256", 10, 1, F.mse_loss),
]
