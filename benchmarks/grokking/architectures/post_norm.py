"""LayerNorm after each sum, not at the end; no biases, ReLU, sinusoidal positions, as in OpenAI's grokking code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import Architecture, Attention, Decoder, mlp

WIDTH = 128


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(WIDTH, bias=False), nn.LayerNorm(WIDTH)
        self.mlp, self.mlp_norm = mlp(WIDTH, nn.ReLU(), bias=False), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, queries: int) -> Tensor:
        x = self.attention_norm(x[:, -queries:] + self.attention(x, queries))
        normed: Tensor = self.mlp_norm(x + self.mlp(x))
        return normed


class Sinusoids(nn.Module):
    """Fixed positions: sines and cosines of falling frequency (arXiv:1706.03762)."""

    def forward(self, at: Tensor) -> Tensor:
        frequencies = 10000.0 ** (-torch.arange(0, WIDTH, 2, device=at.device) / WIDTH)
        angles = at[:, None] * frequencies
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


ARCHITECTURES = [
    Architecture(
        "post-norm",
        "LayerNorm after each sum, no biases, ReLU, no final norm",
        lambda numbers: Decoder(numbers, WIDTH, [Block(), Block()], nn.Identity(), Sinusoids()),
    )
]
