"""Whether a model normalises its activations, and which of its modules are norm layers.

It shows in modules, by their classes, and in code, by calls of torch.nn.functional's norms.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from itertools import chain
from types import CodeType, FunctionType

from torch import Tensor, nn

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
# names of classes: the word Norm, but not Normal, NoNorm or NormFree; and kinds of norms that normalise activations
_NAME = re.compile(r"(?<!no)norm(?!al(?!i[sz])|_?free)|^ln$", re.IGNORECASE)
_KIND = re.compile(r"(?<!no)(?<!without)(layer|rms|batch|group|instance)_?norm(?!_?free)", re.IGNORECASE)
_FUNCTIONS = frozenset({"layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"})


def is_norm(module: nn.Module) -> bool:
    """Return True for torch's norm layers, and for modules with vectors and the word Norm in their class's name.

    A module with matrices, or with submodules that have parameters, such as a PreNormBlock, is more than a norm layer.
    """
    if isinstance(module, _NORMS):
        return True
    own = list(module.parameters(recurse=False))
    is_small = bool(own) and all(map(_is_vector, own)) and len(own) == len(list(module.parameters()))
    return is_small and _NAME.search(type(module).__name__) is not None


def has_norms(model: nn.Module) -> bool:
    """Return True if the model has a norm layer, or its code calls a norm of torch.nn.functional."""
    return any(
        is_norm(module) or _KIND.search(type(module).__name__) or _calls_norms(module) for module in model.modules()
    )


def _is_vector(param: Tensor) -> bool:
    return sum(n != 1 for n in param.shape) < 2


def _calls_norms(module: nn.Module) -> bool:
    """Return True if a module's ``forward``, or a method or function that it calls by name, calls a norm."""
    functions, seen = [getattr(type(module), "forward", None)], set[FunctionType]()
    while functions:
        found = functions.pop()
        function = inspect.unwrap(found) if inspect.isroutine(found) else None
        if getattr(function, "__name__", None) in _FUNCTIONS:
            return True
        if not isinstance(function, FunctionType) or function in seen or str(function.__module__).startswith("torch."):
            continue
        seen.add(function)
        for name in set(_names(function.__code__)):
            functions.append(inspect.getattr_static(type(module), name, None))
            if name not in _FUNCTIONS:
                functions.append(function.__globals__.get(name))
            elif not hasattr(module, name):  # as in F.layer_norm; else a method, a submodule or a flag
                return True
    return False


def _names(code: CodeType) -> Iterator[str]:
    """Yield the names that a function's code uses, also inside the functions in it."""
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return chain(code.co_names, chain.from_iterable(map(_names, inner)))
