"""Arithmetic mod 97 and 113, and composition in S5, with a small transformer (arXiv:2201.02177, arXiv:2405.20233)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import Data, Task, split, starts

Operation = Callable[[Tensor, Tensor], Tensor]


class Rows(NamedTuple):
    """The residual stream, with one row for each different prefix of "x operation y =" rather than for each token.

    Attention is causal, so a row depends on the tokens up to its position only. Before the first block it depends on
    its own token only.
    """

    values: Tensor  # (rows, width)
    x: Tensor  # (batch,)
    after_x: Tensor  # (numbers, 2): the row of x, and of the operation after it, for each x
    of_pairs: Tensor  # (batch, 4): the row of each token of each pair


class Embedding(nn.Module):
    """A layer from tokens (batch, 2) of x and y to Rows, with learned positions added."""

    def __init__(self, numbers: int, width: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.token, self.position = nn.Embedding(numbers + 2, width), nn.Embedding(4, width)

    def forward(self, tokens: Tensor) -> Rows:
        n = self.numbers
        numbers, operation, equals = self.token.weight.split([n, 1, 1])
        at = self.position.weight
        values = torch.cat([numbers + at[0], operation + at[1], numbers + at[2], equals + at[3]])
        x, y = tokens.unbind(1)
        every_x = torch.arange(n, device=x.device)
        of_pairs = torch.stack([x, torch.full_like(x, n), n + 1 + y, torch.full_like(x, 2 * n + 1)], dim=1)
        return Rows(values, x, torch.stack([every_x, torch.full_like(every_x, n)], dim=1), of_pairs)


class Block(nn.Module):
    """A causal transformer block with LayerNorm in front of attention and of the MLP.

    The last block computes the equals signs only, (batch, width).
    """

    def __init__(self, width: int, heads: int, last: bool) -> None:
        super().__init__()
        self.heads, self.last = heads, last
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, rows: Rows) -> Rows:
        normed = self.norm1(rows.values)
        q, kv = self.q(normed), self.kv(normed)
        if self.last:
            parts = [(rows.of_pairs[:, 3:], rows.of_pairs)]
        else:  # rows of queries, and rows of all positions up to the last query
            parts = [(rows.after_x, rows.after_x), (rows.of_pairs[:, 2:], rows.of_pairs)]
        x = torch.cat([F.embedding(own.flatten(), rows.values) for own, _ in parts])
        x = x + self.out(torch.cat([self.attend(F.embedding(own, q), F.embedding(seen, kv)) for own, seen in parts]))
        x = x + self.mlp(self.norm2(x))
        numbers, batch = len(rows.after_x), len(rows.of_pairs)
        if self.last:
            return rows._replace(values=x)
        after_x, of_pairs = torch.arange(len(x), device=x.device).view(-1, 2).split([numbers, batch])
        return Rows(x, rows.x, after_x, torch.cat([after_x[rows.x], of_pairs], dim=1))

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        """Map q (n, queries, width) of the last positions and kv (n, keys, 2 · width) to (n · queries, width)."""
        n, queries, width = q.shape
        keys = kv.shape[1]
        q, (k, v) = q.unflatten(-1, (self.heads, -1)), kv.view(n, keys, 2, self.heads, -1).unbind(2)
        # written out: for four positions it is quicker than scaled_dot_product_attention
        scores = torch.einsum("nqhs,nkhs->nhqk", q, k) * q.shape[-1] ** -0.5
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
        return torch.einsum("nhqk,nkhs->nqhs", scores.softmax(-1), v).reshape(n * queries, width)


class Head(nn.Module):
    """A layer from the last block's Rows to logits (batch, numbers + 2), not tied to the embedding."""

    def __init__(self, numbers: int, width: int) -> None:
        super().__init__()
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, numbers + 2, bias=False)

    def forward(self, rows: Rows) -> Tensor:
        return self.logits(self.norm(rows.values))


class Transformer(nn.Module):
    """A model from (batch, 2) numbers x, y to logits (batch, numbers + 2): embedding, blocks of 4 heads, head.

    Its results are those of attention over the four tokens "x operation y =".
    """

    def __init__(self, numbers: int, blocks: int = 2, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Embedding(numbers, width),
            *(Block(width, heads, last=i == blocks - 1) for i in range(blocks)),
            Head(numbers, width),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)


def pairs(numbers: int, operation: Operation, share: float, nonzero: bool, seed: int) -> Data:
    """Return all x, y in [0, numbers), without y = 0 if `nonzero`. A share of the pairs is for training."""
    x, y = torch.meshgrid(torch.arange(numbers), torch.arange(int(nonzero), numbers), indexing="ij")
    x, y = x.reshape(-1), y.reshape(-1)
    return split(torch.stack([x, y], dim=1), operation(x, y), round(share * len(x)), seed)


def divide(x: Tensor, y: Tensor) -> Tensor:
    inverse = torch.tensor([0] + [pow(n, -1, 97) for n in range(1, 97)])
    return x * inverse[y] % 97


def compose(x: Tensor, y: Tensor) -> Tensor:
    """Return the number of the permutation of five that applies y first, and then x."""
    table = torch.tensor(list(permutations(range(5))))
    place = 5 ** torch.arange(5)
    number = torch.zeros(5**5, dtype=torch.int64)
    number[table @ place] = torch.arange(120)
    return number[table[x].gather(1, table[y]) @ place]


def mod97(name: str, about: str, operation: Operation, nonzero: bool = False) -> Task:
    data = partial(pairs, 97, operation, 0.5, nonzero)
    return Task(name, f"{about} mod 97, half of all pairs", starts(partial(Transformer, 97), data, 512))


TASKS = [
    mod97("mul97", "x · y", lambda x, y: x * y % 97, nonzero=True),
    mod97("add97", "x + y", lambda x, y: (x + y) % 97),
    mod97("sub97", "x − y", lambda x, y: (x - y) % 97),
    mod97("div97", "x / y", divide, nonzero=True),
    mod97("quad97", "x² + xy + y²", lambda x, y: (x * x + x * y + y * y) % 97),
    Task(
        "s5",
        "composition of two permutations of five, half of all pairs",
        starts(partial(Transformer, 120), partial(pairs, 120, compose, 0.5, False), 512),
    ),
    Task(
        "add113",
        "x + y mod 113, 30% of all pairs, one block, full batch",
        starts(partial(Transformer, 113, 1), partial(pairs, 113, lambda x, y: (x + y) % 113, 0.3, False), None),
        budget=6000,
        evaluate_every=20,
    ),
]
