"""Tests that the architectures compute what they claim to compute."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.grokking import architectures
from benchmarks.grokking.architectures import Architecture, Attention, llama
from grokadamw.groups import has_norms

ALL = architectures.load()


def test_attention_is_torchs_causal_attention() -> None:
    torch.manual_seed(0)
    attention, x = Attention(16, heads=4), torch.randn(5, 3, 16)
    k, v = attention.kv(x).chunk(2, dim=-1)
    heads = (part.view(5, 3, 4, 4).transpose(1, 2) for part in (attention.q(x), k, v))
    expected = attention.out(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
    for queries in (1, 2, 3):
        torch.testing.assert_close(attention(x, queries), expected[:, -queries:])


def test_rotary_positions_are_relative_and_turn_without_stretching() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)

    def product(at: int, other: int) -> torch.Tensor:
        return (llama.rotate(q, torch.tensor([at])) * llama.rotate(k, torch.tensor([other]))).sum()

    torch.testing.assert_close(product(2, 0), product(7, 5))
    assert not torch.isclose(product(2, 0), product(0, 2))
    torch.testing.assert_close(llama.rotate(q, torch.tensor([9])).norm(), q.norm())


@pytest.mark.parametrize("architecture", ALL.values(), ids=ALL)
def test_a_model_answers_each_pair_by_itself(architecture: Architecture) -> None:
    torch.manual_seed(0)
    model = architecture.make(7).eval()
    pairs = torch.tensor([[0, 6], [3, 2], [2, 3]])
    logits = model(pairs)
    assert logits.shape == (3, 7)
    torch.testing.assert_close(model(pairs[1:2]), logits[1:2])
    assert not torch.allclose(logits[1], logits[2])  # the model distinguishes x from y
    assert has_norms(model) == (architecture.name != "no-norm")
    blocks = list(model.blocks)
    assert len(blocks) == {"wide": 1, "deep": 4}.get(architecture.name, 2)
    x = model.embedded(pairs)
    for block in blocks:  # compute all positions; the model omits those that are never read
        x = block(x, architectures.POSITIONS)
    torch.testing.assert_close(model.head(model.norm(x[:, -1])), logits)


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    model, pairs = ALL["dropout"].make(7), torch.tensor([[0, 6]])
    assert not torch.equal(model(pairs), model(pairs))
    model.eval()
    assert torch.equal(model(pairs), model(pairs))
