"""Measure the memory that `step_in_backward` saves, and the time it costs, for a 12-block transformer on the CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.step_in_backward [--passes 8] [--out benchmarks/results]

Each arm runs in its own process. Prints, and writes to step_in_backward.json, the largest size of gradients alive at
once, the peak memory, and the CPU time of forward, backward and step together, and of one update.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grokadamw import GrokAdamW, step_in_backward

from . import RESULTS
from .step_time import MIB, machine

WARMUP, SMALL = 2, 300  # passes; tensors of 16 × 16 that are updated one by one
ARMS = {"step()": False, "step_in_backward": True}


class Model(nn.Module):
    """A transformer with 39 million parameters in 147 tensors."""

    def __init__(self, width: int = 512, vocabulary: int = 1000) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.blocks(self.embed(x)))
        return y


def measure(early: bool, passes: int) -> dict[str, float]:
    """Train for that many passes, and return the memory and time that this process needed."""
    model = Model()
    live: list[weakref.ref[Tensor]] = []
    most = 0.0

    def count(param: Tensor) -> None:
        nonlocal most
        assert param.grad is not None
        live.append(weakref.ref(param.grad))
        most = max(most, sum(grad.nbytes for reference in live if (grad := reference()) is not None))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    optimizer = GrokAdamW(model.parameters(), gradient_clipping=0.0, gamma=0.0)
    if early:
        step_in_backward(optimizer)
    x, times = torch.randint(0, 1000, (4, 33)), []
    for _ in range(WARMUP + passes):
        live.clear()
        start = time.process_time()
        nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - start)
    return {
        "gradients_mib": round(most / MIB, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "pass_ms": round(1e3 * statistics.median(times[WARMUP:])),
        "parameters": sum(param.numel() for param in model.parameters()),
        "tensors": len(list(model.parameters())),
        "small_us": round(small(early), 1),
    }


def small(early: bool) -> float:
    """Return the microseconds of CPU time that the update of a small tensor takes, in a pass over many."""
    params = [nn.Parameter(torch.randn(16, 16)) for _ in range(SMALL)]
    optimizer = GrokAdamW(params, gradient_clipping=0.0, gamma=0.0)
    handle, times = step_in_backward(optimizer) if early else None, []
    for _ in range(20):
        for param in params:
            param.grad = torch.full_like(param, 0.1)
        start = time.process_time()
        for param in params if handle else ():
            handle._update(param)
        optimizer.step()
        times.append(time.process_time() - start)
    return 1e6 * statistics.median(times[WARMUP:]) / SMALL


def table(results: dict[str, Any]) -> str:
    """Return the table of docs/gradient_release.md."""
    lines = ["| | peak memory of gradients | peak memory of the process | a pass | one update of 16 × 16 |"]
    lines.append("| --- | ---: | ---: | ---: | ---: |")
    for name, found in results["arms"].items():
        cells = (f"{found['gradients_mib']:g} MiB", f"{found['peak_mib']} MiB")
        lines.append(f"| `{name}` | {' | '.join(cells)} | {found['pass_ms']} ms | {found['small_us']:.0f} µs |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What step_in_backward saves, and what it costs.")
    parser.add_argument("--passes", type=int, default=8, help="that are timed (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.arm:
        print(json.dumps(measure(ARMS[options.arm], options.passes)))
        return
    arms = {}
    for name in ARMS:
        command = [sys.executable, "-m", "benchmarks.step_in_backward", "--arm", name, "--passes", str(options.passes)]
        arms[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    results = {"machine": machine("cpu"), "passes": options.passes, "arms": arms}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "step_in_backward.json").write_text(json.dumps(results) + "\n")
    print(table(results), end="")


if __name__ == "__main__":
    main()
