"""The pages of docs/: their code runs, the examples do what they say, and the site builds."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .pages import ROOT, code_blocks

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if code_blocks(page.read_text(encoding="utf-8")))
NEEDS = {"huggingface": "accelerate", "lightning": "lightning", "pytorch": "pandas"}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own, and without what Accelerate keeps for the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(DOCS / "examples"))
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def test_there_is_code_on_the_pages() -> None:
    assert {"accumulation", "grokfast", "huggingface", "index", "lightning", "migrating", "pytorch", "signals"} <= {
        page.stem for page in PAGES
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_run_one_after_the_other(page: Path, recwarn: pytest.WarningsRecorder) -> None:
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in code_blocks(page.read_text(encoding="utf-8")):
        exec(compile(block, page.name, "exec"), namespace)
    assert not [str(warning.message) for warning in recwarn if warning.filename == page.name]


@pytest.mark.parametrize(("example", "few"), [("trainer", {"steps": 40}), ("with_lightning", {"epochs": 3})])
def test_examples_run(example: str, few: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for needed in ("accelerate", "lightning", "scattertext"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}")
    importlib.import_module(example).main(tmp_path / "picture.png", **few)
    found = re.search(r"losses (.*) and (.*), α (.*);", capsys.readouterr().out)
    assert found is not None
    train_loss, eval_loss, alpha = map(float, found.groups())
    gap = max(0, eval_loss - train_loss) / max(eval_loss, train_loss)
    assert alpha == pytest.approx(0.98 * math.exp(-0.1 * gap), abs=2e-3)
    assert min(train_loss, eval_loss) > 1
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_the_site_builds_in_strict_mode(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    api = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
    assert 'id="grokadamw.GrokAdamW.set_layers"' in api
    assert (tmp_path / "site/benchmarks/results/grokking-mod97.png").exists()
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="https?://[^"]+"'
        assert not re.findall(loaded, page.read_text(encoding="utf-8")), page  # all that it needs comes with it
