"""What each argument may be: one clear error that names it, its value and the way out, before anything has changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

# What holds for the whole optimizer, and is refused in a parameter group. Its value stands in the groups to be seen.
PER_OPTIMIZER = (
    *("second_moment", "nonfinite", "compat", "differentiable"),
    *("amplify_by_signal", "window_size", "window_dtype", "accumulation_steps"),
)
# How a group's step is run, which is this process's affair, and not a checkpoint's.
HOW_TO_RUN = ("foreach", "fused", "capturable")
_NEVER_IN_A_GROUP = ("grokking_signal_fns", "grokking_signal_fn", "combine")

_LIMITS = ("gradient_clipping", "max_row_norm", "max_row_change")  # 0 is off
_NOT_NEGATIVE = ("eps", "weight_decay", "lamb", "grokking_signal_decay_rate", *_LIMITS)
_SETTABLE = (
    *("lr", "betas", "alpha_init", "gamma", "amplify_after", "maximize", "layer"),
    *(*_NOT_NEGATIVE, *HOW_TO_RUN, *PER_OPTIMIZER, *_NEVER_IN_A_GROUP),
)
_CHOICES: dict[str, tuple[Any, ...]] = {
    "second_moment": ("filtered", "raw"),
    "nonfinite": ("skip", "raise", "propagate"),
    "compat": (None, "0.1.2"),
    "differentiable": (True, False),
    "foreach": (None, True, False),
    "fused": (None, True, False),
    "capturable": (True, False),
    "maximize": (True, False),
    "amplify_by_signal": (True, False),
}


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError for per-optimizer options that do not go together."""
    if options["compat"] is not None and options["nonfinite"] == "raise":
        raise ValueError(
            f"nonfinite='raise' with compat={options['compat']!r}: that release has no rule for what is not finite; "
            "leave one of them out"
        )
    if (size := options["window_size"]) is not None:
        check_count("window_size", size, at_least=1)
    check_dtype("window_dtype", options["window_dtype"])
    if size is None and options["window_dtype"] is not None:
        raise ValueError(f"window_dtype={options['window_dtype']} without a window: give window_size, or leave it out")
    check_count("accumulation_steps", options["accumulation_steps"], at_least=1)
    steps = options["accumulation_steps"]
    if steps > 1 and options["second_moment"] != "raw":
        raise ValueError(
            f"accumulation_steps={steps} with second_moment={options['second_moment']!r}: the square of the amplified "
            "gradient cannot be collected from micro-batches, as the slow gradient joins at the last; give "
            "second_moment='raw', or take Accumulate(GrokAdamW(...), steps), which needs a buffer"
        )
    if steps > 1 and size is not None:
        raise ValueError(
            f"accumulation_steps={steps} with window_size={size}: a window keeps each step's gradient, which is "
            "nowhere in one piece; leave one out, or take Accumulate(GrokAdamW(...), steps), which needs a buffer"
        )
    for name, there in (("accumulation_steps", steps > 1), ("window_size", size is not None)):
        for other in ("compat", "differentiable"):
            if there and options[other]:
                raise ValueError(f"{name}={options[name]} with {other}={options[other]!r}: leave one of them out")


def check_group(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raise TypeError, ValueError or RuntimeError for what a parameter group, the defaults filled in, must not hold."""
    for name in _NEVER_IN_A_GROUP:
        if group.get(name) is not None:
            raise ValueError(
                f"{name}={group[name]!r} in a parameter group: signals hold for the whole optimizer; "
                "pass them to GrokAdamW(...) or set_signals(...)"
            )
    if group.get("amsgrad"):
        raise ValueError(
            f"amsgrad={group['amsgrad']!r} in a parameter group: GrokAdamW has no such thing; leave it out"
        )
    for name in PER_OPTIMIZER:
        if group[name] != defaults[name]:
            raise ValueError(
                f"{name}={group[name]!r} in a parameter group: it holds for the whole optimizer, where it is "
                f"{defaults[name]!r}; pass it to GrokAdamW(...)"
            )
    for name, choices in _CHOICES.items():
        value = group[name]
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ValueError(f"{name}={value!r} is unknown: give one of {', '.join(map(repr, choices))}")
    _check_how_to_run(group)
    for name, at_most in (("lr", None), ("alpha_init", 1)):
        value = group[name]
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"Tensor {name} must be 1-element, and {name}={value!r} is not")
            value = value.item()
        check_number(name, value, at_most=at_most)
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise TypeError(f"betas={betas!r} is not a pair of numbers, as in (0.9, 0.999)")
    for i in (0, 1):
        check_number(f"betas[{i}]", betas[i], below=1)
    for name in _NOT_NEGATIVE:
        check_number(name, group[name])
    check_number("gamma", group["gamma"], below=1)
    check_count("amplify_after", group["amplify_after"])
    if group["layer"] is not None:
        check_count("layer", group["layer"])
    for name in ("max_row_norm", "max_row_change"):
        if group["compat"] is not None and group[name]:
            raise ValueError(
                f"{name}={group[name]} with compat={group['compat']!r}, which has no such thing: leave one of them out"
            )
    for name, is_on in (
        ("accumulation_steps", group["accumulation_steps"] > 1),
        ("amplify_by_signal", group["amplify_by_signal"]),
    ):
        if group["capturable"] and is_on:
            raise ValueError(
                f"{name}={group[name]!r} with capturable=True: a CUDA graph does the same at every replay; leave one "
                "of them out"
            )


def _check_how_to_run(group: dict[str, Any]) -> None:
    """What does not go together, in the words of torch's optimizers where they refuse it too."""
    if group["fused"]:
        if group["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`: leave one of them out")
        if group["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together. Leave one of them out")
    if group["foreach"] and group["differentiable"]:
        raise ValueError(
            "foreach=True with differentiable=True: torch's foreach operations have no autograd; leave foreach out"
        )
    if group["foreach"] and isinstance(group["lr"], Tensor) and not group["capturable"]:
        raise ValueError(
            "lr as a Tensor is not supported for capturable=False and foreach=True: leave foreach out, or give a number"
        )


def settings(group: dict[str, Any]) -> list[Any]:
    """What may be set by hand, to see when it has changed; of tensors and arrays only which they are."""
    return [_comparable(group.get(name)) for name in _SETTABLE]


def _comparable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)  # as it is now
    return (
        id(value) if isinstance(value, Tensor) or hasattr(value, "__len__") and hasattr(value, "__array__") else value
    )


def check_settings(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """check_group for what was set by hand. The value of a tensor, which may be on a GPU, is not looked at."""
    passed = [name for name in ("lr", "alpha_init") if isinstance(group[name], Tensor) and group[name].numel() == 1]
    if isinstance(group["lr"], Real) and -1e-12 < float(group["lr"]) < 0:
        passed.append("lr")  # a scheduler's 0, to rounding
    check_group({**group, **dict.fromkeys(passed, 0.0)}, defaults)


def make_plain(group: dict[str, Any]) -> None:
    """Python's own numbers in place of NumPy's, which a checkpoint could not be read back with."""
    for name in ("lr", "alpha_init", "gamma", *_NOT_NEGATIVE):
        if name in group and not isinstance(group[name], Tensor):
            group[name] = float(group[name])
    group["betas"] = tuple(map(float, group["betas"]))
    group["amplify_after"] = int(group["amplify_after"])
    group["accumulation_steps"] = int(group["accumulation_steps"])
    group["window_size"] = None if group["window_size"] is None else int(group["window_size"])
    group["layer"] = None if group["layer"] is None else int(group["layer"])


def check_number(name: str, value: Any, *, below: float = math.inf, at_most: float | None = None) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        hint = "; 0 switches it off" if name in _LIMITS else ""
        raise TypeError(f"{name}={value!r} is not a number{hint}")
    if not 0 <= float(value) < below or (at_most is not None and float(value) > at_most):
        limits = f"in [0, {at_most}]" if at_most is not None else f"in [0, {below})"
        raise ValueError(f"{name}={value!r} is out of range: give a number {limits}")


def check_count(name: str, value: Any, at_least: int = 0) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} is not an integer")
    if value < at_least:
        raise ValueError(f"{name}={value!r} is out of range: give an integer of at least {at_least}")


def check_window(window_size: int, filter_type: str) -> None:
    check_count("window_size", window_size, at_least=1)
    if filter_type not in ("mean", "sum"):
        raise ValueError(f"filter_type={filter_type!r} is unknown: give 'mean' or 'sum'")


def check_dtype(name: str, value: Any) -> None:
    """Raise ValueError unless it is None, or a dtype of real numbers that gradients can be kept in."""
    if value not in (None, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"{name}={value!r} cannot keep gradients: give torch.bfloat16, float32, float64, or None for what "
            "suits the parameter"
        )
