"""The base class of optimizers that wrap another one: how such a wrapper takes a step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from itertools import chain, product
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing the compiler
from torch.optim import Optimizer

from ._numbers import as_real, resolved
from ._warn import warn
from ._wrapper_base import WrapperBase
from .distributed import check_agreed, is_for_state_alone, overflow_of_all
from .shards import mesh_of
from .state.slots import State, check_grad, check_shapes

_Kind = TypeVar("_Kind")


class Part(NamedTuple):
    """A parameter that has a gradient, with its gradient, state and group."""

    param: Tensor  # may be complex
    grad: Tensor  # a real tensor, divided by the loss scale
    state: State  # read only: write to the optimizer's `state`
    group: dict[str, Any]


class Wrapper(WrapperBase):
    """An optimizer that wraps another one: it computes new gradients, and the inner optimizer steps with them."""

    def __init__(self, optimizer: Optimizer, group_defaults: dict[str, Any]) -> None:
        if not isinstance(optimizer, Optimizer):
            is_class = isinstance(optimizer, type)
            what = f"the class {optimizer.__name__}" if is_class else f"of type {type(optimizer).__name__}"
            raise TypeError(
                f"optimizer is {what}, and not a torch.optim.Optimizer: make one from your parameters, and give it here"
            )
        self._inner, self._group_defaults = optimizer, group_defaults
        *wrappers, innermost = self._inside()
        for wrapper in wrappers:
            if wrapper._level >= self._level:
                raise ValueError(
                    f"{type(self).__name__} cannot wrap {type(wrapper).__name__}: use at most one filter, and put "
                    "Accumulate outermost, as in Accumulate(Grokfast(optimizer), steps)"
                )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(
                f"{type(self).__name__} cannot wrap {type(optimizer).__name__}, which evaluates its closure several "
                "times per step, and so overwrites the gradients: use an optimizer whose step() needs no closure"
            )
        self._check_innermost(innermost)
        self._check_not_early()
        self._drop_none()
        for group in optimizer.param_groups:
            self._check({**group_defaults, **group})
        # groups and states that belonged to another wrapper of this kind
        groups = [group for group in optimizer.param_groups if self._mark in group]
        states = [optimizer.state.get(param, {}) for group in groups for param in group["params"]]
        entries = (self._state_names, *self._others)
        if any(int(state.get(names[-1], 0)) > 0 for state, names in product(states, entries)):
            warn(
                "the optimizer's state has entries of another wrapper, which are dropped: to continue a run, put the "
                "same wrapper around a new optimizer first, and call the wrapper's load_state_dict",
                UserWarning,
            )
        for group in groups:
            group.update(group_defaults)
        for state, name in product(states, chain(*entries)):
            state.pop(name, None)
        self._fill_groups()
        self._begin()

    def _check_innermost(self, inner: Optimizer) -> None:
        """Raise ValueError if this wrapper cannot work with the innermost optimizer."""
        if getattr(inner, "_overlap_with_ddp", False):
            raise ValueError(
                "ZeroRedundancyOptimizer with overlap_with_ddp=True steps inside DDP's backward pass, without the "
                f"gradients that {type(self).__name__} makes: leave overlap_with_ddp out"
            )
        if any(group.get("differentiable") for group in inner.param_groups):
            raise ValueError(
                f"{type(self).__name__} cannot wrap an optimizer with differentiable=True, because it steps without an "
                "autograd graph: leave one of them out"
            )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, after running the closure if there is one. ``p.grad`` stays as the closure left it.

        If GradScaler leaves unscaling to the optimizer, gradients are divided by the loss scale, and the step is
        skipped if GradScaler found infinity. GradScaler's flag is read back from a GPU.

        Returns:
            The closure's return value; None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step(getattr(self, "found_inf", None))  # without gradients GradScaler gives a plain 0
        return loss

    @_disable_dynamo  # a step branches on Python numbers; compile the inner optimizer's step instead
    def _step(self, found_inf: Any) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph cannot capture a step of {type(self).__name__}, which counts in Python: capture a step "
                "of GrokAdamW, which has the filter, with capturable=True"
            )
        self._check_not_early()
        if self._overflows(found_inf):
            self._skip()
            return
        self._fill_groups()  # the inner optimizer may have a new group
        for group in self.param_groups:
            self._check(group)
        self._check_kept()
        parts = self._parts()
        has_state = any(not isinstance(state, dict) or state for state in self.state.values())
        if not has_state and is_for_state_alone():
            self._inner.step()
            self._make_state(parts)
            return
        without = [part.param for part in parts if self._state_names[-1] not in part.state]
        try:
            self._take(parts)
        except BaseException:
            self._forget_state(without)
            raise

    def _overflows(self, found_inf: Any) -> bool:
        """Return True if GradScaler found infinity. Raise RuntimeError if only some ranks of the shard_group did."""
        flag = overflow_of_all(found_inf, self.param_groups, self._shard_group)
        found = 0.0 if flag is None else float(flag)  # waits for the device
        check_agreed(found, self._shard_group)
        return found != 0

    def _check_not_early(self) -> None:
        """Raise ValueError if step_in_backward is on: gradients would be used before this wrapper sees them."""
        if getattr(self._innermost_run, "in_backward", None) is not None:
            name = type(self).__name__
            raise ValueError(
                f"{name} does not work with step_in_backward, which updates parameters before {name} sees their "
                "gradients: leave one of them out. GrokAdamW has a filter of its own, and accumulation_steps"
            )

    def _check_kept(self) -> None:
        """Raise RuntimeError if a parameter's state is missing, or no longer has the parameter's shape."""
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
        """Take a step with these gradients. Every wrapper defines this."""
        raise NotImplementedError

    def _make_state(self, parts: list[Part]) -> None:
        """Create the state that these parameters lack, initialised to zero. Every wrapper defines this."""
        raise NotImplementedError

    def _parts(self) -> list[Part]:
        scale = getattr(self, "grad_scale", None)
        parts = []
        for i, group in enumerate(self.param_groups):
            for j, param in enumerate(group["params"]):
                if param.grad is None:
                    continue
                try:
                    check_grad(param, param.grad)
                except RuntimeError as error:
                    raise RuntimeError(f"parameter {j} of group {i}: {error}") from None
                if scale is not None and param.grad.dtype == torch.float16:
                    raise ValueError(
                        f"parameter {j} of group {i} has a float16 gradient, which cannot be divided by GradScaler's "
                        "scale: under GradScaler keep parameters in float32, and compute in float16 by torch.autocast"
                    )
                grad = as_real(resolved(param.grad))
                if scale is not None:
                    grad = grad / (scale.to(grad.device) if isinstance(scale, Tensor) else scale)
                parts.append(Part(param, grad, self.state.get(param, {}), group))
        return parts

    def _forget_state(self, params: Sequence[Tensor]) -> None:
        """Remove this wrapper's state of these parameters."""
        for param in params:
            state = self.state.get(param, {})
            for name in self._state_names:
                state.pop(name, None)
            if not state:
                self.state.pop(param, None)

    @property
    def _shard_group(self) -> Any:
        """The shard_group of a GrokAdamW inside; None without one, as with ZeRO, whose wrapper has all gradients."""
        return getattr(self._innermost_run, "shard_group", None)

    @property
    def _innermost_run(self) -> Any:
        """The `Run` of the GrokAdamW inside; None if there is none."""
        return getattr(self._inside()[-1], "_run", None)

    def _widen(self, part: Part, name: str) -> None:
        """Convert a tensor of the state if the gradient has more precision, as after `model.double()`."""
        kept = part.state.get(name)
        if kept is not None and (dtype := torch.promote_types(kept.dtype, part.grad.dtype)) != kept.dtype:
            self.state[part.param][name] = kept.to(dtype)

    def _inner_step(self, parts: Sequence[Part], grads: Sequence[Tensor]) -> None:
        """Step the inner optimizer with these gradients (real tensors), in the dtypes of the parameters' own.

        Other parameters have no gradient meanwhile.
        """
        kept = {param: param.grad for group in self.param_groups for param in group["params"]}
        new = {part.param: grad for part, grad in zip(parts, grads, strict=True)}
        try:
            for param, old in kept.items():
                grad = new.get(param)
                if grad is not None:
                    grad = torch.view_as_complex(grad) if param.is_complex() else grad
                    # from torch 2.10 on, a parameter may ask for gradients of another dtype than its own
                    expected = getattr(param, "grad_dtype", None) or param.dtype
                    grad = grad.to(expected if old is None else old.dtype)
                param.grad = grad
            with self._hidden():
                self._inner.step()
        finally:
            for param, old in kept.items():
                param.grad = old


def by_kind(parts: Sequence[Part], kind: Callable[[Part], _Kind]) -> list[tuple[_Kind, list[Part]]]:
    """Group the parts by kind, device, mesh and dtype into lists that one torch._foreach operation can take."""
    lists: dict[Any, tuple[_Kind, list[Part]]] = {}
    for part in parts:
        part_kind = kind(part)
        key = (part_kind, part.grad.device, mesh_of(part.grad), part.grad.dtype)
        lists.setdefault(key, (part_kind, []))[1].append(part)
    return list(lists.values())
