"""A thousand images of MNIST, with a convolutional network and a vision transformer, both initialised as usual."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from . import Task, starts
from .mnist import data

PATCH, WIDTH = 7, 64
PATCHES = (28 // PATCH) ** 2


def cnn() -> nn.Module:
    """Return a network from (batch, 784) pixels to (batch, 10) logits."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )


class VisionTransformer(nn.Module):
    """A network from (batch, 784) pixels to (batch, 10) logits: 16 patches, two blocks, the patches' mean, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.position = nn.Embedding(PATCHES, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels.view(-1, 1, 28, 28)).flatten(2).mT + self.position.weight
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits


def task(name: str, about: str, model: Callable[[], nn.Module], budget: int) -> Task:
    start = starts(model, data, 100)
    return Task(name, about, start, solved=math.inf, betas=(0.9, 0.999), budget=budget, evaluate_every=20)


TASKS = [
    task("mnist-cnn", "1,000 images of digits, CNN with two convolutions", cnn, 600),
    task("mnist-vit", "1,000 images of digits, vision transformer with two blocks", VisionTransformer, 1000),
]
