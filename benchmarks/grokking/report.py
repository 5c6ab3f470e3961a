"""Tables and pictures of the runs in grokking.csv. The tables are written between the marks in the pages."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from . import evidence, methods, pictures, tasks
from .evidence import (
    COMPARED,
    DECAYS,
    GRID_TASKS,
    LEARNT,
    LRS,
    MOD97,
    MOD97_METHODS,
    OTHER_METHODS,
    OTHER_TASKS,
    TWO_BY_TWO,
    select,
)
from .runs import Row

Table = Callable[[list[Row]], str]
Both = tuple[list[Row], list[Row]]  # AdamW's rows and the preset's, on the same task

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / page for page in ("README.md", "docs/grokfast.md", "benchmarks/results/GROKKING_REPORT.md")]
PUBLISHED = {"grokfast": 910, "grokfast-ma": 790, "adam": 39890}  # steps to 95% (arXiv:2405.20233, table 1)


def steps(rows: Iterable[Row]) -> list[float]:
    """Return the steps to sustained, infinite for runs that failed."""
    return [math.inf if row.sustained is None else row.sustained for row in rows]


def shown(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def quartiles(rows: list[Row]) -> str:
    """Return the median (first to third quartile), and how many runs failed. Quartiles are steps of actual runs."""
    if not rows:
        return ""
    found = steps(rows)
    low, high = np.quantile(found, [0.25, 0.75], method="inverted_cdf")
    failed = sum(map(math.isinf, found))
    if failed == len(rows):
        return f"not reached (0 of {failed})"
    text = f"{shown(float(np.median(found)))} ({shown(low)} to {shown(high)})"
    return f"{text}, {failed} of {len(rows)} failed" if failed else text


def markdown(head: list[str], lines: Iterable[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *lines])


def times_sooner(rows: list[Row], opponents: list[Row]) -> str:
    """Return the opponents' median divided by the median of the rows."""
    if not rows or not opponents:
        return ""
    median, opponent = (float(np.median(steps(found))) for found in (rows, opponents))
    if math.isinf(opponent) or math.isinf(median):
        return "–" if math.isinf(median) else "∞"
    return f"{opponent / median:.2f}"


def cell(rows: list[Row]) -> str:
    return f"{rows[0].lr:g}, {rows[0].weight_decay:g}" if rows else ""


def published(rows: list[Row]) -> str:
    lines = []
    for row in select(rows, evidence.published()):
        found = f"{row.first:,}" if row.first else f"> {row.budget:,}"
        lines.append([methods.load()[row.method].about, found, f"{PUBLISHED[row.method]:,}"])
    return markdown(["", "steps to 95%", "published"], lines)


def mod97(names: list[str], rows: list[Row]) -> str:
    lines = []
    for name in names:
        found = select(rows, evidence.finals(name, rows))
        if found:
            by_task = [quartiles([row for row in found if row.task == task]) for task in MOD97]
            lines.append([name, cell(found), *by_task])
    adamw, preset = (select(rows, evidence.finals(name, rows)) for name in ("adamw", evidence.PRESET))
    by_task = []
    for task in MOD97:
        ours, opponents = ([row for row in found if row.task == task] for found in (preset, adamw))
        by_task.append(times_sooner(ours, opponents))
    return markdown(["", "lr, wd", *MOD97], [*lines, ["speed-up of the preset", "", *by_task]])


def untuned(rows: list[Row]) -> str:
    """Return the table of a tuned AdamW and of the preset with its own settings."""
    both = [
        ("AdamW, tuned", select(rows, evidence.finals("adamw", rows))),
        ("the preset, untuned", select(rows, evidence.untuned())),
    ]
    by_task = [[[row for row in found if row.task == task] for task in MOD97] for _, found in both]
    lines = [[name, cell(found), *map(quartiles, there)] for (name, found), there in zip(both, by_task, strict=True)]
    sooner = [times_sooner(preset, adamw) for adamw, preset in zip(*by_task, strict=True)]
    return markdown(["", "lr, wd", *MOD97], [*lines, ["speed-up", "", *sooner]])


def both_of_pairs(rows: list[Row], names: Iterable[str] = evidence.PAIRS) -> dict[str, Both]:
    """Return for each architecture × task the rows of a tuned AdamW, if there are any, and of the untuned preset."""
    of = {pair: [row for row in rows if row.task == pair] for pair in names}  # so that each part reads few rows
    return {
        pair: (evidence.pair_reported(pair, "adamw", there), select(there, evidence.pair_untuned(pair)))
        for pair, there in of.items()
    }


def alike_of_pairs(rows: list[Row], names: list[str]) -> dict[str, list[Row]]:
    """Return the rows of AdamW with one cell for all of these pairs, for each pair whose runs are done."""
    found = select(rows, evidence.pairs_alike(names, rows))
    by_pair = {pair: [row for row in found if row.task == pair] for pair in names}
    return {pair: there for pair, there in by_pair.items() if len(there) == len(evidence.PAIR_SEEDS)}


def ratio(preset: list[Row], adamw: list[Row]) -> float | None:
    """Return the preset's median over AdamW's, or over AdamW's budget if AdamW failed. None if either has no rows."""
    if not preset or not adamw:
        return None
    ours, adamws = (float(np.median(steps(rows))) for rows in (preset, adamw))
    return ours / min(adamws, adamw[0].budget)


def two_digits(ratio: float) -> str:
    """Return a ratio for a table; it is infinite if the median run failed."""
    return "–" if math.isinf(ratio) else f"{ratio:.2f}"


def pairs(names: list[str], rows: list[Row]) -> str:
    """Return a table of models × tasks: the untuned preset, AdamW tuned on each, and AdamW with one cell for all.

    AdamW is shown where its runs are done.
    """
    alike = alike_of_pairs(rows, names)
    lines, tuned, same_cell = list[list[str]](), list[Both](), list[Both]()
    for pair, (adamw, preset) in both_of_pairs(rows, names).items():
        if not preset and not adamw:
            continue
        line = [pair, quartiles(preset), cell(adamw)]
        for opponents, compared in ((adamw, tuned), (alike.get(pair, []), same_cell)):
            found = ratio(preset, opponents)
            line += [quartiles(opponents), "" if found is None else two_digits(found)]
            if found is not None:
                compared.append((opponents, preset))
        lines.append(line)
    if tuned:
        count, *_, failed, _ = _in_short(tuned)
        first, mean = _last_lines(tuned)
        first_of_same, mean_of_same = _last_lines(same_cell if len(same_cell) == len(tuned) else [])
        lines.append([f"best, median, worst of {count}", f"{failed} failed", "", *first, *first_of_same])
        lines.append(["geometric mean", "", "", *mean, *mean_of_same])
    of_all = cell(next(iter(alike.values()), []))
    head = ["task/model", "preset, untuned", "AdamW: lr, wd", "AdamW, tuned", "ratio", f"AdamW, {of_all}", "ratio"]
    return markdown(head, lines)


def _last_lines(compared: list[Both]) -> tuple[list[str], list[str]]:
    """Return entries for the last two lines of `pairs`: AdamW's failed runs and the range of ratios; their mean."""
    if not compared:
        return ["", ""], ["", ""]
    _, best, median, worst, mean, _, failed = _in_short(compared)
    return [f"{failed} failed", f"{best}, {median}, {worst}"], ["", mean]


def recipes(rows: list[Row]) -> str:
    """Return the table of AdamW with the recipes of public code, for each architecture × task whose runs are done."""
    lines = []
    for pair, (adamw, preset) in both_of_pairs(rows).items():
        found = [select(rows, evidence.pair_recipe(pair, cell)) for cell in evidence.RECIPES]
        if any(len(of_cell) == len(evidence.PAIR_SEEDS) for of_cell in found):
            done = (quartiles(of_cell) if len(of_cell) == len(evidence.PAIR_SEEDS) else "" for of_cell in found)
            lines.append([pair, *done, quartiles(adamw), quartiles(preset)])
    heads = [f"AdamW, {lr:g}, {decay:g}" for lr, decay in evidence.RECIPES]
    return markdown(["task/architecture", *heads, "AdamW, tuned", "preset, untuned"], lines)


def both_tuned(method: str, name: str, rows: list[Row]) -> str:
    """Return the table of a method and AdamW, both tuned, for the pairs whose runs are all done."""
    lines, ratios = list[list[str]](), list[float]()
    compared: tuple[list[Row], list[Row]] = ([], [])
    for pair, (adamw, _) in both_of_pairs(rows).items():
        found = evidence.pair_reported(pair, method, rows)
        if len(found) == len(evidence.PAIR_SEEDS) and (shown_ratio := ratio(found, adamw)) is not None:
            ratios.append(shown_ratio)
            compared[0].extend(adamw)
            compared[1].extend(found)
            lines.append([pair, quartiles(adamw), cell(found), quartiles(found), two_digits(shown_ratio)])
    if ratios:
        numbers = ", ".join(map(two_digits, (min(ratios), float(np.median(ratios)), max(ratios))))
        failed = [f"{sum(map(math.isinf, steps(side)))} of {len(side)} failed" for side in compared]
        lines.append([f"best, median, worst of {len(ratios)}", failed[0], "", failed[1], numbers])
    return markdown(["task/architecture", "AdamW, tuned", f"{name}: lr, wd", f"{name}, tuned", "ratio"], lines)


def by_accuracy(rows: list[Row]) -> str:
    """Return the table of the untuned preset with a signal of losses and one of accuracies, beside a tuned AdamW."""
    lines = []
    for task in evidence.BY_ACCURACY_TASKS:
        if task in LEARNT:
            adamw = [row for row in select(rows, evidence.finals("adamw", rows)) if row.task == task]
        elif task in evidence.SHORT:
            adamw = evidence.other_reported(task, "adamw", rows)
        else:
            adamw = evidence.pair_reported(task, "adamw", rows)
        runs = evidence.by_accuracy(task)
        found = {name: select(rows, asked) for name, asked in runs.items()}
        if all(len(found[name]) == len(runs[name]) for name in runs):
            lines.append([task, quartiles(adamw), *map(quartiles, found.values())])
    return markdown(["task/model", "AdamW, tuned", "preset, by losses", "preset, by accuracies"], lines)


def summary(rows: list[Row]) -> str:
    """Return the table of the preset's medians over AdamW's, and of failures, for pairs with all runs done.

    In the first lines AdamW is tuned for each pair; in the last two it has one cell for all pairs of the line.
    """

    def done(compared: Iterable[Both], seeds: Collection[int] = evidence.PAIR_SEEDS) -> list[Both]:
        return [both for both in compared if all(len(found) == len(seeds) for found in both)]

    def of_pairs(names: Iterable[str]) -> list[Both]:
        return done(both_of_pairs(rows, names).values())

    adamw, preset = (select(rows, asked) for asked in (evidence.finals("adamw", rows), evidence.untuned()))
    by_task = [([x for x in adamw if x.task == task], [x for x in preset if x.task == task]) for task in LEARNT]
    sets = [
        ("transformers", done(by_task, evidence.SEEDS) + of_pairs(evidence.PAIRS)),
        ("of these, not used to choose settings", of_pairs(evidence.UNSEEN)),
        ("other models, with norms", of_pairs(filter(evidence.has_norms, evidence.KINDS))),
        ("other models, without norms", of_pairs(itertools.filterfalse(evidence.has_norms, evidence.KINDS))),
    ]
    lines = [[name, "tuned for each", *_in_short(compared)] for name, compared in sets if compared]
    for name, names in (("transformers except the two-block one", evidence.PAIRS), ("other models", evidence.KINDS)):
        alike = alike_of_pairs(rows, names)
        if len(alike) == len(names):
            compared = [(alike[pair], preset) for pair, (_, preset) in both_of_pairs(rows, names).items()]
            lines.append([name, f"{cell(alike[names[0]])} for all", *_in_short(compared)])
    ratios = ["best ratio", "median ratio", "worst ratio", "geometric mean"]
    head = ["models", "AdamW's lr, wd", "pairs", *ratios, "preset: failed runs", "AdamW: failed runs"]
    return markdown(head, lines)


def _in_short(compared: list[Both]) -> list[str]:
    """Return the number of pairs; their best, median, worst and mean ratio; the failed runs of preset and AdamW."""
    ratios = [found for adamw, preset in compared if (found := ratio(preset, adamw)) is not None]
    numbers = min(ratios), float(np.median(ratios)), max(ratios), math.exp(float(np.mean(np.log(ratios))))
    adamws, presets = ([x for found in pairs for x in steps(found)] for pairs in zip(*compared, strict=True))
    failed = (f"{sum(map(math.isinf, found))} of {len(found)}" for found in (presets, adamws))
    return [str(len(ratios)), *(f"{x:.2f}" for x in numbers), *failed]


def afterwards(names: list[str], rows: list[Row]) -> str:
    """Return the table of memorisation, dips before and after learning, and time, for runs on tasks that are learnt."""
    lines = []
    for name in names:
        found = [row for row in select(rows, evidence.finals(name, rows)) if row.task in LEARNT]
        learnt = [row for row in found if row.sustained is not None and row.seconds is not None]
        if learnt:
            memorised = shown(float(np.median([row.train or math.inf for row in found])))
            early = sum((row.first or 0) < (row.sustained or 0) for row in learnt)
            lowest = [row.lowest or 0.0 for row in learnt]
            fell = sum(score < tasks.load()[row.task].solved for row, score in zip(learnt, lowest, strict=True))
            seconds = np.median([row.seconds for row in learnt])
            lines.append(
                [
                    name,
                    memorised,
                    f"{early} of {len(learnt)}",
                    f"{fell} of {len(learnt)}",
                    f"{min(lowest):.0%}",
                    f"{seconds:.0f} s",
                ]
            )
    head = [
        "",
        "steps to 95% in training",
        "dipped before it stayed",
        "fell again within 100 steps",
        "lowest then",
        "median time",
    ]
    return markdown(head, lines)


def reach(names: list[str], rows: list[Row]) -> str:
    """Return the table of how often and when each method grokked on the grid of lr × wd, if the whole grid is done."""
    lines = []
    for name in names:
        asked = evidence.grid(name)
        found = select(rows, asked)
        if len(found) == len(asked):
            reached = sum(row.sustained is not None for row in found)
            chosen = evidence.best(found)
            there = [row for row in found if (row.lr, row.weight_decay) == chosen]
            median = shown(float(np.median(steps(found))))
            share = f"{reached / len(found):.0%} of {len(found)}"
            lines.append([name, share, median, cell(there), shown(float(np.median(steps(there))))])
    return markdown(["", "grokked", "median, all cells", "best cell", "median there"], lines)


def others(rows: list[Row]) -> str:
    lines = []
    for task in OTHER_TASKS:
        finals = {name: evidence.other_reported(task, name, rows) for name in COMPARED}
        for name, found in finals.items():
            if found:
                score = f"{np.median([row.best for row in found]):.3f}"
                sooner = times_sooner(found, finals["adamw"])
                lines.append([task, name, cell(found), quartiles(found), sooner, score, str(len(found))])
    return markdown(["task", "method", "lr, wd", "steps", "speed-up", "best score", "seeds"], lines)


def two_by_two(task: str, rows: list[Row]) -> str:
    lines = []
    found = select(rows, evidence.two_by_two(task))
    for name, title in (("adamw", "AdamW"), ("grokfast-adamw", "with the filter")):
        line = [title]
        for decay in TWO_BY_TWO[task][2]:
            there = [row for row in found if row.method == name and row.weight_decay == decay]
            line.append(f"{quartiles(there)}; {np.median([row.best for row in there]):.3f}" if there else "")
        lines.append(line)
    return markdown([task, *(f"wd {decay:g}: steps; best score" for decay in TWO_BY_TWO[task][2])], lines)


def variations(rows: list[Row]) -> str:
    lines = []
    for name, asked in evidence.variations(rows).items():
        found = select(rows, asked)
        if found and len(found) == len(asked):
            by_task = [quartiles([row for row in found if row.task == task]) for task in GRID_TASKS]
            lines.append([name, *by_task])
    return markdown(["", *GRID_TASKS], lines)


def formats(rows: list[Row]) -> str:
    """Return the table of the steps until each task is learnt, or of the median and range of the best scores."""

    def entry(found: list[Row]) -> str:
        if not found or not math.isinf(tasks.load()[found[0].task].solved):
            return quartiles(found) if found else ""
        amounts = [abs(row.best) for row in found]
        return f"{np.median(amounts):.4f} ({min(amounts):.4f} to {max(amounts):.4f})"

    lines = []
    for name, asked in evidence.formats().items():
        found = select(rows, asked)
        lines.append([name, *(entry([row for row in found if row.task == task]) for task in evidence.FORMAT_TASKS)])
    return markdown(["", *evidence.FORMAT_TASKS], lines)


def data(names: Iterable[str], rows: list[Row]) -> str:
    """Return the table of the median and range of the best scores. Losses are shown without their minus."""
    lines = []
    for task in names:
        opponents: list[float] = []
        for name, runs in evidence.data_reported(task, rows).items():
            found = select(rows, runs)
            amounts = [abs(row.best) for row in found]
            opponents = amounts if name == "adamw" else opponents
            if found:
                kind = "loss" if found[0].best < 0 else "accuracy"
                amount = f"{kind} {np.median(amounts):.4f} ({min(amounts):.4f} to {max(amounts):.4f})"
                more = np.median(amounts) / np.median(opponents) - 1 if opponents else math.nan
                difference = f"{more:+.1%}" if math.isfinite(more) and name != "adamw" else ""
                step = f"{shown(float(np.median([row.best_at or math.inf for row in found])))} of {found[0].budget:,}"
                lines.append([task, name, cell(found), amount, difference, step, str(len(found))])
    return markdown(["task", "method", "lr, wd", "best (range)", "against adamw", "at step", "seeds"], lines)


def effort(rows: list[Row]) -> str:
    hours = sum(row.minutes for row in rows) / 60
    commits = len({row.commit.rstrip("+") for row in rows})
    return f"{len(rows):,} runs, {hours:.1f} core-hours, at {commits} commits, which `grokking.csv` names.\n"


TABLES: dict[str, Table] = {
    "effort": effort,
    "published": published,
    "mod97": partial(mod97, MOD97_METHODS),
    "untuned": untuned,
    "pairs": partial(pairs, evidence.PAIRS),
    "defaults": partial(both_tuned, "grokadamw", "defaults"),
    "preset-tuned": partial(both_tuned, evidence.PRESET, "preset"),
    "kinds": partial(pairs, evidence.KINDS),
    "recipes": recipes,
    "by accuracy": by_accuracy,
    "summary": summary,
    "afterwards": partial(afterwards, MOD97_METHODS),
    "reach": partial(reach, [*MOD97_METHODS, evidence.RISING]),
    "others": others,
    **{f"filter and decay, {task}": partial(two_by_two, task) for task in TWO_BY_TWO},
    "variations": variations,
    "formats": formats,
    "data": partial(data, [task for task in evidence.DATA if task != evidence.FINETUNING]),
    "finetuning": partial(data, [evidence.FINETUNING]),
    "reach, others": partial(reach, ["adamw", evidence.PRESET, *OTHER_METHODS]),
}


def filled(text: str, rows: list[Row]) -> str:
    """Return the page with new tables between the marks `<!-- name -->` and `<!-- /name -->`."""
    for name, table in TABLES.items():
        mark = f"<!-- {name} -->\n"
        pattern = re.compile(f"{re.escape(mark)}.*?<!-- /{re.escape(name)} -->", re.DOTALL)
        text = pattern.sub(lambda _, mark=mark, table=table, name=name: f"{mark}{table(rows)}<!-- /{name} -->", text)
    return text


def main(rows: list[Row], out: Path) -> None:
    """Write pictures to `out`, and tables into the pages that have marks for them."""
    for page in PAGES:
        page.write_text(filled(page.read_text(), rows))
    finals = {name: found for name in MOD97_METHODS if (found := select(rows, evidence.finals(name, rows)))}
    pictures.quartiles(finals, MOD97, out / "grokking-mod97.png")
    grids = {name: found for name in MOD97_METHODS if (found := select(rows, evidence.grid(name)))}
    pictures.maps(grids, GRID_TASKS, LRS, DECAYS, out / "grokking-maps.png")
