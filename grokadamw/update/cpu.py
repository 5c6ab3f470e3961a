"""The sum of squares, and the step from slow_grad to limit_rows: on the CPU, each in one pass through memory.

A C kernel gets arrays of addresses.

`cpu_kernel.c` is compiled when the package is installed, for several instruction sets. It takes tensors that lie in
memory without gaps, all of a kind: `memory.why_not` tells.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ..numbers import mesh_of
from . import foreach, memory, native
from .memory import DTYPES, Where, addresses, ends_of, has_no_gaps, plain, where
from .reference import Numbers, Tensors, limited_widths, written
from .rows import SHORT

_PROCESS = os.getpid()  # a later fork of it has none of OpenMP's threads, and would wait for them forever
_ALONE = 1 << 17  # elements for which another thread is not worth its start


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
    found = native.kernel()
    if isinstance(found, str) or len({x.dtype for x in tensors}) != 1 or not all(map(_can_be_summed, tensors)):
        return None
    ends, dtype, count = ends_of(tensors), DTYPES.index(tensors[0].dtype), len(tensors)
    (elements,) = struct.unpack("q", ends[-8:])
    sums = (ctypes.c_double * -(-elements // found.piece))()

    def squares(at: bytes) -> float:
        table = native.Table(count=count, ends=ends, grads=at, grad=dtype)
        return found.sum_of_squares(table, sums, *_threads(elements))

    return squares


def _can_be_summed(x: Tensor) -> bool:
    return type(x) is Tensor and x.is_cpu and x.dtype in DTYPES and has_no_gaps(x) and not x.is_neg()


def row_width(param: Tensor) -> int:
    """The elements of a row of a parameter that `why_not` has cleared, where `step` can limit its rows; otherwise 0."""
    found = native.kernel()
    return 0 if isinstance(found, str) else memory.row_width(param, found.row_bytes // param.itemsize)


def step(tensors: Tensors, numbers: Numbers) -> None:
    """Do slow_grad to limit_rows for every tensor, written in place.

    Args:
        tensors: cleared by `why_not` and `share_memory`.
    """
    found, n = native.kernel(), numbers
    if isinstance(found, str):
        raise RuntimeError(found)
    if n.finite is not None and not n.finite:
        if n.micro_step.of == 1:
            return
        tensors, n = tensors._replace(grads=list(map(torch.zeros_like, tensors.grads)), kept=None), n._replace(clip=1.0)
    at: Where = where(tensors) if tensors.kept is None else tensors.kept
    count, widths = len(tensors.params), limited_widths(tensors, n)
    (elements,) = struct.unpack("q", at.ends[-8:])
    table = native.Table(
        count=count,
        **at._asdict(),
        beta1=struct.pack(f"{count}d", *n.beta1),
        bias_beta1=struct.pack(f"{count}d", *n.bias_beta1),
        row_widths=memory.packed(widths) if any(widths) else None,
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
        micro_steps=n.micro_step.of,
        max_row_change=n.max_row_change,
        max_row_norm=n.max_row_norm,
        shortest=SHORT,
        decays=n.micro_step.decays,
        moves=n.micro_step.moves,
        param=DTYPES.index(tensors.params[0].dtype),
        grad=DTYPES.index(tensors.grads[0].dtype),
        state=DTYPES.index(tensors.exp_avgs[0].dtype),
    )
    for column in written(tensors, n.micro_step.moves):  # which torch's own operations do themselves
        torch.autograd.graph.increment_version(column)
        if mesh_of(column[0]) is not None:
            torch.autograd.graph.increment_version(plain(column))
    found.step(table, *_threads(elements))
