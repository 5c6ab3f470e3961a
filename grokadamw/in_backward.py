"""Gradient release: the backward pass updates each parameter once its gradient is ready, and frees the gradient."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing the compiler
from torch.utils.hooks import RemovableHandle

from ._warn import warn
from .backends.gpu_tables import Tables
from .backends.types import Calls
from .ddp import why_not_early
from .grokadamw import GrokAdamW
from .layers import name_of
from .options import refuse, rules_of
from .param_groups import check_changed
from .signals import SlowGradient
from .step import stages
from .step.alpha import Signals, effects_of
from .step.batches import Given
from .step.cache import Cache
from .step.metrics import LastStep
from .step.norm import NormSoFar
from .step.run import Run

__all__ = ["StepInBackward", "step_in_backward"]

_QUIET = 1  # `count_skipped` warns if the count was 0: a count that begins at 1 leaves the warning to `end`
_SCALED = (
    "GradScaler with step_in_backward: this pass has used gradients before they could be unscaled. Compute in "
    "bfloat16, which needs no GradScaler, and start from the last checkpoint; or call the handle's remove()"
)
_TWICE = (
    "{} got a second gradient before optimizer.step() with step_in_backward, and was updated with the first. Call "
    "optimizer.step() after each backward(); for micro-batches, construct GrokAdamW(..., accumulation_steps=k, "
    'second_moment="raw"). After a backward pass that failed, call optimizer.zero_grad() and optimizer.step(). A '
    "parameter that is shared with a checkpointed segment needs use_reentrant=False"
)


def step_in_backward(optimizer: GrokAdamW, *, clip_by: str | None = None) -> StepInBackward:
    """Update each parameter in the backward pass, as soon as its gradient is ready, and free that gradient.

    The gradients of the whole model are then never in memory at once. Without clipping, the result is the same as that
    of ``step()``, bit for bit (with ``foreach=True`` or ``fused=False``: up to rounding).

    ```python
    handle = step_in_backward(optimizer)
    for x, y in batches:
        loss(model(x), y).backward()  # updates parameters
        optimizer.step()              # ends the pass
        scheduler.step()
    handle.remove()
    ```

    Call ``step()`` after each backward pass, as usual; schedulers and frameworks rely on it. It updates parameters that
    have a gradient but were not updated yet, counts the step or micro-batch, and calls step hooks. ``step(closure)``
    first runs the closure, whose backward pass updates parameters. ``zero_grad()`` does no harm.

    Signals are evaluated once per backward pass, before its first update, so call ``record`` before ``backward``. At
    that time only one gradient exists, so signals must not read gradients, and ``SlowGradient`` is refused. With
    ``accumulation_steps``, each backward pass is a micro-batch. ``nonfinite`` acts on each parameter separately:
    ``"skip"`` leaves out that parameter, and ``metrics()["skipped_steps"]`` counts how often that happened; ``"raise"``
    raises an error after earlier parameters of the pass were written.

    Args:
        optimizer: a GrokAdamW, without ``Grokfast`` or ``Accumulate`` around it. Its parameters must not be DTensors,
            nor be in a DDP or FSDP model.
        clip_by: required if ``gradient_clipping`` is above 0, as the norm N of all gradients is only known at the end
            of the pass. ``"last"``: N is that of the last pass, or of this pass's gradients so far if that is larger,
            as in the first pass. Checkpoints save N. Each group's ``gradient_clipping`` is still its limit.

    Returns:
        A handle that is also a context manager. Its ``remove()``, or leaving the context, ends an open pass and
        restores the usual ``step()``. The optimizer keeps the handle, so you need not keep it.

    Raises:
        TypeError, ValueError: the optimizer, or one of its options, does not work with this.
        RuntimeError: it is already on for this optimizer; or, in ``backward``, a parameter gets a second gradient
            before ``step()``.
    """
    return StepInBackward(optimizer, clip_by)


class StepInBackward:
    """The handle that ``step_in_backward`` returns. Its ``remove()`` restores the usual ``step()``."""

    def __init__(self, optimizer: GrokAdamW, clip_by: str | None) -> None:
        if not isinstance(optimizer, GrokAdamW):
            raise TypeError(
                f"optimizer is of type {type(optimizer).__name__}: give a GrokAdamW, without Accumulate or Grokfast "
                "around it"
            )
        if clip_by not in (None, "last"):
            raise ValueError(f'clip_by={clip_by!r} is unknown: give "last", or set gradient_clipping=0')
        if optimizer._run.in_backward is not None:
            raise RuntimeError("step_in_backward is already on for this optimizer: call its handle's remove() first")
        self._clip_by = clip_by
        optimizer._complete_groups()
        self._check(optimizer, and_wrappers=True)
        self._optimizer = weakref.ref(optimizer)  # weak, as the optimizer keeps this object
        self._one = Run(Signals([]), in_backward=weakref.proxy(self))  # the run of one parameter's step
        self._caches, self._hooks = dict[Tensor, Cache](), dict[Tensor, RemovableHandle]()
        self._lock = threading.RLock()  # autograd has a thread for each device
        self._begun, self.is_open = 0, False  # how many passes have begun, and whether a pass is open
        self._places: dict[Tensor, tuple[int, int, int]] = {}  # each parameter's group, place in the group, and index
        self._updated, self._norm = set[Tensor](), NormSoFar(0.0)  # in this pass
        self.is_clipped = False  # True if any group is clipped: then all gradients of the pass count in its norm
        self._skipped = list[str]()  # names of updated parameters whose gradients were not finite
        self._watch(optimizer)
        optimizer._run.in_backward = self
        optimizer._step_supports_amp_scaling = True  # so that `end` sees a GradScaler

    def remove(self) -> None:
        """Restore the usual ``step()``, which updates all parameters. An open pass is ended first."""
        optimizer = self._optimizer()
        is_on = optimizer is not None and optimizer._run.in_backward is self
        try:
            if optimizer is not None and is_on and self.is_open:
                optimizer.step()
        finally:
            if optimizer is not None and is_on:
                optimizer._run.in_backward = None
                optimizer._set_amp_support()
            for hook in self._hooks.values():
                hook.remove()
            self._hooks.clear()

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        optimizer = self._optimizer()
        if error is not None and optimizer is not None:
            optimizer.zero_grad()  # drop the gradients of a failed pass, so that ending it cannot fail
        self.remove()

    def end(self, optimizer: GrokAdamW, given: Given) -> tuple[Calls, Tables | None]:
        """End the pass for ``step()``: return the updates that remain to be done, and count the pass."""
        if given.scale is not None or given.found_inf is not None:
            # GradScaler leaves its attributes and scaled gradients behind; the next step must not see them
            for name in ("grad_scale", "found_inf"):
                optimizer.__dict__.pop(name, None)
            optimizer.zero_grad()
            self.is_open = False
            raise RuntimeError(_SCALED)
        with self._lock:
            run = optimizer._run
            if not stages.check_given(run, given):
                return [], None
            if not self.is_open:
                self._begin(optimizer)
            groups = optimizer.param_groups
            added = groups[len(run.last.effects) :]  # since the pass began
            effects = effects_of([run.last.signal] * len(added), added, rules_of(given.options))
            run.last = run.last._replace(effects=[*run.last.effects, *effects])
            left, tables = stages.prepare(run, given._replace(groups=groups, state=optimizer.state))
            calls = self._clipped(left, run.last, groups)
            if self._updated and given.options["accumulation_steps"] == 1:
                run.stepped = bool(calls) or len(self._skipped) < len(self._updated)
            clips = [self._norm.clip(group["gradient_clipping"]) for group in groups]
            run.last = run.last._replace(norm=self._norm.value, clips=clips)
            if self._skipped and groups[0]["skipped_steps"] == 0:
                names = ", ".join(self._skipped)
                warn(f"parameters were skipped, as their gradients hold NaN or infinity: {names}", RuntimeWarning)
            for group in groups:
                group["skipped_steps"] += len(self._skipped)
                if self._clip_by is not None:
                    group["last_norm"] = self._norm.to_remember
                for param in group["params"]:
                    param.grad = None
            self.is_open = False
            self._watch(optimizer)
            return calls, tables

    @property
    def has_updated(self) -> bool:
        """True if the open pass has updated parameters."""
        return self.is_open and bool(self._updated)

    def check_signals(self, signals: Signals) -> None:
        """Raise ValueError for a signal that reads gradients: when it is called, only one parameter has a gradient."""
        if any(isinstance(function, SlowGradient) for function in signals.functions):
            raise ValueError(
                "SlowGradient with step_in_backward: it reads the gradients of all parameters, and signals are called "
                "when the pass has the first of them. Choose another signal, or leave step_in_backward out"
            )

    def _begin(self, optimizer: GrokAdamW) -> None:
        """Begin a pass: do all that `GrokAdamW._prepared` does before batches are collected."""
        optimizer._complete_groups()
        groups, run = optimizer.param_groups, optimizer._run
        check_changed(groups, optimizer.defaults, run.checked, run.checked_layers)
        # a model may be wrapped later, and a search for wrappers may take 50 ms: search in passes 1, 2, 4, 8 and so on
        self._check(optimizer, and_wrappers=self._begun & (self._begun + 1) == 0)
        stages.begin(run, Given(groups, optimizer.state, optimizer.defaults))
        index, self._places = 0, {}
        for i, group in enumerate(optimizer.param_groups):  # after signals, which may replace them
            if len(group["layers"]) == len(group["params"]):  # else `end` raises
                self._places |= {param: (i, j, index + j) for j, param in enumerate(group["params"])}
            index += len(group["params"])
        self._updated.clear()
        self._skipped.clear()
        self._norm = NormSoFar(optimizer.param_groups[0]["last_norm"])
        self.is_clipped = any(group["gradient_clipping"] > 0 for group in optimizer.param_groups)
        self._begun, self.is_open = self._begun + 1, True

    @_disable_dynamo  # compiled autograd would trace the hook
    def _update(self, param: Tensor) -> None:
        """Update one parameter whose gradient is ready, and free the gradient."""
        optimizer = self._optimizer()
        if optimizer is None or param.grad is None:
            return
        with self._lock, torch.no_grad():
            if not self.is_open:
                self._begin(optimizer)
            if param not in self._places:
                return
            if param in self._updated:
                param.grad = None  # else `end` would use this gradient
                raise RuntimeError(_TWICE.format(name_of(param, optimizer.param_groups, optimizer._run.names)))
            run, one, (i, place, index) = optimizer._run, self._one, self._places[param]
            group = optimizer.param_groups[i]
            alone = {**group, "skipped_steps": _QUIET}
            alone |= {name: [group[name][place]] for name in ("params", "layers", "param_names") if name in group}
            one.cache = self._caches.setdefault(param, Cache())
            one.last = LastStep(run.last.signal, run.last.effects[i : i + 1])
            one.skipped, one.names = run.skipped, run.names
            given = Given([alone], optimizer.state, optimizer.defaults, first_index=index)
            if optimizer.defaults["nonfinite"] == "raise":
                stages.check_finite(one, given)
            calls, tables = stages.prepare(one, given)
            run.skipped = one.skipped
            stages.write(self._clipped(calls, one.last, [alone]), tables)
            self._updated.add(param)
            if alone["skipped_steps"] > _QUIET:  # its gradient was not finite
                self._skipped.append(name_of(param, [alone], run.names))
            param.grad = None

    def _clipped(self, calls: Calls, last: LastStep, groups: Sequence[dict[str, Any]]) -> Calls:
        """Add these gradients to the pass's norm, and return the calls with the clip coefficient c so far."""
        self._norm.add(last.norm)
        if self._clip_by is None:
            return calls
        limits = [groups[batch.group]["gradient_clipping"] for batch, _ in calls]
        pairs = zip(calls, limits, strict=True)
        return [(b, n._replace(clip=self._norm.clip(limit, b.params[0].device))) for (b, n), limit in pairs]

    def _watch(self, optimizer: GrokAdamW) -> None:
        """Put hooks on the parameters that have none, including new ones and those that were frozen before."""
        handle = weakref.ref(self)  # weak, so that parameters do not keep the optimizer alive

        def hook(param: Tensor) -> None:
            if (alive := handle()) is not None:
                alive._update(param)

        params = [param for group in optimizer.param_groups for param in group["params"]]
        for param in self._hooks.keys() - {*params}:  # removed from the groups
            self._hooks.pop(param).remove()
            self._caches.pop(param, None)
        for param in params:
            if param.requires_grad and param not in self._hooks:
                self._hooks[param] = param.register_post_accumulate_grad_hook(hook)

    def _check(self, optimizer: GrokAdamW, and_wrappers: bool) -> None:
        """Raise ValueError for anything that does not work with updates in the backward pass."""
        refuse(optimizer.param_groups, "step_in_backward")
        for group in optimizer.param_groups:
            if (limit := group["gradient_clipping"]) > 0 and self._clip_by is None:
                raise ValueError(
                    f"gradient_clipping={limit:g} with step_in_backward: the norm of all gradients is not known "
                    'when the first is used. Choose clip_by="last", or set gradient_clipping=0'
                )
        self.check_signals(optimizer._run.signals)
        if optimizer._run.shard_group is not None:
            raise ValueError("step_in_backward with shard_group, or ranks of ZeroRedundancyOptimizer: leave one out")
        if and_wrappers:
            params = {param for group in optimizer.param_groups for param in group["params"]}
            if reason := why_not_early(params):
                raise ValueError(f"step_in_backward with parameters {reason}: leave one of them out")
