"""Tests of the benchmark that decided the formats of moments."""

from __future__ import annotations

import json
import re

import pytest
import torch

pytest.importorskip("rich")
import grokadamw.state.formats  # noqa: E402
from benchmarks import formats  # noqa: E402
from benchmarks.formats import CANDIDATES, int8, linears  # noqa: E402
from grokadamw.state.formats import BLOCK  # noqa: E402


def test_every_candidate_is_compared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(formats, "SAMPLE", 1024)
    rows = formats.replay("decades", 0.999, 0.98, 3)
    assert [(row["format"], row["rounding"]) for row in rows] == [(c.name, c.rounding) for c in CANDIDATES]
    assert all(0 < row["error"] < 3 for row in rows)
    formats.show(rows, [{"format": "float32", "rounding": "nearest", "seed": 0, "loss": 2.5}])
    out = capsys.readouterr().out
    assert "decades" in out
    assert "2.5000" in out


@pytest.mark.parametrize("is_v", [False, True])
def test_linear_codes_are_int8s(is_v: bool) -> None:
    """The codes agree with those of int8, except for dithers of 16 bits and for scales."""
    torch.manual_seed(0)
    x, u = torch.randn(64, 64), torch.rand(64, 64)
    x = x.square() if is_v else x
    of = linears(64)
    ours, expected = (
        int8(x, u, is_v),
        (of.square if is_v else of.signed)(x, u if is_v else (u - (x < 0).float()).abs(), is_v),
    )
    assert (ours - expected).norm() < 0.01 * x.norm()


def test_the_figures_of_the_docstring_are_those_of_the_results() -> None:
    rows = json.loads((formats.RESULTS / "formats.json").read_text(encoding="utf-8"))["streams"]
    found = {}
    for row in rows:
        if row["beta2"] == 0.999 and (row["block"] == BLOCK or row["format"] == "bfloat16"):
            found.setdefault((row["format"], row["rounding"]), []).append(f"{row['error']:.3f}")
    line = re.compile(r"    (\S+(?:, \S+)?) +(dither|random|nearest) +(\d\.\d{3}) +(\d\.\d{3}) +(\d\.\d{3})")
    told = {(name, rounding): errors for name, rounding, *errors in line.findall(str(grokadamw.state.formats.__doc__))}
    assert len(told) == 10
    assert told == {key: found[key] for key in told}
