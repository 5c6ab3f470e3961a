"""A number that a step uses: Python's own, or a tensor where reading it would make the host wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from .distributed import whole

# A Python float, or a 0-d tensor on the parameters' device where reading it back would make the host wait.
Number: TypeAlias = float | Tensor
_N = TypeVar("_N", Number, Number | None)


def reads_are_free(device: torch.device) -> bool:
    """Return True if a number on this device is there, and can be read without waiting for queued work."""
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)  # FakeTensorMode, which has no numbers
    return device.type == "cpu" and fake is None


def accumulator(device: torch.device) -> torch.dtype:
    """Return the dtype that squares are summed in, and numbers kept in: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that averages and sums are kept in, so that small changes do not vanish: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as two real numbers an element, sharing memory; any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def as_number(value: Any, name: str = "the value") -> Number:
    """Return a user's number as a float, or as a detached 0-d copy where reading it would make the host wait.

    Raises:
        TypeError: it is not one number.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"{name} is a tensor of shape {tuple(value.shape)}, not one number")
        value = whole(value.detach()).reshape(())
        return float(value) if reads_are_free(value.device) else value.to(accumulator(value.device), copy=True)
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name}={value!r} is not one number")
    return float(value)


def as_share(value: Any, name: str) -> Number:
    """Return a user's accuracy, as `as_number` does. A tensor that is not read is not checked.

    Raises:
        TypeError, ValueError: it is not one number, or not in [0, 1].
    """
    share = as_number(value, name)
    if isinstance(share, Tensor):
        return share
    if not -1e-6 <= share <= 1 + 1e-6:  # a mean of rounded numbers may be a little more than 1
        raise ValueError(f"{name}={value!r} is not an accuracy: give a share of right answers, in [0, 1]")
    return min(max(share, 0.0), 1.0)


def product(a: Number, b: Number) -> Number:
    """a · b, on a's device, and at no cost where b is 1."""
    if isinstance(b, Tensor):
        return a * (b.to(a.device, non_blocking=True) if isinstance(a, Tensor) else b)
    return a if b == 1 else a * b


def as_float(number: Number) -> float:
    """Return the number read back."""
    return float(number.item() if isinstance(number, Tensor) else number)


def detached(numbers: Sequence[_N]) -> list[_N]:
    """Return the numbers without the graph that they came from, which would keep a step's tensors alive."""
    return [number.detach() if isinstance(number, Tensor) else number for number in numbers]
