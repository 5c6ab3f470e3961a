"""What all optimizers around another one have in common: its groups, its state, and the order of a step."""

from __future__ import annotations

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
from .distributed import mesh_of
from .state.slots import State, check_shapes, in_order

_Kind = TypeVar("_Kind")


class Part(NamedTuple):
    """A parameter that has a gradient, with what belongs to it; as real tensors."""

    param: Tensor  # itself, which may be complex
    grad: Tensor  # without the loss scale
    state: State  # to be read: what is to be written goes into the optimizer's `state`
    group: dict[str, Any]


class Wrapper(Optimizer):
    """An optimizer around another, which is `optimizer`: the groups and the state are that one's.

    What a wrapper keeps of a parameter is in the state, too, under names of its own, so that it is in every checkpoint;
    the inner optimizer does not see it while it steps. Numbers that may change are in the groups.
    """

    _inner: Optimizer  # by this name alone here: Lightning's optimizers are of our class, and have an `optimizer`
    _group_defaults: dict[str, Any]
    _state_names: tuple[str, ...]  # what is in the state, of each parameter
    _settings: tuple[str, ...] = ()  # attributes that pickle and deepcopy keep
    _runs: tuple[str, ...] = ()  # what in the groups is no setting, but how far a run is
    _others: tuple[str, ...] = ()  # what others of its kind keep in the state
    _mark: str  # what is in the groups of an optimizer that another of its kind was around
    _rank: int  # it goes around optimizers of lower rank

    def __init__(self, optimizer: Optimizer, group_defaults: dict[str, Any]) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer is of type {type(optimizer).__name__}, and not a torch.optim.Optimizer: make one of your "
                "parameters, and give it here"
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
                f"{type(optimizer).__name__} evaluates its closure several times a step, and sees other gradients than "
                f"those that {type(self).__name__} makes: give an optimizer that takes a step without a closure"
            )
        self._inner, self._group_defaults = optimizer, group_defaults
        self._check({**group_defaults})
        for group in optimizer.param_groups:
            self._check({**group_defaults, **group})
        for group in optimizer.param_groups:
            if self._mark in group:  # another like this was around it
                group.update(group_defaults)
                for param in group["params"]:
                    for name in (*self._state_names, *self._others):
                        optimizer.state.get(param, {}).pop(name, None)
        self._fill_groups()
        self._begin()

    def _begin(self) -> None:
        # GradScaler's word for leaving its scale to the optimizer, and calling it where it has found infinity
        if self._always_unscales or getattr(self._inner, "_step_supports_amp_scaling", False):
            self._step_supports_amp_scaling = True
        super().__setstate__({})  # the hooks that every optimizer has

    _always_unscales = False

    def _fill_groups(self) -> None:
        """Give each group what it lacks; and Python's numbers for NumPy's, which weights_only=True does not read."""
        for group in self._inner.param_groups:
            for name, value in self._group_defaults.items():
                here = group.setdefault(name, value)
                if isinstance(here, Real) and type(here).__module__ != "builtins":
                    group[name] = int(here) if isinstance(here, Integral) else float(here)

    def _check(self, group: dict[str, Any]) -> None:
        """Raise TypeError or ValueError for a number that a group must not hold."""

    def __getattr__(self, name: str) -> Any:
        """Look up what this class lacks, such as schedule-free's ``train`` and ``eval``, in the inner optimizer."""
        if name.startswith("_") or "_inner" not in self.__dict__:  # which copying and pickling ask for first
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._inner, name)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that this one is around."""
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
        """Run the closure, if there is one, and take a step; ``p.grad`` is afterwards what it was after the closure.

        Under a GradScaler that leaves its scale to the optimizer, gradients are divided by it, and nothing is done
        where it has found infinity, which is read back from a GPU.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            found_inf = getattr(self, "found_inf", None)
            self._step(bool(found_inf))  # GradScaler's 0 is no tensor where there are no gradients
        return loss

    @_disable_dynamo  # Python's numbers decide what is done; what to compile is the inner optimizer's step
    def _step(self, overflows: bool) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph cannot capture a step of {type(self).__name__}, in which Python counts: capture that of "
                "GrokAdamW, which has the filter, with capturable=True"
            )
        if overflows:
            self._skip()
            return
        self._fill_groups()  # of which the inner optimizer may have got another
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
        """Raise RuntimeError if what is kept for a parameter no longer has its shape."""
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            state = self.state.get(param)
            if isinstance(state, dict):
                check_shapes(state, self._state_names, param)

    def _skip(self) -> None:
        """Do what is due at a step in which GradScaler has found infinity."""

    def _take(self, parts: list[Part]) -> None:
        """Take a step with these gradients."""
        raise NotImplementedError

    def _make_state(self, parts: list[Part]) -> None:
        """Make the state that a checkpoint of these parameters is loaded into."""
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
                        f"parameter {j} of group {i} has a float16 gradient, and GradScaler's scale to be divided by: "
                        "under GradScaler keep parameters in float32, and compute in float16 by torch.autocast"
                    )
                grad = as_real(param.grad.resolve_conj())
                if scale is not None:
                    grad = grad / (scale.to(grad.device) if isinstance(scale, Tensor) else scale)
                parts.append(Part(param, grad, self.state.get(param, {}), group))
        return parts

    def _is_for_state_alone(self, parts: list[Part]) -> bool:
        """Return True if torch.distributed.checkpoint takes this step, to have the state made that it loads into.

        There is no state yet, the learning rate is 0, and so are the gradients.
        """
        if not parts or any(not isinstance(state, dict) or state for state in self.state.values()):
            return False
        lrs = [group.get("lr") for group in self.param_groups]  # None is some optimizers' word for their own
        if any(lr is None or float(lr) != 0 for lr in lrs):
            return False
        return not any(part.grad.any() for part in parts)

    def _inner_step(self, parts: Sequence[Part], grads: Sequence[Tensor]) -> None:
        """Let the inner optimizer step with other gradients, which are real; no parameter but these has one."""
        with self._hidden(), _replaced(parts, grads, chain.from_iterable(g["params"] for g in self.param_groups)):
            self._inner.step()

    @contextmanager
    def _hidden(self) -> Iterator[None]:
        """Inside, the state is as if the inner optimizer were alone: many of them ask whether it is empty."""
        states = {param: state for param, state in self.state.items() if isinstance(state, dict)}
        hidden: dict[Tensor, State] = {}
        for param, state in states.items():
            hidden[param] = {name: state.pop(name) for name in self._state_names if name in state}
            if not state:
                del self.state[param]
        try:
            yield
        finally:
            for param, ours in hidden.items():
                inner = self.state.get(param)
                state = states[param]  # the same dict as before, which state dicts share
                if inner is not state:
                    state.update(inner or {})
                state.update(ours)
                if state:
                    self.state[param] = state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as the inner optimizer does; it may set this one's numbers, too."""
        self._check({**self._group_defaults, **param_group})
        self._inner.add_param_group(param_group)
        self._fill_groups()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict, of which this one's memory is a part.

        So each loads what the other has saved; an inner optimizer that has not stepped yet has nothing to be loaded.
        """
        self._fill_groups()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict = self._inner.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, as the inner optimizer does; what this one keeps comes back in its own dtype.

        A checkpoint of the inner optimizer alone is gone on from: what it does not know starts afresh.

        Raises:
            ValueError: that is no optimizer's state dict, or does not fit. Nothing was loaded then.
        """
        if not is_state_dict(state_dict):
            raise ValueError(
                "state_dict is no optimizer's, which has 'state' and 'param_groups': give what state_dict() returned, "
                "and of a checkpoint the part that holds it"
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
        known = []  # what the saved groups do not say of this one
        for group in self.param_groups:
            known.append({name: group[name] for name in self._group_defaults})
            known[-1].update({name: self._group_defaults[name] for name in self._runs})
        groups = [{**mine, **saved} for mine, saved in zip(known, state_dict["param_groups"], strict=True)]
        self._inner.load_state_dict({**state_dict, "state": rest, "param_groups": groups})
        for param, state in ours.items():
            if state:
                self.state[param].update({name: self._placed(name, value, param) for name, value in state.items()})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        """Raise ValueError where a run that was saved cannot be gone on from."""

    def _check_state(self, param: Tensor, state: State) -> None:
        """Raise ValueError where what was saved of a parameter does not fit it."""

    def _placed(self, name: str, value: Any, param: Tensor) -> Any:
        """Return a loaded value where a step wants it."""
        if not isinstance(value, Tensor):
            return value
        # a count stays where the host reads it
        return value.detach().to(param.device if value.is_floating_point() else torch.device("cpu"), copy=True)

    def _described(self) -> str:
        """Return the settings that are not in the groups."""
        return ""

    def __repr__(self) -> str:
        described = f"{self._described()}, " if self._described() else ""
        return f"{type(self).__name__}({described}{self._inner!r})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_inner", "_group_defaults", *self._settings)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


def check_saved(name: str, value: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError where what was saved under that name has another shape."""
    if value.shape != torch.Size(shape):
        raise ValueError(
            f"state_dict: {name} of a parameter has shape {tuple(value.shape)}, and not {tuple(shape)}: construct the "
            "optimizer as it was when that was saved, or take those entries out to start afresh"
        )


def by_kind(parts: Sequence[Part], kind: Callable[[Part], _Kind]) -> list[tuple[_Kind, list[Part]]]:
    """Return the parts in lists of one kind, which one of torch's operations on lists can take."""
    lists: dict[Any, tuple[_Kind, list[Part]]] = {}
    for part in parts:
        its = kind(part)
        key = (its, part.grad.device, mesh_of(part.grad), part.grad.dtype)
        lists.setdefault(key, (its, []))[1].append(part)
    return list(lists.values())


@contextmanager
def _replaced(parts: Sequence[Part], grads: Sequence[Tensor], params: Iterator[Tensor]) -> Iterator[None]:
    """Inside, the gradients are others, in the dtype that they had, and those of all other parameters are away."""
    kept = {param: param.grad for param in params}
    new = {part.param: grad for part, grad in zip(parts, grads, strict=True)}
    try:
        for param in kept:
            grad = new.get(param)
            if grad is not None:
                old = kept[param]
                grad = torch.view_as_complex(grad) if param.is_complex() else grad
                grad = grad.to(param.dtype if old is None else old.dtype)
            param.grad = grad
        yield
    finally:
        for param, grad in kept.items():
            param.grad = grad
