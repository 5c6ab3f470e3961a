"""Runs release 0.1.2 on problems from a file, in a process that imports that release."""

from __future__ import annotations

import sys
from typing import Any

import torch


def signal(step: list[int], kind: str) -> float:
    """Return the value of the test signal of this name; it depends on the step alone."""
    values = {"rising": 0.1 * step[0], "negative": -0.3, "constant": 0.7, "nan": float("nan")}
    return values[kind]


def build(problem: dict[str, Any], make: Any) -> tuple[list[list[torch.nn.Parameter]], Any, list[int]]:
    """Return the problem's parameters, its optimizer, and a list from which the signals read the step."""
    params = [[torch.nn.Parameter(value.clone()) for value in group] for group in problem["values"]]
    step = [0]
    groups = [{"params": ps, **options} for ps, options in zip(params, problem["group_options"], strict=True)]
    fns = problem["signals"] and [lambda kind=kind: signal(step, kind) for kind in problem["signals"]]
    return params, make(groups, grokking_signal_fns=fns, **problem["options"]), step


def run(problem: dict[str, Any], make: Any) -> list[list[list[torch.Tensor]]]:
    """Return the parameters after each step."""
    params, optimizer, step = build(problem, make)
    trajectory = []
    for grads, losses in zip(problem["grads"], problem["losses"], strict=True):
        step[0] += 1
        for group, loss in zip(optimizer.param_groups, losses, strict=True):
            group["train_loss"], group["eval_loss"] = loss
            if step[0] == problem["switches_on_at"]:
                group["lamb"] = 2.0
        for ps, gs in zip(params, grads, strict=True):
            for p, g in zip(ps, gs, strict=True):
                p.grad = None if g is None else g.clone()
        optimizer.step()
        trajectory.append([[p.detach().clone() for p in ps] for ps in params])
    return trajectory


if __name__ == "__main__":
    import grokadamw

    assert grokadamw.__version__ == "0.1.2", grokadamw.__file__
    problems = torch.load(sys.argv[1])
    torch.save({name: run(problem, grokadamw.GrokAdamW) for name, problem in problems.items()}, sys.argv[2])
