"""Tests that the README's code runs, and that its figures and those of other pages are the benchmarks' results."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grokadamw import GrokAdamW

pytest.importorskip("rich", reason="the benchmarks print with rich, and draw with matplotlib")
pytest.importorskip("matplotlib", reason="the benchmarks print with rich, and draw with matplotlib")

from benchmarks import accumulation, filter_time, memory, scaling, step_in_backward, step_time  # noqa: E402
from benchmarks.grokking import report, runs  # noqa: E402

from .pages import ROOT, code_blocks  # noqa: E402

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks/results"


@pytest.mark.filterwarnings("error")
def test_code_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = code_blocks(README)
    assert blocks
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["optimizer"].param_groups[0]["eval_loss"] is not None
    assert not list(tmp_path.iterdir())


def test_every_argument_is_in_the_table_with_its_default() -> None:
    page = (ROOT / "docs/arguments.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)`[ ◦]*\| ([^|]*?) ?\|", page, re.MULTILINE))
    for name, parameter in inspect.signature(GrokAdamW).parameters.items():
        if name == "params":
            assert name in rows
        elif name != "grokking_signal_fn":
            assert name in rows, f"the table of arguments has no row for {name}"
            assert eval(rows.pop(name)) == parameter.default, name


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_the_figures_on_grokking_are_those_of_the_runs(page: Path) -> None:
    text = page.read_text()
    assert re.search(r"<!-- (summary|mod97|published) -->\n\| ", text)
    assert report.filled(text, runs.read(runs.CSV)) == text
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (page.parent / picture).exists()


SCALING = ("memory on many GPUs", "time on many GPUs", "latency", "memory by ranks")
TABLES: dict[str, tuple[str, str, Callable[[Any], str]]] = {  # page, results file, function that makes the table
    "step time": ("docs/speed.md", "step_time-cpu", step_time.table),
    "filter time": ("docs/grokfast.md", "filter_time-cpu", filter_time.table),
    "accumulation": ("docs/accumulation.md", "accumulation", accumulation.table),
    "gradient release": ("docs/gradient_release.md", "step_in_backward", step_in_backward.table),
    "time of formats": ("docs/memory.md", "memory", memory.times_table),
    **{name: ("docs/scaling.md", "scaling", lambda found, name=name: scaling.tables(found)[name]) for name in SCALING},
}


def made(name: str) -> str:
    _, file, table = TABLES[name]
    return table(json.loads((RESULTS / f"{file}.json").read_text()))


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_are_what_the_benchmarks_wrote(name: str) -> None:
    page = (ROOT / TABLES[name][0]).read_text()
    written = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", page, re.DOTALL)
    assert written is not None
    assert written.group(1) == made(name)


if __name__ == "__main__":  # python -m tests.test_readme
    print(*map(made, TABLES), sep="\n")
