"""Checks of a single argument. The errors name the argument, its value, and what to give instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._numbers import as_number

# A check takes an option's name and value. It returns the value, or raises an error that names both and says what to
# give instead. It turns NumPy numbers into Python numbers, which torch.load(weights_only=True) can read.
Check: TypeAlias = Callable[[str, Any], Any]


def check_number(
    name: str, value: Any, *, below: float = math.inf, at_most: float | None = None, hint: str = ""
) -> float:
    """Check a number in [0, below), or in [0, at_most]."""
    limits = f"in [0, {at_most}]" if at_most is not None else f"in [0, {below})"
    if type(value) is not float and (not isinstance(value, Real) or isinstance(value, bool)):
        raise TypeError(f"{name}={value!r} is not a number{hint or f': give one {limits}'}")
    number = float(as_number(value, name))
    if not 0 <= number < below or (at_most is not None and number > at_most):
        raise ValueError(f"{name}={value!r} is out of range: give a number {limits}{hint}")
    return number


check_limit = partial(check_number, hint="; 0 switches it off")


def check_scalar(name: str, value: Any, *, at_most: float | None = None) -> float | Tensor:
    """Check a number, or that a tensor has one real element. A tensor's value is not read, as it may be on a GPU."""
    if not isinstance(value, Tensor):
        return check_number(name, value, at_most=at_most)
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element, and {name}={value!r} is not")
    if value.is_complex():
        raise TypeError(f"{name}={value!r} is complex: give a real number")
    return value


def check_betas(name: str, value: Any) -> tuple[float, ...]:
    """Check a pair of numbers in [0, 1)."""
    if not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"{name}={value!r} is not a pair of numbers, as in (0.9, 0.999)")
    return tuple(check_number(f"{name}[{i}]", value[i], below=1) for i in (0, 1))


def check_count(name: str, value: Any, at_least: int = 0) -> int:
    """Check an integer of at least `at_least`."""
    if type(value) is not int and (not isinstance(value, Integral) or isinstance(value, bool)):
        raise TypeError(f"{name}={value!r} is not an integer: give one of at least {at_least}")
    if value < at_least:
        raise ValueError(f"{name}={value!r} is out of range: give an integer of at least {at_least}")
    return int(value)


_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def check_dtype(name: str, value: Any) -> Any:
    """Check a dtype in which gradients are to be kept, or None."""
    if value is not None and (not isinstance(value, torch.dtype) or value not in _DTYPES):
        raise ValueError(
            f"{name}={value!r} cannot keep gradients: give torch.bfloat16, float32, float64, or None for a dtype that "
            "suits the parameter"
        )
    return value


def one_of(*choices: Any) -> Check:
    """Return a check that a value is one of the choices, and of the same type: 1 is not True."""
    types = {*map(type, choices)}

    def check(name: str, value: Any) -> Any:
        if type(value) not in types or value not in choices:
            raise ValueError(f"{name}={value!r} is unknown: give one of {', '.join(map(repr, choices))}")
        return value

    return check


def or_none(check: Check, **limits: Any) -> Check:
    """Return a check that also allows None."""
    return lambda name, value: None if value is None else check(name, value, **limits)


def check_keys(value: Any) -> None:
    """Raise TypeError if a dict has a key that is not a string, because JSON would turn it into one."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{key!r} is a key")
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return
    for item in value:
        check_keys(item)
