"""The pages of docs/: their code runs, the examples do what they say, and the site builds."""

from __future__ import annotations

import functools
import html
import http.server
import importlib.util
import math
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .pages import ROOT, code_blocks

DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if code_blocks(page.read_text(encoding="utf-8")))
ALL_PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/results/GROKKING_REPORT.md"]
NEEDS = {"huggingface": "accelerate", "lightning": "lightning", "pytorch": "pandas"}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the test in a folder of its own, and reset the state that Accelerate keeps for the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(DOCS / "examples"))
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def test_there_is_code_on_the_pages() -> None:
    assert {
        "accumulation",
        "grokfast",
        "huggingface",
        "index",
        "lightning",
        "memory",
        "migrating",
        "pytorch",
        "signals",
        "start",
    } <= {page.stem for page in PAGES}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.stem)
def test_each_page_begins_with_when_to_use_it(page: Path) -> None:
    title, first = page.read_text(encoding="utf-8").split("\n\n")[:2]
    assert title.startswith("# ")
    assert re.search(r"\b(Use|Read) (this|it) when\b", " ".join(first.split()))


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.stem)
def test_code_is_no_wider_than_a_reader_sees(page: Path) -> None:
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 88] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_run_one_after_the_other(page: Path, recwarn: pytest.WarningsRecorder) -> None:
    if page.stem in NEEDS:
        pytest.importorskip(NEEDS[page.stem])
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in code_blocks(page.read_text(encoding="utf-8")):
        exec(compile(block, page.name, "exec"), namespace)
    assert not [str(warning.message) for warning in recwarn if warning.filename == page.name]


@pytest.mark.parametrize(
    ("example", "few"),
    [pytest.param("trainer", {"steps": 40}, marks=pytest.mark.long), ("with_lightning", {"epochs": 2})],
)
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


def built(folder: Path) -> Path:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_builds_in_strict_mode(tmp_path: Path) -> None:
    site = built(tmp_path / "site")
    api = (site / "api/index.html").read_text(encoding="utf-8")
    assert 'id="grokadamw.GrokAdamW.set_layers"' in api
    groups = ["Parameters, and AdamW's numbers", "The filter, and its signals", "Limits", "How a step runs"]
    assert re.findall(r"doc-section-title\">([^<]*)<", html.unescape(api))[:4] == groups
    signature = re.sub("<[^>]+>", "", api[api.index('id="grokadamw.GrokAdamW"') : api.index(groups[2])])
    assert "\n    lr: float | Tensor = 0.001,\n" in signature  # one argument per line, so a formatter has run
    for page in site.rglob("*.html"):
        linked = re.findall(r'(?:href|src)="([^":#]*benchmarks/results/[^"#]+)"', page.read_text(encoding="utf-8"))
        assert [path for path in linked if path[0] != "/" and not (page.parent / path).exists()] == [], page
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="https?://[^"]+"'
        assert not re.findall(loaded, text), page  # the site contains everything that it loads
        assert page.stem == "404" or re.search("md-footer__link--(next|prev)", text), page
    styles = (site / "katex/katex.min.css").read_text(encoding="utf-8")
    fonts = re.findall(r"url\(([^)]+)\)", styles)
    assert fonts
    assert [font for font in fonts if not (site / "katex" / font).exists()] == []


@pytest.mark.long
@pytest.mark.parametrize("width", [1400, 390])
def test_the_pages_in_a_browser(width: int, tmp_path: Path) -> None:
    """Nothing is missing, no page is wider than the window, names are in one piece, and formulas are set."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    site = built(tmp_path / "site")
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, playwright.sync_playwright() as driver:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        page.set_viewport_size({"width": width, "height": 900})
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("response", lambda answer: faults.append(answer.url) if answer.status >= 400 else None)
        for path in sorted(site.rglob("index.html")):
            page.goto(f"http://127.0.0.1:{server.server_port}/{path.relative_to(site)}", wait_until="networkidle")
            faults += [f"{path.parent.name or 'home'}: {fault}" for fault in page.evaluate(FAULTS)]
            if width == 1400:
                faults += page.evaluate(SCROLLING_CODE)
        server.shutdown()
    assert faults == []


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


FAULTS = """() => [
  ...(document.documentElement.scrollWidth > document.documentElement.clientWidth ? ["wider than the window"] : []),
  ...[...document.querySelectorAll("article td code, article td .name")]
    .filter(name => name.getClientRects().length > 1).map(name => `${name.textContent} is broken`),
  ...[...document.querySelectorAll(".arithmatex")]
    .filter(formula => !formula.querySelector(".katex") || formula.querySelector(".katex-error"))
    .map(formula => `${formula.textContent} is not set`),
]"""
SCROLLING_CODE = """() => [...document.querySelectorAll("article pre code")]
  .filter(code => code.scrollWidth > code.clientWidth + 1).map(code => `${code.textContent} is cut`)"""
