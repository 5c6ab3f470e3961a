"""The step's rows 2 and 6 to 10: the same mathematics in several files, each with the same two functions.

    sum_of_squares(tensors) -> 0-d float64 tensor
    step(Tensors, Numbers) -> None

A new implementation is one new file and one line in `choose`.
"""

from __future__ import annotations

from types import ModuleType

from . import foreach, reference

__all__ = ["choose"]


def choose(differentiable: bool, use_foreach: bool | None) -> ModuleType:
    """The implementation to run.

    Autograd passes through `reference` alone: its results are new tensors. Otherwise `foreach` serves every device, and
    foreach=False gets the loop over tensors, as with torch's optimizers: it needs the least memory.
    """
    return reference if differentiable or use_foreach is False else foreach
