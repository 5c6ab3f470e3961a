"""Grokfast's first experiment as it was published, down to the order of random numbers (arXiv:2405.20233, table 1).

It sets no part of the held-out half apart for signals, so they get the training half.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import Data, Split, Start, Task

P, WIDTH, HEADS, BATCH = 97, 128, 4, 512
EQUALS, TIMES, VOCABULARY = P, P + 1, P + 2


class Block(nn.Module):
    """The published block: its attention is added to the normed input, and not to the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        x = x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """A model from (batch, 4) tokens to (batch, 99) logits. Modules are made in the published order, for its seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(5, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.logits = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.logits(self.norm(self.blocks(x)[:, -1]))


def start(seed: int) -> Start:
    torch.manual_seed(seed)
    model = Decoder()
    x, y = torch.cartesian_prod(torch.arange(P), torch.arange(1, P)).T
    everything = Split(torch.stack([x, torch.full_like(x, TIMES), y, torch.full_like(x, EQUALS)], dim=1), x * y % P)
    train, held_out = (everything[half] for half in torch.randperm(len(x)).chunk(2))

    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())  # continues the split's random numbers

    def batches() -> Iterator[Split]:
        nonlocal train
        while True:  # each epoch shuffles the last epoch's order
            train = train[torch.randperm(len(train), generator=generator)]
            for first in range(0, len(train), BATCH):
                yield train[first : first + BATCH]

    return Start(model, Data(train, train, held_out), batches())


TASKS = [Task("published", "x · y mod 97 as Grokfast published it", start, budget=5000)]
