"""The `blocks` backend gives the results of `reference`, the definition, wherever its cache-sized blocks end."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grokadamw.backends import blocks, reference
from grokadamw.backends.types import Batch, written

from .test_update import numbers


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    layers=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    with_mu=st.booleans(),
    amplify_after=st.sampled_from([0, 3]),
    clip=st.sampled_from([1.0, 0.3]),
    maximize=st.booleans(),
)
def test_blocks_end_anywhere(
    sizes: list[int], layers: list[int], with_mu: bool, amplify_after: int, clip: float, maximize: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random() -> list[Tensor]:
        return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]

    steps = [torch.tensor(float(i + 1)) for i in range(len(sizes))]
    given = Batch(random(), random(), random(), [x.square() for x in random()], random() if with_mu else None, steps)
    expected = Batch(*(None if column is None else [x.clone() for x in column] for column in given[:6]))
    beta1 = [0.9 * 0.5**layer for layer in layers[: len(sizes)]]
    n = numbers(beta1=beta1, bias_beta1=beta1, amplify_after=amplify_after, clip=clip, maximize=maximize)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_BLOCK", 16)
        blocks.step(given, n)
    reference.step(expected, n)
    for ours, wanted in zip(written(given), written(expected), strict=True):
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_autograd_is_told() -> None:
    given = Batch(*([torch.ones(3)] for _ in range(5)), [torch.zeros(())])
    blocks.step(given, numbers(beta1=[0.9], bias_beta1=[0.9]))
    assert all(x._version > 0 for column in written(given) for x in column)
