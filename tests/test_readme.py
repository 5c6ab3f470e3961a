"""The README's code runs, and its figures are those that the demonstration wrote."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import accumulation, filter_time, step_time
from grokadamw import GrokAdamW

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks/results"


@pytest.mark.filterwarnings("error")
def test_code_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = code_blocks()
    assert len(blocks) >= 5
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["optimizer"].stepped
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def code_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_every_argument_is_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)`[ ◦]*\| ([^|]*?) ?\|", README, re.MULTILINE))
    for name, parameter in inspect.signature(GrokAdamW).parameters.items():
        if name == "params":
            assert name in rows
        elif name != "grokking_signal_fn":
            assert eval(rows.pop(name)) == parameter.default, name


@pytest.mark.parametrize("table", ["results", "parts", "step time", "filters", "filter time", "accumulation"])
def test_the_tables_are_what_the_benchmarks_wrote(table: str) -> None:
    assert (RESULTS / "demo-seed0.png").exists()
    assert (RESULTS / "step_time-cpu.png").exists()
    written = re.search(rf"<!-- {table} -->\n(.*?)<!-- /{table} -->", README, re.DOTALL)
    assert written is not None
    assert written.group(1) == TABLES[table]()


def results_table() -> str:
    """Of the demonstration's three seeds."""
    seeds = [json.loads((RESULTS / f"demo-seed{seed}.json").read_text()) for seed in range(3)]
    rows = []
    for arms in zip(*(seed["arms"] for seed in seeds), strict=True):
        steps = [[arm["steps_to_95"][key] for arm in arms] for key in ("validation", "sustained")]
        shown = [[f"{step:,}" if step else "> 2,000" for step in each] for each in steps]
        rows.append([f"{arms[0]['arm']} ({arms[0]['settings']})", *shown[0], ", ".join(shown[1])])
    return markdown(["", "seed 0", "seed 1", "seed 2", "sustained"], rows)


def parts_table() -> str:
    """Of GrokAdamW without one of its parts."""
    arms = json.loads((RESULTS / "parts.json").read_text())["arms"]
    rows = [
        [name, *(f"{r['validation'] or '–'} / {r['sustained'] or '–'}" for r in runs)] for name, runs in arms.items()
    ]
    return markdown(["", "seed 0", "seed 1", "seed 2"], rows)


def step_time_table() -> str:
    return step_time.table(json.loads((RESULTS / "step_time-cpu.json").read_text()))


def filters_table() -> str:
    """Of Grokfast's first experiment."""
    results = json.loads((RESULTS / "filters-seed0.json").read_text())
    rows = [
        [f"{arm['arm']} ({arm['settings']})", *(f"{arm[key]:,}" for key in ("steps_to_95", "published"))]
        for arm in results["arms"]
    ]
    return markdown(["", "steps to 95%", "published"], rows)


def filter_time_table() -> str:
    return filter_time.table(json.loads((RESULTS / "filter_time-cpu.json").read_text()))


def accumulation_table() -> str:
    return accumulation.table(json.loads((RESULTS / "accumulation.json").read_text()))


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


TABLES = {
    "results": results_table,
    "parts": parts_table,
    "step time": step_time_table,
    "filters": filters_table,
    "filter time": filter_time_table,
    "accumulation": accumulation_table,
}

if __name__ == "__main__":  # python -m tests.test_readme
    print(*(table() for table in TABLES.values()), sep="\n")
