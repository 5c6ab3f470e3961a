"""LayerNorm in front of attention and MLP, GELU, learned positions, as in GPT-2: a wide model and a deep one."""

from __future__ import annotations

from functools import partial

from torch import nn

from . import POSITIONS, Architecture, Attention, Decoder, PreNormBlock, mlp


def model(numbers: int, blocks: int, width: int) -> nn.Module:
    norm = partial(nn.LayerNorm, width)
    made = [PreNormBlock(Attention(width), mlp(width, nn.GELU()), norm) for _ in range(blocks)]
    return Decoder(numbers, width, made, norm(), nn.Embedding(POSITIONS, width))


ARCHITECTURES = [
    Architecture("wide", "one block of width 512", partial(model, blocks=1, width=512)),
    Architecture("deep", "four blocks of width 128", partial(model, blocks=4, width=128)),
]
