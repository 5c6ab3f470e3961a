"""Rows 2 and 6 to 10 of the step on the CPU, in one pass through memory: a C kernel that gets arrays of addresses.

`cpu_kernel.c` is compiled when the package is installed, for several instruction sets, and loaded with ctypes. It takes
tensors that lie in memory without gaps, all of a kind: `why_not` tells. Addresses must be those of this moment, since
the kernel writes where they point: `where` reads them, and whoever keeps what it returned compares before using it.
"""

from __future__ import annotations

import ctypes
import os
import struct
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..numbers import mesh_of
from . import foreach
from .reference import Numbers, Tensors, written

_LIBRARY = Path(__file__).with_name("cpu_kernel.so")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # in the kernel's order
_PROCESS = os.getpid()  # a later fork of it has none of OpenMP's threads, and would wait for them forever
_ALONE = 1 << 17  # elements for which another thread is not worth its start


class _Table(ctypes.Structure):
    """`table` in cpu_kernel.c. Bytes are arrays."""

    _fields_ = [
        ("count", ctypes.c_int64),
        *((name, ctypes.c_char_p) for name in ("ends", "params", "grads", "exp_avgs", "exp_avg_sqs", "grok_emas")),
        *((name, ctypes.c_char_p) for name in ("steps", "beta1", "bias_beta1")),
        *((name, ctypes.c_double) for name in ("beta2", "lr", "eps", "weight_decay", "alpha", "lamb", "clip")),
        ("amplify_after", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("eps_before_correction", "raw_second_moment", "param", "grad", "state")),
    ]


class Kernel(NamedTuple):
    """The functions of cpu_kernel.c, compiled for one instruction set."""

    instruction_set: str
    piece: int  # elements of a sum of squares
    step: Callable[..., None]
    sum_of_squares: Callable[..., float]
    meet: Callable[..., int]
    look: Callable[..., int] | None  # None where torch has no table of DLPack's functions


@cache
def kernel() -> Kernel | str:
    """The kernel for this processor; or, in words, why there is none."""
    if not _LIBRARY.exists():
        return "the native kernel was not built, for want of a C compiler when grokadamw was installed"
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        for name in _instruction_sets():
            if hasattr(library, f"step_{name}"):
                return _kernel(library, name)
    except OSError as error:
        return f"the native kernel cannot be loaded: {error}"
    return "the native kernel is of another version of grokadamw: install it again"


def _instruction_sets() -> list[str]:
    """Those that this processor has, best first, as torch finds it (and ATEN_CPU_CAPABILITY limits it)."""
    names = {"AVX512": ["v4", "v3"], "AVX2": ["v3"]}
    return [*names.get(torch.backends.cpu.get_cpu_capability(), []), "baseline"]


def _kernel(library: ctypes.CDLL, name: str) -> Kernel | str:
    size, piece, step, squares, meet = (
        getattr(library, f"{function}_{name}") for function in ("table_size", "piece", "step", "sum_of_squares", "meet")
    )
    if size() != ctypes.sizeof(_Table):
        return "the native kernel is of another version of grokadamw: install it again"
    step.restype, squares.restype = None, ctypes.c_double
    step.argtypes = (ctypes.POINTER(_Table), ctypes.c_int64, ctypes.c_void_p)
    squares.argtypes = (ctypes.POINTER(_Table), ctypes.POINTER(ctypes.c_double), ctypes.c_int64, ctypes.c_void_p)
    meet.argtypes = (ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p) * 2
    return Kernel({"v3": "x86-64-v3", "v4": "x86-64-v4"}.get(name, name), piece(), step, squares, meet, _look(name))


class _Python(ctypes.Structure):
    """`python` in cpu_kernel.c: functions that it calls."""

    _fields_ = [("item", ctypes.c_void_p), ("look", ctypes.c_void_p)]


def _look(name: str) -> Callable[..., int] | None:
    """The kernel's `look`, and what it needs of torch: the fourth function in DLPack's table."""
    get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    try:
        table = get(Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
    except (AttributeError, ValueError):
        return None
    (major,) = (ctypes.c_uint32 * 1).from_address(table)
    of_tensor = (ctypes.c_void_p * 6).from_address(table)[5]  # after the version, its predecessor, and three others
    if major != 1 or of_tensor is None:
        return None
    look = getattr(ctypes.PyDLL(str(_LIBRARY)), f"look_{name}")  # PyDLL, as it looks at Python's objects
    look.argtypes = (
        *(ctypes.POINTER(_Python), ctypes.py_object, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_char_p, ctypes.c_int, ctypes.c_int),
    )
    return partial(look, _Python(ctypes.cast(ctypes.pythonapi.PyList_GetItem, ctypes.c_void_p), of_tensor))


def look() -> Callable[..., int] | None:
    """`look` of cpu_kernel.c without its first argument; None where it cannot be had."""
    found = kernel()
    return None if isinstance(found, str) else found.look


class Where(NamedTuple):
    """Where the tensors of a list lie, 8 bytes for each address; and how large they are."""

    params: bytes
    exp_avgs: bytes
    exp_avg_sqs: bytes
    grok_emas: bytes | None
    steps: bytes
    ends: bytes  # elements of all tensors up to and with each
    grads: bytes


def where(tensors: Tensors) -> Where:
    """The addresses of this moment."""
    params, mu = _plain(tensors.params), tensors.grok_emas
    return Where(
        addresses(params),
        addresses(_plain(tensors.exp_avgs)),
        addresses(_plain(tensors.exp_avg_sqs)),
        None if mu is None else addresses(_plain(mu)),
        addresses(tensors.steps),
        _ends(params),
        addresses(_plain(tensors.grads)),
    )


def why_not(row: Sequence[Tensor], step: Tensor) -> str | None:
    """Why the kernel cannot take a parameter; None where it can.

    Args:
        row: the parameter, its gradient, m, v and, where there is one, μ.
        step: its step count.
    """
    dtypes = [x.dtype for x in row[:3]]
    if any(x.dtype != dtypes[2] for x in row[3:]) or not set(dtypes) <= set(_DTYPES):
        return f"dtypes {', '.join(str(x.dtype) for x in row)}"
    if torch.float64 in dtypes and len(set(dtypes)) > 1:
        return f"dtypes {', '.join(map(str, dtypes))}"
    if mesh_of(row[0]) is not None and any(x.placements != row[0].placements for x in row):  # type: ignore[attr-defined]
        return f"a DTensor whose gradient or state is not placed as it is, {row[0].placements}"  # type: ignore[attr-defined]
    row = [_plain([x])[0] for x in row]
    odd = [type(x).__name__ for x in row if type(x) not in (Tensor, nn.Parameter)]
    if odd:
        return f"a tensor subclass, {odd[0]}"
    if not all(x.is_cpu for x in (*row, step)) or step.dtype != torch.float32 or step.numel() != 1:
        return "gradient or state are not on the CPU, or the step count is not float32"
    if not _lie_alike(row):
        return "memory with gaps, or a gradient with other strides"
    return None


def _plain(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, or a DTensor's part that is here."""
    return [x._local_tensor for x in tensors] if mesh_of(tensors[0]) is not None else tensors  # type: ignore[attr-defined]


def _lie_alike(row: Sequence[Tensor]) -> bool:
    """Whether the same place in memory is the same element of each, and every place up to the last is one."""
    if any(x.shape != row[0].shape or x.is_neg() for x in row):
        return False
    return all(x.is_contiguous() for x in row) or (
        _has_no_gaps(row[0]) and all(x.stride() == row[0].stride() for x in row)
    )


def _has_no_gaps(x: Tensor) -> bool:
    """Whether every place in memory up to the last is one element, in whatever order."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def share_memory(tensors: Tensors) -> bool:
    """Whether memory that a step writes belongs to two of the tensors."""
    ranges = Ranges([x for column in written(tensors) for x in _plain(column)], _plain(tensors.grads))
    return ranges.overlap or ranges.meet(addresses(_plain(tensors.grads)))


class Ranges:
    """The memory that a step writes, to see whether gradients lie in it, which it reads meanwhile."""

    def __init__(self, written: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        pairs = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in written if x.numel())
        self.overlap = any(end > start for (_, end), (start, _) in zip(pairs, pairs[1:], strict=False))
        self._count, self._sizes = len(pairs), packed([grad.nbytes for grad in grads])
        self._starts, self._ends = (packed([pair[i] for pair in pairs]) for i in (0, 1))

    def meet(self, grads: bytes) -> bool:
        """Whether one of the gradients, which lie there, has memory in common with what is written."""
        found, count = kernel(), len(grads) // 8
        if not isinstance(found, str):
            return bool(found.meet(self._count, self._starts, self._ends, count, grads, self._sizes))
        starts, ends = (struct.unpack(f"{self._count}Q", x) for x in (self._starts, self._ends))
        for at, size in zip(*(struct.unpack(f"{count}Q", x) for x in (grads, self._sizes)), strict=True):
            before = bisect_left(starts, at + size)  # ranges that begin before it ends; they are sorted, and apart
            if size and before and ends[before - 1] > at:
                return True
        return False


def addresses(tensors: Sequence[Tensor]) -> bytes:
    """Where they lie, 8 bytes for each."""
    return packed(list(map(Tensor.data_ptr, tensors)))


def packed(numbers: Collection[int]) -> bytes:
    """8 bytes for each, as C wants them."""
    return struct.pack(f"{len(numbers)}Q", *numbers)


def _ends(tensors: Sequence[Tensor]) -> bytes:
    return struct.pack(f"{len(tensors)}q", *accumulate(map(Tensor.numel, tensors)))


def _threads(elements: int) -> tuple[int, int | None]:
    """How many threads for so many elements; and the function that runs them, None for threads of the kernel's own."""
    threads = torch.get_num_threads() if elements > _ALONE else 1
    return threads, _openmp() if os.getpid() == _PROCESS else None


@cache
def _openmp() -> int | None:
    """The address of GOMP_parallel in the OpenMP that torch has loaded, if it has."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Σ g² over all elements of tensors on one device, squared and summed in float64, in fixed order: a 0-d tensor.

    What the kernel cannot take is left to `foreach`.
    """
    lists: dict[torch.dtype | None, list[Tensor]] = {}
    for x in tensors:
        lists.setdefault(x.dtype if _can_be_summed(x) else None, []).append(x)
    total = 0.0
    for group in lists.values():
        squares = flat(group)
        total += foreach.sum_of_squares(group).item() if squares is None else squares(addresses(group))
    return torch.tensor(total, dtype=torch.float64, device="cpu")


def flat(tensors: Sequence[Tensor]) -> Callable[[bytes], float] | None:
    """A function from the addresses of such tensors to their Σ g²; None where the kernel has no one sum for them."""
    found = kernel()
    if isinstance(found, str) or len({x.dtype for x in tensors}) != 1 or not all(map(_can_be_summed, tensors)):
        return None
    ends, dtype, count = _ends(tensors), _DTYPES.index(tensors[0].dtype), len(tensors)
    (elements,) = struct.unpack("q", ends[-8:])
    sums = (ctypes.c_double * -(-elements // found.piece))()

    def squares(at: bytes) -> float:
        return found.sum_of_squares(_Table(count=count, ends=ends, grads=at, grad=dtype), sums, *_threads(elements))

    return squares


def _can_be_summed(x: Tensor) -> bool:
    return type(x) is Tensor and x.is_cpu and x.dtype in _DTYPES and _has_no_gaps(x) and not x.is_neg()


def step(tensors: Tensors, numbers: Numbers) -> None:
    """Rows 6 to 10 for every tensor, written in place; of tensors that `why_not` and `share_memory` have cleared."""
    found, n = kernel(), numbers
    if isinstance(found, str):
        raise RuntimeError(found)
    if n.finite is not None and not n.finite:
        return
    at: Where = where(tensors) if tensors.kept is None else tensors.kept
    count = len(tensors.params)
    (elements,) = struct.unpack("q", at.ends[-8:])
    table = _Table(
        count=count,
        **at._asdict(),
        beta1=struct.pack(f"{count}d", *n.beta1),
        bias_beta1=struct.pack(f"{count}d", *n.bias_beta1),
        beta2=n.beta2,
        lr=float(n.lr),
        eps=n.eps,
        weight_decay=n.weight_decay,
        alpha=float(n.alpha),
        lamb=n.lamb,
        clip=-float(n.clip) if n.maximize else float(n.clip),
        amplify_after=min(n.amplify_after, 2**63 - 1),
        eps_before_correction=n.eps_before_correction,
        raw_second_moment=n.raw_second_moment,
        param=_DTYPES.index(tensors.params[0].dtype),
        grad=_DTYPES.index(tensors.grads[0].dtype),
        state=_DTYPES.index(tensors.exp_avgs[0].dtype),
    )
    for column in written(tensors):  # which torch's own operations do themselves
        torch.autograd.graph.increment_version(column)
        if mesh_of(column[0]) is not None:
            torch.autograd.graph.increment_version(_plain(column))
    found.step(table, *_threads(elements))
