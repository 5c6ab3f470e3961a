"""The README's code runs, and its figures, and those on other pages, are those that the benchmarks wrote."""

from __future__ import annotations

import inspect
import json
import re
from functools import partial
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
    rows = dict(re.findall(r"^\| `(\w+)`[ ◦]*\| ([^|]*?) ?\|", README, re.MULTILINE))
    for name, parameter in inspect.signature(GrokAdamW).parameters.items():
        if name == "params":
            assert name in rows
        elif name != "grokking_signal_fn":
            assert name in rows, f"README's table of arguments has no row for {name}"
            assert eval(rows.pop(name)) == parameter.default, name


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_the_figures_on_grokking_are_those_of_the_runs(page: Path) -> None:
    text = page.read_text()
    assert re.search(r"<!-- (untuned|mod97|published) -->\n\| ", text)
    assert report.filled(text, runs.read(runs.CSV)) == text
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (page.parent / picture).exists()


@pytest.mark.parametrize(
    ("table", "page"),
    [
        ("step time", "docs/speed.md"),
        ("filter time", "docs/grokfast.md"),
        ("accumulation", "docs/accumulation.md"),
        ("gradient release", "docs/gradient_release.md"),
        ("time of formats", "docs/memory.md"),
        ("memory on many GPUs", "docs/scaling.md"),
        ("time on many GPUs", "docs/scaling.md"),
        ("latency", "docs/scaling.md"),
        ("memory by ranks", "docs/scaling.md"),
    ],
)
def test_the_tables_are_what_the_benchmarks_wrote(table: str, page: str) -> None:
    written = re.search(rf"<!-- {table} -->\n(.*?)<!-- /{table} -->", (ROOT / page).read_text(), re.DOTALL)
    assert written is not None
    assert written.group(1) == TABLES[table]()


def step_time_table() -> str:
    return step_time.table(json.loads((RESULTS / "step_time-cpu.json").read_text()))


def filter_time_table() -> str:
    return filter_time.table(json.loads((RESULTS / "filter_time-cpu.json").read_text()))


def accumulation_table() -> str:
    return accumulation.table(json.loads((RESULTS / "accumulation.json").read_text()))


def gradient_release_table() -> str:
    return step_in_backward.table(json.loads((RESULTS / "step_in_backward.json").read_text()))


def formats_table() -> str:
    return memory.times_table(json.loads((RESULTS / "memory.json").read_text()))


def scaling_table(name: str) -> str:
    return scaling.tables(json.loads((RESULTS / "scaling.json").read_text()))[name]


TABLES = {
    "step time": step_time_table,
    "filter time": filter_time_table,
    "accumulation": accumulation_table,
    "gradient release": gradient_release_table,
    "time of formats": formats_table,
    **{
        name: partial(scaling_table, name)
        for name in ("memory on many GPUs", "time on many GPUs", "latency", "memory by ranks")
    },
}

if __name__ == "__main__":  # python -m tests.test_readme
    print(*(table() for table in TABLES.values()), sep="\n")
