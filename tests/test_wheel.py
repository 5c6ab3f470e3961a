"""Tests of installing the package with pip, with and without a C compiler, in an environment that has only torch."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

import grokadamw

from .test_release import copy_of_the_source

VERSION = grokadamw.__version__
STEP = """
import torch, grokadamw
print(grokadamw.__file__)
p = torch.nn.Parameter(torch.ones(5000))
optimizer = grokadamw.GrokAdamW([p])
p.grad = torch.ones(5000)
optimizer.step()
print(optimizer.implementation())
"""
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
COMPILERS = ["there", "missing"]


def run(*command: str | Path, compiler: str, cwd: Path | None = None) -> str:
    environment = os.environ | ({"CC": "false"} if compiler == "missing" else {})
    return subprocess.run(command, check=True, env=environment, cwd=cwd, stdout=-1, text=True).stdout


def check_in_an_empty_environment(package: Path, compiler: str, folder: Path) -> None:
    """Install a wheel or an sdist in an environment that has only torch, and take a step."""
    venv.create(folder / "venv", with_pip=False)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    # add the folder of torch; its own .pth files, such as that of a development install, are not read then
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
    python = folder / "venv/bin/python"
    run(*PIP, "--no-cache-dir", "--python", python, "install", "--no-deps", package, compiler=compiler)
    lines = run(python, "-W", "error", "-c", STEP, compiler=compiler, cwd=folder).splitlines()
    assert Path(lines[0]).is_relative_to(site)
    if compiler == "missing":
        assert lines[1] == (
            "blocks: the native kernel was not built: install grokadamw again, where a C compiler works"
        )
    else:
        assert lines[1].startswith("cpu: the native kernel, compiled for ")
    said = run(folder / "venv/bin/grokadamw", "--version", compiler=compiler, cwd=folder)
    assert said == f"grokadamw {VERSION}\n"


def check_name(wheel: Path, compiler: str) -> None:
    assert wheel.name.startswith(f"grokadamw-{VERSION}-py3-none-")
    assert wheel.name.endswith("-any.whl") == (compiler == "missing")


@pytest.mark.long
@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_wheel_in_an_empty_environment(compiler: str, tmp_path: Path) -> None:
    source = copy_of_the_source(tmp_path / "source")
    run(*PIP, "wheel", "--no-deps", "--wheel-dir", tmp_path / "wheels", source, compiler=compiler)
    (wheel,) = (tmp_path / "wheels").iterdir()
    check_name(wheel, compiler)
    if compiler == "there":
        assert b".debug_info" not in ZipFile(wheel).read("grokadamw/backends/cpu_kernel.so")
    check_in_an_empty_environment(wheel, compiler, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_release_in_an_empty_environment(compiler: str, tmp_path: Path) -> None:
    """Check the sdist, and the wheel that `python -m build` builds from it."""
    for tool in ("build", "twine"):
        pytest.importorskip(tool)
    source = copy_of_the_source(tmp_path / "source")
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", source, compiler=compiler)
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel, compiler=compiler)
    check_name(wheel, compiler)
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "grokadamw/backends/cpu_kernel.c"} <= files
    assert not [name for name in files if name.startswith(("tests", "benchmarks", "docs"))]  # complete, or not at all
    for package in (sdist, wheel):
        folder = tmp_path / package.suffix
        folder.mkdir()
        check_in_an_empty_environment(package, compiler, folder)
