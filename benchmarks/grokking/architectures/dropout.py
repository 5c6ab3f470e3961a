"""Embeddings times √width, learned positions, dropout 0.1, as in the first transformers (arXiv:1706.03762)."""

from __future__ import annotations

from functools import partial

from torch import nn

from . import POSITIONS, Architecture, Attention, Decoder, PreNormBlock, mlp

WIDTH, DROPOUT = 128, 0.1


def model(numbers: int) -> nn.Module:
    norm = partial(nn.LayerNorm, WIDTH)
    blocks = [PreNormBlock(Attention(WIDTH), mlp(WIDTH, nn.GELU()), norm, DROPOUT) for _ in range(2)]
    return Decoder(numbers, WIDTH, blocks, norm(), nn.Embedding(POSITIONS, WIDTH), WIDTH**0.5, DROPOUT)


ARCHITECTURES = [Architecture("dropout", "embeddings × √width, dropout 0.1, learned positions", model)]
