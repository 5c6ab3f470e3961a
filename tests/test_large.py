"""Tests of parameters of more than 2³¹ elements, whose indices do not fit into 32 bits."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from grokadamw import GrokAdamW
from grokadamw.backends import cpu, foreach

COUNT = 2**31 + 8


@pytest.mark.long
def test_the_norm_counts_them_all() -> None:
    """The tensor expands one element, so that it takes no memory. Its blocks are squared one after the other."""
    assert foreach.sum_of_squares([torch.full((1,), 0.5).expand(COUNT)]).item() == COUNT / 4


@pytest.mark.long
def test_the_kernels_norm_counts_them_all() -> None:
    x = torch.full((COUNT,), 0.5, dtype=torch.bfloat16)  # 4 GiB
    assert cpu.sum_of_squares([x]).item() == COUNT / 4


def room(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_last_elements_are_updated_as_the_first(device: str) -> None:
    if room(device) < 90 * 2**30:
        pytest.skip(f"needs 90 GiB on {device}")
    p = nn.Parameter(torch.ones(COUNT, dtype=torch.float16, device=device))
    p.grad = torch.zeros_like(p)
    p.grad[:4] = p.grad[-4:] = torch.tensor([1.0, -1.0, 2.0, 0.5], device=device)
    small = nn.Parameter(torch.ones(8, dtype=torch.float16, device=device))
    small.grad = torch.cat([p.grad[:4], p.grad[-4:]])
    large, optimizer = GrokAdamW([p], lr=0.25), GrokAdamW([small], lr=0.25)
    for _ in range(2):
        large.step()
        optimizer.step()
    torch.testing.assert_close(torch.cat([p[:4], p[-4:]]), small)
    assert large.metrics()["grad_norm"] == pytest.approx(optimizer.metrics()["grad_norm"])
