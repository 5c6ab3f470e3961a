"""A rehearsal of the stages where there is no GPU: Triton compiles for one, and its launches do nothing.

Imports, paths, flags and calls are real. So are Triton's compilations, also those for other arguments, and the host's
time except for the driver's share. Results and the device's times are not real: tensors are on the CPU, and stand-ins
with the same arguments replace torch.cuda's functions. With TRITON_INTERPRET=1 Triton's interpreter runs the kernels
instead, and the results are real, too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import create_autospec, patch

import torch

from .common import INTERPRETS
from .interpreter import quicken

_IMITATED = 90  # compute capability 9.0
_patches: list[Any] = []
_capturing = False


class _Utils:
    """The driver's answers to Triton's questions about kernels and devices."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spilled, and the most threads: only the last is used

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "max_num_regs": 1 << 16, "warpSize": 32}


class _Launcher:
    """A launcher that launches nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        pass


class _Driver:
    """A driver that the compiler cannot tell from a GPU's."""

    launcher_cls, utils = _Launcher, _Utils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", _IMITATED, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Event:
    """An event that uses the host's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1000 * (end.at - self.at)


class _Graph:
    def replay(self) -> None:
        pass


@contextmanager
def _graph(graph: _Graph) -> Iterator[None]:
    """Make the optimizer take its steps inside as if they were captured."""
    global _capturing
    _capturing = True
    try:
        yield
    finally:
        _capturing = False


def that_read() -> list[ModuleType]:
    """Return the package's modules that ask whether reading a number makes the host wait."""
    modules = [module for name, module in sys.modules.items() if name.startswith("grokadamw.")]
    return [module for module in modules if hasattr(module, "reads_are_free")]


def begin() -> None:
    """Make tensors on the CPU use the GPU's code from now on."""
    from grokadamw.backends import gpu

    of_module = [(gpu, "_DEVICE_TYPE", "cpu")]
    if INTERPRETS:
        quicken()
    else:
        from triton.runtime import driver

        driver.set_active(_Driver())
        of_module.append((gpu, "_why_not_here", lambda device: None))
    of_module += [(torch.cuda, name, value) for name, value in _stand_ins().items()]
    _patches.extend(patch.object(*arguments) for arguments in of_module)
    _patches.extend(patch.object(module, "reads_are_free", lambda device: False) for module in that_read())
    _patches.append(patch("grokadamw.step.capture.is_capturing", lambda optimizer: _capturing))
    _patches.append(patch("grokadamw.step.capture._get_capturable_supported_devices", lambda: ["cpu"]))
    for replaced in _patches:
        replaced.start()


@contextmanager
def paused() -> Iterator[None]:
    """Let tensors on the CPU use the CPU's code inside."""
    for replaced in _patches:
        replaced.stop()
    try:
        yield
    finally:
        for replaced in _patches:
            replaced.start()


def _stand_ins() -> dict[str, Any]:
    """Return replacements for names in torch.cuda. The functions refuse arguments that the real ones do not take."""
    answers = {
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 0,
        "memory_allocated": 0,
    }
    functions = {name: create_autospec(getattr(torch.cuda, name), return_value=x) for name, x in answers.items()}
    return functions | {"Event": _Event, "CUDAGraph": _Graph, "graph": _graph}
