"""The tests themselves, on a machine with few packages: files that cannot run are skipped, and say why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from grokadamw.backends import gpu

from .conftest import PRELOADED
from .models import skip_unless_interpreted

ROOT = Path(__file__).parent.parent
MISSING = ["accelerate", "expecttest", "lightning", "matplotlib", "rich", "transformers"]


def test_what_is_not_installed_stops_no_collection_and_no_process() -> None:
    """Missing packages stop neither the collection of tests nor the server that processes are forked from.

    A file that cannot be imported would end the whole run. The server ends if one of its imports raises anything but
    ImportError.
    """
    files = [str(path) for path in (ROOT / "tests").rglob("test_*.py")]
    code = f"""
import sys, pytest
sys.modules |= dict.fromkeys({MISSING})
code = pytest.main(sys.argv[1:])
import {", ".join(PRELOADED)}
sys.exit(code)
"""
    command = [sys.executable, "-c", code, "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "torch.testing._internal needs expecttest" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, kernels are not interpreted")
def test_an_interpreter_that_numpy_does_not_fit_is_told_from_one_that_fails() -> None:
    if isinstance(reason := gpu.kernels(), str):
        pytest.skip(reason)
    told = "Triton does not work here: TypeError('only 0-dimensional arrays can be converted to Python scalars')"
    with (
        patch.object(gpu, "_why_not_for_codes", lambda device: told),
        pytest.raises(pytest.skip.Exception, match="NumPy"),
    ):
        skip_unless_interpreted()
    with (
        patch.object(gpu, "_why_not_for_codes", lambda device: "another"),
        pytest.raises(AssertionError, match="another"),
    ):
        skip_unless_interpreted()
