"""The parts of wrappers that act between steps: shared groups and state, checkpoints, pickles and copies."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._numbers import plain
from .checkpoints import check_form, with_whole_states, without_wrappers
from .state.loading import check_count_loaded, check_sharding, in_order
from .state.slots import State

_W = TypeVar("_W", bound="WrapperBase")


class WrapperBase(Optimizer):
    """An optimizer that wraps another one, `optimizer`, and shares its groups and state.

    A wrapper's own tensors are in that state, too, under names of their own, so that every checkpoint has them. The
    inner optimizer does not see them while it steps. Numbers that may change are in the groups.
    """

    _inner: Optimizer  # always use this name: Lightning's optimizers subclass ours and redefine `optimizer`
    _group_defaults: dict[str, Any]
    _state_names: tuple[str, ...]  # the wrapper's entries in each parameter's state
    _settings: tuple[str, ...] = ()  # attributes that pickle and deepcopy keep
    _prefixes: tuple[str, ...]  # prefixes of its group keys and state entries, and of those of wrappers inside
    _runs: tuple[str, ...] = ()  # its group keys that hold the progress of a run, not settings
    _others: tuple[tuple[str, ...], ...] = ()  # state names of each other wrapper; a count comes last in all
    _mark: str  # a group key which shows that a wrapper of this kind was around the optimizer
    _level: int  # it may only wrap wrappers of a lower level
    _always_unscales = False

    def _begin(self) -> None:
        # GradScaler then leaves unscaling to the optimizer, and calls the optimizer even if it found infinity
        if self._always_unscales or getattr(self._inner, "_step_supports_amp_scaling", False):
            self._step_supports_amp_scaling = True
        super().__setstate__({})  # creates the hooks that every optimizer has

    def _drop_none(self) -> None:
        """Remove None from the state. ZeroRedundancyOptimizer loads it for parameters that other ranks step."""
        for param in [param for param, state in self.state.items() if state is None]:
            del self.state[param]

    def _fill_groups(self) -> None:
        """Add missing keys to each group, and turn NumPy numbers into Python numbers."""
        for group in self._inner.param_groups:
            for name, value in self._group_defaults.items():
                group[name] = plain(group.get(name, value))

    def _check(self, group: dict[str, Any]) -> None:
        """Raise TypeError or ValueError if a group holds a number that is not allowed."""

    def __getattr__(self, name: str) -> Any:
        """Look up attributes that this class lacks, such as schedule-free's ``train``, in the inner optimizer."""
        if name.startswith("_") or "_inner" not in self.__dict__:  # copy and pickle ask before it is set
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name == "memory":
            inside = self._inside()
            if hasattr(inside[-1], "memory"):
                path = ".".join(["optimizer"] * (len(inside) + 1))
                raise AttributeError(
                    f"memory() of {type(inside[-1]).__name__} does not count the tensors of {type(self).__name__}: "
                    f"call {path}.memory(), and add those tensors of optimizer.state whose names begin with "
                    "accumulated or grokfast"
                )
        if name == "record" and not hasattr(self._inner, name):
            raise AttributeError(
                f"only GrokAdamW has record(), and there is none inside this {type(self).__name__}. Grokfast's "
                "amplify_when may be a function that reads your losses, or AccuracyGap(), with a record() of its own"
            )
        return getattr(self._inner, name)

    def _inside(self) -> list[Any]:
        """Return the optimizers inside this one: the wrappers, outermost first, and last the innermost optimizer."""
        inside: list[Any] = [self._inner]
        while isinstance(inside[-1], WrapperBase):
            inside.append(inside[-1]._inner)
        return inside

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

    @contextmanager
    def _hidden(self) -> Iterator[dict[Tensor, State]]:
        """Hide the wrapper's state inside the context, and yield it.

        Many optimizers check if a parameter's state is empty, so they must not find the wrapper's entries there.
        """
        states = {param: state for param, state in self.state.items() if isinstance(state, dict)}
        hidden = {p: {name: state[name] for name in self._state_names if name in state} for p, state in states.items()}
        try:
            for param, ours in hidden.items():
                for name in ours:
                    del states[param][name]
                if not states[param]:
                    del self.state[param]
            yield hidden
        finally:
            for param, ours in hidden.items():
                inner = self.state.get(param)
                state = states[param]  # keep the same dict object, which state dicts share
                if inner is not state:  # the inner optimizer made a new dict, or the state was empty
                    state.clear()
                    state.update(inner or {})
                state.update(ours)
                if state:
                    self.state[param] = state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the inner optimizer. The group may also set this wrapper's numbers."""
        self._check({**self._group_defaults, **param_group})
        self._inner.add_param_group(param_group)
        self._fill_groups()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict, which includes the wrapper's state.

        The wrapper and the inner optimizer can therefore load each other's state dicts. Before the inner optimizer's
        first step, the state dict has nothing for it to load.
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
        """Add the wrapper's entries that the inner optimizer left out, as ZeroRedundancyOptimizer does."""
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(keys, params, strict=False):
            state, saved = self.state.get(param, {}), state_dict["state"].get(key, {})
            own = {name: state[name] for name in self._state_names if name in state and name not in saved}
            if own:
                state_dict["state"][key] = {**saved, **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict into the inner optimizer and this wrapper, whose state keeps its own dtype.

        A checkpoint of the inner optimizer alone can be loaded, too. The wrapper's state then starts from scratch.

        Raises:
            ValueError: this is not an optimizer's state dict, or it does not fit. Then nothing was loaded.
        """
        check_form(state_dict)
        self._fill_groups()
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        state_dict = in_order(with_whole_states(state_dict), self.param_groups)
        state_dict = without_wrappers(state_dict, but=self._prefixes)
        states, inner_states = self._divided(state_dict)
        self._check_groups(state_dict["param_groups"])
        for param, state in states.items():
            if missing := [name for name in self._state_names if name not in state]:
                raise ValueError(
                    f"state_dict: a parameter's state has {next(iter(state))} without {', '.join(missing)}: remove "
                    f"{', '.join(self._state_names)} from each state to start from scratch"
                )
            self._check_kinds(state)
            self._check_state(param, state)
            for name in self._state_names[:-1]:
                check_sharding(f"{name} of a parameter", state[name], param)
        groups = []
        for i, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=True)):
            # saved groups that lack this wrapper's numbers get the current ones, and their progress starts over
            current = {name: group[name] for name in self._group_defaults if name not in self._runs}
            groups.append({**self._group_defaults, **current, **saved})
            try:
                self._check(groups[i])
            except (TypeError, ValueError) as error:
                raise ValueError(f"state_dict: param_groups[{i}] cannot be loaded, as {error}") from None
        placed = {p: {name: self._placed(name, x, p) for name, x in state.items()} for p, state in states.items()}
        self._inner.load_state_dict({**state_dict, "state": inner_states, "param_groups": groups})
        self._drop_none()
        for param, state in placed.items():
            self.state[param].update(state)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _divided(self, state_dict: dict[str, Any]) -> tuple[dict[Tensor, State], dict[Any, Any]]:
        """Split a saved state into this wrapper's part, by parameter, and the inner optimizer's part, by key."""
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = dict(zip(keys, chain.from_iterable(group["params"] for group in self.param_groups), strict=False))
        not_inner = {*self._state_names, *chain(*self._others)}
        states: dict[Tensor, State] = {}
        inner_states: dict[Any, Any] = {}
        for key, state in state_dict["state"].items():
            if key in params and isinstance(state, dict):
                if found := {name: state[name] for name in self._state_names if name in state}:
                    states[params[key]] = found
                state = {name: value for name, value in state.items() if name not in not_inner}
            if not isinstance(state, dict) or state:
                inner_states[key] = state
        return states, inner_states

    def _check_kinds(self, state: State) -> None:
        """Raise ValueError unless a saved state holds tensors and, as its last entry, the number of their gradients."""
        *tensors, count = self._state_names
        for name in tensors:
            if not isinstance(state[name], Tensor):
                raise ValueError(f"state_dict: {name} of a parameter is {state[name]!r:.40}, not a tensor")
        check_count_loaded(f"{count} of a parameter", state[count])

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        """Raise ValueError if a saved run cannot be continued."""

    def _check_state(self, param: Tensor, state: State) -> None:
        """Raise ValueError if a saved state does not fit its parameter."""

    def _placed(self, name: str, value: Any, param: Tensor) -> Any:
        """Return a loaded value on the device where a step needs it."""
        if not isinstance(value, Tensor):
            return value
        # counts stay on the CPU, where the host reads them
        return value.detach().to(param.device if value.is_floating_point() else torch.device("cpu"), copy=True)

    def _described(self) -> str:
        """Describe the settings that are not in the groups. Every wrapper defines this."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._described()}, {self._inner!r})"

    def _own(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("_inner", "_group_defaults", *self._settings)}

    def __getstate__(self) -> dict[str, Any]:
        states = {param: state for param, state in self.state.items() if isinstance(state, dict)}
        if not any(state and state.keys() <= {*self._state_names} for state in states.values()):
            return self._own()
        # the inner optimizer has no state yet, and many optimizers cannot be unpickled with the wrapper's entries:
        # pickle a copy without them, which shares all tensors
        tensors = [x for param, state in states.items() for x in (param, *state.values()) if isinstance(x, Tensor)]
        tensors += chain.from_iterable(group["params"] for group in self.param_groups)
        with self._hidden() as hidden:
            inner = copy.deepcopy(self._inner, {id(x): x for x in tensors})
            return {**self._own(), "_inner": inner, "_hidden_state": hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if name in ("state", "param_groups"):  # the inner optimizer has these
                setattr(self, name, value)
            elif name not in ("_hidden_state", "defaults"):
                self.__dict__[name] = value
        for param, hidden in state.get("_hidden_state", {}).items():
            if hidden:
                self.state[param].update(hidden)
        self._begin()

    def __copy__(self: _W) -> _W:
        """Return another wrapper around the same inner optimizer."""
        copied = type(self).__new__(type(self))
        copied.__setstate__(self._own())
        return copied

    def __deepcopy__(self: _W, memo: dict[int, Any]) -> _W:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        with self._hidden() as hidden:  # many optimizers cannot be copied with it
            copied.__setstate__(copy.deepcopy({**self._own(), "_hidden_state": hidden}, memo))
        return copied


def check_saved(name: str, value: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError if the tensor saved under a name does not have this shape."""
    if value.shape != torch.Size(shape):
        raise ValueError(
            f"state_dict: {name} of a parameter has shape {tuple(value.shape)}, and not {tuple(shape)}: construct the "
            "optimizer as it was when that was saved, or remove those entries to start from scratch"
        )
