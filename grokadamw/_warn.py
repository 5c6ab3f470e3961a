"""Warnings that point at the user's line, not at the code that torch, schedulers and compilers wrap around a step."""

from __future__ import annotations

import sys
import warnings

_FRAMEWORKS = (
    *("transformers", "accelerate", "trl", "lightning", "pytorch_lightning", "lightning_utilities"),
    *("skorch", "fastai", "fastcore"),
)
_NOT_THE_USERS = ("grokadamw", "torch", "contextlib", "copy", "functools", *_FRAMEWORKS)


def is_new(what: str, said: set[str]) -> bool:
    """Remember that a warning was given, and return True if it is new. Most warnings are given only once."""
    before = len(said)
    said.add(what)
    return len(said) > before


def warn(message: str, category: type[Warning]) -> None:
    """Issue a warning that points at the innermost frame outside this package, torch and the frameworks."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
