"""Checks that fail in every possible way. test_on_gpu.py runs them instead of those of benchmarks/on_gpu/checks.py."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from benchmarks.on_gpu import checks


def passes() -> dict[str, Any]:
    return {"pid": os.getpid()}


def fails() -> dict[str, Any]:
    raise ValueError("wrong numbers")


def loses_the_device() -> dict[str, Any]:
    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.cuda.synchronize = synchronize
    return {}


def dies() -> dict[str, Any]:
    os._exit(11)


def hangs() -> dict[str, Any]:
    time.sleep(1000)
    return {}


CHECKS = {
    "passes": passes,
    "fails": fails,
    "passes in the same process": passes,
    "loses the device": loses_the_device,
    "passes in another": passes,
    "dies": dies,
    "hangs": hangs,
    "passes at last": passes,
}

if __name__ == "__main__":
    torch.cuda.synchronize = lambda: None
    checks.DEVICE, checks.SECONDS = "cpu", 1
    checks.run(sys.argv[1], CHECKS)
