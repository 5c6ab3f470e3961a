"""Numbers that a step uses: Python floats, or tensors if reading them would make the host wait for the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from operator import is_
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from .shards import whole

# A Python float, or a 0-d tensor on the parameters' device if reading it back would make the host wait.
Number: TypeAlias = float | Tensor
_N = TypeVar("_N", Number, Number | None)


def reads_are_free(device: torch.device) -> bool:
    """Return True if numbers on this device can be read without waiting for queued work, and are not fake."""
    fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)  # fake tensors have no numbers
    return device.type == "cpu" and fake is None


def accumulator(device: torch.device) -> torch.dtype:
    """Return the dtype for sums of squares and for numbers: float64 if the device supports it, else float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for averages and sums: at least float32, so that small changes do not vanish."""
    return torch.promote_types(dtype, torch.float32)


def as_real(tensor: Tensor) -> Tensor:
    """Return a complex tensor as a real view with two numbers per element; return any other tensor unchanged."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def resolved(tensor: Tensor) -> Tensor:
    """Return a tensor whose elements are in memory: copy conjugate views, and ZeroTensors, which have no memory.

    Autograd returns such gradients: ZeroTensors, for example, for torch.sgn.
    """
    tensor = tensor.resolve_conj()
    return tensor.clone() if tensor._is_zerotensor() else tensor


def as_number(value: Any, name: str = "the value") -> Number:
    """Return a user's number as a float, or as a detached 0-d copy if reading it would make the host wait.

    Raises:
        TypeError: the value is not one real number.
        ValueError: it is an integer beyond the range of floats.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"{name} is a tensor of shape {tuple(value.shape)}, not one number")
        if value.is_complex():
            raise TypeError(f"{name} is a tensor of {value.dtype}, not one real number: give its real part or size")
        value = whole(value.detach()).reshape(())
        return float(value) if reads_are_free(value.device) else value.to(accumulator(value.device), copy=True)
    if getattr(value, "size", None) == 1 and hasattr(value, "item"):  # a NumPy array
        value = value.item()
    try:
        if hasattr(value, "__float__"):  # a string has none
            return float(value)
    except OverflowError:  # the integer may have too many digits to be shown
        raise ValueError(f"{name} is an integer beyond the range of floats, which ends at 1.8e308") from None
    except TypeError:
        pass
    raise TypeError(f"{name}={value!r} is not one number: give a number, or a tensor of one element")


def plain(value: Any) -> Any:
    """Return NumPy numbers as Python numbers, including those in a tuple or list; return other values unchanged.

    torch.load(weights_only=True) cannot read NumPy numbers.
    """
    if type(value) in (tuple, list):
        items = [plain(item) for item in value]
        return value if all(map(is_, items, value)) else type(value)(items)
    if isinstance(value, Real) and type(value).__module__ != "builtins":
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def as_share(value: Any, name: str) -> Number:
    """Return a user's accuracy, as `as_number` does. A value that stays a tensor is not checked.

    Raises:
        TypeError, ValueError: the value is not one number, or not in [0, 1].
    """
    share = as_number(value, name)
    if isinstance(share, Tensor):
        return share
    if not -1e-6 <= share <= 1 + 1e-6:  # a mean of rounded numbers may be a little more than 1
        raise ValueError(f"{name}={value!r} is not an accuracy: give a fraction of correct answers, in [0, 1]")
    return min(max(share, 0.0), 1.0)


def product(a: Number, b: Number) -> Number:
    """Return a · b, on a's device if a is a tensor. If b is the number 1, nothing is computed."""
    if isinstance(b, Tensor):
        return a * (b.to(a.device, non_blocking=True) if isinstance(a, Tensor) else b)
    return a if b == 1 else a * b


def number_on(device: torch.device, value: Number, differentiable: bool) -> Number:
    """Return a number for a step on a device: a tensor is moved there, or read as a float if that is free."""
    if not isinstance(value, Tensor):
        return float(value)
    if is_on_host(value.device, differentiable) or is_on_host(device, differentiable):
        return value.item()
    dtype = accumulator(device)
    if value.dim() == 0 and value.dtype == dtype and value.device == device:
        return value
    return value.reshape(()).to(device, dtype, non_blocking=True)


def is_on_host(device: torch.device, differentiable: bool) -> bool:
    """Return True if a step on a device uses Python numbers: reading tensors is free, and no derivative is lost."""
    return reads_are_free(device) and not differentiable


def as_float(number: Number) -> float:
    """Return a number as a float, read back if it is a tensor; NaN for one on the meta device."""
    if isinstance(number, Tensor):
        return math.nan if number.is_meta else float(number.item())
    return float(number)


def detached(numbers: Sequence[_N]) -> list[_N]:
    """Return the numbers detached from their autograd graph, which would keep a step's tensors alive."""
    return [number.detach() if isinstance(number, Tensor) else number for number in numbers]
