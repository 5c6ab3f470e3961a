"""RMSNorm, rotary positions, SwiGLU, no biases: Llama's block (arXiv:2302.13971)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import Architecture, Attention, Decoder, PreNormBlock

WIDTH = 128


def rotate(x: Tensor, at: Tensor) -> Tensor:
    """Turn pairs of channels of (batch, positions, heads, size) by angles that grow with the position
    (arXiv:2104.09864)."""
    size = x.shape[-1] // 2
    angles = at[:, None] * 10000.0 ** (-torch.arange(size, device=x.device) / size)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class SwiGLU(nn.Module):
    """A gated MLP with as many parameters as an MLP that is four times as wide inside (arXiv:2002.05202)."""

    def __init__(self) -> None:
        super().__init__()
        inner = 8 * WIDTH // 3
        self.gate, self.up = nn.Linear(WIDTH, inner, bias=False), nn.Linear(WIDTH, inner, bias=False)
        self.down = nn.Linear(inner, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return down


def norm() -> nn.Module:
    return nn.RMSNorm(WIDTH)


def model(numbers: int) -> nn.Module:
    blocks = [PreNormBlock(Attention(WIDTH, bias=False, turn=rotate), SwiGLU(), norm) for _ in range(2)]
    return Decoder(numbers, WIDTH, blocks, norm(), None)


ARCHITECTURES = [Architecture("llama", "RMSNorm, rotary positions, SwiGLU, no biases", model)]
