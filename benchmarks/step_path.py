"""Count what Python does in one warm step of one group on the CPU, beside torch's fused AdamW.

    python -m benchmarks.step_path [--list]

Prints the number of Python calls, in all and within the package, how many of its files they are in, and how often one
file calls another. --list also prints each call within the package.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import grokadamw
from grokadamw import GrokAdamW

PACKAGE = str(Path(grokadamw.__file__).parent)
WARM = 5  # steps before the one that is counted


def calls_of(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[tuple[str, str]]:
    """Return the file and the function of every Python call that a warm step makes, in order."""
    calls: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            calls.append((frame.f_code.co_filename, frame.f_code.co_qualname))

    for nth in range(WARM + 1):
        for param in params:
            param.grad = torch.full_like(param, 0.01)
        if nth == WARM:
            sys.setprofile(note)
        optimizer.step()
        sys.setprofile(None)
    return calls


def main(arguments: list[str]) -> None:
    """Print the counts of GrokAdamW and of torch's fused AdamW."""
    print(f"{'':22}{'calls':>8}{'ours':>8}{'files':>8}{'changes':>9}")
    listed: list[tuple[str, str]] = []
    for name, make in {"GrokAdamW": GrokAdamW, "AdamW(fused=True)": lambda p: torch.optim.AdamW(p, fused=True)}.items():
        params = [nn.Parameter(torch.ones(8, 8)) for _ in range(4)]
        calls = calls_of(make(params), params)
        ours = [(Path(file).relative_to(PACKAGE).as_posix(), call) for file, call in calls if file.startswith(PACKAGE)]
        files = [file for file, _ in ours]
        changes = sum(a != b for a, b in pairwise(files))
        print(f"{name:22}{len(calls):8}{len(ours):8}{len(set(files)):8}{changes:9}")
        listed += ours
    if "--list" in arguments:
        print(*(f"{file:22}{call}" for file, call in listed), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
