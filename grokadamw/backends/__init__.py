"""The backends: the stages norm, and slow_grad to limit_rows, the same mathematics in several files.

    sum_of_squares(tensors) -> 0-d float64 tensor
    step(Batch, Scalars) -> None

A new backend is one new file and a few lines in `choose`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import blocks, cpu, decoded, foreach, gpu, memory, native, reference, rows
from .types import Batch, Choice, MicroStep, Scalars

__all__ = ["BY_ADDRESS", "FUSED_ON", "LIMITS_ROWS", "Batch", "Choice", "MicroStep", "Scalars", "choose"]
__all__ += ["fastest_sum_of_squares", "is_fused_on", "keep", "row_width", "rows", "sum_of_squares"]

BY_ADDRESS = (cpu, blocks, gpu)  # those for which memory must not overlap
LIMITS_ROWS = (cpu, gpu, decoded)  # those that limit rows themselves
_LAUNCH = "one Triton launch for all tensors of a kind"
FUSED_ON = ["cpu", "cuda"]  # where there are backends that do all in one pass


def choose(row: Sequence[Tensor], step: Tensor, options: dict[str, Any], coded: bool = False) -> Choice:
    """Return the backend for one parameter, under the options of its group.

    Autograd and torch.func's transforms pass through `reference` alone: its results are new tensors. foreach=False gets
    it too, a loop over tensors as in torch's optimizers: it needs the least memory. `foreach` takes every other tensor
    on every device; on a GPU and the CPU there are faster ones for what they can take.

    Args:
        row: the parameter, its gradient, m, v and, where there is one, μ; plain and real.
        step: its step count.
        options: of its group.
        coded: whether its state is not kept as the numbers that a step computes with, or the parameter itself is not.
    """
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, row)):
        return Choice(reference, "torch.func transforms it, and has no rules for lists")
    if asked := asked_for(options):
        return asked._replace(module=decoded) if coded else asked
    if coded:
        return _chosen_for_codes(row, step)
    if gpu.is_for(row[0].device):
        reason = gpu.why_not(row, step)
        return Choice(foreach, reason) if reason else Choice(gpu, _LAUNCH)
    if not row[0].is_cpu:
        return Choice(foreach, f"parameters on {row[0].device}")
    if reason := memory.why_not(row, step):
        return Choice(foreach, reason)
    kernel = native.kernel()
    if not isinstance(kernel, str):
        return Choice(cpu, f"the native kernel, compiled for {kernel.instruction_set}")
    if reason := blocks.why_not(row, options["second_moment"] == "raw", options["compat"] is not None):
        return Choice(foreach, f"{kernel}, and {reason}")
    return Choice(blocks, kernel)


def _chosen_for_codes(row: Sequence[Tensor], step: Tensor) -> Choice:
    """Return the backend for a parameter that is kept in fewer bits, or whose state is."""
    reason: str | None
    if gpu.is_for(row[0].device):
        choice, reason = Choice(gpu, _LAUNCH), gpu.why_not(row, step, True)
    elif not row[0].is_cpu:
        return Choice(decoded, f"float32 copies, as there is no kernel for parameters on {row[0].device}")
    else:
        kernel = native.kernel()
        instructions = "" if isinstance(kernel, str) else kernel.instruction_set
        choice = Choice(cpu, f"the native kernel, compiled for {instructions}")
        reason = memory.why_not(row, step, True) or (kernel if isinstance(kernel, str) else None)
    is_matrix_of_halves = row[0].itemsize == 2 and row[0].dim() > 1 and row[0].numel() > 0
    if reason is None and is_matrix_of_halves and not row_width(choice, row[0], True):
        reason = "rows longer than those that the kernel limits"  # rows.py does not know of low bits
    return choice if reason is None else Choice(decoded, f"float32 copies, as {reason}")


def asked_for(options: dict[str, Any]) -> Choice | None:
    """Return the backend that the options themselves choose; None where they leave it to be found."""
    if options["differentiable"]:
        return Choice(reference, "differentiable=True")
    if options["foreach"] is not None:
        return Choice(foreach if options["foreach"] else reference, f"foreach={options['foreach']}")
    return Choice(foreach, "fused=False") if options["fused"] is False else None


def is_fused_on(device: torch.device) -> bool:
    """Return True if fused=True is for parameters there: AMD's GPUs are of type cuda, too."""
    return device.type in FUSED_ON


def row_width(choice: Choice, param: Tensor, coded: bool = False) -> int:
    """Return the elements of a row of a parameter, where that backend limits its rows; otherwise 0."""
    width: int = choice.module.row_width(param, coded) if choice.module in LIMITS_ROWS else 0
    return width


def keep(batch: Batch) -> Batch:
    """Return the batch with what its backend can use again for as long as no tensor moves."""
    if batch.choice.module not in (cpu, gpu):
        return batch
    return batch._replace(addresses=batch.choice.module.keep(batch))


def sum_of_squares(options: dict[str, Any], compiling: bool) -> Callable[[Sequence[Tensor]], Tensor]:
    """Return the function for a list of tensors on one device, as `choose` chooses under the optimizer's options."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return reference.sum_of_squares
    if asked := asked_for(options):
        function: Callable[[Sequence[Tensor]], Tensor] = asked.module.sum_of_squares
        return function
    if not memory.memory_is_all(compiling):
        return foreach.sum_of_squares
    return fastest_sum_of_squares


def fastest_sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ g² of a list of tensors on one device, wherever that is."""
    if gpu.is_for(tensors[0].device) and gpu.can_sum(tensors):
        return gpu.sum_of_squares(tensors)
    return cpu.sum_of_squares(tensors) if tensors[0].is_cpu else foreach.sum_of_squares(tensors)
