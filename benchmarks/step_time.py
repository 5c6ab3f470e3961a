"""Measure how long a step takes: GrokAdamW in each implementation, torch's AdamW, other packages' optimizers.

    python -m benchmarks.step_time [--device cpu] [--model a b c d e] [--rounds 15] [--out benchmarks/results]
    python -m benchmarks.step_time --table benchmarks/results/step_time-cpu.json

Optimizers take turns of a few steps, in a new order each round, on the same float32 parameters and gradients. There is
no forward or backward pass. A ratio compares two turns of the same round, and the table has its median. Writes
step_time-cpu.json (or -cuda), again after each model, and step_time-cpu.png. The second form prints docs/speed.md's
table from such a file.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import functools
import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeElapsedColumn
from rich.table import Table
from torch import nn

import grokadamw
from grokadamw import GrokAdamW

from . import RESULTS
from .grokking.tasks.modular import Transformer
from .peers import ARMS, CLIPPED, FUSED, Arm, Shapes, Step, Tensors, free_memory, gpt2, heats, version

ROOT = Path(__file__).parent.parent
WARMUP = 3  # steps
TURN, MOST_STEPS = 0.03, 100  # a turn takes this many seconds at least, but no more steps than these
FEWEST_ROUNDS = 5  # of arms that are too slow for more
COPIED = 100_000_000  # float32 elements whose copy measures the memory's bandwidth
HOST_TENSORS = 300  # small tensors on a GPU, to measure how much of the host's time a step takes
PEAK_ELEMENTS = 1 << 24  # of the one tensor on which a step's memory is measured: 64 MiB of float32
MIB = 1 << 20


class Model(NamedTuple):
    """The shapes of a model's parameters, and how to measure on them."""

    title: str
    shapes: Callable[[], Shapes]
    seconds: float  # for all of its rounds, approximately
    is_large: bool  # does not fit into a cache, so memory bandwidth limits a step
    devices: tuple[str, ...] = ("cpu", "cuda")


MODELS = {
    "a": Model("GPT-2, 124 M", gpt2, 80, True),
    "b": Model("demonstration, 0.4 M", lambda: [tuple(p.shape) for p in Transformer(97).parameters()], 15, False),
    "c": Model("1,000 × 1,000", lambda: [(1000,)] * 1000, 15, False),
    "d": Model("1 × 100 M", lambda: [(100_000_000,)], 60, True),
    "e": Model("1 B in 300", lambda: [(1024, 3255)] * 300, 60, True, ("cuda",)),
}


@dataclass
class Runner:
    """An arm, its share of the measurements, and its times."""

    name: str
    step: Step
    steps: int = 1  # in a turn
    rounds: int = 0
    seconds: dict[int, float] = field(default_factory=dict)  # by round: a step's mean over the turn

    def takes_part(self, nth: int, rounds: int) -> bool:
        """Return True if the runner takes part in round nth, from 0. Its own rounds are spread over all rounds."""
        return (nth + 1) * self.rounds // rounds > nth * self.rounds // rounds


def timed(step: Step, steps: int, device: str) -> float:
    """Return the mean seconds of a step, over several in a row."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(steps):
            step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / steps
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


def started(arm: Arm, tensors: Tensors, device: str) -> tuple[Step, float]:
    """Warm an arm up. Return its step, and the seconds of the last one."""
    step = arm.make(tensors.params(arm))
    return step, [timed(step, 1, device) for _ in range(WARMUP)][-1]


def reason(error: Exception) -> str:
    """Return in one line why an arm does not run."""
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 80 else f"{lines[0][:79]}…"


def measured(
    model: Model, arms: Sequence[Arm], device: str, rounds: int, show: Callable[[float, str], None]
) -> dict[str, Any]:
    """Measure all arms on one model. `show` gets the progress, from 0 to 1, and the arm whose turn it is."""
    shapes = model.shapes()
    parameters = sum(map(math.prod, shapes))
    plan = heats(arms, parameters, int(0.9 * free_memory(device)) - 8 * COPIED)
    tensors = Tensors(shapes, device)
    results: dict[str, Any] = {"title": model.title, "tensors": len(shapes), "parameters": parameters}
    results |= {"copy_gb_per_s": None, "arms": {}}
    for i, heat in enumerate(plan):

        def show_heat(share: float, name: str, i: int = i) -> None:
            show((i + share) / len(plan), name)

        seconds = model.seconds / len(arms)  # the same for each arm
        runners = warmed_up(heat, tensors, device, rounds, seconds, show_heat, results["arms"])
        if model.is_large:
            source, target = (torch.ones(COPIED, device=device) for _ in range(2))
            runners.append(Runner("copy", functools.partial(target.copy_, source), 1, rounds))
            del source, target
        take_turns(runners, rounds, device, show_heat)
        summarize(runners, heat, parameters, results)
        del runners
        release(device)
    show(1, "")
    return results


def warmed_up(
    heat: list[Arm],
    tensors: Tensors,
    device: str,
    rounds: int,
    seconds: float,
    show: Callable[[float, str], None],
    results: dict[str, Any],
) -> list[Runner]:
    """Return the arms of a heat, with as many steps and rounds as fit into the seconds; add failures to the results."""
    runners = []
    for arm in heat:
        show(0, f"warming up: {arm.name}")
        try:
            step, last = started(arm, tensors, device)
        except Exception as error:  # a peer may raise anything
            results[arm.name] = {"reason": reason(error)}
            continue
        steps = max(1, min(MOST_STEPS, round(TURN / last)))
        fewest = rounds if arm in (FUSED, CLIPPED) else min(FEWEST_ROUNDS, rounds)
        runners.append(Runner(arm.name, step, steps, max(fewest, min(rounds, int(seconds / (last * steps))))))
    return runners


def take_turns(runners: list[Runner], rounds: int, device: str, show: Callable[[float, str], None]) -> None:
    """Measure every runner, and fill in its seconds."""
    generator = random.Random(0)
    for nth in range(rounds):
        taking_part = [runner for runner in runners if runner.takes_part(nth, rounds)]
        generator.shuffle(taking_part)
        for i, runner in enumerate(taking_part):
            show((nth + i / len(taking_part)) / rounds, runner.name)
            runner.seconds[nth] = timed(runner.step, runner.steps, device)


def summarize(runners: list[Runner], heat: list[Arm], parameters: int, results: dict[str, Any]) -> None:
    """Add a heat to the model's results. The two arms that all are compared with keep the first heat's results."""
    by_name = {runner.name: runner for runner in runners}
    copy = by_name.get("copy")
    for arm in heat:
        if arm.name not in by_name or arm.name in results["arms"]:
            continue
        runner = by_name[arm.name]
        results["arms"][arm.name] = {
            "ms": quartiles([1000 * seconds for seconds in runner.seconds.values()]),
            "ratio": ratio(runner, by_name[FUSED.name]),
            "ratio_to_clipped": ratio(runner, by_name[CLIPPED.name]) if arm.clips else None,
            "share_of_copy": None,
            "rounds": len(runner.seconds),
            "steps_in_a_turn": runner.steps,
        }
        if copy is not None and arm.traffic is not None:
            moved = arm.traffic * parameters / (8 * COPIED)  # in the time of a copy, at the same bandwidth
            results["arms"][arm.name]["share_of_copy"] = [round(moved / x, 4) for x in ratio(runner, copy)][::-1]
    if copy is not None and results["copy_gb_per_s"] is None:
        results["copy_gb_per_s"] = quartiles([8e-9 * COPIED / seconds for seconds in copy.seconds.values()])


def ratio(runner: Runner, other: Runner) -> list[float]:
    return quartiles([seconds / other.seconds[nth] for nth, seconds in runner.seconds.items()])


def quartiles(values: list[float]) -> list[float]:
    return [round(value, 4) for value in statistics.quantiles(values, n=4, method="inclusive")]


def release(device: str) -> None:
    """Give back memory that nothing refers to."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed in pieces below 32 MiB


def peak(arm: Arm, device: str) -> float | None:
    """Return a step's peak memory in MiB beyond the memory in use before it; None if the system does not say."""
    step, _ = started(arm, Tensors([(PEAK_ELEMENTS,)], device), device)
    release(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / MIB, 2)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        step()
        return round((resident("VmHWM") - before) / MIB, 2)
    except OSError:
        return None


def resident(name: str) -> int:
    """Return the bytes of memory that the process has: VmRSS now, VmHWM at most."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def peak_alone(arm: Arm, device: str) -> float | None:
    """Return `peak` from a fresh process; None also if that fails."""
    command = [sys.executable, "-m", "benchmarks.step_time", "--device", device, "--peak", arm.name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # packages may have printed other lines before
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def host_time(arm: Arm, device: str) -> list[float]:
    """Return the microseconds until a step returns, if its launches wait for nothing."""
    step, _ = started(arm, Tensors([(100,)] * HOST_TENSORS, device), device)
    times = []
    for _ in range(100):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        times.append(1e6 * (time.perf_counter() - began))
    return quartiles(times)


def machine(device: str) -> dict[str, Any]:
    """Return what the times depend on besides the code."""
    return {
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "implementation": GrokAdamW([nn.Parameter(torch.zeros(1 << 16, device=device))]).implementation(),
        "torch": torch.__version__,
        "grokadamw": grokadamw.__version__,
        "python": platform.python_version(),
        "peers": {arm.name: version(arm.package) for arm in ARMS if arm.package},
    }


def processor() -> str:
    """Return the processor's name, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def row(results: dict[str, Any], arm: dict[str, Any], entry: Callable[[dict[str, Any]], str]) -> list[str]:
    """Return an entry for each model. The reason why an arm does not run is given once."""
    of_arm = [results["models"][key]["arms"].get(arm["name"]) for key in results["models"]]
    reasons = {of_model["reason"] for of_model in of_arm if of_model and "reason" in of_model}
    cells = ["–" if of_model is None or "reason" in of_model else entry(of_model) for of_model in of_arm]
    if reasons:
        first = next(i for i, of_model in enumerate(of_arm) if of_model and "reason" in of_model)
        cells[first] = f"does not run here: {'; '.join(sorted(reasons))}"
    return cells


def table(results: dict[str, Any]) -> str:
    """Return docs/speed.md's table: ratios to fused AdamW; in brackets, for arms that clip, to AdamW with clipping."""

    def entry(of_model: dict[str, Any]) -> str:
        shown = f"{of_model['ratio'][1]:.2f}"
        return shown + (f" ({of_model['ratio_to_clipped'][1]:.2f})" if of_model["ratio_to_clipped"] else "")

    head = ["", *(f"({key}) {model['title']}" for key, model in results["models"].items())]
    rows = [[*head, "bytes per parameter", "peak, MiB"], ["---", *["---:"] * (len(head) + 1)]]
    for arm in results["arms"]:
        numbers = [arm["bytes_per_parameter"], arm["peak_extra_mib"]]
        shown = ["–" if number is None else f"{number:,.0f}" for number in numbers]
        rows.append([arm["name"], *row(results, arm, entry), *shown])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def times(results: dict[str, Any]) -> Table:
    """Return, for the console, milliseconds a step and its share of the bandwidth of a copy."""

    def entry(of_model: dict[str, Any]) -> str:
        share = of_model["share_of_copy"]
        return f"{of_model['ms'][1]:,.2f} ms" + (f" {share[1]:4.0%}" if share else "")

    result = Table(title="A step, and its share of a copy's bandwidth", box=None)
    result.add_column("")
    for key, model in results["models"].items():
        result.add_column(f"({key}) {model['title']}", justify="right")
    on_gpu = results["device"] == "cuda"
    if on_gpu:
        result.add_column(f"host, {HOST_TENSORS} tensors", justify="right")
    for arm in results["arms"]:
        cells = row(results, arm, entry)
        if on_gpu:
            cells.append(f"{arm['host_us'][1]:,.0f} µs" if arm["host_us"] else "–")
        result.add_row(arm["name"], *("–" if cell.startswith("does") else cell for cell in cells))
    return result


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw ratios to fused AdamW on a logarithmic axis, one panel per model. Thin lines span the quartiles."""
    arms, models = results["arms"], results["models"]
    columns, lines = min(2, len(models)), (len(models) + 1) // 2
    figure = Figure(figsize=(2.4 + 2.8 * columns, 0.4 + (0.6 + 0.22 * len(arms)) * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for panel in panels[len(models) :]:
        panel.set_visible(False)
    for panel, (key, model) in zip(panels, models.items(), strict=False):
        low, high = 0.7, 2.0
        for y, arm in enumerate(arms):
            of_model = model["arms"].get(arm["name"], {"reason": ""})
            if "reason" in of_model:
                panel.text(
                    1.03, y, "does not run here" if of_model["reason"] else "", va="center", size=7, color="grey"
                )
                continue
            first, middle, third = of_model["ratio"]
            panel.barh(y, middle - 1, left=1, height=0.7, color="C0" if arm["ours"] else "silver")
            panel.plot([first, third], [y, y], color="black", linewidth=0.8)
            end = max(third, 1.0)
            panel.text(1.04 * end, y, f"{middle:.2f}", va="center", size=7)
            low, high = min(low, first), max(high, end)
        panel.axvline(1.0, color="black", linewidth=0.8)
        panel.set(xscale="log", xlim=(0.9 * low, 3 * high), title=f"({key}) {model['title']}")
        ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if 0.9 * low < tick < 3 * high]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.title.set_size(9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(arms)), [arm["name"] for arm in arms])
    panels[0].set_ylim(len(arms) - 0.4, -0.6)
    name = results["machine"]["gpu" if results["device"] == "cuda" else "processor"]
    figure.supxlabel(f"time of a step, relative to torch.optim.AdamW(fused=True), on {name}", size=9)
    figure.savefig(path, dpi=120)


def run(
    device: str, keys: Sequence[str], rounds: int, console: Console, write: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Return the results. `write` gets the results so far after each model, and all of them at the end."""
    arms = [arm for arm in ARMS if device in arm.devices]
    columns = ["{task.description:22}", BarColumn(bar_width=10), TimeElapsedColumn(), "{task.fields[shown]}"]
    models: dict[str, Any] = {}
    peaks: dict[str, float | None] = {}
    hosts: dict[str, list[float]] = {}
    described = machine(device)
    # the bytes of our arms are those of one pass through memory
    is_one_pass = not described["implementation"].startswith("foreach")

    def results() -> dict[str, Any]:
        return {
            "date": datetime.date.today().isoformat(),
            "device": device,
            "machine": described,
            "rounds": rounds,
            "peak_elements": PEAK_ELEMENTS,
            "arms": [
                {
                    "name": arm.name,
                    "ours": arm.ours,
                    "bytes_per_parameter": arm.traffic if is_one_pass or not arm.ours else None,
                    "peak_extra_mib": peaks.get(arm.name),
                    "host_us": hosts.get(arm.name),
                }
                for arm in arms
            ],
            "models": {key: models[key] for key in keys if key in models},
        }

    with Progress(*columns, console=console) as progress:
        # small models first, as large ones leave a fragmented heap behind
        for key in sorted(keys, key=lambda key: MODELS[key].is_large):
            task = progress.add_task(MODELS[key].title, total=1, shown="")

            def show(share: float, name: str, task: Any = task) -> None:
                progress.update(task, completed=share, shown=name)

            models[key] = measured(MODELS[key], arms, device, rounds, show)
            write(results())
            release(device)
        runs = [arm for arm in arms if any("ms" in model["arms"][arm.name] for model in models.values())]
        task = progress.add_task("memory", total=len(runs), shown="")
        with ThreadPoolExecutor(2) as pool:  # memory is measured here, not time
            for arm, found in zip(runs, pool.map(peak_alone, runs, len(runs) * [device]), strict=True):
                peaks[arm.name] = found
                progress.update(task, advance=1)
    if device == "cuda":
        hosts |= {arm.name: host_time(arm, device) for arm in runs if arm.package is None}
    write(results())
    return results()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How long a step takes, beside torch's AdamW and other packages.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    titles = "; ".join(f"{key}: {model.title}" for key, model in MODELS.items())
    parser.add_argument("--model", nargs="+", choices=MODELS, help=f"{titles}; default: all that are for the device")
    parser.add_argument("--rounds", type=int, default=15, help="slow arms take fewer (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of an earlier run, and no more")
    parser.add_argument("--peak", choices=[arm.name for arm in ARMS], help="print what one step needs in MiB, alone")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(json.loads(options.table.read_text())), end="")
        return
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: there are no quartiles of that; give at least 2")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; leave it out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from peers, and about β1 in a thousand layers, which is intended
        if options.peak:
            print(json.dumps(peak(next(arm for arm in ARMS if arm.name == options.peak), options.device)))
            return
        try:
            options.out.mkdir(parents=True, exist_ok=True)  # an error here comes before there is anything to lose
        except OSError as error:
            parser.error(f"--out {options.out}: not a folder that can be made ({error}); name another")
        console = Console()
        keys = options.model or [key for key, model in MODELS.items() if options.device in model.devices]
        path = options.out / f"step_time-{options.device}.json"

        def write(so_far: dict[str, Any]) -> None:
            path.write_text(json.dumps(so_far, ensure_ascii=False) + "\n")

        results = run(options.device, keys, options.rounds, console, write)
    draw(results, path.with_suffix(".png"))
    console.print(times(results))
    print(f"\n{table(results)}")
    console.print(f"chart    {path.with_suffix('.png')}\nnumbers  {path}", highlight=False)


if __name__ == "__main__":
    main()
