"""The README's code runs, and its figures are those that the demonstration wrote."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from grokadamw import GrokAdamW

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("error")
def test_code_blocks_run_one_after_the_other() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["optimizer"].metrics()["step"] > 0


def test_every_argument_is_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)`[ ◦]*\| ([^|]*?) ?\|", README, re.MULTILINE))
    for name, parameter in inspect.signature(GrokAdamW).parameters.items():
        if name == "params":
            assert name in rows
        elif name != "grokking_signal_fn":
            assert eval(rows.pop(name)) == parameter.default, name


def test_the_table_of_results_is_what_the_demonstration_wrote() -> None:
    assert (ROOT / "benchmarks/results/demo-seed0.png").exists()
    assert re.search(r"<!-- results -->\n(.*?)<!-- /results -->", README, re.DOTALL).group(1) == results_table()  # type: ignore[union-attr]


def results_table() -> str:
    """The table, from the files; python -m tests.test_readme prints it."""
    seeds = [json.loads((ROOT / f"benchmarks/results/demo-seed{seed}.json").read_text()) for seed in range(3)]
    lines = ["| | seed 0 | seed 1 | seed 2 | sustained |", "|---|---|---|---|---|"]
    for arms in zip(*(seed["arms"] for seed in seeds), strict=True):
        reached, sustained = (
            [f"{step:,}" if (step := arm["steps_to_95"][key]) else "> 2,000" for arm in arms]
            for key in ("validation", "sustained")
        )
        lines.append(f"| {arms[0]['arm']} ({arms[0]['settings']}) | {' | '.join(reached)} | {', '.join(sustained)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(results_table())
