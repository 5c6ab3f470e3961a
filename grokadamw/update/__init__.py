"""The step's rows 2 and 6 to 10: the same mathematics in several files, each with the same two functions.

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
from . import blocks, cpu, foreach, memory, native, reference
from .reference import Tensors

__all__ = ["Choice", "checked", "choose", "fastest_sum_of_squares", "memory_is_all", "sum_of_squares"]


class Choice(NamedTuple):
    """An implementation, and why it is that one."""

    module: ModuleType
    reason: str


def choose(row: Sequence[Tensor], step: Tensor, options: dict[str, Any]) -> Choice:
    """The implementation for one parameter, under the options of its group.

    Autograd and torch.func's transforms pass through `reference` alone: its results are new tensors. foreach=False gets
    it too, a loop over tensors as in torch's optimizers: it needs the least memory. `foreach` takes every other tensor
    on every device; on the CPU there are faster ones for what they can take.

    Args:
        row: the parameter, its gradient, m, v and, where there is one, μ; real.
        step: its step count.
    """
    if options["differentiable"]:
        return Choice(reference, "differentiable=True")
    if options["foreach"] is not None:
        return Choice(foreach if options["foreach"] else reference, f"foreach={options['foreach']}")
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, row)):
        return Choice(reference, "torch.func transforms it, and has no rules for lists")
    if options["fused"] is False:
        return Choice(foreach, "fused=False")
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


def checked(choice: Choice, tensors: Tensors) -> Choice:
    """The choice for a list, once its tensors have been looked at together."""
    if choice.module in (cpu, blocks) and memory.share_memory(tensors):
        return Choice(foreach, "parameters, gradients or state share memory")
    return choice


def sum_of_squares(options: dict[str, Any], compiling: bool) -> Callable[[Sequence[Tensor]], Tensor]:
    """The function for a list of tensors on one device, as `choose` chooses, under the options of the optimizer."""
    if options["differentiable"] or options["foreach"] is False:
        return reference.sum_of_squares
    if options["foreach"] or options["fused"] is False or not memory_is_all(compiling):
        return foreach.sum_of_squares
    return fastest_sum_of_squares


def fastest_sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Σ g² of a list of tensors on one device, wherever that is: the kernel's on the CPU."""
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
