"""The native CPU backend: the sum of squares, and slow_grad to limit_rows, each in one pass through memory.

It passes arrays of addresses to a C kernel, `cpu_kernel.c`, which is compiled for several instruction sets when the
package is installed. A call takes tensors of one kind without gaps in memory; `memory.why_not` checks them.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..state.formats import BLOCK, has_no_gaps, key_of, width_of
from . import foreach, memory, native
from .memory import DTYPES, addresses, ends_of, where
from .rows import SHORT
from .types import Addresses, Batch, Coded, Scalars, limited_widths, written

_PROCESS = os.getpid()  # a process forked later lacks OpenMP's threads, and would wait for them forever
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 2}  # as `enum format` in cpu_kernel.c
_ALONE = 1 << 17  # elements; up to this many, it is not worth starting another thread


def _threads(elements: int) -> tuple[int, int | None]:
    """Return how many threads to use, and the function that runs them (None: the kernel starts its own threads)."""
    threads = torch.get_num_threads() if elements > _ALONE else 1
    return threads, _openmp() if os.getpid() == _PROCESS else None


@cache
def _openmp() -> int | None:
    """Return the address of GOMP_parallel if torch has loaded an OpenMP with that function, otherwise None."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):
        return None


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ g² over all elements of CPU tensors, squared and summed in float64, in fixed order, as a 0-d tensor.

    `foreach` sums the tensors that the kernel cannot take.
    """
    lists: dict[torch.dtype | None, list[Tensor]] = {}
    for x in tensors:
        lists.setdefault(x.dtype if _can_be_summed(x) else None, []).append(x)
    total = 0.0
    for group in lists.values():
        squares = squares_by_address(group)
        total += foreach.sum_of_squares(group).item() if squares is None else squares(addresses(group))
    return torch.tensor(total, dtype=torch.float64, device="cpu")


def squares_by_address(tensors: Sequence[Tensor]) -> Callable[[bytes], float] | None:
    """Return a function from the tensors' addresses to their Σ g², or None if one kernel call cannot sum them."""
    kernel = native.kernel()
    if isinstance(kernel, str) or len({x.dtype for x in tensors}) != 1 or not all(map(_can_be_summed, tensors)):
        return None
    ends, dtype, count = ends_of(tensors), DTYPES.index(tensors[0].dtype), len(tensors)
    (elements,) = struct.unpack("q", ends[-8:])
    sums = (ctypes.c_double * -(-elements // kernel.piece))()
    table = native.Table(count=count, ends=ends, grad=dtype)

    def squares(at: bytes) -> float:
        table.grads = at
        return kernel.sum_of_squares(table, sums, *_threads(elements))

    return squares


def _can_be_summed(x: Tensor) -> bool:
    return type(x) is Tensor and x.is_cpu and x.dtype in DTYPES and has_no_gaps(x)


def row_width(param: Tensor, coded: bool) -> int:
    """Return the elements in a row of a parameter that `why_not` has cleared; 0 if `step` cannot limit its rows."""
    found = native.kernel()
    return 0 if isinstance(found, str) else memory.row_width(param, found.row_bytes // (4 if coded else param.itemsize))


# the table's numbers that may change from step to step, of which `beta2` is the first
_SCALARS, _FIRST = struct.Struct("=11dq4i"), native.Table.beta2.offset


def keep(batch: Batch) -> Addresses:
    """Return the addresses of a batch, with the kernel's table: it can be reused until a parameter or state moves."""
    at = where(batch)
    count, (elements,) = len(batch.params), struct.unpack("q", at.ends[-8:])
    columns = dict(zip(at._fields[:7], at, strict=False))
    kept = torch.float32 if batch.coded is not None else batch.exp_avgs[0].dtype
    param, grad, state = map(DTYPES.index, (batch.params[0].dtype, batch.grads[0].dtype, kept))
    table = native.Table(count=count, **columns, param=param, grad=grad, state=state)
    table.elements, table.betas, table.limits = elements, (), False  # only Python reads these
    if batch.coded is not None:
        _add_codes(table, batch, batch.coded)
    return at._replace(table=table)


def _add_codes(table: Any, batch: Batch, coded: Coded) -> None:
    """Add to the table how state and parameters are coded."""
    table.coded, table.rounds, table.low_bits = 1, coded.rounds, 8 * coded.lows[0].itemsize if coded.lows else 0
    for i, (column, scales) in enumerate(zip(batch[2:5], coded[:3], strict=True)):
        table.formats[i] = _FORMATS[column[0].dtype] if column else 0
        table.scales[i] = addresses(scales) if scales else None
    table.lows = addresses(coded.lows) if coded.lows else None
    odd = [width_of(param) if param.dim() > 1 and width_of(param) % BLOCK else 0 for param in batch.params]
    before = [blocks % 2**32 for blocks in coded.blocks_before]
    table.firsts = struct.pack(f"{len(odd)}I", *before) if before else None
    table.widths, table.keys = memory.packed(odd), struct.pack(f"{len(odd)}I", *map(key_of, batch.indices))


def step(batch: Batch, n: Scalars) -> None:
    """Do slow_grad to limit_rows in place, for tensors that `why_not` and `share_memory` have cleared."""
    kernel = native.kernel()
    if isinstance(kernel, str):
        raise RuntimeError(kernel)
    if n.finite is not None and not n.finite:
        if n.micro_step.k == 1:
            return
        batch, n = batch._replace(grads=list(map(torch.zeros_like, batch.grads)), addresses=None), n._replace(clip=1.0)
    at = keep(batch) if batch.addresses is None else batch.addresses
    table, (k, decays, moves, _) = at.table, n.micro_step
    table.grads = at.grads
    if table.betas != (n.beta1, n.bias_beta1):
        packer = struct.Struct(f"{len(batch.params)}d")
        table.beta1, table.bias_beta1 = packer.pack(*n.beta1), packer.pack(*n.bias_beta1)
        table.betas = n.beta1, n.bias_beta1
    if n.limits_rows != table.limits:
        widths = limited_widths(batch, n)
        table.row_widths, table.limits = memory.packed(widths) if any(widths) else None, n.limits_rows
    clip = -float(n.clip) if n.maximize else float(n.clip)
    _SCALARS.pack_into(
        *(table, _FIRST, n.beta2, n.lr, n.eps, n.weight_decay, n.alpha, n.lamb, clip, k),
        *(n.max_row_change, n.max_row_norm, SHORT, n.amplify_after),
        *(n.eps_before_correction, n.raw_second_moment, decays, moves),
    )
    if batch.coded is not None:
        table.nth = n.micro_step.nth
    # torch's own operations do this themselves
    torch.autograd.graph.increment_version(chain.from_iterable(written(batch, moves)))
    if kernel.step(table, *_threads(table.elements)):
        raise MemoryError("not enough memory for copies of the rows that are limited: this batch was not written")
