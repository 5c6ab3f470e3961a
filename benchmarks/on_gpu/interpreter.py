"""Triton's interpreter, in half the time."""

from __future__ import annotations

from functools import cache
from typing import Any


def quicken() -> None:
    """From now on, a launch gives Triton's language to the interpreter once, not once for each call of a function.

    That takes names of Triton 3.7 that are private. Without them nothing changes, and nor does it without Triton.
    """
    try:
        from triton.language import core
        from triton.runtime import interpreter

        patch, launch, nothing = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._LangPatchScope
    except (ImportError, AttributeError):
        return
    given: set[bool] = set()

    @cache
    def is_tritons(fn: Any) -> bool:
        """Return True if a function has the language's inner module, and not triton.language as a whole."""
        return any(value is core for value in fn.__globals__.values())

    def give(fn: Any) -> Any:
        of_core = is_tritons(fn)
        if of_core in given:
            return nothing()
        given.add(of_core)
        return patch(fn)

    def launch_with_one_patch(self: Any, *args: Any, **kwargs: Any) -> None:
        given.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = give, launch_with_one_patch
