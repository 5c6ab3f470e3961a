"""The runs that the report is made of, in the order in which it needs them.

Every method gets the same trials:

- tasks mod 97: a grid of lr × wd on two tasks, two seeds a cell; then the best cell on all five, with ten other seeds;
- every other task: four to nine cells, one seed; then the best with three other seeds, or ten where runs are quick;
- architectures, and other kinds of models: on each task the grid on one seed, as a race; then its three best cells on
  another seed, and the best of these on five more. If AdamW's best cell is on the grid's edge, the cells beyond it are
  tried, too. If it fails on two or more of the five seeds, the second-best cell runs on them, too. So does the cell
  that is best over all architectures and tasks, or over all other kinds of models. If several of AdamW's cells ran on
  the five seeds, the best one counts;
- tasks on real data: a grid for each, then five seeds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

from grokadamw import GrokAdamW, norms

from . import architectures, tasks
from .methods.grokadamw import BOOST
from .runs import Row, Run
from .tasks import kinds
from .tasks.architectures import PROBLEMS

LEARNT = ["mul97", "add97", "sub97", "div97"]
MOD97 = [*LEARNT, "quad97"]  # x² + xy + y², which no method learns in time
PRESET = "grokadamw-grokking"
METHODS = ["adamw", "adamw-matrices", PRESET, "grokadamw-no-filter", "adamw-row-limits", "grokadamw", "grokfast-adamw"]
MOD97_METHODS = [*METHODS, "grokadamw-short-rows", "muon"]
COMPARED = ["adamw", "grokfast-adamw", "grokadamw", PRESET]  # on the other tasks
RISING = "grokadamw-rising-decay"  # runs on the grid only
BY_ACCURACY = "grokadamw-by-accuracy"
OTHER_METHODS = ["row-norm-cap", "orthograd", "muon"]

GRID_TASKS, LRS, DECAYS = ["mul97", "sub97"], (1e-3, 3e-3, 1e-2), (0.3, 1.0, 3.0)
DECAYS_OF = {"row-norm-cap": (0.0, 0.3, 1.0)}  # for methods that are meant to need no weight decay
GRID_BUDGET, BUDGET, AFTERWARDS = 1500, 3000, 100  # steps
GRID_SEEDS, SEEDS = (0, 1), range(2, 12)
TRIAL_SEED, OTHER_SEEDS = 0, (1, 2, 3)  # reported runs use other seeds than those that chose the cell
QUICK = ["parity", "mnist", "qm9"]  # a run takes seconds
OTHER_SEEDS_OF: dict[str, Iterable[int]] = {
    "s5": (3, 4, 5),  # the preset was found with seeds 0 to 2
    **dict.fromkeys(QUICK, SEEDS),
}

# lrs and weight decays of the grid of each other task
OTHER_TASKS = {
    "parity": ((3e-3, 1e-2, 3e-2, 1e-1), (0.3, 1.0)),
    "mnist": ((1e-3, 3e-3, 1e-2), (0.3, 2.0, 5.0)),
    "s5": ((1e-3, 3e-3), (1.0, 3.0)),
    "sentiment": ((3e-4, 1e-3), (1.0, 10.0)),
    "qm9": ((3e-4, 1e-3, 3e-3), (1.0, 3.0, 10.0)),
    "add113": ((1e-3, 3e-3, 1e-2), (1.0, 3.0)),
}

# the preset with a constant weight decay, and with one change each: a method, and its options
VARIATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "as it is": (PRESET, {}),
    "weight decay follows the signal": (PRESET, BOOST),
    "without the filter": (PRESET, {"lamb": 0.0}),
    "without filter and γ": (PRESET, {"lamb": 0.0, "gamma": 0.0}),
    "without γ": (PRESET, {"gamma": 0.0}),
    "without a boost": (PRESET, {"signal_boost": 0.0}),
    "boost 2": (PRESET, {"signal_boost": 2.0}),
    "boost 8": (PRESET, {"signal_boost": 8.0}),
    "γ 0.3": (PRESET, {"gamma": 0.3}),
    "γ 0.8": (PRESET, {"gamma": 0.8}),
    "norms do not decay": ("grokadamw-norm-decay", {}),
    "norms decay as weights do": ("grokadamw-norm-decay", {"share": 1.0}),
    "without a largest change of rows": (PRESET, {"max_row_change": 0.0}),
    "rows move by 0.02": (PRESET, {"max_row_change": 0.02}),
    "rows move by 0.05": (PRESET, {"max_row_change": 0.05}),
    "embeddings learn as slowly as weights": ("grokadamw-same-lr", {}),
    "all rows no longer than 1": (PRESET, {"max_row_norm": 1.0}),
    "α does not adapt": (PRESET, {"grokking_signal_decay_rate": 0.0}),
    "α 0.8": (PRESET, {"alpha_init": 0.8}),
    "α 0.98": (PRESET, {"alpha_init": 0.98}),
    "λ 1": (PRESET, {"lamb": 1.0}),
    "λ 4": (PRESET, {"lamb": 4.0}),
    "without clipping": (PRESET, {"gradient_clipping": 0.0}),
    "second_moment='raw'": (PRESET, {"second_moment": "raw"}),
}

# every architecture × four tasks; each pair has its own grid
PAIRS = [f"{problem}/{name}" for problem in PROBLEMS for name in architectures.load()]
PAIR_METHODS = ["adamw", PRESET, "grokadamw"]
# no setting of the preset was chosen on these
UNSEEN = [f"s5/{name}" for name in ("dropout", "llama", "post-norm", "deep")]
# other kinds of models; each has one task and its own grid
KINDS = [task.name for task in kinds.TASKS]
PAIR_BUDGETS = {"s5": 3000, "add113": 3000}  # others have the grid's
PAIR_SEEDS = range(100, 105)
WIDE_LRS, WIDE_DECAYS = (3e-4, *LRS, 3e-2, 1e-1), (0.1, *DECAYS, 10.0)  # the grid, and the cells beyond it
FIRST, BEHIND, FINALISTS = (3e-3, 1.0), 1.5, 3  # the race: a cell stops at 1.5 times the first cell's steps
RECIPES = ((1e-3, 1.0), (1e-3, 0.01))  # lr and wd of AdamW in public code

# tasks on which the preset also runs with a signal of accuracies: the two-block model's, other kinds, division
SHORT = ["mnist", "parity"]  # other tasks with quick models
SHORT_BUDGET = 3000
BY_ACCURACY_TASKS = [*LEARNT, *KINDS, *(pair for pair in PAIRS if pair.startswith("div97/")), *SHORT]

# real data, judged by the best score: lrs, decays and seeds of the grid, and the methods
DATA_LRS, DATA_DECAYS = (3e-4, 1e-3, 3e-3), (0.1, 0.3, 1.0, 3.0, 10.0)
DATA_METHODS = ["adamw", PRESET, "grokadamw"]
# the grid, and the cells around it
WIDE_DATA_LRS, WIDE_DATA_DECAYS = (1e-4, *DATA_LRS, 1e-2, 3e-2, 1e-1), (0.03, *DATA_DECAYS, 30.0, 100.0)
FINETUNING = "hamlet-finetuning"
FINETUNING_LRS, FINETUNING_DECAYS = (1e-4, 3e-4, 1e-3, 3e-3), (0.01, 1.0)
DATA: dict[str, tuple[Iterable[float], Iterable[float], Iterable[int], list[str]]] = {
    **dict.fromkeys(["hamlet", "mnist-cnn", "mnist-vit"], (DATA_LRS, DATA_DECAYS, [TRIAL_SEED], DATA_METHODS)),
    FINETUNING: (FINETUNING_LRS, FINETUNING_DECAYS, GRID_SEEDS, ["adamw", "grokadamw"]),
    **dict.fromkeys(["breast-cancer", "digits", "diabetes"], (DATA_LRS, DATA_DECAYS, GRID_SEEDS, DATA_METHODS)),
}
DATA_SEEDS = range(100, 105)
WEAKER = {"lamb": 0.5}  # a weaker filter than the default λ of 2, for a model that is already trained

# formats of state and weights: a method, and its options
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": (PRESET, {}),
    "bfloat16 states": (PRESET, {"state_dtype": "bfloat16"}),
    "int8 states": (PRESET, {"state_dtype": "int8"}),
    "bfloat16 weights, 32 bits of them": ("grokadamw-bfloat16", {"master_weight_bits": 32}),
    "bfloat16 weights, 24 bits, int8 states": ("grokadamw-bfloat16", {"master_weight_bits": 24, "state_dtype": "int8"}),
    "bfloat16 weights, stochastic rounding": ("grokadamw-bfloat16", {"rounding": "stochastic"}),
    "bfloat16 weights, rounded to nearest": ("grokadamw-bfloat16", {}),
}
FORMAT_TASKS = {"mul97": (1.4, None), "mnist-vit": (1.4, None), "hamlet": (0.1, 600)}  # weight decay and steps

# without and with the filter × low and high weight decay: the settings of Grokfast's section 4
TWO_BY_TWO = {
    "mnist": ({"alpha": 0.8, "lamb": 0.1}, 1e-3, (0.01, 2.0), 60000),
    "sentiment": ({"alpha": 0.98, "lamb": 2.0}, 3e-4, (1.0, 10.0), 1500),
}

Cell = tuple[float, float]  # lr, wd


def best(rows: Iterable[Row]) -> Cell | None:
    """Return the cell with the lowest geometric mean of steps, or None if there are no rows.

    A failure counts as twice the budget. The highest score decides between equals, and so decides alone on a task that
    has no level to reach.
    """
    steps: dict[Cell, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        steps[row.lr, row.weight_decay].append((math.log(row.sustained or 2 * row.budget), -row.best))
    means = {  # rounded: means of equal numbers differ in the last digit, depending on how many there are
        cell: tuple(round(sum(values) / len(found), 9) for values in zip(*found, strict=True))
        for cell, found in steps.items()
    }
    return min(means, key=means.__getitem__, default=None)


def select(rows: Iterable[Row], asked: Iterable[Run]) -> list[Row]:
    """Return the rows of the runs that are done, in the runs' order."""
    asked = list(asked)
    few = {(run.task, run.method) for run in asked}  # to skip most rows quickly
    by_run = {row.run: row for row in rows if (row.task, row.method) in few}
    return [by_run[run] for run in asked if run in by_run]


def published() -> list[Run]:
    """Return the runs of Grokfast's first table."""
    return [Run.of("published", method, 0) for method in ("grokfast", "grokfast-ma", "adam")]


def grid(method: str) -> list[Run]:
    cells = product(GRID_SEEDS, GRID_TASKS, LRS, DECAYS_OF.get(method, DECAYS))
    return [Run.of(task, method, seed, lr, wd, budget=GRID_BUDGET) for seed, task, lr, wd in cells]


def finals(method: str, rows: list[Row]) -> list[Run]:
    """Return the runs with the best cell of the grid."""
    cell = best(select(rows, grid(method)))
    if cell is None:
        return []
    return [
        Run.of(task, method, seed, *cell, budget=BUDGET, afterwards=AFTERWARDS) for task, seed in product(MOD97, SEEDS)
    ]


def untuned() -> list[Run]:
    """Return runs of the preset with its own settings, on the same seeds as `finals`."""
    pairs = product(MOD97, SEEDS)
    return [Run.of(task, PRESET, seed, budget=BUDGET, afterwards=AFTERWARDS) for task, seed in pairs]


def trials(task: str, method: str) -> list[Run]:
    return [Run.of(task, method, TRIAL_SEED, lr, wd) for lr, wd in product(*OTHER_TASKS[task])]


def other_finals(task: str, method: str, rows: list[Row]) -> list[Run]:
    cell = best(select(rows, trials(task, method)))
    seeds = OTHER_SEEDS_OF.get(task, OTHER_SEEDS)
    return [] if cell is None else [Run.of(task, method, seed, *cell) for seed in seeds]


def other_reported(task: str, method: str, rows: list[Row]) -> list[Row]:
    return _reported(other_finals(task, method, rows), rows)


def _reported(asked: list[Run], rows: list[Row]) -> list[Row]:
    """Return the rows of the chosen cell on the reported seeds.

    If several of AdamW's cells were run on these seeds, the best counts. That favours AdamW: no other method chooses on
    seeds that are reported.
    """
    if not asked or asked[0].method != "adamw":
        return select(rows, asked)
    cells = sorted({(row.lr, row.weight_decay) for row in rows if (row.task, row.method) == (asked[0].task, "adamw")})
    of_cells = [select(rows, [replace(run, lr=lr, weight_decay=wd) for run in asked]) for lr, wd in cells]
    return _of_best([row for found in of_cells if len(found) == len(asked) for row in found])


def pair_budget(pair: str) -> int:
    """Return the steps of a run on the grid of a pair."""
    return PAIR_BUDGETS.get(pair.partition("/")[0], GRID_BUDGET)


def pair_grid(pair: str, method: str, rows: list[Row]) -> list[Run]:
    """Return the grid on the first seed. The first cell runs alone; its steps then limit those of the others."""
    done = {row.run: row for row in rows if row.task == pair}
    budget = pair_budget(pair)
    whole = [Run.of(pair, method, GRID_SEEDS[0], lr, wd, budget=budget) for lr, wd in product(LRS, DECAYS)]
    first = next(run for run in whole if (run.lr, run.weight_decay) == FIRST)
    if first not in done:
        return [first]
    limit = min(budget, math.ceil(BEHIND * (done[first].sustained or budget)))
    # runs that took the whole budget before races were introduced count, too
    return [run if run in done else replace(run, budget=limit) for run in whole]


def pair_semifinals(pair: str, method: str, rows: list[Row]) -> list[Run]:
    """Return runs on a second seed, for the best cells of the first seed."""
    asked = pair_grid(pair, method, rows)
    found = select(rows, asked)
    if len(found) < len(LRS) * len(DECAYS):
        return []
    found.sort(key=lambda row: (row.sustained or 2 * row.budget, -row.best))
    budget = pair_budget(pair)
    cells = [(row.lr, row.weight_decay) for row in found[:FINALISTS]]
    return [Run.of(pair, method, GRID_SEEDS[1], *cell, budget=budget) for cell in cells]


def pair_finalists(pair: str, method: str, rows: list[Row]) -> list[Row]:
    """Return the rows of the grid's three best cells, over both seeds; nothing if the semifinals are not done."""
    asked = pair_semifinals(pair, method, rows)
    second = select(rows, asked)
    if not asked or len(second) < len(asked):
        return []
    cells = {(row.lr, row.weight_decay) for row in second}
    first = [r for r in select(rows, pair_grid(pair, method, rows)) if (r.lr, r.weight_decay) in cells]
    return [*first, *second]


def pair_best(pair: str, method: str, rows: list[Row]) -> list[Row]:
    """Return the rows of the grid's best cell, over both seeds; nothing if the semifinals are not done."""
    return _of_best(pair_finalists(pair, method, rows))


def _of_best(rows: list[Row]) -> list[Row]:
    cell = best(rows)
    return [row for row in rows if (row.lr, row.weight_decay) == cell]


def pair_beyond(pair: str, method: str, rows: list[Row]) -> list[Run]:
    """Return runs of AdamW beyond its grid, if the best cell is on the grid's edge: all cells next to it, as a race.

    They run on the first seed; the quickest of them then runs on the second seed, too. On other kinds of models the two
    next higher learning rates are tried, because some of these models need very high ones.
    """
    inside = {row.seed: row for row in pair_best(pair, method, rows)}
    if method != "adamw" or not inside:
        return []
    lr, wd = inside[GRID_SEEDS[0]].lr, inside[GRID_SEEDS[0]].weight_decay
    i, j, more = WIDE_LRS.index(lr), WIDE_DECAYS.index(wd), 3 if pair in KINDS else 2
    near = WIDE_LRS[i - 1 : i + more], WIDE_DECAYS[j - 1 : j + 2]
    cells = [cell for cell in product(*near) if cell[0] not in LRS or cell[1] not in DECAYS]
    longest = pair_budget(pair)
    limits = {seed: min(longest, math.ceil(BEHIND * (row.sustained or longest))) for seed, row in inside.items()}
    asked = [[Run.of(pair, method, seed, *cell, budget=limits[seed]) for cell in cells] for seed in GRID_SEEDS]
    found = select(rows, asked[0])
    quickest = best(row for row in found if row.sustained) if len(found) == len(cells) else None
    return [*asked[0], *(run for run in asked[1] if (run.lr, run.weight_decay) == quickest)]


def pair_finals(pair: str, method: str, rows: list[Row]) -> list[Run]:
    """Return runs with the best cell, over both seeds, of the grid and beyond it."""
    asked = pair_beyond(pair, method, rows)
    beyond = select(rows, asked)
    if len(beyond) < len(asked):
        beyond = []  # until they are done, the grid's best cell counts
    seconds = {(row.lr, row.weight_decay) for row in beyond if row.seed == GRID_SEEDS[1]}
    cell = best([*pair_best(pair, method, rows), *(row for row in beyond if (row.lr, row.weight_decay) in seconds)])
    return [] if cell is None else [Run.of(pair, method, seed, *cell) for seed in PAIR_SEEDS]


def pair_seconds(pair: str, method: str, rows: list[Row]) -> list[Run]:
    """Return runs of AdamW's second-best cell on the reported seeds, if its best one failed on two of them or more."""
    asked = pair_finals(pair, method, rows)
    found = select(rows, asked)
    if method != "adamw" or len(found) < len(asked) or sum(row.sustained is None for row in found) < 2:
        return []
    chosen = found[0].lr, found[0].weight_decay
    others = [row for row in pair_finalists(pair, method, rows) if (row.lr, row.weight_decay) != chosen]
    return [Run.of(pair, method, row.seed, *cell) for row in found if (cell := best(others)) is not None]


def pair_reported(pair: str, method: str, rows: list[Row]) -> list[Row]:
    return _reported(pair_finals(pair, method, rows), rows)


# the grid's first cell, then the others; the cells beyond it on the first seed, then the quickest on the second
PAIR_PARTS = [pair_grid, pair_grid, pair_semifinals, pair_beyond, pair_beyond, pair_finals, pair_seconds]


@cache
def has_norms(pair: str) -> bool:
    return norms.has_norms(tasks.load()[pair].start(0).model)


@cache
def own(task: str) -> tuple[float, float, dict[str, Any]]:
    """Return the preset's own lr, wd and d for a task's model. A run that gives wd must give d, too."""
    preset = GrokAdamW.for_grokking(tasks.load()[task].start(0).model).defaults
    return preset["lr"], preset["weight_decay"], {"decay_boost": preset["decay_boost"]}


def pair_untuned(pair: str) -> list[Run]:
    """Return runs of the preset with its own settings."""
    return [Run.of(pair, PRESET, seed, *own(pair)) for seed in PAIR_SEEDS]


def by_accuracy(task: str) -> dict[str, list[Run]]:
    """Return runs of the untuned preset, by method: with a signal of losses, and with one of accuracies."""
    if task in LEARNT:
        losses = [run for run in untuned() if run.task == task]
    elif task in SHORT:
        losses = [Run.of(task, PRESET, seed, *own(task), SHORT_BUDGET) for seed in OTHER_SEEDS_OF[task]]
    else:
        losses = pair_untuned(task)
    return {PRESET: losses, BY_ACCURACY: [replace(run, method=BY_ACCURACY) for run in losses]}


def pairs_alike(pairs: list[str], rows: list[Row]) -> list[Run]:
    """Return runs of AdamW with the same cell on all pairs: the best of the grid on the first seed, over all pairs.

    There are none until the grids of all pairs are done.
    """
    found = select(rows, [run for pair in pairs for run in pair_grid(pair, "adamw", rows)])
    if len(found) < len(pairs) * len(LRS) * len(DECAYS) or (cell := best(found)) is None:
        return []
    return [Run.of(pair, "adamw", seed, *cell) for pair, seed in product(pairs, PAIR_SEEDS)]


def pair_recipe(pair: str, cell: Cell) -> list[Run]:
    """Return runs of AdamW with the learning rate and weight decay of a public recipe."""
    return [Run.of(pair, "adamw", seed, *cell, budget=GRID_BUDGET) for seed in PAIR_SEEDS]


def data_grid(task: str, method: str) -> list[Run]:
    lrs, decays, seeds, _ = DATA[task]
    return [Run.of(task, method, seed, lr, wd) for seed, lr, wd in product(seeds, lrs, decays)]


def data_trials(task: str, method: str, rows: list[Row]) -> list[Run]:
    """Return the grid and, while the best cell has neighbours that were not tried, these. Fine-tuning has the grid."""
    tried = data_grid(task, method)
    while task != FINETUNING and len(found := select(rows, tried)) == len(tried):
        lr, wd = best(found) or FIRST
        i, j = WIDE_DATA_LRS.index(lr), WIDE_DATA_DECAYS.index(wd)
        near = product(DATA[task][2], WIDE_DATA_LRS[max(i - 1, 0) : i + 2], WIDE_DATA_DECAYS[max(j - 1, 0) : j + 2])
        new = [run for seed, *cell in near if (run := Run.of(task, method, seed, *cell)) not in tried]
        if not new:
            break
        tried += new
    return tried


def data_finals(task: str, method: str, rows: list[Row]) -> list[Run]:
    """Return the runs with the best cell of the task's trials, as far as they are done."""
    return _with_best(task, method, select(rows, data_trials(task, method, rows)))


def _with_best(task: str, method: str, tried: list[Row]) -> list[Run]:
    cell = best(tried)
    return [] if cell is None else [Run.of(task, method, seed, *cell) for seed in DATA_SEEDS]


def data_reported(task: str, rows: list[Row]) -> dict[str, list[Run]]:
    """Return the reported runs of a task on real data, by name."""
    runs = dict[str, list[Run]]()
    for method in DATA[task][-1]:
        asked = data_finals(task, method, rows)
        if len(select(rows, asked)) < len(asked):  # until they are done, the grid's best cell counts
            asked = _with_best(task, method, select(rows, data_grid(task, method)))
        runs[method] = [row.run for row in _reported(asked, rows)]
    if task == FINETUNING:
        runs["grokadamw, λ 0.5, at AdamW's cell"] = [run for run in weaker(rows) if run.seed in DATA_SEEDS]
    return runs


def weaker(rows: list[Row]) -> list[Run]:
    """Return runs of fine-tuning with a weaker filter, at the best cell of AdamW's grid; the grid's seeds are first."""
    cell = best(select(rows, data_grid(FINETUNING, "adamw")))
    if cell is None:
        return []
    return [Run.of(FINETUNING, "grokadamw", seed, *cell, WEAKER) for seed in (*GRID_SEEDS, *DATA_SEEDS)]


def two_by_two(task: str) -> list[Run]:
    options, lr, decays, budget = TWO_BY_TWO[task]
    arms = [("adamw", {}), ("grokfast-adamw", options)]
    return [
        Run.of(task, method, seed, lr, wd, {**settings, "clip": 0.0}, budget)
        for seed, wd, (method, settings) in product(OTHER_SEEDS, decays, arms)
    ]


def formats() -> dict[str, list[Run]]:
    """Return runs of the preset in each format, on the seeds of reported runs."""
    return {
        name: [
            Run.of(task, method, seed, None, decay, options, budget)
            for (task, (decay, budget)), seed in product(FORMAT_TASKS.items(), DATA_SEEDS)
        ]
        for name, (method, options) in FORMATS.items()
    }


def variations(rows: list[Row]) -> dict[str, list[Run]]:
    """Return runs of each variation, with the best cell of the preset's grid."""
    cell = best(select(rows, grid(PRESET)))
    tried = list(product(GRID_TASKS, SEEDS[:3]))
    return {
        name: [Run.of(task, method, seed, *cell, options, GRID_BUDGET) for task, seed in tried] if cell else []
        for name, (method, options) in VARIATIONS.items()
    }


def todo(rows: list[Row]) -> list[Run]:
    """Return the next runs that are not done yet. Their results will choose later ones."""
    return next(not_done(rows), [])


def missing(rows: list[Row]) -> list[Run]:
    """Return all runs that are not done yet, as far as `rows` determine them."""
    return list(dict.fromkeys(run for stage in not_done(rows) for run in stage))


def not_done(rows: list[Row]) -> Iterator[list[Run]]:
    done = {row.run for row in rows}
    for stage in stages(rows):
        if left := [run for run in stage if run not in done]:
            yield left


def stages(rows: list[Row]) -> Iterator[list[Run]]:
    """Yield the runs in the order in which they are done, as far as `rows` determine them."""

    of: dict[str, list[Row]] = defaultdict(list)  # by task: most parts need the rows of one task only
    for row in rows:
        of[row.task].append(row)

    def learnt(asked: list[Run]) -> list[Run]:  # x² + xy + y² comes later: it fails, and so takes longest
        return [run for run in asked if run.task in LEARNT]

    yield learnt(untuned())
    for problem in PROBLEMS:
        of_problem = [pair for pair in PAIRS if pair.startswith(problem + "/")]
        yield [run for pair in of_problem for run in pair_untuned(pair)]
        for part in PAIR_PARTS:
            yield [run for pair in of_problem for run in part(pair, "adamw", of[pair])]
    yield [run for pair in KINDS for run in pair_untuned(pair)]
    for part in PAIR_PARTS:
        yield [run for pair in KINDS for run in part(pair, "adamw", of[pair])]
    yield grid(PRESET)
    yield [run for same in zip(*formats().values(), strict=True) for run in same]
    for _ in WIDE_DATA_LRS:  # the grid, then the cells around the best one
        for task, (*_, names) in DATA.items():
            yield [run for method in names for run in data_trials(task, method, rows)]
    for task, (*_, names) in DATA.items():
        yield [run for method in names for run in data_finals(task, method, rows)]
    yield weaker(rows)
    for method in MOD97_METHODS:
        yield grid(method)
    for method in MOD97_METHODS:
        yield learnt(finals(method, rows))
    yield published()
    yield from variations(rows).values()
    for task in TWO_BY_TWO:
        yield two_by_two(task)
    for task, method in product(OTHER_TASKS, COMPARED):
        yield trials(task, method)
    for task, method in product(OTHER_TASKS, COMPARED):
        yield other_finals(task, method, rows)
    yield [run for task in BY_ACCURACY_TASKS for runs in by_accuracy(task).values() for run in runs]
    yield pairs_alike(KINDS, rows)
    yield pairs_alike(PAIRS, rows)
    for cell in RECIPES:
        yield [run for pair in PAIRS for run in pair_recipe(pair, cell)]
    yield untuned()
    for method in MOD97_METHODS:
        yield finals(method, rows)
    for method in [RISING, *OTHER_METHODS]:
        yield grid(method)
    for method, part in product(PAIR_METHODS, PAIR_PARTS):
        yield [run for pair in PAIRS for run in part(pair, method, of[pair])]
