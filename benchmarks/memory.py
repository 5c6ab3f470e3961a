"""Measure an optimizer's memory, and a step's peak memory and time, for every format of state and weights.

    python -m benchmarks.memory [--rounds 15] [--out benchmarks/results]

Optimizers take turns with torch's fused AdamW with float32 weights, on 100 M parameters in one vector and on GPT-2's
tensors. Gradients have the weights' dtype. "Peak" is the memory that a step allocates and frees, measured in a process
of its own. Prints a table and writes memory.json, which the docs quote. `make peers` installs the other packages.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from grokadamw import GrokAdamW

from . import RESULTS
from .peers import Shapes, gpt2, imported
from .step_time import MIB, ROOT, Runner, machine, quartiles, reason, release, resident, take_turns, timed

MODELS: dict[str, Callable[[], Shapes]] = {"GPT-2, 124 M": gpt2, "1 × 100 M": lambda: [(100_000_000,)]}
OFF = {"gradient_clipping": 0.0, "nonfinite": "propagate"}
STEPS = 3  # of a turn


class Case(NamedTuple):
    """An optimizer for parameters of a dtype."""

    name: str
    make: Callable[[list[nn.Parameter]], Optimizer]
    dtype: torch.dtype = torch.float32


def ours(**options: Any) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda params: GrokAdamW(params, gamma=1e-3, **options)


def peer(package: str, module: str, name: str) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda params: getattr(imported(package, module), name)(params, lr=1e-3)


FUSED = Case("AdamW", partial(AdamW, fused=True))
FORMATS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "float32 state": ({}, torch.float32),
    "bfloat16 state": ({"state_dtype": "bfloat16"}, torch.float32),
    "int8 state": ({"state_dtype": "int8"}, torch.float32),
    "bfloat16 weights + 16 bits, bfloat16 state": (
        {"master_weight_bits": 32, "state_dtype": "bfloat16"},
        torch.bfloat16,
    ),
    "bfloat16 weights + 8 bits, int8 state": ({"master_weight_bits": 24, "state_dtype": "int8"}, torch.bfloat16),
}
CASES = [
    FUSED,
    Case("AdamW, bfloat16 weights", partial(AdamW, fused=True), torch.bfloat16),
    *(Case(f"GrokAdamW, {name}", ours(**OFF, **options), dtype) for name, (options, dtype) in FORMATS.items()),
    *(Case(f"GrokAdamW, {name}, clip 1", ours(**options), dtype) for name, (options, dtype) in FORMATS.items()),
    Case("bitsandbytes AdamW8bit", peer("bitsandbytes", "bitsandbytes.optim", "AdamW8bit")),
    Case("torchao AdamW8bit", peer("torchao", "torchao.optim", "AdamW8bit")),
    Case("flashoptim AdamW", peer("flashoptim", "flashoptim", "FlashAdamW"), torch.bfloat16),
]


def parameters(shapes: Shapes, dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter((0.02 * torch.randn(shape)).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = (0.01 * torch.randn(param.shape)).to(dtype)
    return params


def bytes_of(optimizer: Optimizer) -> int:
    """Return the bytes of all tensors of an optimizer's state."""
    entries = (x for state in optimizer.state.values() for x in state.values())
    return sum(map(_bytes, (x for x in entries if isinstance(x, Tensor))))


def _bytes(x: Tensor) -> int:
    """Return the bytes of a tensor, or of the tensors that a tensor subclass is made of."""
    if not hasattr(x, "__tensor_flatten__"):
        return x.nbytes
    return sum(_bytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])


def peak(name: str) -> float:
    """Return the MiB that a step on one matrix of 16 M parameters needs beyond the memory in use before it."""
    case = next(case for case in CASES if case.name == name)
    optimizer = case.make(parameters([(4096, 4096)], case.dtype))
    for _ in range(3):
        optimizer.step()
    release("cpu")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    optimizer.step()
    return round((resident("VmHWM") - before) / MIB, 2)


def peak_alone(case: Case) -> float | None:
    """Return `peak` from a process of its own, or None if that fails."""
    command = [sys.executable, "-m", "benchmarks.memory", "--peak", case.name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None


def measured(shapes: Shapes, rounds: int, show: Callable[[str], None]) -> dict[str, Any]:
    """Return bytes per parameter and times of all cases on one model."""
    count, runners, found = sum(map(math.prod, shapes)), [], dict[str, Any]()
    shared = {dtype: parameters(shapes, dtype) for dtype in dict.fromkeys(case.dtype for case in CASES)}
    for case in CASES:
        show(case.name)
        params = shared[case.dtype]  # a step of one case changes no other's time
        try:
            optimizer = case.make(params)
            for _ in range(3):
                timed(optimizer.step, 1, "cpu")
        except Exception as error:  # a peer may raise anything
            found[case.name] = {"reason": reason(error)}
            continue
        found[case.name] = {
            "state": round(bytes_of(optimizer) / count, 3),
            "all": round((bytes_of(optimizer) + sum(2 * param.nbytes for param in params)) / count, 3),
        }
        runners.append(Runner(case.name, optimizer.step, STEPS, rounds))
    take_turns(runners, rounds, "cpu", lambda share, name: show(f"{share:.0%}"))
    fused = runners[0]
    for runner in runners:
        found[runner.name]["ms"] = quartiles([1000 * x for x in runner.seconds.values()])
        found[runner.name]["ratio"] = quartiles([x / fused.seconds[nth] for nth, x in runner.seconds.items()])
    return found


def table(results: dict[str, Any]) -> Table:
    shown = Table(title="Bytes a parameter, MiB of a step, and times fused AdamW", box=None)
    for head in ("", "state", "with weight and gradient", "peak", *results["models"]):
        shown.add_column(head, justify="left" if not head else "right")
    for name, peak_mib in results["peak_mib"].items():
        of_arm = [of_model[name] for of_model in results["models"].values()]
        if "reason" in of_arm[0]:
            shown.add_row(name, f"does not run here: {of_arm[0]['reason']}")
            continue
        ratios = [f"{of_model['ratio'][1]:.2f}" for of_model in of_arm]
        bytes_ = [f"{of_arm[-1][kind]:.2f}" for kind in ("state", "all")]
        shown.add_row(name, *bytes_, "–" if peak_mib is None else f"{peak_mib:.1f}", *ratios)
    return shown


def times_table(results: dict[str, Any]) -> str:
    """Return the table of docs/memory.md: times of steps without clipping, as multiples of fused AdamW's."""
    models = results["models"]
    lines = [f"| | {' | '.join(models)} |", f"| --- |{' ---: |' * len(models)}"]
    for name in [f"GrokAdamW, {form}" for form in FORMATS] + ["bitsandbytes AdamW8bit", "torchao AdamW8bit"]:
        ratios = [f"{of_model[name]['ratio'][1]:.2f}" for of_model in models.values() if "ratio" in of_model[name]]
        if ratios:
            lines.append(f"| {name} | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    description, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.memory",
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="turns of each case (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak(options.peak)))
        return
    console = Console()
    results: dict[str, Any] = {"machine": machine("cpu"), "peak_mib": {c.name: peak_alone(c) for c in CASES}}
    results["models"] = {}
    for title, shapes in MODELS.items():
        with console.status(title) as status:
            results["models"][title] = measured(shapes(), options.rounds, status.update)
    console.print(table(results))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "memory.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
