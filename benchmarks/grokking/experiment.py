"""One run: a task, a method and a seed, from the start until the task is learnt."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grokadamw import GrokAdamW

from .tasks import Split, Task

IN_A_ROW = 6  # evaluations that have to be good for the task to count as learnt: *sustained*
CHUNK = 1024  # examples evaluated at once; those of the first chunk alone where the task is far from learnt


@dataclass
class Curve:
    """What a run did. Lists are parallel, one entry an evaluation."""

    solved: float
    steps: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)  # score on the batches since the last evaluation
    report: list[float] = field(default_factory=list)  # score on the part that no signal sees
    seconds: list[float] = field(default_factory=list)  # since the start, evaluations left out
    signal: list[float] = field(default_factory=list)
    alpha: list[float] = field(default_factory=list)

    def first(self, scores: list[float]) -> int | None:
        """The index of the first evaluation that is good enough, or None."""
        return next((i for i, score in enumerate(scores) if score >= self.solved), None)

    def best(self, scores: list[float]) -> int | None:
        """The index of the first evaluation with the highest score, or None if no score is a number."""
        numbers = [i for i, score in enumerate(scores) if not math.isnan(score)]
        return max(numbers, key=scores.__getitem__, default=None)

    def sustained(self, scores: list[float]) -> int | None:
        """The index of the first of six evaluations in a row that are good enough, or None."""
        good = [score >= self.solved for score in scores]
        return next((i for i in range(len(good) - IN_A_ROW + 1) if all(good[i : i + IN_A_ROW])), None)


def run(
    task: Task,
    make: Callable[[nn.Module], Optimizer],
    seed: int,
    budget: int,
    afterwards: int = 0,
    *,
    clip: float = 0.0,
    on_evaluation: Callable[[Curve], None] = lambda curve: None,
) -> Curve:
    """Train until the task is learnt, and for `afterwards` more steps, or else for `budget` steps.

    A task that has no level at which it is learnt takes the whole budget.

    Six good evaluations that begin within the budget are seen to their end.
    """
    model, data, batches = task.start(seed)
    optimizer = make(model)
    grok = optimizer if isinstance(optimizer, GrokAdamW) else None
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / task.warmup))
    curve = Curve(task.solved)
    scores: list[Tensor] = []
    seconds, start = 0.0, time.process_time()
    end: int | None = None
    for step in count(1):
        batch = next(batches)
        outputs = model(batch.inputs)
        loss = task.loss(outputs, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        scores.append(task.score(outputs.detach(), batch.targets))
        if step % task.evaluate_every == 0 or step == budget:
            seconds += time.process_time() - start
            model.eval()
            with torch.no_grad():
                if grok:
                    grok.record(train_loss=loss, eval_loss=task.loss(model(data.signal.inputs), data.signal.targets))
                report = evaluate(task, model, data.report)
            model.train()
            metrics = grok.metrics() if grok else {}
            curve.steps.append(step)
            curve.train.append(torch.cat(scores).mean().item())
            curve.report.append(report)
            curve.seconds.append(seconds)
            curve.signal.append(metrics.get("signal", torch.nan))
            curve.alpha.append(metrics.get("alpha", torch.nan))
            scores.clear()
            on_evaluation(curve)
            if end is None and curve.sustained(curve.report) is not None:
                end = step + afterwards
            if step >= (end or budget) and not (end is None and curve.report[-1] >= task.solved):
                break  # but not in the middle of what may become six
            start = time.process_time()
    return curve


def evaluate(task: Task, model: nn.Module, data: Split) -> float:
    """The mean score; of the first examples alone, as an estimate, where that is far from solved.

    All examples count where there is no level to reach.
    """
    scores: list[Tensor] = []
    for inputs, targets in zip(data.inputs.split(CHUNK), data.targets.split(CHUNK), strict=True):
        scores.append(task.score(model(inputs), targets))
        if math.isfinite(task.solved) and scores[0].mean() < task.solved - 0.1:
            break
    return torch.cat(scores).mean().item()
