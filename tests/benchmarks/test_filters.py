"""Small runs of the benchmarks of filters and of accumulation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="the benchmarks print with rich, and draw with matplotlib")
pytest.importorskip("matplotlib", reason="the benchmarks print with rich, and draw with matplotlib")

from benchmarks import accumulation, filter_time  # noqa: E402


@pytest.mark.filterwarnings("ignore")
def test_filters_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filter_time, "ALONE", filter_time.ALONE[:2])  # a window of 1,000 takes 2 GB
    filter_time.main(["--rounds", "2", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "filter_time-cpu.json").read_text())
    assert list(results["training"]) == [arm.name for arm in filter_time.TRAINING]
    assert results["training"]["GrokAdamW"]["ratio"] == results["alone"]["gradfilter_ema"]["ratio"] == 1
    capsys.readouterr()
    filter_time.main(["--table", str(tmp_path / "filter_time-cpu.json")])
    assert capsys.readouterr().out == filter_time.table(results)


def test_step_lengths_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulation, "AT", (1, 2))
    accumulation.main(["--steps", "2", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "accumulation.json").read_text())["ratios"]
    assert set(found) == {"2", "8", "32"}
    assert all(k**-0.5 <= ratio <= 1 for k in (2, 8, 32) for ratio in found[f"{k}"].values())
    assert "| 32 | 0." in capsys.readouterr().out
