"""Tests of the benchmark that times steps whose gradients, groups or numbers change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("rich")
from benchmarks import changing_steps  # noqa: E402
from benchmarks.changing_steps import CASES, Case  # noqa: E402


def test_every_case_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    small = [case._replace(tensors=4, groups=min(case.groups, 4), optimizers=min(case.optimizers, 4)) for case in CASES]
    monkeypatch.setattr(changing_steps, "CASES", small)
    changing_steps.main(["--steps", "2", "--out", str(tmp_path)])
    cases = json.loads((tmp_path / "changing_steps.json").read_text())["cases"]
    assert list(cases) == [case.title for case in CASES]
    assert all(case["ratio"] > 0 for case in cases.values())
    assert "two halves in turn" in capsys.readouterr().out


def test_the_gradients_are_those_of_the_case() -> None:
    (halves,) = [case for case in CASES if case.title == "two halves in turn"]
    assert [halves.has(step, place) for step in (0, 1) for place in (0, 199)] == [True, False, False, True]
    times = changing_steps.milliseconds(Case("", 3, groups=3), 2)
    assert {name: len(times_of) for name, times_of in times.items()} == dict.fromkeys(changing_steps.ARMS, 2)
