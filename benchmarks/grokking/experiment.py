"""One run: a task, a method and a seed, from the start until the task is learnt."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grokadamw import GrokAdamW

from .tasks import Data, Split, Task, right

IN_A_ROW = 6  # evaluations in a row that must be good for a task to count as learnt: *sustained*
CHUNK = 1024  # examples evaluated at once; the first chunk alone if the task is far from learnt


@dataclass
class Curve:
    """The course of a run, in parallel lists with one entry per evaluation."""

    solved: float
    steps: list[int] = field(default_factory=list)
    train: list[float] = field(default_factory=list)  # score on the batches since the last evaluation
    report: list[float] = field(default_factory=list)  # score on the held-out part that no signal sees
    seconds: list[float] = field(default_factory=list)  # since the start, without evaluations
    signal: list[float] = field(default_factory=list)
    alpha: list[float] = field(default_factory=list)

    def first(self, scores: list[float]) -> int | None:
        """Return the index of the first evaluation that is good enough, or None."""
        return next((i for i, score in enumerate(scores) if score >= self.solved), None)

    def best(self, scores: list[float]) -> int | None:
        """Return the index of the first evaluation with the highest score, or None if no score is a number."""
        numbers = [i for i, score in enumerate(scores) if not math.isnan(score)]
        return max(numbers, key=scores.__getitem__, default=None)

    def sustained(self, scores: list[float]) -> int | None:
        """Return the index of the first of six evaluations in a row that are good enough, or None."""
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

    A task that has no level at which it is learnt takes the whole budget. Six good evaluations that begin within the
    budget are followed to their end.
    """
    for curve in evaluations(task, make, seed, budget, afterwards, clip=clip):
        if curve.steps:
            on_evaluation(curve)
    return curve


def evaluations(
    task: Task,
    make: Callable[[nn.Module], Optimizer],
    seed: int,
    budget: int,
    afterwards: int = 0,
    *,
    clip: float = 0.0,
    device: str = "cpu",
) -> Iterator[Curve]:
    """Train as `run` does, and yield the curve before and after each evaluation.

    On a GPU, steps are replays of a graph on the current stream. When the curve is yielded before an evaluation, the
    steps are still running, so the caller can go on with other runs in the meantime.
    """
    model, data, batches = task.start(seed)
    data = Data(*(split.to(device) for split in data))
    optimizer = make(model.to(device))
    grok = optimizer if isinstance(optimizer, GrokAdamW) else None
    train = (Training if device == "cpu" else Captured)(task, model, optimizer, clip)
    curve = Curve(task.solved)
    scores: list[Tensor] = []
    seconds, start = 0.0, time.process_time()
    end: int | None = None
    for step in count(1):
        loss, score = train.step(next(batches))
        scores.append(score)
        if step % task.evaluate_every == 0 or step == budget:
            yield curve
            seconds += time.process_time() - start
            model.eval()
            with torch.no_grad():
                if grok:
                    grok.record(**values(task, loss, score, model(data.signal.inputs), data.signal.targets))
                report = evaluate(task, model, data.report)
            model.train()
            train.hear()
            metrics = grok.metrics() if grok else {}
            curve.steps.append(step)
            curve.train.append(torch.cat(scores).mean().item())
            curve.report.append(report)
            curve.seconds.append(seconds)
            curve.signal.append(metrics.get("signal", torch.nan))
            curve.alpha.append(metrics.get("alpha", torch.nan))
            scores.clear()
            yield curve
            if end is None and curve.sustained(curve.report) is not None:
                end = step + afterwards
            if step >= (end or budget) and not (end is None and curve.report[-1] >= task.solved):
                break  # but not in the middle of what may become six good evaluations
            start = time.process_time()


def values(task: Task, loss: Tensor, score: Tensor, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return what an optimizer records: losses, and accuracies if they are the task's score."""
    losses = {"train_loss": loss, "eval_loss": task.loss(outputs, targets)}
    if task.score is not right:
        return losses
    return {**losses, "train_acc": score.mean(), "eval_acc": right(outputs, targets).mean()}


class Training:
    """The steps of a run."""

    def __init__(self, task: Task, model: nn.Module, optimizer: Optimizer, clip: float) -> None:
        self.task, self.model, self.optimizer, self.clip = task, model, optimizer, clip
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / task.warmup))

    def step(self, batch: Split) -> tuple[Tensor, Tensor]:
        """Return the loss of the batch before the step, and the score of each example."""
        done = self.update(batch)
        self.schedule.step()
        return done

    def update(self, batch: Split) -> tuple[Tensor, Tensor]:
        outputs = self.model(batch.inputs)
        loss = self.task.loss(outputs, batch.targets)
        self.optimizer.zero_grad()
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.detach(), self.task.score(outputs.detach(), batch.targets)

    def hear(self) -> None:
        """Update the signals, if steps do not. Called after each evaluation."""


class Captured(Training):
    """The steps of a run on a GPU: each size of batch has a CUDA graph, captured at the fourth step or later."""

    EAGER = 3  # steps; after these a capture has nothing left to create

    def __init__(self, task: Task, model: nn.Module, optimizer: Optimizer, clip: float) -> None:
        super().__init__(task, model, optimizer, clip)
        if not isinstance(optimizer, (GrokAdamW, torch.optim.AdamW)):
            raise TypeError(f"{type(optimizer).__name__}: on a GPU AdamW and GrokAdamW can be captured, and no others")
        for group in optimizer.param_groups:  # the schedule writes the lr, and a graph reads it
            group["lr"] = torch.tensor(float(group["lr"]), device="cuda")
            group["capturable"] = True
            if type(optimizer) is torch.optim.AdamW:
                group["fused"] = True
        self.taken = 0
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Split, tuple[Tensor, Tensor]]] = {}

    def step(self, batch: Split) -> tuple[Tensor, Tensor]:
        self.taken += 1
        done = self.update(batch)
        if self.taken <= self.task.warmup:
            self.schedule.step()
        return done

    def update(self, batch: Split) -> tuple[Tensor, Tensor]:
        if self.taken <= self.EAGER:
            return super().update(batch.to("cuda"))
        if len(batch) not in self.graphs:
            fixed, graph = batch.to("cuda"), torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            graph.capture_begin()
            try:
                found = super().update(fixed)
            finally:
                graph.capture_end()
            self.graphs[len(batch)] = graph, fixed, found
        graph, fixed, (loss, score) = self.graphs[len(batch)]
        fixed.inputs.copy_(batch.inputs, non_blocking=True)
        fixed.targets.copy_(batch.targets, non_blocking=True)
        graph.replay()
        return loss, score.clone()

    def hear(self) -> None:
        if isinstance(self.optimizer, GrokAdamW):
            self.optimizer.update_signals()  # a graph's replay does not


def evaluate(task: Task, model: nn.Module, data: Split) -> float:
    """Return the mean score, estimated from the first examples alone if these are far from solved.

    All examples count if the task has no level to reach.
    """
    scores: list[Tensor] = []
    for inputs, targets in zip(data.inputs.split(CHUNK), data.targets.split(CHUNK), strict=True):
        scores.append(task.score(model(inputs), targets))
        if math.isfinite(task.solved) and scores[0].mean() < task.solved - 0.1:
            break
    return torch.cat(scores).mean().item()
