"""Find out how to call a signal, and give it a name."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch

_KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_OF_TRAINING = {"train", "training"}
_OF_EVALUATION = {"eval", "evaluation", "val", "valid", "validation", "test"}
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, _KEYWORD_ONLY)


def takes_losses(function: Any) -> str:
    """Return how a signal takes (train_loss, eval_loss): "by name", "in order", or "" for not at all."""
    if isinstance(function, type):
        name = function.__name__
        raise TypeError(f"grokking_signal_fns holds the class {name}: give one of its objects, such as {name}()")
    if not callable(function):
        raise TypeError(f"grokking_signal_fns holds {function!r}: give a function, or an object that can be called")
    try:
        called = function.forward if isinstance(function, torch.nn.Module) else function
        parameters = inspect.signature(called).parameters
    except (TypeError, ValueError):
        return ""  # some built-in callables have no readable signature
    bound = getattr(function, "keywords", {})  # arguments given by functools.partial
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    positional = [name for name in kinds if kinds[name] in _POSITIONAL]
    by_name = {name for name in kinds if kinds[name] in _BY_NAME and name not in bound}
    losses = ["train_loss", "eval_loss"]
    if inspect.Parameter.VAR_KEYWORD in kinds.values() and inspect.Parameter.VAR_POSITIONAL not in kinds.values():
        by_name |= {*losses} - {*kinds, *bound}  # (*args, **kwargs) may accept anything, or nothing
    required = [name for name in positional if parameters[name].default is inspect.Parameter.empty]
    required += [n for n in kinds if kinds[n] is _KEYWORD_ONLY and parameters[n].default is inspect.Parameter.empty]
    if set(required) <= set(losses):
        if positional[:2] == losses and not bound:
            return "in order"
        if set(losses) <= by_name:
            return "by name"
    # arguments of other names get the losses in order, but none gets a loss under the other loss's name
    first, second = ([name.partition("_")[0] for name in names] for names in (required[:1], required[1:]))
    swapped = {*first} & _OF_EVALUATION or {*second} & _OF_TRAINING
    if any("acc" in name for name in required):
        way_out = "accuracies are not passed to signals; give grokadamw.signals.AccuracyGap()"
    elif not required:
        return ""
    elif len(required) == 2 and required == positional[:2] and not swapped:
        return "in order"
    else:
        way_out = (
            "a signal takes no arguments, or (train_loss, eval_loss); bind all others with a lambda or "
            "functools.partial"
        )
    raise TypeError(f"grokking_signal_fns holds {_name(function)}, which requires ({', '.join(required)}): {way_out}")


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__


def names_of(functions: Sequence[Any]) -> list[str]:
    """Return a name for each function, with a number if several have the same name."""
    plain = [_name(function) for function in functions]
    names: list[str] = []
    for name in plain:
        numbered = (f"{name}_{i}" for i in itertools.count(1))
        names.append(name if plain.count(name) == 1 else next(n for n in numbered if n not in {*plain, *names}))
    return names
