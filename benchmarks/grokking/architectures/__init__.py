"""Transformers for pairs of numbers, as other people train them. Each file here has a list ARCHITECTURES."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

import torch
from torch import Tensor, nn

POSITIONS = 3  # x, y and the equals sign


@dataclass(frozen=True)
class Architecture:
    """A model for pairs of numbers."""

    name: str
    about: str
    make: Callable[[int], nn.Module]  # n → a model from pairs (batch, 2) of numbers below n to logits (batch, n)


class Attention(nn.Module):
    """Causal attention with several heads: (batch, positions, width) → (batch, queries, width).

    Queries come from the last `queries` positions. `turn` changes queries and keys by their positions.
    """

    def __init__(
        self, width: int, heads: int = 4, bias: bool = True, turn: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.heads, self.turn = heads, turn
        self.q, self.kv = nn.Linear(width, width, bias), nn.Linear(width, 2 * width, bias)
        self.out = nn.Linear(width, width, bias)

    def forward(self, x: Tensor, queries: int) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)
        q = self.q(x[:, -queries:]).unflatten(-1, (self.heads, -1))  # (batch, queries, heads, size)
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).unbind(2)
        if self.turn is not None:
            q, k = self.turn(q, at[-queries:]), self.turn(k, at)
        scores = torch.einsum("bqhs,bkhs->bhqk", q, k) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(at > at[-queries:, None], -torch.inf)
        return self.out(torch.einsum("bhqk,bkhs->bqhs", scores.softmax(-1), v).flatten(-2))


class Decoder(nn.Module):
    """Token and position embeddings, blocks, a norm and a head without bias.

    Args:
        blocks: block(x, queries) maps (batch, positions, width) to (batch, queries, width), the last positions. The
            last block computes the equals sign only.
        positions: gives (positions, width), which is added to the tokens; None adds nothing.
        scale: the factor of the tokens, before positions are added.
        dropout: the probability of dropout on the sum of both.
    """

    def __init__(
        self,
        numbers: int,
        width: int,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        positions: nn.Module | None,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = scale, nn.Dropout(dropout)
        self.token = nn.Embedding(numbers + 1, width)
        self.positions = positions
        self.blocks, self.norm = nn.ModuleList(blocks), norm
        self.head = nn.Linear(width, numbers, bias=False)

    def embedded(self, pairs: Tensor) -> Tensor:
        """Map (batch, 2) to (batch, positions, width)."""
        equals = torch.full_like(pairs[:, :1], self.token.num_embeddings - 1)
        x: Tensor = self.scale * self.token(torch.cat([pairs, equals], dim=1))
        if self.positions is not None:
            x = x + self.positions(torch.arange(POSITIONS, device=x.device))
        dropped: Tensor = self.dropout(x)
        return dropped

    def forward(self, pairs: Tensor) -> Tensor:
        x = self.embedded(pairs)
        for block in self.blocks:
            x = block(x, 1 if block is self.blocks[-1] else POSITIONS)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


class PreNormBlock(nn.Module):
    """A block with norms in front of attention and MLP, which add to the residual stream."""

    def __init__(
        self, attention: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module], dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = norm(), attention
        self.mlp_norm, self.mlp = norm(), mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, queries: int) -> Tensor:
        x = x[:, -queries:] + self.dropout(self.attention(self.attention_norm(x), queries))
        added: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return added


def mlp(width: int, activation: nn.Module, bias: bool = True) -> nn.Module:
    """Return an MLP that is four times as wide inside."""
    return nn.Sequential(nn.Linear(width, 4 * width, bias), activation, nn.Linear(4 * width, width, bias))


@cache
def load() -> dict[str, Architecture]:
    """Return all architectures, by name."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    return {architecture.name: architecture for module in modules for architecture in module.ARCHITECTURES}
