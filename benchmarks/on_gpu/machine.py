"""Stage 0: describe the machine, and build the native library, without which a step takes much more host time.

python3 -m benchmarks.on_gpu.machine FILE
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from grokadamw.__main__ import environment
from grokadamw.backends import native

from . import common
from .record import Record, first_line

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ["triton", "numpy", "pytest", "pytest-xdist", "hypothesis", "expecttest", "rich", "matplotlib"]
ASKED = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit,ecc.mode.current"


def main(path: str) -> None:
    record = Record(path)
    record.write(
        device=common.device_name(),
        python=platform.python_version(),
        system=platform.platform(),
        cores=os.cpu_count(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        packages={name: version(name) for name in PACKAGES},
    )
    record.write(driver=said("nvidia-smi", f"--query-gpu={ASKED}", "--format=csv"), nvcc=said("nvcc", "--version"))
    if not common.REHEARSES:
        device = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        record.write(
            capability=[device.major, device.minor],
            multiprocessors=device.multi_processor_count,
            memory={"free": free, "total": total},
        )
    if native.signature() is None:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        record.write(build={"code": built.returncode, "output": (built.stdout + built.stderr)[-2000:]})
        native.kernel.cache_clear()
    kernel = native.kernel()
    has_signature = native.signature() is not None
    record.write(native=kernel if isinstance(kernel, str) else kernel.instruction_set, signature=has_signature)
    record.write(environment=environment())
    print(record.results["environment"])
    if not has_signature:
        sys.exit(f"the native library is not there: {record.results['native']}; {record.results.get('build')}")
    record.write(summary=f"{record.results['device']}; torch {torch.__version__}, triton {version('triton')}")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def said(*command: str) -> str:
    """Return a command's output, or the reason why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return first_line(error)
    return (done.stdout + done.stderr).strip()


if __name__ == "__main__":
    main(sys.argv[1])
