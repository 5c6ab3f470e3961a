"""No norms, and small initial embeddings, as in the model of "Progress measures for grokking" (arXiv:2301.05217)."""

from __future__ import annotations

from torch import nn

from . import POSITIONS, Architecture, Attention, Decoder, PreNormBlock, mlp

WIDTH = 128


def model(numbers: int) -> nn.Module:
    positions = nn.Embedding(POSITIONS, WIDTH)
    blocks = [PreNormBlock(Attention(WIDTH, bias=False), mlp(WIDTH, nn.ReLU()), nn.Identity) for _ in range(2)]
    found = Decoder(numbers, WIDTH, blocks, nn.Identity(), positions)
    for embedding in (found.token, positions):
        nn.init.normal_(embedding.weight, std=WIDTH**-0.5)
    return found


ARCHITECTURES = [Architecture("no-norm", "no norms, ReLU, embeddings of length 1 at the start", model)]
