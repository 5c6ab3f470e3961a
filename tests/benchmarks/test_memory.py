"""The memory benchmark measures true sizes, and its results have all of its cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the benchmarks print with rich, and draw with matplotlib")
pytest.importorskip("matplotlib", reason="the benchmarks print with rich, and draw with matplotlib")

from benchmarks import memory  # noqa: E402

RESULTS = Path(memory.__file__).parent / "results" / "memory.json"


def test_bytes_and_times_of_every_format() -> None:
    found = memory.measured([(96, 1024), (5000,)], 2, lambda text: None)
    assert found.keys() == {case.name for case in memory.CASES}
    kept = {name: entry["state"] for name, entry in found.items() if "reason" not in entry}
    assert kept["AdamW"] == pytest.approx(8, abs=0.01)
    assert kept["GrokAdamW, float32 state"] == pytest.approx(12, abs=0.01)
    assert kept["GrokAdamW, bfloat16 state"] == pytest.approx(6, abs=0.01)
    assert kept["GrokAdamW, int8 state"] == pytest.approx(3 * (1 + 4 / 64), abs=0.01)
    name = "GrokAdamW, bfloat16 weights + 8 bits, int8 state"
    assert kept[name] == pytest.approx(4 + 12 / 64, abs=0.01)
    assert found[name]["all"] == pytest.approx(8 + 12 / 64, abs=0.01)
    assert found["AdamW"]["ratio"] == [1, 1, 1]


def test_the_results_are_of_these_cases() -> None:
    results = json.loads(RESULTS.read_text())
    assert results["peak_mib"].keys() == {case.name for case in memory.CASES}
    assert results["models"].keys() == memory.MODELS.keys()
    peaks = [x for name, x in results["peak_mib"].items() if name.startswith("GrokAdamW")]
    assert max(peaks) <= 4
