"""The native kernel's library: cpu_kernel.c, compiled when the package is installed, and loaded with ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_ANOTHER = "the native kernel was built for another version of grokadamw: install grokadamw again"
_LIBRARY = Path(__file__).with_name("cpu_kernel.so")


class Table(ctypes.Structure):
    """`table` in cpu_kernel.c. Fields that hold bytes are arrays."""

    _fields_ = [
        ("count", ctypes.c_int64),
        *((name, ctypes.c_char_p) for name in ("ends", "params", "grads", "exp_avgs", "exp_avg_sqs", "grok_emas")),
        *((name, ctypes.c_char_p) for name in ("steps", "beta1", "bias_beta1", "row_widths")),
        *(
            (name, ctypes.c_double)
            for name in ("beta2", "lr", "eps", "weight_decay", "alpha", "lamb", "clip", "micro_steps")
        ),
        *((name, ctypes.c_double) for name in ("max_row_change", "max_row_norm", "shortest")),
        ("amplify_after", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("eps_before_correction", "raw_second_moment", "decays", "moves")),
        *((name, ctypes.c_int32) for name in ("param", "grad", "state", "coded", "rounds", "low_bits")),
        *(("formats", ctypes.c_int32 * 3), ("scales", ctypes.c_char_p * 3)),
        *((name, ctypes.c_char_p) for name in ("lows", "widths", "keys", "firsts")),
        ("nth", ctypes.c_int64),
    ]


class Kernel(NamedTuple):
    """The functions of cpu_kernel.c, compiled for one instruction set."""

    instruction_set: str
    piece: int  # elements in each partial sum of squares
    row_bytes: int  # of the longest row that `step` can limit
    step: Callable[..., int]
    sum_of_squares: Callable[..., float]
    meet: Callable[..., int]
    signature: Callable[..., int] | None  # None if torch has no table of DLPack's functions


@cache
def kernel() -> Kernel | str:
    """Return the kernel for this processor, or a sentence that says why there is none."""
    if not _LIBRARY.exists():
        return "the native kernel was not built: install grokadamw again, where a C compiler works"
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        for name in _instruction_sets():
            if hasattr(library, f"update_{name}"):  # the newest function, which an older library lacks
                return _kernel(library, name)
    except OSError as error:
        return f"the native kernel cannot be loaded: {error}"
    return _ANOTHER


def _instruction_sets() -> list[str]:
    """Return this processor's instruction sets, best first, as torch detects (and ATEN_CPU_CAPABILITY limits) them."""
    names = {"AVX512": ["v4", "v3"], "AVX2": ["v3"]}
    return [*names.get(torch.backends.cpu.get_cpu_capability(), []), "baseline"]


def _kernel(library: ctypes.CDLL, name: str) -> Kernel | str:
    table_size, piece, row_bytes, step, squares, meet = (
        getattr(library, f"{function}_{name}")
        for function in ("table_size", "piece", "row_bytes", "update", "sum_of_squares", "meet")
    )
    if table_size() != ctypes.sizeof(Table):
        return _ANOTHER
    squares.restype = ctypes.c_double
    step.argtypes = (ctypes.POINTER(Table), ctypes.c_int64, ctypes.c_void_p)
    squares.argtypes = (ctypes.POINTER(Table), ctypes.POINTER(ctypes.c_double), ctypes.c_int64, ctypes.c_void_p)
    meet.argtypes = (ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p) * 2
    instruction_set = {"v3": "x86-64-v3", "v4": "x86-64-v4"}.get(name, name)
    return Kernel(instruction_set, piece(), row_bytes(), step, squares, meet, _signature(name))


class _Python(ctypes.Structure):
    """`python` in cpu_kernel.c: the functions that the kernel calls."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("item", "type", "release", "look")]


def _signature(name: str) -> Callable[..., int] | None:
    """Return the kernel's `signature` with the function that it needs from torch: the fourth in DLPack's table."""
    get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    try:
        table = get(Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
    except (AttributeError, ValueError):
        return None
    (major,) = (ctypes.c_uint32 * 1).from_address(table)
    of_tensor = (ctypes.c_void_p * 6).from_address(table)[5]  # after the version, the predecessor, and three others
    if major != 1 or of_tensor is None:
        return None
    function = getattr(ctypes.PyDLL(str(_LIBRARY)), f"signature_{name}")  # PyDLL keeps the GIL, to read Python objects
    function.argtypes = (
        *(ctypes.POINTER(_Python), ctypes.py_object, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int),
    )
    of_python = (getattr(ctypes.pythonapi, name) for name in ("PyList_GetItem", "PyObject_Type", "Py_DecRef"))
    return partial(function, _Python(*(ctypes.cast(x, ctypes.c_void_p) for x in of_python), of_tensor))


def signature() -> Callable[..., int] | None:
    """Return `signature` of cpu_kernel.c without its first argument, or None if it is not available."""
    found = kernel()
    return None if isinstance(found, str) else found.signature
