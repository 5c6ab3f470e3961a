"""Warnings that point at the user's line, past the wrappers that torch, schedulers and compilers put around a step."""

from __future__ import annotations

import sys
import warnings

_FRAMEWORKS = (
    *("transformers", "accelerate", "trl", "lightning", "pytorch_lightning", "lightning_utilities"),
    *("skorch", "fastai", "fastcore"),
)
_NOT_THE_USERS = ("grokadamw", "torch", "contextlib", "copy", "functools", *_FRAMEWORKS)


def is_new(what: str, said: set[str]) -> bool:
    """Note that something was said, and return True if it was not before: most warnings come once."""
    before = len(said)
    said.add(what)
    return len(said) > before


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the innermost frame that does not belong to this package, torch or a framework."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
