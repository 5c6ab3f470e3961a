"""Rows 2 and 6 to 10 of the step on the CPU, in one pass through memory, and row 11 in another.

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
from torch import Tensor, nn

from ..numbers import as_real, mesh_of
from . import foreach, native
from .memory import DTYPES, Where, addresses, ends_of, has_no_gaps, plain, where
from .reference import Numbers, Tensors, written

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


def can_limit(param: Tensor) -> bool:
    """Whether the kernel can limit the rows of a parameter, which has some: they lie one after the other."""
    if type(param) not in (Tensor, nn.Parameter) or not param.is_cpu or param.is_neg() or param.is_conj():
        return False
    rows = max(param.shape[0], 1)
    return (
        (as_real(param) if param.is_complex() else param).dtype in DTYPES
        and has_no_gaps(param)
        and (rows == 1 or param.stride(0) == param.numel() // rows)
        and not isinstance(native.kernel(), str)
    )


def limit(params: Sequence[Tensor], before: Sequence[Tensor], change: float, shortest: float, norm: float) -> None:
    """Row 11 for tensors of one dtype that `can_limit` has cleared, and that share no memory; see `rows.limit`."""
    found = native.kernel()
    if isinstance(found, str):
        raise RuntimeError(found)
    real, count = list(map(as_real, params)), len(params)
    rows = [x.shape[0] for x in real]
    table = native.Limits(
        count=count,
        rows=struct.pack(f"{count}q", *rows),
        widths=struct.pack(f"{count}q", *(x.numel() // max(n, 1) for x, n in zip(real, rows, strict=True))),
        params=addresses(real),
        before=addresses(list(map(as_real, before))) if before else None,
        change=change,
        shortest=shortest,
        norm=norm,
        param=DTYPES.index(real[0].dtype),
    )
    torch.autograd.graph.increment_version(params)
    found.limit(table, (ctypes.c_int64 * count)(), *_threads(sum(map(Tensor.numel, real))))


def _can_be_summed(x: Tensor) -> bool:
    return type(x) is Tensor and x.is_cpu and x.dtype in DTYPES and has_no_gaps(x) and not x.is_neg()


def step(tensors: Tensors, numbers: Numbers) -> None:
    """Rows 6 to 10 for every tensor, written in place; of tensors that `why_not` and `share_memory` have cleared."""
    found, n = native.kernel(), numbers
    if isinstance(found, str):
        raise RuntimeError(found)
    if n.finite is not None and not n.finite:
        if n.micro_step.of == 1:
            return
        tensors, n = tensors._replace(grads=list(map(torch.zeros_like, tensors.grads)), kept=None), n._replace(clip=1.0)
    at: Where = where(tensors) if tensors.kept is None else tensors.kept
    count = len(tensors.params)
    (elements,) = struct.unpack("q", at.ends[-8:])
    table = native.Table(
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
        micro_steps=n.micro_step.of,
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
