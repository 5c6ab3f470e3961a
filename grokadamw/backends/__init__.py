"""The backends: several implementations of the stages norm and slow_grad to limit_rows, with the same mathematics.

A backend is two functions:

    sum_of_squares(tensors) -> 0-d float64 tensor
    step(Batch, Scalars) -> None

`decoded` has only `step`: gradients are never kept in fewer bits.

A new backend needs one new file and a few lines in `choose`. List it in `NO_SHARED_MEMORY` if its tensors must not
share memory. A backend that limits rows itself also has `row_width`; one that reads memory by address also has `keep`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..options import rules_of
from . import blocks, cpu, decoded, foreach, gpu, memory, native, reference
from .types import NOBODY, Addresses, Batch, Choice

__all__ = ["NO_SHARED_MEMORY", "FUSED_ON", "choose", "fastest_sum_of_squares"]
__all__ += ["has_limits", "keep", "row_width", "sum_of_squares"]

NO_SHARED_MEMORY = (cpu, blocks, gpu)  # backends whose tensors must not share memory
_LAUNCH = "one Triton launch for all tensors of a kind"
# device types with a backend that does everything in one pass; AMD's GPUs are of type cuda, too
FUSED_ON = ["cpu", "cuda"]


def choose(tensors: Sequence[Tensor], step: Tensor, options: dict[str, Any], coded: bool) -> Choice:
    """Return the backend for one parameter, under the options of its group.

    Only `reference` supports autograd and torch.func's transforms, because its results are new tensors. foreach=False
    chooses it, too: a loop over tensors, as in torch's optimizers, needs the least memory. `foreach` takes any other
    tensor on any device. GPUs and the CPU have faster backends for some tensors.

    Args:
        tensors: the parameter, its gradient, m, v and, if it has one, μ; plain and real.
        step: its step count.
        options: of its group.
        coded: True if the parameter or its state is kept in another form than a step computes with.
    """
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        return Choice(reference, "torch.func transforms it, and has no rules for lists")
    if asked := asked_for(options):
        return asked._replace(module=decoded) if coded else asked
    choice, reason = _by_address(tensors, step, options, coded)
    param = tensors[0]
    is_matrix_of_halves = param.itemsize == 2 and param.dim() > 1 and param.numel() > 0
    limits_rows = coded and is_matrix_of_halves and has_limits(options)  # rows.py cannot handle low bits
    if limits_rows and reason is None and not row_width(choice, param, True):
        reason = "rows longer than those that the kernel limits"
    if reason is None:
        return choice
    return Choice(decoded, f"float32 copies, as {reason}") if coded else Choice(foreach, reason)


def has_limits(options: dict[str, Any]) -> bool:
    """Return True if these options of a group limit rows."""
    return bool(options["max_row_norm"] or options["max_row_change"])


def _by_address(
    tensors: Sequence[Tensor], step: Tensor, options: dict[str, Any], coded: bool
) -> tuple[Choice, str | None]:
    """Return this device's backend that takes addresses, and why it cannot take the parameter (None if it can)."""
    device = tensors[0].device
    if gpu.is_for(device):
        return Choice(gpu, _LAUNCH), gpu.why_not(tensors, step, coded)
    if not tensors[0].is_cpu:
        return NOBODY, f"{'there is no kernel for ' if coded else ''}parameters on {device}"
    reason, kernel = memory.why_not(tensors, step, coded), native.kernel()
    if not isinstance(kernel, str):
        return Choice(cpu, f"the native kernel, compiled for {kernel.instruction_set}"), reason
    if reason or coded:
        return NOBODY, reason or kernel
    reason = blocks.why_not(tensors, options["second_moment"] == "raw", rules_of(options).eps_before_correction)
    return Choice(blocks, kernel), reason and f"{kernel}, and {reason}"


def asked_for(options: dict[str, Any]) -> Choice | None:
    """Return the backend that the options ask for, or None if they leave the choice open."""
    if options["differentiable"]:
        return Choice(reference, "differentiable=True")
    if options["foreach"] is not None:
        return Choice(foreach if options["foreach"] else reference, f"foreach={options['foreach']}")
    return Choice(foreach, "fused=False") if options["fused"] is False else None


def row_width(choice: Choice, param: Tensor, coded: bool) -> int:
    """Return the elements in a row of the parameter if the chosen backend limits its rows; otherwise 0."""
    limits = getattr(choice.module, "row_width", None)
    return 0 if limits is None else limits(param, coded)


def keep(batch: Batch) -> Addresses | None:
    """Return the addresses that a batch's backend can reuse until a parameter or state moves; None if it takes none."""
    kept: Callable[[Batch], Addresses] | None = getattr(batch.choice.module, "keep", None)
    return None if kept is None else kept(batch)


def sum_of_squares(options: dict[str, Any], compiling: bool) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return the function that sums squares of tensors on one device, chosen by the options as in `choose`."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return reference.sum_of_squares
    if asked := asked_for(options):
        function: Callable[[Sequence[Tensor]], Tensor] = asked.module.sum_of_squares
        return function
    if not memory.memory_is_all(compiling):
        return foreach.sum_of_squares
    return fastest_sum_of_squares


def fastest_sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ g² of a list of tensors on one device, by the fastest backend for it."""
    if gpu.can_sum(tensors):
        return gpu.sum_of_squares(tensors)
    return cpu.sum_of_squares(tensors) if tensors[0].is_cpu else foreach.sum_of_squares(tensors)
