"""The stages norm, and slow_grad to limit_rows: the same mathematics in several files, with two functions each.

    sum_of_squares(tensors) -> 0-d float64 tensor
    step(Tensors, Numbers) -> None

A new implementation is one new file and a few lines in `choose`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..numbers import mesh_of
from . import blocks, cpu, foreach, gpu, memory, native, reference, rows
from .foreach import average
from .gpu_tables import Tables
from .reference import MicroStep, Numbers, Tensors

__all__ = [
    "BY_ADDRESS",
    "FUSED_ON",
    "Choice",
    "average",
    "MicroStep",
    "checked",
    "choose",
    "fastest_sum_of_squares",
    "is_fused_on",
    "memory_is_all",
    "rows",
    "steps",
    "sum_of_squares",
]


BY_ADDRESS = (cpu, blocks, gpu)  # those for which memory must not overlap


FUSED_ON = ["cpu", "cuda"]  # where there are implementations that do all in one pass


class Choice(NamedTuple):
    """An implementation, and why it is that one."""

    module: ModuleType
    reason: str


def choose(row: Sequence[Tensor], step: Tensor, options: dict[str, Any]) -> Choice:
    """The implementation for one parameter, under the options of its group.

    Autograd and torch.func's transforms pass through `reference` alone: its results are new tensors. foreach=False gets
    it too, a loop over tensors as in torch's optimizers: it needs the least memory. `foreach` takes every other tensor
    on every device; on a GPU and the CPU there are faster ones for what they can take.

    Args:
        row: the parameter, its gradient, m, v and, where there is one, μ; real.
        step: its step count.
    """
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, row)):
        return Choice(reference, "torch.func transforms it, and has no rules for lists")
    if asked := asked_for(options):
        return asked
    if gpu.is_for(row[0].device):
        reason = gpu.why_not(row, step)
        return Choice(foreach, reason) if reason else Choice(gpu, "one Triton launch for all tensors of a kind")
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


def asked_for(options: dict[str, Any]) -> Choice | None:
    """What the options themselves choose, unless torch.func transforms those; None where they leave it to be found."""
    if options["differentiable"]:
        return Choice(reference, "differentiable=True")
    if options["foreach"] is not None:
        return Choice(foreach if options["foreach"] else reference, f"foreach={options['foreach']}")
    return Choice(foreach, "fused=False") if options["fused"] is False else None


def is_fused_on(device: torch.device) -> bool:
    """Whether fused=True is for parameters there: AMD's GPUs are of type cuda, too."""
    return device.type in FUSED_ON


def checked(choice: Choice, *lists: Tensors) -> Choice:
    """The choice for what is done in one pass, once its tensors have been looked at together."""
    if choice.module in BY_ADDRESS and memory.share_memory(*lists):
        return Choice(foreach, "parameters, gradients or state share memory")
    return choice


def sum_of_squares(options: dict[str, Any], compiling: bool) -> Callable[[Sequence[Tensor]], Tensor]:
    """The function for a list of tensors on one device, as `choose` chooses, under the options of the optimizer."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return reference.sum_of_squares
    if asked := asked_for(options):
        function: Callable[[Sequence[Tensor]], Tensor] = asked.module.sum_of_squares
        return function
    if not memory_is_all(compiling):
        return foreach.sum_of_squares
    return fastest_sum_of_squares


def fastest_sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Σ g² of a list of tensors on one device, wherever that is."""
    if gpu.is_for(tensors[0].device) and gpu.can_sum(tensors):
        return gpu.sum_of_squares(tensors)
    plain = tensors[0].is_cpu and mesh_of(tensors[0]) is None
    return cpu.sum_of_squares(tensors) if plain else foreach.sum_of_squares(tensors)


def memory_is_all(compiling: bool) -> bool:
    """Whether a tensor is now what its memory says: nothing traces, transforms or fakes what is done with it."""
    return not (
        compiling
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def steps(calls: Sequence[tuple[ModuleType, Tensors, Numbers]], tables: Tables | None) -> None:
    """Let each implementation update its tensors for its tensors; those of a GPU together, as they share launches."""
    for implementation, tensors, numbers in calls:
        if implementation is not gpu:
            implementation.step(tensors, numbers)
    together = [(tensors, numbers) for implementation, tensors, numbers in calls if implementation is gpu]
    if together:
        gpu.steps(together, tables)
