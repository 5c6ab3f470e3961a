"""Warnings about arguments of the Trainer that do not reach the optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import Any

from torch.optim import Optimizer

from ._hints import meant
from ._numbers import as_float
from .options import OPTIONS, TAKE

# the names in optim_args that the Trainer passes to this optimizer; it silently drops all others
_IN_OPTIM_ARGS = ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping")


def is_given(arguments: Any, name: str) -> bool:
    """Return True if an argument differs from its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(arguments)}
    return bool(getattr(arguments, name) != defaults[name])


def lost(optim_args: str | None, optimizer: Optimizer, is_resumed: bool, options: Collection[str]) -> Iterator[str]:
    """Yield a warning for each entry of ``optim_args`` that the optimizer does not use; later `options` override it."""
    entries = [entry.partition("=") for entry in (optim_args or "").replace(" ", "").split(",")]
    for name, value in {name: value for name, _, value in entries}.items():  # the last entry of a name counts
        if name in _IN_OPTIM_ARGS and name not in options:
            used = [as_float(group[name]) for group in optimizer.param_groups]
            if _is_among(_number(value), used if is_resumed else [*used, as_float(optimizer.defaults[name])]):
                continue
            if is_resumed:
                yield (
                    f"optim_args has {name}={value}, but the resumed run keeps {max(used):g}: to change it, pass "
                    f"{name} to GrokAdamWCallback"
                )
            else:
                yield (
                    f"optim_args has {name}={value}, and the optimizer has {max(used):g}: the Trainer reads optim_args "
                    'only if optim="grokadamw" makes the optimizer. Give it where you construct yours'
                )
        elif name and name not in _IN_OPTIM_ARGS:
            instead, is_fixed = meant(name, _IN_OPTIM_ARGS), name in OPTIONS and OPTIONS[name].on_load != TAKE
            if meant(name, ("lr", "weight_decay")):
                where = "in TrainingArguments"
            else:
                where = "by optimizer_cls_and_kwargs=(GrokAdamW, {...})" if is_fixed else "to GrokAdamWCallback"
            others = f"it takes {', '.join(_IN_OPTIM_ARGS)}; give others {where}"
            way_out = f"did you mean {instead}?" if instead else others
            yield f"optim_args has {name!r}, which the Trainer drops: {way_out}"


def unused(arguments: Any, optimizer: Optimizer, is_resumed: bool) -> Iterator[str]:
    """Yield a warning for each number in the TrainingArguments that the optimizer does not use."""
    groups, defaults = optimizer.param_groups, optimizer.defaults
    for name, option, i in (("adam_beta1", "betas", 0), ("adam_beta2", "betas", 1), ("adam_epsilon", "eps", None)):
        used = as_float(groups[0][option] if i is None else groups[0][option][i])
        given = getattr(arguments, name)
        if is_given(arguments, name) and not _is_among(given, [used]):
            yield (
                f"{name}={given:g} does not reach the optimizer, which has {used:g}: give {option} to GrokAdamWCallback"
            )
    for name, option, current, where in (
        ("learning_rate", "lr", "initial_lr", "lr and initial_lr of the groups, and base_lrs of the scheduler,"),
        ("weight_decay", "weight_decay", "weight_decay", "weight_decay of the groups"),
    ):
        given = getattr(arguments, name)
        numbers = [as_float(group.get(current, defaults[option])) for group in groups]
        of_optimizer, of_trainer = as_float(defaults[option]), _is_among(given, numbers)
        if option == "weight_decay" and of_trainer and not _is_among(of_optimizer, [*numbers, OPTIONS[option].default]):
            yield (
                f"the optimizer was given weight_decay={of_optimizer:g}, and the Trainer's groups have "
                f"{max(numbers):g}: pass weight_decay to TrainingArguments"
            )
        if not is_given(arguments, name) or of_trainer:
            continue
        if is_resumed:
            yield (
                f"{name}={given:g} is not used: the resumed run keeps {max(numbers):g}. To change it, "
                f"set {where} in a callback's on_train_begin"
            )
        elif not _is_among(given, [of_optimizer]):  # groups may have their own numbers
            it = "lr" if option == "lr" else "it"
            yield (
                f"{name}={given:g} does not reach the optimizer, which has {max(numbers):g}: give {it} where the "
                "optimizer is made, or for_grokking(arguments)"
            )


def _number(value: str) -> float:
    """Return an entry's value as a float; NaN if it is not a number, as may be if the Trainer did not read it."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def _is_among(given: float, numbers: list[float]) -> bool:
    return any(math.isclose(given, number, rel_tol=1e-6) for number in numbers)  # some may be rounded to float32
