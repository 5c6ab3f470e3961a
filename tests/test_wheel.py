"""What pip makes of the package, with a C compiler and without one, in an environment that has nothing but torch."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEP = """
import torch, grokadamw
print(grokadamw.__file__)
p = torch.nn.Parameter(torch.ones(5000))
optimizer = grokadamw.GrokAdamW([p])
p.grad = torch.ones(5000)
optimizer.step()
print(optimizer.implementation())
"""


@pytest.mark.parametrize("compiler", ["there", "missing"])
def test_a_wheel_in_an_empty_environment(compiler: str, tmp_path: Path) -> None:
    environment = os.environ | ({"CC": "false"} if compiler == "missing" else {})
    # of a copy, as a build leaves its objects where it was made
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        if name.startswith("grokadamw/") or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, source], check=True, env=environment)
    (wheel,) = wheels.iterdir()
    assert wheel.name.startswith("grokadamw-0.2.0-py3-none-")
    assert wheel.name.endswith("-any.whl") == (compiler == "missing")

    venv.create(tmp_path / "venv", with_pip=False)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    # torch's own folder, whose .pth files, and so the package in development, do not count there
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
    python = tmp_path / "venv/bin/python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", wheel], check=True)
    lines = subprocess.run(
        [python, "-W", "error", "-c", STEP], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout.splitlines()
    assert Path(lines[0]).is_relative_to(site)
    if compiler == "missing":
        assert lines[1] == (
            "blocks: the native kernel was not built, for want of a C compiler when grokadamw was installed"
        )
    else:
        assert lines[1].startswith("cpu: the native kernel, compiled for ")
