"""The stages norm, clip, and slow_grad to limit_rows on a GPU, each in one launch for any number of tensors.

The kernels of gpu_kernels.py find tensors and numbers in tables on the device. A table is sent there only when its
content has changed, from pinned memory and without waiting, so a step with the addresses and numbers of the step before
sends nothing. Kernels read numbers that only the device knows (a loss scale, an α computed there) by their addresses.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..state.formats import has_no_gaps
from . import memory
from .gpu_tables import (
    JUDGE_BLOCK,
    JUDGE_THREADS,
    LONGEST,
    Call,
    Kind,
    Tables,
    Verdict,
    and_odd,
    codes_of,
    misaligned,
    words_of,
)
from .memory import DTYPES, addresses, where
from .types import Addresses, Batch, Calls, Coded, Scalars, written

_DEVICE_TYPE = "cuda"  # AMD's GPUs, too


@cache
def kernels() -> Any:
    """Return the module of the kernels, or a sentence that says why there is none."""
    try:
        import triton

        from . import gpu_kernels
    except Exception as error:  # an incompatible Triton may raise anything
        return f"Triton cannot be imported: {error}"
    if str(triton.__version__).startswith(("2.", "3.0.", "3.1.", "3.2.")):
        return f"the kernels need Triton 3.3 or newer, which comes with torch 2.7, and this is {triton.__version__}"
    return gpu_kernels


@cache
def _why_not_here(device: torch.device) -> str | None:
    """Return why the kernels cannot run on this device, or None if they can."""
    module = kernels()
    if isinstance(module, str):
        return module
    interpreted = type(module.update).__name__ == "InterpretedFunction"
    if interpreted != (device.type == "cpu"):
        return "TRITON_INTERPRET is set, and Triton's interpreter runs only on the CPU"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (7, 5):
        return f"Triton has no code for {torch.cuda.get_device_name(device)}"
    return _why_not_tried(device, torch.float32)


@cache
def _why_not_for_codes(device: torch.device) -> str | None:
    """Return why the kernel for tensors kept in fewer bits cannot run on this device, or None if it can."""
    return _why_not_here(device) or _why_not_tried(device, torch.bfloat16)


def _why_not_tried(device: torch.device, state: torch.dtype) -> str | None:
    """Try a step of one number with a state of that dtype. Return why it fails, or None if it works."""
    numbers = Scalars([0.0], [0.0], 0.0, 0.0, 1.0, False, 0.0, 0.0, 0.0, 0, 1.0, False, False, None)
    try:
        theta, g, count = ([torch.zeros((), dtype=torch.float32, device=device)] for _ in range(3))
        m, v, mu = ([torch.zeros((), dtype=state, device=device)] for _ in range(3))
        coded = None if state == torch.float32 else Coded(None, None, None, None, False)
        for _ in range(2):  # the second launch takes another path: see `_launch`
            sum_of_squares(g)
            step(Batch(theta, g, m, v, mu, count, indices=(0,), coded=coded), numbers)
    except torch.OutOfMemoryError:
        raise  # a shortage of memory is temporary
    except Exception as error:  # Triton compiles its launcher, and there may be no C compiler
        return f"Triton does not work here: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return None


def is_for(device: torch.device) -> bool:
    """Return True if this backend is for tensors on this device. `why_not` says if it can take them."""
    return device.type == _DEVICE_TYPE


def why_not(tensors: Sequence[Tensor], step: Tensor, coded: bool) -> str | None:
    """Return why the kernels cannot take a parameter on a device of `is_for`, or None; see `memory.why_not`."""
    device = tensors[0].device
    reason = memory.why_not(tensors, step, coded)  # comes first: a fake tensor may have no device
    reason = reason or (_why_not_for_codes if coded else _why_not_here)(device)
    if reason is None and any(x.dtype == torch.bfloat16 for x in tensors) and not _has_bfloat16(device):
        return f"{torch.cuda.get_device_name(device)} has no bfloat16"
    return reason


@cache
def _has_bfloat16(device: torch.device) -> bool:
    return device.type == "cpu" or bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def streams(devices: Sequence[torch.device]) -> tuple[int, ...]:
    """Return the current stream of each GPU. Memory of one stream must not pass to another unnoticed."""
    return tuple(torch._C._cuda_getCurrentRawStream(device.index) for device in devices if device.type == "cuda")


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which Triton launches on this device."""
    is_here = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if is_here else torch.cuda.device(device)


def _triton(value: Any) -> Any:
    """Return Triton's dtype for a torch dtype; any other constant as it is."""
    return getattr(kernels().tl, str(value).removeprefix("torch.")) if isinstance(value, torch.dtype) else value


@cache
def _runtime() -> tuple[Any, Any] | None:
    """Return Triton's driver and hooks, or None for a version whose compiled kernels `_launch` cannot start."""
    import triton

    if not str(triton.__version__).startswith(("3.6.", "3.7.")):
        return None
    from triton import knobs
    from triton.runtime import driver

    return driver, knobs.runtime


_compiled: dict[Any, tuple[Any, Any]] = {}  # the kernel whose id is in the key, and its compiled form


def _launch(
    name: str,
    programs: int,
    device: torch.device,
    tensors: Sequence[Tensor],
    *counts: int,
    warps: int,
    **constants: Any,
) -> None:
    """Launch a kernel. Its arguments are pointers, then counts, then the constants in the order of its signature.

    Triton takes longer to look up a compiled kernel than to launch it. So compiled kernels are kept here, by everything
    that Triton specialises on: the constants, which include the tensors' dtypes, and the tensors' alignment. Counts are
    small and not specialised on. If a profiler has set hooks, Triton launches the kernel and calls the hooks.
    Multiplications and additions are not fused: else an element's bits would depend on the body that processes it.
    """
    kernel, at = getattr(kernels(), name), [x.data_ptr() for x in tensors]
    key = (id(kernel), device, warps, *constants.values(), *[address % 16 for address in at])
    made, runtime = _compiled.get(key, (None, None))[1], _runtime()
    with _on(device):
        if made is None or runtime is None:
            given = {constant: _triton(value) for constant, value in constants.items()}
            made = kernel[programs,](*tensors, *counts, **given, num_warps=warps, enable_fp_fusion=False)
            if made is not None and runtime is not None:  # the interpreter returns None
                _compiled[key] = kernel, made
            return
        driver, hooks = runtime
        before, after = hooks.launch_enter_hook, hooks.launch_exit_hook
        if getattr(before, "calls", before) or getattr(after, "calls", after):
            made[programs, 1, 1](*at, *counts, *constants.values())
            return
        stream, about = driver.active.get_current_stream(device.index), (made.function, made.packed_metadata)
        made.run(programs, 1, 1, stream, *about, None, None, None, *at, *counts, *constants.values())


# norm and clip


def can_sum(grads: Sequence[Tensor]) -> bool:
    """Return True if `sum_of_squares` and `judge` can take these gradients."""
    device = grads[0].device
    return (
        is_for(device)
        and type(grads[0]) is Tensor
        and _why_not_here(device) is None
        and all(
            type(x) is Tensor
            and x.device == device
            and x.dtype in DTYPES
            and has_no_gaps(x)
            and (x.dtype != torch.bfloat16 or _has_bfloat16(device))
            for x in grads
        )
    )


def _sums(grads: Sequence[Tensor], at: bytes, tables: Tables) -> Tensor:
    """Return Σ g² of each chunk."""
    device, (sums, found) = grads[0].device, tables.squares(grads)
    first = 0
    for dtype, places, static in found:
        here = at if len(found) == 1 else b"".join(at[8 * i : 8 * i + 8] for i in places)
        shape, count = static.shape, static.chunks.numel()
        if count:
            _launch(
                "squares",
                count,
                device,
                (static.chunks, static.table, tables.words(here, device), sums),
                first,
                GRAD=dtype,
                TAIL=static.tail or tables.masked or misaligned(here),
                CHUNK=shape.chunk,
                BLOCK=shape.block,
                warps=shape.warps,
            )
        first += count
    return sums


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ g² over all elements of tensors that `can_sum` has cleared, squared and summed in float64, as 0-d."""
    return _sums(tensors, addresses(tensors), Tables()).sum()


def judge(
    grads: Sequence[Tensor],
    limits: Sequence[float],
    scale: Tensor | None,
    found_inf: Tensor | None,
    skipped: Tensor | None,
    *,
    needs_norm: bool,
    at: bytes | None = None,
    tables: Tables | None = None,
) -> Verdict:
    """Compute the norm and the clip coefficients, and decide if the step may be written, in two launches.

    Args:
        grads: gradients that `can_sum` has cleared.
        limits: the largest norm for each batch; 0 for no limit.
        scale, found_inf: GradScaler's, float32 and of one element, on the gradients' device.
        skipped: 0-d int64, incremented if a norm that is not finite forbids the step; None if such a norm does not.
        needs_norm: True if the norm is needed. Else gradients are not read, and the returned norm is meaningless.
        at: the gradients' addresses.
        tables: the tables for these gradients.
    """
    device = grads[0].device
    tables = Tables() if tables is None else tables
    sums = _sums(grads, addresses(grads) if at is None else at, tables) if needs_norm else None
    verdict = tables.verdict(device, len(limits))
    unused = verdict.numbers
    _launch(
        "judge",
        1,
        device,
        (
            unused if sums is None else sums,
            tables.words(struct.pack(f"{len(limits)}d", *limits), device),
            unused if scale is None else scale,
            unused if found_inf is None else found_inf,
            verdict.numbers,
            verdict.finite,
            unused if skipped is None else skipped,
        ),
        0 if sums is None else sums.numel(),
        len(limits),
        HAS_SCALE=scale is not None,
        HAS_FOUND=found_inf is not None,
        SKIPS=skipped is not None,
        BATCHES=1 << (len(limits) - 1).bit_length(),
        BLOCK=JUDGE_BLOCK,
        warps=JUDGE_THREADS // (64 if torch.version.hip else 32),
    )
    return verdict


# slow_grad to limit_rows


def row_width(param: Tensor, coded: bool) -> int:
    """Return the elements in a row of a parameter that `why_not` has cleared; 0 if `step` cannot limit its rows."""
    return memory.row_width(param, LONGEST)


def keep(batch: Batch) -> Addresses:
    """Return the addresses of a batch, with the data that a launch needs about tensors kept in fewer bits."""
    at = where(batch)
    return at if batch.coded is None else at._replace(table=codes_of(batch, batch.coded))


def step(batch: Batch, scalars: Scalars) -> None:
    """Do the stages slow_grad to limit_rows in place, for tensors that `why_not` and `share_memory` have cleared."""
    steps([(batch, scalars)])


def steps(calls: Calls, tables: Tables | None = None) -> None:
    """Do `step` for several batches, with one launch for all batches of one kind."""
    tables = Tables() if tables is None else tables
    kinds: dict[Kind, list[Call]] = {}
    for batch, scalars in calls:
        at = keep(batch) if batch.addresses is None else batch.addresses
        kind = Kind(
            batch.params[0].device,
            batch.params[0].dtype,
            batch.grads[0].dtype,
            batch.exp_avgs[0].dtype,
            batch.grok_emas is not None,
            scalars.raw_second_moment,
            scalars.eps_before_correction,
            scalars.finite is not None,
            scalars.micro_step.k > 1,
            scalars.micro_step.moves,
            at.table and at.table.kind,
        )
        kinds.setdefault(kind, []).append(Call(batch, scalars, at))
    by_device: dict[torch.device, list[Call]] = {}
    for kind, of_kind in kinds.items():
        by_device.setdefault(kind.device, []).extend(of_kind)
    counts = [(_step_counts(on_device, tables), on_device[0].scalars) for on_device in by_device.values()]
    for kind, of_kind in kinds.items():
        _update(kind, of_kind, tables)
    for vectors, scalars in counts:  # after all kernels have read the counts
        if scalars.micro_step.moves:
            _advance(vectors, scalars.writable())


def _update(kind: Kind, calls: list[Call], tables: Tables) -> None:
    """Launch the kernel for all tensors of one kind."""
    device = kind.device
    static = tables.static(kind, calls)
    limits = [x.scalars for x in calls] if static.of_rows else []
    shape, finite = static.shape, calls[0].scalars.finite
    grads = b"".join([x.at.grads for x in calls])
    may_be_misaligned = tables.masked or misaligned(grads)
    # without the counts: torch's own operation advances them, and does this itself
    columns = [column for x in calls for column in written(x.batch, kind.moves) if column is not x.batch.steps]
    torch.autograd.graph.increment_version(chain.from_iterable(columns))
    programs = static.chunks.numel()
    if not programs:
        return
    words = b"".join([words_of(x.scalars) for x in calls])
    formats = {"STATE": kind.state}
    if kind.coded is not None:
        m, v, mu, low_bits, rounds = kind.coded
        formats = {"M": m, "V": v, "MU": mu, "LOW": low_bits, "ROUNDS": rounds}
    _launch(
        "update" if kind.coded is None else "update_coded",
        programs,
        device,
        (
            static.chunks,
            static.table,
            tables.words(grads, device),
            tables.words(words, device),
            static.chunks if finite is None else finite,
        ),
        len(grads) // 8,
        PARAM=kind.param,
        GRAD=kind.grad,
        **formats,
        HAS_MU=kind.has_mu,
        RAW=kind.raw,
        EPS_FIRST=kind.eps_first,
        HAS_FINITE=kind.has_finite,
        IS_PART=kind.is_part,
        MOVES=kind.moves,
        TAIL=static.tail or may_be_misaligned,
        HAS_CHANGE=any(n.limits_change for n in limits),
        HAS_NORM=any(n.max_row_norm for n in limits),
        OF_ROWS=and_odd(static.of_rows) if may_be_misaligned else static.of_rows,
        CHUNK=shape.chunk,
        BLOCK=shape.block,
        # more warps, as a row waits for its sums; but threads that decode need more registers
        warps=shape.warps * (2 if limits and kind.coded is None else 1),
    )


def _step_counts(calls: list[Call], tables: Tables) -> list[Tensor]:
    """Return the step counts, as one vector if they are adjacent in memory, as state/slots.py makes them."""
    counts = list(chain.from_iterable([x.batch.steps for x in calls]))
    return tables.vectors(counts, b"".join([x.at.steps for x in calls]))


def _advance(counts: list[Tensor], writable: Tensor | None) -> None:
    """Advance the step counts, unless the step was not written."""
    if len(counts) == 1:
        counts[0].add_(1 if writable is None else writable)
    elif writable is None:
        torch._foreach_add_(counts, 1)
    else:
        torch._foreach_add_(counts, writable.to(torch.float32))
