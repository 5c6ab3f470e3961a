"""Tests of the formulas of docs/scaling.md."""

from __future__ import annotations

import pytest
import torch

from benchmarks import scaling


def test_memory_is_what_two_ranks_hold() -> None:
    for held, formula in scaling.measure(2).values():
        assert 0 <= held - formula < 100  # step counts


def test_a_step_moves_40_bytes_a_parameter_in_float32() -> None:
    assert scaling.moved(scaling.memory(1e6, 1, torch.float32, {})) == 40e6


def test_a_message_takes_longer_over_more_nodes() -> None:
    assert scaling.latency(8) == pytest.approx(4.4 + 2 * 7 * 0.52)
    assert scaling.latency(16384) - scaling.latency(8192) == pytest.approx(10.0)
