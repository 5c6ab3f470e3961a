"""Modular multiplication, and the small transformer that groks it: the first task of Grokfast (arXiv:2405.20233)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

P = 97  # the modulus
TIMES, EQUALS = P, P + 1  # tokens beside the numbers 0 … 96
VOCABULARY = P + 2


class Split(NamedTuple):
    """Tokens (n, 4), int64, and answers (n,), int64."""

    tokens: Tensor
    answers: Tensor


class Data(NamedTuple):
    """Half of all products for training; of the other half a tenth for the signal, the rest for the report alone."""

    train: Split
    signal: Split
    report: Split


def products(seed: int) -> Data:
    """All x · y mod 97 with x in [0, 97) and y in [1, 97): 9,312 of them, shuffled by the seed and split."""
    x, y = torch.meshgrid(torch.arange(P), torch.arange(1, P), indexing="ij")
    x, y = x.reshape(-1), y.reshape(-1)
    tokens = torch.stack([x, torch.full_like(x, TIMES), y, torch.full_like(x, EQUALS)], dim=1)
    answers = x * y % P
    order = torch.randperm(len(answers), generator=torch.Generator().manual_seed(seed))
    half, tenth = len(order) // 2, len(order) // 20
    cuts = [half, tenth, len(order) - half - tenth]
    return Data(*(Split(tokens[part], answers[part]) for part in order.split(cuts)))


class Embedding(nn.Module):
    """Tokens (batch, 4) → (batch, 4, width), learned positions added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(4, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token(tokens) + self.position.weight


class Block(nn.Module):
    """A causal transformer block with LayerNorm in front of attention and of the MLP.

    With last_only it returns the last position alone, (batch, 1, width), and computes no more than that needs.
    """

    def __init__(self, width: int, heads: int, last_only: bool) -> None:
        super().__init__()
        self.heads, self.last_only = heads, last_only
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        size = width // self.heads
        normed = self.norm1(x)
        k, v = self.kv(normed).view(batch, length, 2, self.heads, size).permute(2, 0, 3, 1, 4)
        if self.last_only:
            x, normed = x[:, -1:], normed[:, -1:]
        q = self.q(normed).view(batch, -1, self.heads, size).transpose(1, 2)
        # written out: for four positions it is quicker than scaled_dot_product_attention
        scores = q @ k.transpose(-1, -2) * size**-0.5
        if not self.last_only:
            scores = scores + torch.full((length, length), -torch.inf, device=x.device).triu(1)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, -1, width))
        return x + self.mlp(self.norm2(x))


class Head(nn.Module):
    """(batch, 1, width) → logits (batch, 99), not tied to the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.norm(x[:, -1]))


class Transformer(nn.Module):
    """(batch, 4) tokens → (batch, 99) logits of the answer. Four layers: embedding, two blocks of 4 heads, head."""

    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Embedding(width), Block(width, heads, False), Block(width, heads, True), Head(width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)
