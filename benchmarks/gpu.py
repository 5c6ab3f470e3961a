"""All tests and measurements that need a GPU, in stages that take a few minutes.

    [OUT=benchmarks/results] [STAGES="0 1 2"] python3 benchmarks/gpu.py
    REHEARSE=1 OUT=… python3 benchmarks/gpu.py        where there is no GPU

Each stage has its own process, time limit and file, gpu-N-….json or .log in $OUT, to which it writes each result at
once. A stage that fails or is stopped at its limit leaves the results it has, and the next one begins. Stages 0 to 4
take 6 minutes at most, and all of them 12. A rehearsal runs the same stages: Triton compiles for a GPU, but nothing is
launched, and the results mean nothing.

Needs Python 3.11, torch for the GPU with Triton, a C compiler, pytest, pytest-xdist, hypothesis and NumPy; and
compute-sanitizer and ncu, of CUDA's tools, for stages 6 and 7.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable, "-u"]
PYTEST = [*PYTHON, "-m", "pytest", "--no-header", "-p", "no:cacheprovider", "-p", "benchmarks.on_gpu.failures"]
WORKERS = ["-n", str(min(14, os.cpu_count() or 1))]
LARGEST = "tests/gpu/test_gpu.py::test_more_than_2_31_elements"
GRACE = 5  # seconds for a stopped process to say what it was doing
SHOWN = 2500  # characters of a stage's output
SANITIZED = "from benchmarks.on_gpu import checks; checks.here({})"
PROFILED = "from benchmarks.on_gpu import times; times.few_steps()"


class Command(NamedTuple):
    """A process of a stage."""

    words: list[str]
    limit: int  # seconds
    environment: dict[str, str] = {}
    tool: list[str] = []  # a CUDA tool with flags, which watches the process; the command runs only if it is installed


class Stage(NamedTuple):
    title: str
    file: str
    commands: list[Command]


def module(name: str, limit: int) -> list[Command]:
    """Return the command of a stage that writes its file itself."""
    return [Command([*PYTHON, "-m", f"benchmarks.on_gpu.{name}", "FILE"], limit)]


def sanitizer(tool: str, checks: str, limit: int) -> Command:
    """Return checks under a sanitizer, without the caching allocator, which hides accesses past the ends of tensors."""
    return Command(
        [*PYTHON, "-c", SANITIZED.format(checks)],
        limit,
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--print-limit", "20"],
    )


def tests_for_a_gpu() -> list[str]:
    files = sorted(ROOT.glob("tests/**/test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def stand_ins() -> dict[str, str]:
    """Return the path of a stand-in for the package that torch.testing needs, if that package is not installed."""
    if importlib.util.find_spec("expecttest"):
        return {}
    return {"PYTHONPATH": str(ROOT / "benchmarks/on_gpu/stand_ins")}


def stages() -> list[Stage]:
    of_ncu = ["--clock-control", "none", "--kernel-name", "update", "--launch-skip", "2", "--launch-count", "1"]
    sections = ["SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy"]
    ncu = ["ncu", *of_ncu, *(word for name in sections for word in ("--section", name))]
    tests = [*PYTEST, *WORKERS, "-m", "gpu", "--durations", "15", "--deselect", LARGEST, *tests_for_a_gpu()]
    formats = Command([*PYTHON, "-m", "benchmarks.on_gpu.times", "FILE", "--only", "formats"], 60)
    presets = "'the preset', 'the preset, fewer bits'"
    of_torch = [*PYTEST, *WORKERS, "-k", "cuda", "tests/test_optim.py"]
    return [
        Stage("the machine", "gpu-0-machine.json", module("machine", 40)),
        Stage("smoke", "gpu-1-smoke.json", module("smoke", 60)),
        Stage("times", "gpu-2-times.json", module("times", 100)),
        Stage("tests", "gpu-3-tests.log", [Command(tests, 120, {"OMP_NUM_THREADS": "1"})]),
        Stage("launches, memory", "gpu-4-launches.json", module("launches", 40)),
        Stage("shapes, formats", "gpu-5-sweep.json", [*module("sweep", 60), formats]),
        Stage(
            "compute-sanitizer",
            "gpu-6-sanitizer.log",
            [
                sanitizer("memcheck", f"'five steps, float32', 'five steps, not aligned', {presets}", 60),
                sanitizer("racecheck", "'norm, float32'", 20),
            ],
        ),
        Stage(
            "ncu, 2³¹, torch's",
            "gpu-7-rest.log",
            [
                Command([*PYTHON, "-c", PROFILED], 40, tool=ncu),
                Command([*PYTEST, "-m", "gpu", LARGEST], 30),
                Command(of_torch, 90, stand_ins()),
            ],
        ),
    ]


def run(command: Command, output: BinaryIO) -> str:
    """Run a command, and return "done" or what went wrong."""
    rehearses = os.environ.get("REHEARSE") == "1"
    words = command.words
    if command.tool:
        path = shutil.which(command.tool[0], path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
        if path is None:
            output.write(f"no {command.tool[0]} here: it comes with the CUDA toolkit\n".encode())
            output.flush()
            if not rehearses:
                return f"no {command.tool[0]}"
        else:
            words = [path, *command.tool[1:], *words]
    output.write(f"$ {' '.join(words)}\n".replace(sys.executable, "python3").encode())
    output.flush()
    environment = os.environ | {"PYTHONFAULTHANDLER": "1"} | command.environment
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        process_group=0,
        preexec_fn=heed_interrupts,
    )
    try:
        code = process.wait(command.limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # Python then prints where it was, and pytest its results so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return f"stopped at {command.limit} s"
    finally:
        end(process)
    return "done" if code == 0 else f"failed ({code})"


def heed_interrupts() -> None:
    """Accept interrupts: a shell makes background jobs, and their child processes, ignore them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill all processes of the process's group that are left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def take(stage: Stage, out: Path) -> tuple[bool, str]:
    """Run a stage. Return whether all of it went well, and its line of the table."""
    file = out / stage.file
    file.unlink(missing_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = file if file.suffix == ".log" else Path(folder) / "output"
        with open(log, "wb") as output:
            outcomes = [run(filled(command, file), output) for command in stage.commands]
        said = log.read_text(errors="replace")
    print(said[-SHOWN:].strip(), flush=True)
    seconds, limit = time.monotonic() - began, limit_of(stage)
    found = {"outcome": "; ".join(outcomes), "seconds": round(seconds, 1), "limit": limit}
    summary = last_line(said)
    if file == log:
        with open(file, "a") as output:
            print(f"\n{found}", file=output)
    else:
        file.with_suffix(".new").unlink(missing_ok=True)  # left by a write that was interrupted
        try:
            results = json.loads(file.read_text())
        except (OSError, ValueError):
            results = {}
        summary = results.get("summary", summary)
        results["stage"] = found | {"output": said[-20_000:]}
        file.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    line = f"{stage.title:18} {f'{seconds:.0f} of {limit} s':>12}  {found['outcome']:20} {stage.file:22} {summary}"
    return all(outcome == "done" for outcome in outcomes), line


def limit_of(stage: Stage) -> int:
    return sum(command.limit for command in stage.commands)


def filled(command: Command, file: Path) -> Command:
    return command._replace(words=[str(file) if word == "FILE" else word for word in command.words])


def last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1].strip("= ")[:70] if lines else "nothing was said"


def main() -> int:
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks/results").resolve()
    out.mkdir(parents=True, exist_ok=True)
    every = stages()
    chosen = [int(number) for number in os.environ.get("STAGES", "0 1 2 3 4 5 6 7").split()]
    if os.environ.get("REHEARSE") == "1":
        print("A rehearsal: no GPU was at hand, and results and times mean nothing.", flush=True)
    found = []
    for number in chosen:
        print(f"\nstage {number}: {every[number].title}, at most {limit_of(every[number])} s", flush=True)
        found.append(take(every[number], out))
    print()
    for number, (_, line) in zip(chosen, found, strict=True):
        print(number, line, flush=True)
    return 0 if all(is_good for is_good, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
