"""Rehearsals, without a GPU, of the script that runs on one: no result is lost, however a stage ends."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from benchmarks import gpu
from benchmarks.gpu import Command, Stage
from benchmarks.on_gpu import checks, smoke, sweep, times
from benchmarks.on_gpu.launches import launched
from grokadamw.backends import native
from grokadamw.backends.gpu_tables import Shape

from ..models import skip_unless_interpreted

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a rehearsal: unlike the tests' own, it has no TRITON_INTERPRET."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"REHEARSE": "1"} | more


def test_the_script_runs_from_the_root(tmp_path: Path) -> None:
    """The script runs without an error if it has no stages to run."""
    run = environment(STAGES="", OUT=str(tmp_path))
    assert subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=gpu.ROOT, env=run).returncode == 0


@pytest.mark.long
@needs_triton
@pytest.mark.skipif(native.signature() is None, reason="no native library, and none may be built while others test")
def test_the_first_stages_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Imports, paths, flags and calls work without the packages that a bare machine lacks, and the kernels compile."""
    for name in ("rich", "matplotlib", "expecttest"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} on a bare machine')\n")
    out = tmp_path / "out"
    for name, value in {"REHEARSE": "1", "OUT": str(out), "STAGES": "0 1 2", "PYTHONPATH": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # a busy machine needs longer limits
    patient = [stage._replace(commands=[c._replace(limit=600) for c in stage.commands]) for stage in gpu.stages()]
    monkeypatch.setattr(gpu, "stages", lambda: patient)
    assert gpu.main() == 0, capsys.readouterr().out
    assert [path.name for path in sorted(out.iterdir())] == [stage.file for stage in patient[:3]]
    machine, smoked, timed = (json.loads(path.read_text()) for path in sorted(out.iterdir()))
    assert machine["signature"]
    assert {name: x["outcome"] for name, x in smoked["checks"].items()} == dict.fromkeys(checks.CHECKS, "passed")
    assert len(timed["steps"]) == len(times.MODELS) * (len(times.ARMS) + 1) + 3 * len(times.ROWS)
    assert len(timed["kernels"]) == 3 * len(times.MODELS)
    assert len(timed["host"]) == 3 * 6 + 2 * 4
    assert not any("skipped" in row for row in timed["steps"] + timed["kernels"])
    assert all(report["stage"]["outcome"] == "done" for report in (machine, smoked, timed))
    assert [line[0] for line in capsys.readouterr().out.splitlines()[-3:]] == ["0", "1", "2"]


@pytest.mark.long
def test_smoke_compares_what_the_kernels_compute() -> None:
    """Right kernels, which are interpreted here, stay within the tolerances. A difference of 0.001 does not."""
    skip_unless_interpreted()
    run = environment(TRITON_INTERPRET="1")
    code = "from benchmarks.on_gpu import checks; checks.here('norm, float32', 'five steps, float32', 'the preset')"
    done = subprocess.run([sys.executable, "-c", code], cwd=gpu.ROOT, env=run, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with pytest.raises(AssertionError, match="too far apart: {'exp_avg': 0.001}"):
        checks.check_near({"params": 0.0, "exp_avg": 1e-3}, torch.float32)


def test_numbers_and_none_are_infinitely_far_apart() -> None:
    optimizers = []
    for value in (1.0, torch.nan):
        p = torch.nn.Parameter(torch.tensor([value, 2.0]))
        p.grad = torch.ones(2)
        optimizers.append(optimizer := checks.optimizer_of([p], lr=0.0))
        optimizer.step()
    found = checks.differences(*optimizers)
    assert found.pop("params") == torch.inf
    assert set(found.values()) == {0.0}


@pytest.mark.long
def test_a_check_takes_no_other_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A check that fails, dies, hangs, or leaves a lasting device error in its process does not spoil other checks."""
    with pytest.raises(SystemExit):
        smoke.main(str(tmp_path / "smoke.json"), "tests.benchmarks.failing_checks")
    written = json.loads((tmp_path / "smoke.json").read_text())
    found = written["checks"]
    assert [name for name, x in found.items() if x["outcome"] == "passed"] == [n for n in found if "passes" in n]
    assert all(x["outcome"] == "failed" for name, x in found.items() if "passes" not in name)
    assert found["passes"]["pid"] == found["passes in the same process"]["pid"] != found["passes in another"]["pid"]
    assert "ValueError: wrong numbers" in found["fails"]["traceback"]
    assert "illegal memory access" in found["loses the device"]["traceback"]
    assert found["dies"]["code"] == 11
    assert "in hangs" in found["hangs"]["traceback"]
    assert written["summary"] == "4 of 8 checks passed"
    assert "ValueError: wrong numbers" in capsys.readouterr().out


def test_checks_that_cannot_be_imported_say_why(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="No module named tests.benchmarks.not_there"):
        smoke.main(str(tmp_path / "smoke.json"), "tests.benchmarks.not_there")


def python(code: str, limit: int = 30, **more: Any) -> Command:
    return Command([sys.executable, "-c", code, "FILE"], limit, **more)


WRITES = (
    "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"rows\": [1, 2]}'); print('so far', flush=True); "
)
SLEEP = f"sleep 1000.{os.getpid()}"  # no other process has this command line
HANGS = f"import subprocess, time; subprocess.Popen({SLEEP.split()}); time.sleep(1000)"


def test_each_stage_leaves_its_file_whatever_becomes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 2)
    stages = [
        Stage("fails at once", "a.json", [python("raise SystemExit('no such module')")]),
        Stage("fails later", "b.json", [python(WRITES + "raise ValueError")]),
        Stage("is stopped", "c.json", [python(WRITES + HANGS, 2)]),
        Stage(
            "does not heed",
            "d.log",
            [python("import signal; signal.signal(2, signal.SIG_IGN); " + HANGS, 1), python("print('next')")],
        ),
        Stage("is cut off", "e.json", [python("import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"rows')")]),
        Stage("goes well", "f.json", [python(WRITES)]),
    ]
    monkeypatch.setattr(gpu, "stages", lambda: stages)
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("STAGES", "0 1 2 3 4 5")
    began = time.monotonic()
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job of a shell
    try:
        assert gpu.main() == 1
    finally:
        signal.signal(signal.SIGINT, heard)
    assert time.monotonic() - began < 25
    assert sorted(path.name for path in tmp_path.iterdir()) == [stage.file for stage in stages]
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    outcomes = {name: result["stage"]["outcome"] for name, result in results.items()}
    assert outcomes == {"a": "failed (1)", "b": "failed (1)", "c": "stopped at 2 s", "e": "done", "f": "done"}
    assert all(results[name]["rows"] == [1, 2] for name in "bcf")
    assert "no such module" in results["a"]["stage"]["output"]
    assert "KeyboardInterrupt" in results["c"]["stage"]["output"]  # where it was stopped
    log = (tmp_path / "d.log").read_text()
    assert "\nnext\n" in log
    assert "'outcome': 'stopped at 1 s; done'" in log
    left = subprocess.run(["pgrep", "-f", SLEEP], capture_output=True, text=True).stdout
    assert not left, "what a stage has started is still there"
    table = capsys.readouterr().out.splitlines()[-6:]
    assert [line.split("  ")[0] for line in table] == [f"{i} {stage.title}" for i, stage in enumerate(stages)]


# the stages' commands


def test_the_stages_fit_what_is_lent() -> None:
    """The stages fit into two commands of six minutes. Each leaves one file, which is in no subfolder."""
    stages = gpu.stages()
    assert len({stage.file for stage in stages}) == len(stages)
    assert not any("/" in stage.file for stage in stages)
    assert sum(map(gpu.limit_of, stages[:5])) <= 360
    assert sum(map(gpu.limit_of, stages[5:])) <= 360
    tests = stages[3].commands[0].words
    assert {"tests/gpu/test_gpu.py", "tests/test_capture.py"} <= set(tests)
    assert tests[tests.index("--deselect") + 1] == gpu.LARGEST


def test_tools_that_watch_are_given_their_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the caching allocator, memcheck sees the ends of tensors, not those of the allocator's segments."""
    for name in ("compute-sanitizer", "ncu"):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho "{name} caching=$PYTORCH_NO_CUDA_MEMORY_CACHING" "$@"\n')
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    watched = [command for stage in gpu.stages() for command in stage.commands if command.tool]
    with open(tmp_path / "log", "wb") as output:
        assert [gpu.run(command, output) for command in watched] == ["done", "done", "done"]
    said = [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("$")]
    assert said[0].startswith("compute-sanitizer caching=1 --tool memcheck")
    assert said[1].startswith("compute-sanitizer caching=1 --tool racecheck")
    assert said[2].startswith("ncu caching= --clock-control none --kernel-name update")
    assert all(f" {sys.executable} -u -c from benchmarks.on_gpu" in line for line in said)


def test_without_a_tool_the_stage_says_so_and_a_rehearsal_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = python("print('watched')", tool=["no-such-tool"])
    for rehearses, outcome in (("", "no no-such-tool"), ("1", "done")):
        monkeypatch.setenv("REHEARSE", rehearses)
        with open(tmp_path / "log", "wb") as output:
            assert gpu.run(command, output) == outcome
        assert ("watched" in (tmp_path / "log").read_text()) == bool(rehearses)


def test_torchs_tests_find_a_stand_in_for_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    run = environment(**gpu.stages()[7].commands[2].environment)
    code = "import expecttest; print(expecttest.__file__, expecttest.TestCase)"
    said = subprocess.check_output([sys.executable, "-c", code], env=run, text=True)
    assert "stand_ins/expecttest.py <class 'unittest.case.TestCase'>" in said


def test_the_sweep_has_the_candidates() -> None:
    assert Shape(16384, 2048, 8) in sweep.SQUARES  # 16 wide loads per thread at once
    assert {shape.chunk for shape in sweep.UPDATE} >= {4096, 8192}
    assert all(sweep.ELEMENTS % shape.chunk == 0 for shape in [*sweep.SQUARES, *sweep.UPDATE])


def test_the_names_that_the_host_has_given_are_no_launches() -> None:
    """The profiler lists an optimizer's span, which is no launch, among the activities of the device."""

    def event(name: str, device: DeviceType, is_user_annotation: bool = False) -> FunctionEvent:
        return FunctionEvent(1, name, 0, 0, 1, device_type=device, is_user_annotation=is_user_annotation)

    events = [
        event("update", DeviceType.CUDA),
        event("Optimizer.step#GrokAdamW.step", DeviceType.CUDA, True),
        event("aten::add_", DeviceType.CPU),
        event("Memcpy HtoD (Pinned -> Device)", DeviceType.CUDA),
    ]
    assert launched(events) == ["update", "Memcpy HtoD (Pinned -> Device)"]


def test_what_has_no_room_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(params: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")

    monkeypatch.setattr(times, "DEVICE", "cpu")
    monkeypatch.setattr(times, "COPIED", 100)
    monkeypatch.setattr(times, "MODELS", {"tiny": lambda: [(4, 5), (5,)]})
    monkeypatch.setattr(times, "ARMS", [times.FUSED, times.CLIPPED._replace(make=too_large)])
    monkeypatch.setattr(times, "milliseconds", lambda step, steps: 1.0)
    monkeypatch.setattr(times.common, "milliseconds", lambda step: 1.0)
    monkeypatch.setattr(times.common, "release", lambda: None)
    *_, rows = times.rows_of_model("tiny", times.ARMS)
    assert [row["arm"] for row in rows] == ["copy", times.FUSED.name, times.CLIPPED.name]
    assert rows[-1]["skipped"].startswith("OutOfMemoryError: CUDA out of memory")
