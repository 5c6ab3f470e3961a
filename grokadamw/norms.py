"""Find a model's norm layers, and tell whether it normalises its activations.

This looks at the class names of its modules, and for calls of torch.nn.functional's norms in their code.
"""

from __future__ import annotations

import dis
import inspect
import re
from collections import ChainMap, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial, partialmethod
from itertools import chain
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
# class names: the word Norm, but not Normal, NoNorm or NormFree; and the kinds of norms that normalise activations
_NAME = re.compile(r"(?<!no)norm(?!al(?!i[sz])|_?free)|^ln$", re.IGNORECASE)
_KIND = re.compile(r"(?<!no)(?<!without)(layer|rms|batch|group|instance)_?norm(?!_?free)", re.IGNORECASE)
_FUNCTIONS = frozenset({"layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"})
_FUNCTIONS |= {f"native_{name}" for name in ("layer_norm", "batch_norm", "group_norm")}
_BETWEEN = {"EXTENDED_ARG", "PUSH_NULL"}  # instructions that may stand between a name and its attribute


def is_norm(module: nn.Module) -> bool:
    """Return True for torch's norm layers, and for modules with vectors whose class name has the word Norm.

    A module with matrices, or with submodules that have parameters, such as a PreNormBlock, is more than a norm layer.
    """
    if isinstance(module, _NORMS):
        return True
    own = list(module.parameters(recurse=False))
    is_small = bool(own) and all(map(is_vector, own)) and len(own) == len(list(module.parameters()))
    return is_small and _NAME.search(type(module).__name__) is not None


def has_norms(model: nn.Module) -> bool:
    """Return True if the model has a norm layer, or its code calls a norm of torch.nn.functional."""
    modules = list(model.modules())
    if any(is_norm(module) or _KIND.search(type(module).__name__) for module in modules):
        return True
    methods = defaultdict[str, list[Any]](list)
    for kind in {kind for module in modules for kind in type(module).__mro__}:
        if not f"{kind.__module__}.".startswith(("torch.", "builtins.")):
            for name, value in vars(kind).items():
                methods[name].append(value)
    return any(_calls_norms(module, methods) for module in modules)


def is_vector(param: Tensor) -> bool:
    """Return True if at most one dimension has a size other than 1."""
    return sum(n != 1 for n in param.shape) < 2


def _calls_norms(module: nn.Module, methods: Mapping[str, Iterable[Any]]) -> bool:
    """Return True if a module's ``forward``, or a method or function that it calls by name, calls a norm.

    `methods` are those of all modules of the model and of their base classes, by name: a module may call another one's.
    The ``training_step`` of a Lightning module counts like ``forward``. Calls that a flag switches off are found, too.
    Calls through a list, a dict, a hook or another object are not found.
    """
    found = [inspect.getattr_static(module, name, None) for name in ("forward", "training_step")]
    seen = set[FunctionType]()
    while found:
        function = _function(found.pop())
        if getattr(function, "__name__", None) in _FUNCTIONS:
            return True
        if not isinstance(function, FunctionType) or function in seen or str(function.__module__).startswith("torch."):
            continue
        seen.add(function)
        codes = list(_codes(function.__code__))
        known = ChainMap(_closure(function), function.__globals__)
        if any(_uses_norm(code, known) for code in codes):
            return True
        names = {name for code in codes for name in code.co_names}
        found.extend(_values(names, function, module))
        found.extend(chain.from_iterable(methods.get(name, ()) for name in names))
    return False


def _function(value: Any) -> Any:
    """Return the function behind partials, methods, properties and decorators; None if the value is not a function."""
    while True:
        if isinstance(value, (partial, partialmethod)):
            value = value.func
        elif isinstance(value, (staticmethod, classmethod, MethodType)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        elif inspect.isroutine(value) and hasattr(value, "__wrapped__"):
            value = inspect.unwrap(value)
        else:
            return value if inspect.isroutine(value) else None


def _values(names: set[str], function: FunctionType, module: nn.Module) -> Iterator[Any]:
    """Yield what these names may refer to: attributes of the module, globals, contents of imports, and closures."""
    yield from (inspect.getattr_static(module, name, None) for name in names)
    for name in names - _FUNCTIONS:
        yield (value := function.__globals__.get(name))
        if isinstance(value, ModuleType):
            yield from map(vars(value).get, names - _FUNCTIONS)
    yield from _closure(function).values()


def _closure(function: FunctionType) -> dict[str, Any]:
    """Return the variables of enclosing functions that a function uses."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # the cell is empty
            found[name] = cell.cell_contents
    return found


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code, and the code of the functions that are defined in it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return chain([code], chain.from_iterable(map(_codes, inner)))


def _uses_norm(code: CodeType, known: Mapping[str, Any]) -> bool:
    """Return True if code uses a norm function, as in F.layer_norm. `known` has the variables from outside the code.

    An attribute of a local variable, as in self.layer_norm, does not count: it may be a method, a submodule or a flag.
    """
    found = [instruction for instruction in dis.get_instructions(code) if instruction.opname not in _BETWEEN]
    instructions = [(instruction.opname, instruction.argval) for instruction in found]
    imports = any(kind.startswith("IMPORT") for kind, _ in instructions)
    value: Any = None  # the last one; any module stands for what the function imports
    for kind, name in instructions:
        if kind in ("LOAD_ATTR", "LOAD_METHOD"):
            value = inspect.getattr_static(value, name, value if isinstance(value, ModuleType) else None)
        elif kind in ("LOAD_GLOBAL", "LOAD_DEREF"):
            value = known.get(name)
        else:
            is_local = kind.startswith("LOAD_FAST") and name not in code.co_varnames[: code.co_argcount]
            value = inspect if imports and is_local else None
        if (isinstance(value, ModuleType) or inspect.isroutine(value)) and name in _FUNCTIONS:
            return True
    return False
