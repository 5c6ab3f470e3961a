"""A patch with which Triton's interpreter takes less than half the time."""

from __future__ import annotations

from functools import cache
from typing import Any


def quicken() -> None:
    """Make each launch patch Triton's language for the interpreter once, and not at each call of a function.

    NumPy's dtypes are also cached, rather than looked up in a table that is made for each value. Both need private
    names of Triton 3.7. Without these names, or without Triton, nothing changes.
    """
    try:
        from triton.language import core
        from triton.runtime import interpreter

        patch, launch, nothing = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._LangPatchScope
        dtype_of = interpreter._get_np_dtype
    except (ImportError, AttributeError):
        return
    given: set[bool] = set()
    dtypes: dict[str, Any] = {}

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

    def known_dtype_of(dtype: Any) -> Any:
        if dtype.name not in dtypes:
            dtypes[dtype.name] = dtype_of(dtype)
        return dtypes[dtype.name]

    interpreter._get_np_dtype = known_dtype_of
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = give, launch_with_one_patch
