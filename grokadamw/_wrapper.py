"""The base class of optimizers around another one: they share its groups and state, and the order of a step."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing the compiler
from torch.optim import Optimizer

from ._numbers import as_real
from .checkpoints import is_state_dict
from .distributed import mesh_of, state_is_asked_for
from .state.slots import State, check_shapes, in_order

_Kind = TypeVar("_Kind")


class Part(NamedTuple):
    """A parameter that has a gradient, with its gradient, state and group."""

    param: Tensor  # may be complex
    grad: Tensor  # real, and without the loss scale
    state: State  # read only: write to the optimizer's `state`
    group: dict[str, Any]


class Wrapper(Optimizer):
    """An optimizer around another one, `optimizer`, whose groups and state it shares.

    A wrapper's own tensors are in that state, too, under names of their own, so that every checkpoint has them. The
    inner optimizer does not see them while it steps. Numbers that may change are in the groups.
    """

    _inner: Optimizer  # use this name only: Lightning's optimizers subclass ours, and have another `optimizer`
    _group_defaults: dict[str, Any]
    _state_names: tuple[str, ...]  # its entries in each parameter's state
    _settings: tuple[str, ...] = ()  # attributes that pickle and deepcopy keep
    _runs: tuple[str, ...] = ()  # its group keys that are no settings, but the progress of a run
    _others: tuple[str, ...] = ()  # state entries of other wrappers of its kind
    _mark: str  # a group key which shows that a wrapper of its kind was around the optimizer
    _rank: int  # it may only wrap wrappers of lower rank

    def __init__(self, optimizer: Optimizer, group_defaults: dict[str, Any]) -> None:
        if not isinstance(optimizer, Optimizer):
            is_class = isinstance(optimizer, type)
            what = f"the class {optimizer.__name__}" if is_class else f"of type {type(optimizer).__name__}"
            raise TypeError(
                f"optimizer is {what}, and not a torch.optim.Optimizer: make one from your parameters, and give it here"
            )
        inner = optimizer
        while isinstance(inner, Wrapper):
            if inner._rank >= self._rank:
                raise ValueError(
                    f"{type(self).__name__} around {type(inner).__name__}: one filter at most, and Accumulate is the "
                    "outermost, as in Accumulate(Grokfast(optimizer), steps)"
                )
            inner = inner._inner
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(
                f"{type(optimizer).__name__} evaluates its closure several times a step, and so does not see the "
                f"gradients that {type(self).__name__} makes: give an optimizer that takes a step without a closure"
            )
        self._inner, self._group_defaults = optimizer, group_defaults
        self._drop_none()
        self._check({**group_defaults})
        for group in optimizer.param_groups:
            self._check({**group_defaults, **group})
        for group in optimizer.param_groups:
            if self._mark in group:  # another wrapper of this kind was around it
                group.update(group_defaults)
                for param in group["params"]:
                    for name in (*self._state_names, *self._others):
                        optimizer.state.get(param, {}).pop(name, None)
        self._fill_groups()
        self._begin()

    def _begin(self) -> None:
        # makes GradScaler leave its scale to the optimizer, and call the optimizer even if it found infinity
        if self._always_unscales or getattr(self._inner, "_step_supports_amp_scaling", False):
            self._step_supports_amp_scaling = True
        super().__setstate__({})  # makes the hooks that every optimizer has

    _always_unscales = False

    def _drop_none(self) -> None:
        """Remove None from the state, which ZeroRedundancyOptimizer loads for parameters that other ranks step."""
        for param in [param for param, state in self.state.items() if state is None]:
            del self.state[param]

    def _fill_groups(self) -> None:
        """Add missing keys to each group, and replace NumPy's numbers, which weights_only=True does not read."""
        for group in self._inner.param_groups:
            for name, value in self._group_defaults.items():
                here = group.setdefault(name, value)
                if isinstance(here, Real) and type(here).__module__ != "builtins":
                    group[name] = int(here) if isinstance(here, Integral) else float(here)

    def _check(self, group: dict[str, Any]) -> None:
        """Raise TypeError or ValueError for a number that a group must not hold."""

    def __getattr__(self, name: str) -> Any:
        """Look up attributes that this class lacks, such as schedule-free's ``train``, in the inner optimizer."""
        if name.startswith("_") or "_inner" not in self.__dict__:  # copying and pickling ask before it is there
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._inner, name)

    @property
    def optimizer(self) -> Optimizer:
        """The inner optimizer."""
        return self._inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._inner.param_groups = groups

    @property
    def state(self) -> Any:
        return self._inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self._inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self._inner.defaults

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Run the closure, if there is one, and take a step. ``p.grad`` stays as the closure left it.

        If GradScaler leaves its scale to the optimizer, gradients are divided by the scale, and nothing is done if
        GradScaler found infinity. That flag is read back from a GPU.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            found_inf = getattr(self, "found_inf", None)
            self._step(bool(found_inf))  # without gradients GradScaler gives a plain 0
        return loss

    @_disable_dynamo  # Python's numbers decide what is done; compile the inner optimizer's step instead
    def _step(self, overflows: bool) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph cannot capture a step of {type(self).__name__}, which counts in Python: capture a step "
                "of GrokAdamW, which has the filter, with capturable=True"
            )
        if overflows:
            self._skip()
            return
        self._fill_groups()  # the inner optimizer may have got a new group
        for group in self.param_groups:
            self._check(group)
        self._check_kept()
        parts = self._parts()
        if self._is_for_state_alone(parts):
            self._inner.step()
            self._make_state(parts)
        else:
            self._take(parts)

    def _check_kept(self) -> None:
        """Raise RuntimeError if a parameter's state is gone, or no longer has its shape."""
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            state = self.state.get(param, {})
            if state is None:
                raise RuntimeError(
                    f"{type(self._inner).__name__} has loaded a checkpoint without the state of {type(self).__name__}: "
                    f"call load_state_dict of {type(self).__name__} instead"
                )
            if isinstance(state, dict):
                check_shapes(state, self._state_names, param)

    def _skip(self) -> None:
        """Handle a step in which GradScaler found infinity."""

    def _take(self, parts: list[Part]) -> None:
        """Take a step with these gradients."""
        raise NotImplementedError

    def _make_state(self, parts: list[Part]) -> None:
        """Make the state that these parameters lack, at zero."""
        raise NotImplementedError

    def _parts(self) -> list[Part]:
        scale = getattr(self, "grad_scale", None)
        parts = []
        for i, group in enumerate(self.param_groups):
            for j, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                if param.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not support sparse gradients, and parameter {j} of group {i} has "
                        "one: build its module with sparse=False (torch.nn.Embedding)"
                    )
                if scale is not None and param.grad.dtype == torch.float16:
                    raise ValueError(
                        f"parameter {j} of group {i} has a float16 gradient, which cannot be divided by GradScaler's "
                        "scale: under GradScaler keep parameters in float32, and compute in float16 by torch.autocast"
                    )
                grad = as_real(param.grad.resolve_conj())
                if scale is not None:
                    grad = grad / (scale.to(grad.device) if isinstance(scale, Tensor) else scale)
                parts.append(Part(param, grad, self.state.get(param, {}), group))
        return parts

    def _is_for_state_alone(self, parts: list[Part]) -> bool:
        """Return True if torch.distributed.checkpoint takes this step only to create the state that it loads into.

        There is no state yet then, and the learning rate and all gradients are 0. With a shard_group its caller tells,
        as all ranks must agree, whatever gradients they have.
        """
        if any(not isinstance(state, dict) or state for state in self.state.values()):
            return False
        if self._shard_group is not None:
            return state_is_asked_for()
        if not parts:
            return False
        lrs = [group.get("lr") for group in self.param_groups]  # with None some optimizers choose their own
        if any(lr is None or float(lr) != 0 for lr in lrs):
            return False
        return not any(part.grad.any() for part in parts)

    @property
    def _shard_group(self) -> Any:
        """The shard_group of a GrokAdamW inside; None without one, as in ZeRO, around which gradients are whole."""
        inner = self._inner
        while isinstance(inner, Wrapper):
            inner = inner._inner
        return getattr(getattr(inner, "_run", None), "shard_group", None)

    def _inner_step(self, parts: Sequence[Part], grads: Sequence[Tensor]) -> None:
        """Let the inner optimizer step with these real gradients; other parameters have none meanwhile."""
        with self._hidden(), _replaced(parts, grads, chain.from_iterable(g["params"] for g in self.param_groups)):
            self._inner.step()

    @contextmanager
    def _hidden(self) -> Iterator[dict[Tensor, State]]:
        """Hide the wrapper's state inside the context, and yield it.

        Many optimizers ask whether a parameter's state is empty.
        """
        states = {param: state for param, state in self.state.items() if isinstance(state, dict)}
        hidden: dict[Tensor, State] = {}
        for param, state in states.items():
            hidden[param] = {name: state.pop(name) for name in self._state_names if name in state}
            if not state:
                del self.state[param]
        try:
            yield hidden
        finally:
            for param, ours in hidden.items():
                inner = self.state.get(param)
                state = states[param]  # keep the same dict object, which state dicts share
                if inner is not state:
                    state.update(inner or {})
                state.update(ours)
                if state:
                    self.state[param] = state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as the inner optimizer does. It may also set this wrapper's numbers."""
        self._check({**self._group_defaults, **param_group})
        self._inner.add_param_group(param_group)
        self._fill_groups()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict, which includes the wrapper's state.

        So each can load what the other saved. An inner optimizer that has not stepped yet has nothing to load.
        """
        self._fill_groups()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self._inner.state_dict()
        self._add_own(state_dict)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def _add_own(self, state_dict: dict[str, Any]) -> None:
        """Add the wrapper's state where the inner optimizer has replaced it, as ZeroRedundancyOptimizer does."""
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(keys, params, strict=False):
            state, saved = self.state.get(param, {}), state_dict["state"].get(key, {})
            own = {name: state[name] for name in self._state_names if name in state and name not in saved}
            if own:
                state_dict["state"][key] = {**saved, **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, as the inner optimizer does; the wrapper's state keeps its own dtype.

        A checkpoint of the inner optimizer alone can be loaded, too: the wrapper's state then starts afresh.

        Raises:
            ValueError: this is not an optimizer's state dict, or it does not fit. Then nothing was loaded.
        """
        if not is_state_dict(state_dict):
            raise ValueError(
                "state_dict is not an optimizer's, which has 'state' and 'param_groups': give what state_dict() "
                "returned, or the part of a checkpoint that holds it"
            )
        self._fill_groups()
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        state_dict = in_order(state_dict, self.param_groups)
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = dict(zip(keys, chain.from_iterable(group["params"] for group in self.param_groups), strict=False))
        ours: dict[Tensor, State] = {}
        rest: dict[Any, Any] = {}
        for key, state in state_dict["state"].items():
            if key in params and isinstance(state, dict):
                ours[params[key]] = {name: state[name] for name in self._state_names if name in state}
                state = {
                    name: value for name, value in state.items() if name not in (*self._state_names, *self._others)
                }
            if not isinstance(state, dict) or state:
                rest[key] = state
        self._check_groups(state_dict["param_groups"])
        for param, state in ours.items():
            if state:
                self._check_state(param, state)
        current = []  # the wrapper's numbers, for saved groups that lack them
        for group in self.param_groups:
            current.append({name: group[name] for name in self._group_defaults})
            current[-1].update({name: self._group_defaults[name] for name in self._runs})
        groups = [{**own, **saved} for own, saved in zip(current, state_dict["param_groups"], strict=True)]
        self._inner.load_state_dict({**state_dict, "state": rest, "param_groups": groups})
        self._drop_none()
        for param, state in ours.items():
            if state:
                self.state[param].update({name: self._placed(name, value, param) for name, value in state.items()})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        """Raise ValueError if a saved run cannot be continued."""

    def _check_state(self, param: Tensor, state: State) -> None:
        """Raise ValueError if a saved state does not fit its parameter."""

    def _placed(self, name: str, value: Any, param: Tensor) -> Any:
        """Return a loaded value on the device where a step needs it."""
        if not isinstance(value, Tensor):
            return value
        # counts stay where the host reads them
        return value.detach().to(param.device if value.is_floating_point() else torch.device("cpu"), copy=True)

    def _described(self) -> str:
        """Describe the settings that are not in the groups."""
        return ""

    def __repr__(self) -> str:
        described = f"{self._described()}, " if self._described() else ""
        return f"{type(self).__name__}({described}{self._inner!r})"

    def _own(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_inner", "_group_defaults", *self._settings)}

    def __getstate__(self) -> dict[str, Any]:
        states = {param: state for param, state in self.state.items() if isinstance(state, dict)}
        if not any(state and state.keys() <= {*self._state_names} for state in states.values()):
            return self._own()
        # the inner optimizer has not made its state, and many cannot be unpickled with the wrapper's: take a copy
        # without that, which shares all tensors
        tensors = [x for param, state in states.items() for x in (param, *state.values()) if isinstance(x, Tensor)]
        tensors += chain.from_iterable(group["params"] for group in self.param_groups)
        with self._hidden() as hidden:
            inner = copy.deepcopy(self._inner, {id(x): x for x in tensors})
            return {**self._own(), "_inner": inner, "_hidden_state": hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: value for name, value in state.items() if name != "_hidden_state"})
        for param, hidden in state.get("_hidden_state", {}).items():
            if hidden:
                self.state[param].update(hidden)
        self._begin()

    def __copy__(self) -> Wrapper:
        """Return a wrapper around the same optimizer."""
        copied = type(self).__new__(type(self))
        copied.__setstate__(self._own())
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Wrapper:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        with self._hidden() as hidden:  # as many optimizers cannot be copied with it
            copied.__setstate__(copy.deepcopy({**self._own(), "_hidden_state": hidden}, memo))
        return copied


def check_saved(name: str, value: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError if the tensor that was saved under a name has another shape."""
    if value.shape != torch.Size(shape):
        raise ValueError(
            f"state_dict: {name} of a parameter has shape {tuple(value.shape)}, and not {tuple(shape)}: construct the "
            "optimizer as it was when that was saved, or take those entries out to start afresh"
        )


def by_kind(parts: Sequence[Part], kind: Callable[[Part], _Kind]) -> list[tuple[_Kind, list[Part]]]:
    """Group the parts by kind, device, mesh and dtype into lists that one torch._foreach operation can take."""
    lists: dict[Any, tuple[_Kind, list[Part]]] = {}
    for part in parts:
        part_kind = kind(part)
        key = (part_kind, part.grad.device, mesh_of(part.grad), part.grad.dtype)
        lists.setdefault(key, (part_kind, []))[1].append(part)
    return list(lists.values())


@contextmanager
def _replaced(parts: Sequence[Part], grads: Sequence[Tensor], params: Iterator[Tensor]) -> Iterator[None]:
    """Replace the gradients inside the context, keeping their dtypes; other parameters have none meanwhile."""
    kept = {param: param.grad for param in params}
    new = {part.param: grad for part, grad in zip(parts, grads, strict=True)}
    try:
        for param in kept:
            grad = new.get(param)
            if grad is not None:
                old = kept[param]
                grad = torch.view_as_complex(grad) if param.is_complex() else grad
                # a parameter may ask for gradients of another dtype than its own (from torch 2.10 on)
                expected = getattr(param, "grad_dtype", None) or param.dtype
                grad = grad.to(expected if old is None else old.dtype)
            param.grad = grad
        yield
    finally:
        for param, grad in kept.items():
            param.grad = grad
