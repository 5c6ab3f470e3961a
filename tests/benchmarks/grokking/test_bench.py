"""Tests of the bench: methods, runs and their file, the choice of the next runs, the report, the command."""

from __future__ import annotations

import io
import math
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from grokadamw import GrokAdamW

pytest.importorskip("rich", reason="the benchmarks print with rich, and draw with matplotlib")
pytest.importorskip("matplotlib", reason="the benchmarks print with rich, and draw with matplotlib")

from rich.console import Console  # noqa: E402

from benchmarks.grokking import (  # noqa: E402
    __main__,
    architectures,
    estimates,
    evidence,
    experiment,
    methods,
    on_gpu,
    report,
    runs,
    tasks,
)
from benchmarks.grokking.experiment import Curve  # noqa: E402
from benchmarks.grokking.methods import Method, others  # noqa: E402
from benchmarks.grokking.runs import Row, Run  # noqa: E402
from benchmarks.grokking.tasks import Data, Split, Start, Task  # noqa: E402

METHODS = methods.load()


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for i in range(steps):
        optimizer.zero_grad()
        model(torch.arange(7)).sub(i).square().mean().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_trains_every_parameter(method: Method) -> None:
    model = small()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = method.optimizer(model, betas=(0.9, 0.98))
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, listed)) == sorted(map(id, model.parameters()))
    decay = method.weight_decay * method.lr
    for group in optimizer.param_groups:
        spared = group["weight_decay"] == 0 and all(p.dim() < 2 for p in group["params"])
        share = group["weight_decay"] * group["lr"] / decay if decay else 1.0
        assert spared or share == pytest.approx(0.25 if method.name == evidence.RISING else 1)
    learn(model, optimizer)
    assert all(
        p.isfinite().all() and not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)
    )


def test_the_cap_on_rows() -> None:
    model = small()
    learn(model, METHODS["row-norm-cap"].optimizer(model, betas=(0.9, 0.98), cap=0.3, lr=0.1))
    embedding, inner, _, last = model
    assert inner.weight.norm(dim=1).max().item() == pytest.approx(0.3)
    assert embedding.weight.norm(dim=1).max().item() > 0.5
    assert last.weight.norm(dim=1).max().item() > 0.5


def test_orthograd_turns_gradients_and_keeps_their_length() -> None:
    model = small()
    optimizer = others.orthograd(model, lr=0.0)
    model(torch.arange(7)).square().mean().backward()
    lengths = [p.grad.norm() for p in model.parameters()]
    optimizer.step()
    for p, length in zip(model.parameters(), lengths, strict=True):
        assert torch.dot(p.flatten(), p.grad.flatten()).abs() < 1e-5
        torch.testing.assert_close(p.grad.norm(), length)


def toy(scores: list[float]) -> Task:
    """Return a task whose held-out scores are given in advance, one per evaluation."""
    told = iter(scores)

    def start(seed: int) -> Start:
        part = Split(torch.ones(4, 1), torch.zeros(4, 1))

        def batches():
            while True:
                yield part

        return Start(nn.Linear(1, 1), Data(part, part, Split(part.inputs, part.targets - 1)), batches())

    def score(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.full((4,), next(told) if targets[0] < 0 else 0.5)

    return Task("toy", "", start, loss=nn.functional.mse_loss, score=score, evaluate_every=2)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def grokadamw(model: nn.Module) -> GrokAdamW:
    return GrokAdamW(model.named_parameters())


def test_a_run_ends_with_six_good_evaluations_in_a_row() -> None:
    task = toy([0.2, 0.97, 0.2, *[0.97] * 20])
    curve = experiment.run(task, adamw, seed=0, budget=100)
    assert curve.steps == list(range(2, 20, 2))
    assert curve.steps[curve.first(curve.report)] == 4
    assert curve.steps[curve.sustained(curve.report)] == 8
    assert curve.sustained(curve.train) is None
    assert all(map(math.isnan, curve.alpha))


def test_a_run_goes_on_afterwards_and_stops_at_its_budget() -> None:
    afterwards = experiment.run(toy([0.97] * 50), adamw, seed=0, budget=100, afterwards=8)
    assert afterwards.steps[-1] == 12 + 8
    assert experiment.run(toy([0.9] * 50), adamw, seed=0, budget=21).steps[-2:] == [20, 21]
    begun = experiment.run(toy([*[0.9] * 9, *[0.97] * 9]), adamw, seed=0, budget=20)
    assert begun.steps[begun.sustained(begun.report)] == 20


def test_a_task_without_a_level_takes_its_budget_and_its_best_evaluation_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = [-3.0, math.nan, -1.5, -2.0, -1.5, -4.0]
    monkeypatch.setitem(tasks.load(), "toy", replace(toy(losses), solved=math.inf))
    row, curve = runs.execute(Run.of("toy", "adamw", 0, budget=12))
    assert curve.steps == [2, 4, 6, 8, 10, 12]
    assert (row.best, row.best_at, row.last, row.first, row.sustained) == (-1.5, 6, -4.0, None, None)
    assert curve.best([math.nan] * 3) is None


def test_what_would_contradict_its_row_is_refused() -> None:
    with pytest.raises(ValueError, match="lr is not one of the options"):
        Run.of("mul97", "adamw", 0, options={"lr": 0.1})
    row, _ = runs.execute(Run.of("parity", "adamw", 0, options={"betas": [0.5, 0.9]}, budget=2))
    assert (row.steps, row.sustained) == (2, None)


def test_signals_hear_of_the_tenth_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []
    monkeypatch.setattr(GrokAdamW, "record", lambda self, **losses: heard.append(losses))
    experiment.run(toy([0.5] * 9), grokadamw, seed=0, budget=4)
    assert [set(losses) for losses in heard] == [{"train_loss", "eval_loss"}] * 2
    # in the toy task the part for signals is the training batch, and the report's part is another
    assert heard[0]["eval_loss"] < heard[0]["train_loss"]


def test_evaluation_stops_early_where_nothing_depends_on_it() -> None:
    seen = []

    def score(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(len(targets))
        return targets

    task = replace(toy([]), score=score)
    n = 2 * experiment.CHUNK + 5
    half = torch.cat([torch.ones(n // 2), torch.zeros(n - n // 2)])
    assert experiment.evaluate(task, nn.Identity(), Split(half, half)) == pytest.approx(0.5, abs=1e-3)
    assert experiment.evaluate(task, nn.Identity(), Split(half, half.flip(0))) == 0
    assert seen == [experiment.CHUNK, experiment.CHUNK, 5, experiment.CHUNK]
    everything = replace(task, solved=math.inf)
    assert experiment.evaluate(everything, nn.Identity(), Split(half, half.flip(0))) == pytest.approx(0.5, abs=1e-3)


ROW = Row(
    **asdict(Run.of("mul97", "adamw", 3, options={"eps": 1e-6})),
    train=None,
    sustained=420,
    seconds=1.5,
    steps=470,
    commit="abc+",
    machine="a processor, torch 2",
)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    assert runs.read(path) == []
    other = replace(ROW, seed=4, sustained=None, seconds=None)
    for row in (ROW, other):
        runs.append(path, row)
    assert runs.read(path) == [ROW, other]
    with path.open("a") as file:
        file.write("mul97,adamw,5,0.0")  # the process died while writing
    assert runs.read(path) == [ROW, other]
    runs.append(path, replace(ROW, seed=6))
    assert [row.seed for row in runs.read(path)] == [3, 4, 6]
    path.write_text("task,seed\nmul97,1\n")
    with pytest.raises(ValueError, match="other columns"):
        runs.read(path)
    assert ROW.run == Run.of("mul97", "adamw", 3, options={"eps": 1e-6})


def test_rows_from_before_the_step_of_the_best_score_are_read() -> None:
    rows = runs.read(runs.CSV)
    old = [row for row in rows if row.best_at is None]
    assert any(row.sustained is not None and row.best > 0.95 for row in old)
    assert {row.task for row in old} <= set(tasks.load())


def test_runs_in_parallel_are_those_in_one_process_and_one_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMDB", str(tmp_path))
    asked = [Run.of("imdb", "adamw", 0, budget=50), *(Run.of("parity", "adamw", seed, budget=100) for seed in (0, 1))]
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=120, color_system=None)
    with pytest.raises(FileNotFoundError, match="set IMDB") as error:
        runs.execute_all([*asked, asked[1]], tmp_path / "runs.csv", 1, terminal)
    assert re.search(r"all runs .*0/3 .*0:00:00 -:--:--", shown.getvalue())  # elapsed and remaining time
    assert "task='imdb'" in error.value.__notes__[0]
    rows = runs.read(tmp_path / "runs.csv")
    assert [row.run for row in rows] == asked[1:]
    here, _ = runs.execute(asked[1])
    assert (rows[0].steps, rows[0].best, rows[0].last, rows[0].sustained) == (100, here.best, here.last, None)
    assert rows[0].commit
    assert rows[0].minutes > 0


def test_a_gpu_gets_a_run_as_soon_as_what_it_depends_on_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads replace the worker processes in this test. A run that fails is started only once."""
    path = tmp_path / "runs.csv"
    first, failing, *later = (replace(ROW.run, seed=seed) for seed in range(5))
    asked: list[Run] = []

    def work(todo: queue.Queue[Run | None], done: queue.Queue[Row | str]) -> None:
        while (run := todo.get()) is not None:
            asked.append(run)
            done.put("no such thing" if run == failing else replace(ROW, seed=run.seed))

    def missing() -> list[Run]:
        done = {row.run for row in runs.read(path)}
        return [run for run in [first, failing, *(later if first in done else [])] if run not in done]

    monkeypatch.setattr(on_gpu, "work", work)
    monkeypatch.setattr(on_gpu, "AT_ONCE", 2)
    threads = SimpleNamespace(Queue=queue.Queue, Process=threading.Thread)
    monkeypatch.setattr(on_gpu.multiprocessing, "get_context", lambda _: threads)
    with pytest.raises(RuntimeError, match="no such thing"):
        on_gpu.execute_all(missing, path, 1, Console(quiet=True))
    assert asked == [first, failing, *later]
    assert [row.run for row in runs.read(path)] == [first, *later]


def test_a_run_has_its_bar_from_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    told: queue.SimpleQueue[runs.News] = queue.SimpleQueue()
    monkeypatch.setattr(runs, "news", told, raising=False)
    asked = Run.of("parity", "adamw", 0, budget=100)
    runs.work(asked)
    news = [told.get() for _ in range(told.qsize())]
    assert news[0] == (asked, 0, "starting")
    assert news[-1][:2] == (asked, 100)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.long
@pytest.mark.parametrize("how", ["the keyboard", "SIGKILL"])
def test_an_end_at_any_time_ends_all_of_it_and_what_is_done_stays(how: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    code = f"""if __name__ == "__main__":
        from pathlib import Path
        from rich.console import Console
        from benchmarks.grokking.runs import Run, execute_all
        asked = [Run.of("parity", "adamw", 0, budget=50), Run.of("parity", "adamw", 1, budget=10**6)]
        execute_all(asked, Path({str(path)!r}), 1, Console(quiet=True))"""
    (tmp_path / "main.py").write_text(textwrap.dedent(code))
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py")], env=environment, start_new_session=True, stdout=-1
    )
    while not runs.read(path):
        assert process.poll() is None
        time.sleep(0.1)
    if how == "SIGKILL":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) != 0
    process.communicate(timeout=30)  # returns once no worker has the output open
    assert [row.seed for row in runs.read(path)] == [0]


def pretended(run: Run) -> Row:
    """Return an invented row of the run: the smaller the learning rate and the seed, the fewer steps it needs."""
    return Row(**asdict(run), sustained=round(1000 * run.lr**0.1) + 10 * run.seed, minutes=1.0, best=0.99, best_at=90)


def test_evidence_comes_to_an_end_and_gives_every_method_the_same_trials() -> None:
    rows: list[Row] = []
    for _ in range(7):  # grids, then cells beyond them, then the runs that both select, then nothing
        missing = evidence.missing(rows)
        assert evidence.todo(rows) == missing[: len(evidence.todo(rows))]
        assert not {row.run for row in rows} & set(missing)
        rows += map(pretended, missing)
    assert missing == []
    finals = [row for row in rows if row.afterwards]
    untuned = set(evidence.untuned())
    assert len([row for row in finals if row.run in untuned]) == 50
    for method in evidence.METHODS:
        tuned = [row for row in finals if row.method == method and row.run not in untuned]
        assert len(tuned) == 50
        assert {row.lr for row in tuned} == {1e-3}  # the best cell
        assert len(evidence.select(rows, evidence.grid(method))) == 36
        for task in evidence.OTHER_TASKS if method in evidence.COMPARED else ():
            reported = evidence.other_finals(task, method, rows)
            assert len(reported) == (10 if task in evidence.QUICK else 3)
            assert not {run.seed for run in reported} & {run.seed for run in evidence.trials(task, method)}
    assert not {row.seed for row in finals} & set(evidence.GRID_SEEDS)
    text = report.filled("".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in report.TABLES), rows)
    assert "old" not in text
    assert report.filled(text, rows) == text
    assert "| mul97 |" in text or "mul97 | add97" in text


def test_a_run_may_say_otherwise_about_clipping() -> None:
    asked = next(run for run in evidence.two_by_two("mnist") if run.method == "grokfast-adamw")
    row, _ = runs.execute(replace(asked, budget=50))
    assert row.options == '{"alpha": 0.8, "clip": 0.0, "lamb": 0.1}'
    assert row.steps == 50


def test_the_best_cell() -> None:
    rows = [
        replace(ROW, lr=lr, seed=seed, sustained=sustained, budget=1000, best=best)
        for lr, seed, sustained, best in [
            (1e-3, 0, 300, 1.0),
            (1e-3, 1, None, 0.9),  # a failure counts as 2,000 steps
            (3e-3, 0, 700, 1.0),
            (3e-3, 1, 700, 1.0),
            (1e-2, 0, None, 0.3),
            (1e-2, 1, None, -math.inf),
        ]
    ]
    assert evidence.best(rows) == (3e-3, 1.0)
    assert evidence.best(row for row in rows if row.sustained is None) == (1e-3, 1.0)  # failures are ranked by score
    assert evidence.best([]) is None


@pytest.mark.parametrize(
    "name", [*(f"add97/{name}" for name in architectures.load()), *evidence.KINDS, *evidence.SHORT]
)
def test_the_preset_as_it_comes_has_its_own_numbers(name: str) -> None:
    reported = evidence.by_accuracy(name)[evidence.PRESET][0]
    asked = ["run", "--task", name, "--method", evidence.PRESET, "--seeds", str(reported.seed)]
    (by_hand,) = __main__.checked(__main__.parsed(asked)[0])
    model = tasks.load()[name].start(reported.seed).model
    expected = GrokAdamW.for_grokking(model).param_groups
    for run in (reported, by_hand):
        found = run.optimizer(model).param_groups
        assert [{**group, "betas": ()} for group in found] == [{**group, "betas": ()} for group in expected]


def test_the_summary_has_what_is_done_alone() -> None:
    rows = [
        replace(ROW, **asdict(run), sustained=300 if run.method == "adamw" else 100 + run.seed)
        for pair in evidence.PAIRS[:6]
        for run in evidence.pair_untuned(pair)
    ]
    assert report.summary(rows).count("\n") == 2  # AdamW's runs are missing
    while asked := [
        run for pair in evidence.PAIRS[:6] for part in evidence.PAIR_PARTS for run in part(pair, "adamw", rows)
    ]:
        new = [run for run in asked if run not in {row.run for row in rows}]
        if not new:
            break
        rows += [replace(ROW, **asdict(run), sustained=400) for run in dict.fromkeys(new)]
    ratios = " | ".join(4 * ["0.51"])  # 202 of 400 steps
    assert f"| transformers | tuned for each | 6 | {ratios} | 0 of 30 | 0 of 30 |" in report.summary(rows)
    assert "| transformers | tuned for each | 5 | 0.51" in report.summary(rows[1:])


def test_recipes_are_shown_where_all_seeds_are_done() -> None:
    pair, (first, second) = evidence.PAIRS[0], evidence.RECIPES
    rows = [replace(ROW, **asdict(run), sustained=700) for run in evidence.pair_recipe(pair, first)]
    assert pair not in report.recipes(rows[1:])
    assert f"| {pair} | 700 (700 to 700) |  |  |  |" in report.recipes(rows)
    rows += [replace(ROW, **asdict(run), sustained=None) for run in evidence.pair_recipe(pair, second)]
    assert f"| {pair} | 700 (700 to 700) | not reached (0 of 5) |  |  |" in report.recipes(rows)


def test_one_cell_for_all_pairs_is_the_best_over_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """On each of two pairs another cell is best. The cell that is second-best on both is best over both."""
    names = evidence.PAIRS[:2]
    quickest = dict(zip(names, [(1e-2, 1.0), (1e-2, 0.3)], strict=True))
    rows = [replace(ROW, **asdict(run), sustained=200) for pair in names for run in evidence.pair_untuned(pair)]
    done = {row.run for row in rows}
    while new := [
        run for pair in names for part in evidence.PAIR_PARTS for run in part(pair, "adamw", rows) if run not in done
    ]:
        for run in dict.fromkeys(new):
            at = run.lr, run.weight_decay
            took = 400 if at == quickest[run.task] else 500 if at == (3e-3, 0.3) else 700
            rows.append(replace(ROW, **asdict(run), sustained=took))
            done.add(run)

    runs = evidence.pairs_alike(names, rows)
    assert runs == [Run.of(pair, "adamw", seed, 3e-3, 0.3) for pair in names for seed in range(100, 105)]
    assert evidence.pairs_alike(names, [row for row in rows if (row.lr, row.seed) != (1e-3, 0)]) == []
    rows += [replace(ROW, **asdict(run), sustained=800) for run in runs[:-1]]
    assert report.pairs(names, rows).endswith(
        "| 0 of 10 failed | 0.50, 0.50, 0.50 |  |  |\n| geometric mean |  |  |  | 0.50 |  |  |\n"
    )
    rows.append(replace(ROW, **asdict(runs[-1]), sustained=None))
    assert "| AdamW, 0.003, 0.3 | ratio |\n" in report.pairs(names, rows)
    assert "| 800 (800 to 800), 1 of 5 failed | 0.25 |\n" in report.pairs(names, rows)
    assert "| 1 of 10 failed | 0.25, 0.25, 0.25 |\n" in report.pairs(names, rows)
    monkeypatch.setattr(evidence, "KINDS", names)
    ratios = " | ".join(4 * ["0.25"])
    line = f"| other models | 0.003, 0.3 for all | 2 | {ratios} | 0 of 10 | 1 of 10 |"
    assert line in report.summary(rows)
    assert line not in report.summary(rows[:-1])


def test_architectures_are_tuned_by_a_race() -> None:
    """The first cell limits the others. The best three run with a second seed, and the best of these is kept."""
    steps = {(3e-3, 1.0): 600, (1e-3, 3.0): 800, (3e-3, 0.3): 500, (1e-2, 0.3): 550}

    def done(asked: list[Run]) -> list[Row]:
        found = [steps.get((run.lr, run.weight_decay), 3000) + 400 * run.seed * (run.lr == 1e-2) for run in asked]
        return [
            replace(ROW, **asdict(run), sustained=count if count <= run.budget else None)
            for run, count in zip(asked, found, strict=True)
        ]

    pair = "add113/deep"
    (first,) = evidence.pair_grid(pair, "adamw", [])
    assert (first.lr, first.weight_decay, first.budget) == (3e-3, 1.0, 3000)
    rows = done([first])
    grid = evidence.pair_grid(pair, "adamw", rows)
    assert [run.budget for run in grid if run != first] == [900] * 8
    assert evidence.pair_semifinals(pair, "adamw", rows) == []
    rows += done([run for run in grid if run != first])
    assert evidence.pair_grid(pair, "adamw", rows) == grid
    semifinals = evidence.pair_semifinals(pair, "adamw", rows)
    assert [(run.lr, run.weight_decay) for run in semifinals] == [(3e-3, 0.3), (1e-2, 0.3), (3e-3, 1.0)]
    assert {(run.seed, run.budget) for run in semifinals} == {(1, 3000)}
    assert evidence.pair_finals(pair, "adamw", rows) == []
    finals = evidence.pair_finals(pair, "adamw", rows + done(semifinals))
    assert {(run.lr, run.weight_decay) for run in finals} == {(3e-3, 0.3)}
    assert [run.seed for run in finals] == [100, 101, 102, 103, 104]
    rows += done(semifinals)
    assert evidence.pair_seconds(pair, "adamw", rows) == []
    for failed, count in ((1, 0), (2, 5)):
        reported = [replace(row, sustained=None if row.seed < 100 + failed else 500) for row in done(finals)]
        second = evidence.pair_seconds(pair, "adamw", rows + reported)
        assert [(run.lr, run.weight_decay, run.budget) for run in second] == [(3e-3, 1.0, 3000)] * count
        assert evidence.pair_reported(pair, "adamw", rows + reported) == reported
    assert evidence.pair_reported(pair, "adamw", rows + reported + done(second)) == done(second)  # 600 for each seed
    worse = [replace(row, sustained=None) for row in done(second)]
    assert evidence.pair_reported(pair, "adamw", rows + reported + worse) == reported
    beyond = evidence.pair_beyond(pair, "adamw", rows)  # the best cell has the grid's lowest weight decay
    assert [(run.lr, run.weight_decay) for run in beyond] == [(1e-3, 0.1), (3e-3, 0.1), (1e-2, 0.1)]
    assert {(run.seed, run.budget) for run in beyond} == {(0, 750)}
    assert evidence.pair_beyond(pair, "grokadamw", rows) == []
    steps[1e-2, 0.1] = 450  # 850 steps on the second seed
    last = evidence.pair_beyond(pair, "adamw", rows + done(beyond))[3:]
    assert [(run.lr, run.weight_decay, run.seed, run.budget) for run in last] == [(1e-2, 0.1, 1, 750)]
    assert evidence.pair_finals(pair, "adamw", rows + done(beyond)) == finals
    assert evidence.pair_finals(pair, "adamw", rows + done(beyond) + done(last)) == finals
    steps[3e-3, 0.1] = 440
    beyond = evidence.pair_beyond(pair, "adamw", rows + done(beyond))
    better = evidence.pair_finals(pair, "adamw", rows + done(beyond))
    assert {(run.lr, run.weight_decay) for run in better} == {(3e-3, 0.1)}
    assert evidence.pair_grid(pair, "adamw", [replace(rows[0], sustained=None)])[0].budget == 3000


def losses(asked: list[Run]) -> list[Row]:
    """Return invented rows: loss is lowest at lr 1e-3, wd 1, grows with the seed, and is 10% higher for GrokAdamW."""
    rows = []
    for run in asked:
        away = abs(math.log(run.lr / 1e-3)) + abs(math.log(run.weight_decay))
        loss = (1 + away + run.seed / 1000) * (1.1 if run.method == "grokadamw" else 1)
        rows.append(Row(**asdict(run), best=-loss, best_at=200 + run.seed, last=-9.0))
    return rows


def test_the_cell_with_the_lowest_loss_is_kept_and_reported() -> None:
    rows: list[Row] = []
    for method in ("adamw", "grokadamw"):
        grid = evidence.data_grid("hamlet", method)
        assert {run.weight_decay for run in grid} >= {0.1, 10.0}
        rows += losses(grid)
        assert evidence.best(rows) == (1e-3, 1.0)
        assert evidence.data_trials("hamlet", method, rows) == grid
        finals = evidence.data_finals("hamlet", method, rows)
        assert not {run.seed for run in finals} & {run.seed for run in grid}
        rows += losses(finals)
    assert report.data(["hamlet"], rows).splitlines()[2:] == [
        "| hamlet | adamw | 0.001, 1 | loss 1.1020 (1.1000 to 1.1040) |  | 302 of 2,000 | 5 |",
        "| hamlet | grokadamw | 0.001, 1 | loss 1.2122 (1.2100 to 1.2144) | +10.0% | 302 of 2,000 | 5 |",
    ]


def test_cells_around_the_best_one_are_tried_until_it_is_inside() -> None:
    """On real data. The best is at lr 0.03 and wd 1, the grid ends at 3e-3."""

    def at_30(asked: list[Run]) -> list[Row]:
        return [replace(row, lr=run.lr) for run in asked for row in losses([replace(run, lr=run.lr / 30)])]

    rows: list[Row] = []
    sizes = []
    for _ in range(6):
        tried = evidence.data_trials("hamlet", "adamw", rows)
        rows = at_30(tried)
        sizes.append(len(tried))
    assert sizes == [15, 18, 21, 24, 24, 24]
    assert evidence.best(rows) == (3e-2, 1.0)
    inside = evidence.data_finals("hamlet", "adamw", rows)
    assert {run.lr for run in inside} == {3e-2}
    on_the_edge = [replace(run, lr=3e-3) for run in inside]
    rows += at_30(on_the_edge)
    assert evidence.data_reported("hamlet", rows)["adamw"] == on_the_edge  # until the others have run
    assert evidence.data_reported("hamlet", rows + at_30(inside))["adamw"] == inside
    assert len({(run.seed, run.lr, run.weight_decay) for run in tried}) == 24
    grid = evidence.data_grid(evidence.FINETUNING, "adamw")
    assert evidence.data_trials(evidence.FINETUNING, "adamw", at_30(grid)) == grid


def test_finetuning_gives_both_optimizers_the_same_learning_rates() -> None:
    cells = [
        {(run.lr, run.weight_decay) for run in evidence.data_grid(evidence.FINETUNING, name)}
        for name in ("adamw", "grokadamw")
    ]
    assert cells[0] == cells[1]
    assert len({lr for lr, _ in cells[0]}) == 4


def test_a_weaker_filter_is_tried_where_adamw_is_best() -> None:
    assert evidence.weaker([]) == []
    rows = losses(evidence.data_grid(evidence.FINETUNING, "adamw"))
    runs = evidence.weaker(rows)
    assert {(run.lr, run.weight_decay) for run in runs} == {evidence.best(rows)}
    reported = evidence.data_reported(evidence.FINETUNING, rows)["grokadamw, λ 0.5, at AdamW's cell"]
    assert [run.seed for run in reported] == [*evidence.DATA_SEEDS]


def test_quartiles() -> None:
    rows = [replace(ROW, seed=i, sustained=steps) for i, steps in enumerate([100, 200, 300, 400, None])]
    assert report.quartiles(rows[:3]) == "200 (100 to 300)"
    assert report.quartiles(rows[:4]) == "250 (100 to 300)"
    assert report.quartiles(rows) == "300 (200 to 400), 1 of 5 failed"
    ten = [replace(ROW, seed=i, sustained=10 * i) for i in range(1, 11)]
    assert report.quartiles(ten) == "55 (30 to 80)"
    assert report.quartiles([rows[4]]) == "not reached (0 of 1)"


def test_the_command_trains_prints_a_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--method", "adamw", "grokadamw", "--seeds", "2", "--steps", "20", "--out", str(tmp_path)]
    __main__.main(["run", "--task", "parity", *arguments, "--set", "eps=1e-6", "--lr", "2e-3"])
    printed = capsys.readouterr().out
    assert "grokadamw" in printed
    assert "parity.png" in printed
    assert (tmp_path / "parity.png").read_bytes().startswith(b"\x89PNG")
    rows = runs.read(tmp_path / "grokking.csv")
    assert {(row.method, row.lr, row.options, row.steps) for row in rows} == {
        (method, 2e-3, '{"eps": 1e-06}', 20) for method in ("adamw", "grokadamw")
    }


def test_the_command_lists_what_there_is_and_refuses_what_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: tasks.load()[name] for name in ("mul97", "parity", "imdb", "hamlet-finetuning")}
    monkeypatch.setenv("IMDB", str(tmp_path))
    with monkeypatch.context() as patch:  # listing all tasks takes seconds
        patch.setattr(tasks, "load", lambda: few)
        __main__.main(["list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in [*few, *METHODS])
    minutes = statistics.median(row.minutes for row in runs.read(runs.CSV) if row.task == "mul97" and row.minutes)
    assert re.search(rf"mul97 .* 422,656 +4,656 +3,000 +{minutes:.2g} ", listed)
    assert re.search(r"imdb .* – +– +1,500 ", listed)  # the data of imdb is missing
    assert re.search(r"hamlet-finetuning .* – +– +400 ", listed)
    (tmp_path / "file").touch()
    for arguments, said in [
        (["--task", "mul98"], "mul97"),
        (["--task", "mul97", "--seeds", "0", "-1"], "give numbers of at least 0"),
        (["--task", "mul97", "--set", "lr=0.1"], "lr is not one of the options"),
        (["--task", "mul97", "--set", "memory=0.1"], "unexpected keyword argument 'memory'"),
        (["--task", "mul97", "--lr", "-1"], "Invalid learning rate"),
        (["--task", "mul97", "--out", str(tmp_path / "file")], "File exists"),
    ]:
        with pytest.raises(SystemExit):
            __main__.main(["run", "--method", "adamw", *arguments])
        assert said in capsys.readouterr().err


def test_every_option_is_explained() -> None:
    _, parser = __main__.parsed(["list"])
    (commands,) = (action for action in parser._actions if isinstance(action.choices, dict))
    for name, command in commands.choices.items():
        assert [action.dest for action in command._actions if not action.help] == [], name
    assert len(commands._choices_actions) == len(commands.choices)  # the commands that --help explains


def test_a_dry_run_says_what_is_missing_and_trains_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (Run.of(task, "adamw", seed, budget=1000) for task, seed in (("mul97", 0), ("digits", 0)))
    asked = [old, *(replace(old, seed=seed) for seed in (1, 2)), new]
    done = [Row(**asdict(old), steps=500, minutes=30.0)]
    monkeypatch.setattr(evidence, "stages", lambda rows: iter([asked[:2], asked[2:]]))
    monkeypatch.setattr(__main__, "read", lambda path: done)
    monkeypatch.setattr(__main__, "execute_all", lambda *_: pytest.fail("it trains"))
    __main__.main(["evidence", "--dry-run", "--jobs", "4"])
    said = capsys.readouterr().out
    assert re.search(r"mul97 +adamw +2 +1.00 ", said)
    assert re.search(r"digits +adamw +1 +– ", said)
    assert "3 runs, about 1.0 hours of a core: 0.2 hours with 4 at a time.\nThe time of 1 of them is not known" in said


def test_how_long_a_run_will_take() -> None:
    done = [replace(ROW, method="adamw", steps=400, minutes=2.0), replace(ROW, method="muon", steps=800, minutes=8.0)]
    assert estimates.minutes(replace(ROW.run, budget=3000), done) == pytest.approx(2.0)  # from runs of its method
    assert estimates.minutes(replace(ROW.run, budget=100), done) == pytest.approx(0.5)
    assert estimates.minutes(replace(ROW.run, method="grokadamw"), done) == pytest.approx(600 * 0.0075)  # from all runs
    assert estimates.minutes(replace(ROW.run, task="add97"), done) is None
    assert estimates.minutes_by_task([*done, replace(ROW, task="qm9", minutes=0.0)]) == {"mul97": 5.0}


def test_sustained() -> None:
    curve = Curve(0.95, steps=list(range(10)), report=[0.5, 0.96, 0.5, *[0.97] * 7])
    assert curve.first(curve.report) == 1
    assert curve.sustained(curve.report) == 3
    assert curve.sustained(curve.report[:8]) is None


def test_the_presets_numbers_are_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    (group, *_) = GrokAdamW.for_grokking(model).param_groups
    assert group["params"][0] is model[0].weight
    for name in (evidence.PRESET, "grokadamw-bfloat16"):
        assert (METHODS[name].lr, METHODS[name].weight_decay) == (group["lr"], group["weight_decay"])


def test_variations_change_what_they_say() -> None:
    def groups(method: str, **options: Any) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        model = nn.Sequential(small(), nn.LayerNorm(4))  # without norms the preset does not limit row changes
        return METHODS[method].optimizer(model, betas=(0.9, 0.98), **options).param_groups

    for method, options in evidence.VARIATIONS.values():
        pairs = list(zip(groups(evidence.PRESET), groups(method, **options), strict=True))
        changed = {key for whole, other in pairs for key in whole if key != "params" and other[key] != whole[key]}
        assert changed == (
            set(options)
            if method == evidence.PRESET
            else {"weight_decay", "lr"} - ({"lr"} if method == "grokadamw-norm-decay" else set())
        )


def test_a_task_and_a_method_are_a_file_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example task and method in CONTRIBUTING.md run as they are printed there."""
    text = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()
    task, method = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for package, name, code in ((tasks, "circle", task), (methods, "nadam", method)):
        (tmp_path / package.__name__).mkdir()
        (tmp_path / package.__name__ / f"{name}.py").write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / package.__name__)])
        package.load.cache_clear()
    row, _ = runs.execute(Run.of("circle", "nadam", 0, budget=300))
    assert row.best > 0.8
    for package in (tasks, methods):
        package.load.cache_clear()


def test_rising_decay_rises_as_the_presets_own_does() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    preset, rising = GrokAdamW.for_grokking(model), METHODS["grokadamw-rising-decay"].optimizer(model)
    for group, same in zip(preset.param_groups, rising.param_groups, strict=True):
        assert {name: value for name, value in group.items() if name != "params"}.items() <= same.items()
