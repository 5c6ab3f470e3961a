"""The Grokfast filters on their own, for any optimizer (Lee et al. 2024, arXiv:2405.20233).

Two optimizers wrap another one, and keep the filter's memory in checkpoints. The two functions of `gradfilters` are
called between ``backward()`` and ``step()``.

For a gradient g, `gradfilter_ema` and `Grokfast` implement section 2.3 of the paper, `gradfilter_ma` and `GrokfastMA`
section 2.2:

    EMA   μ ← α μ + (1 − α) g          g ← g + λ μ        μ starts as the first gradient
    MA    μ ← mean of the last w g     g ← g + λ μ        once there are w of them
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._checks import check_count, check_dtype, check_number
from ._hints import with_hints
from ._numbers import as_real, wide
from ._warn import warn
from ._wrapper import Part, Wrapper, by_kind
from ._wrapper_base import check_saved
from .accumulation import Accumulate
from .checkpoints import OF_FILTERS
from .distributed import mean_over_ranks
from .gradfilters import check_window, gradfilter_ema, gradfilter_ma
from .state import window
from .state.slots import State
from .step.alpha import Signals
from .step.effects import amplification

__all__ = ["Grokfast", "GrokfastMA", "gradfilter_ema", "gradfilter_ma"]


# the filters' entries in the state
_OF_EMA = ("grokfast_ema", "grokfast_step")
_OF_MA = tuple(window.names("grokfast_"))


class _Filter(Wrapper):
    """A wrapper that filters the gradients with which another optimizer steps."""

    _prefixes = OF_FILTERS
    _settings: tuple[str, ...] = ("_signals",)
    _runs = ("grokfast_signal_state",)
    _mark, _level = "grokfast_filter", 1

    def __init__(
        self, optimizer: Optimizer, numbers: dict[str, Any], amplify_after: int, amplify_when: Callable[[], Any] | None
    ) -> None:
        check_count("amplify_after", amplify_after)
        self._signals = _signal(amplify_when)
        kept = {"grokfast_amplify_after": amplify_after, "grokfast_signal_state": None}
        super().__init__(optimizer, {**numbers, **kept, "grokfast_filter": self._described()})
        lamb = max((group.get("lamb", 0.0) for group in self.param_groups if "alpha_init" in group), default=0.0)
        if lamb:
            name = type(self).__name__
            warn(
                f"{name} around a GrokAdamW with lamb={lamb} filters twice: give GrokAdamW lamb=0, or leave out {name}",
                UserWarning,
            )

    def _begin(self) -> None:
        super()._begin()
        if self._signals is not None:
            self._signals.bind(self._inner)  # which has the groups and the state, and is the same in a shallow copy

    def _check(self, group: dict[str, Any]) -> None:
        check_number("grokfast_lamb", group["grokfast_lamb"])
        check_count("grokfast_amplify_after", group["grokfast_amplify_after"])

    def _gate(self) -> float:
        """Return the factor of λ that `amplify_when` gives, in [0, 1] and the same on all ranks."""
        if self._signals is None:
            return 1.0
        signal, elsewhere = mean_over_ranks(self._signals.evaluate(None, None), self.param_groups)
        self._signals.warn_of_missing(None, None, is_asked_for=True, boosts=True, elsewhere=elsewhere)
        return amplification(signal)

    def state_dict(self) -> dict[str, Any]:
        for group in self.param_groups[:1]:
            group["grokfast_signal_state"] = None if self._signals is None else self._signals.state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["grokfast_filter"] = self._described()
        if self._signals is not None:
            self._signals.load(self.param_groups[0]["grokfast_signal_state"])

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        saved = str(groups[0].get("grokfast_filter", self._described()))
        if saved != self._described():
            warn(
                f"state_dict is of a run with Grokfast's filter ({saved}), and this optimizer keeps "
                f"({self._described()}), as constructed",
                UserWarning,
            )


def _usable(parts: list[Part]) -> list[Tensor]:
    """Return gradients for μ, in which NaN and infinity would stay, so they are 0. (The inner optimizer gets them.)"""
    return [part.grad.nan_to_num(0.0, 0.0, 0.0) for part in parts]


def _signal(function: Any) -> Signals | None:
    """Return amplify_when as `Signals`; None if it is None."""
    if function is None:
        return None
    way_out = "give a function of no arguments, such as lambda: plateau(train_loss, eval_loss)"
    if not callable(function):
        raise TypeError(f"amplify_when={function!r} is not callable: {way_out}")
    try:
        signals = Signals(function, counted=False)
    except TypeError:
        if isinstance(function, type):
            way_out = f"it is a class, so give {function.__name__}(...)"
        raise TypeError(f"amplify_when={function!r} requires arguments: {way_out}") from None
    if any(signals.takes_losses):
        raise TypeError(f"amplify_when={function!r} takes losses, which are not passed to it here: {way_out}")
    return signals


class Grokfast(_Filter):
    r"""Grokfast around any optimizer: it steps with ``g + λ μ``, where μ is a moving average of the gradients g.

    ```python
    optimizer = Grokfast(torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=0.005))
    ```

    Use it like the inner optimizer, with schedulers, closures, GradScaler and checkpoints. Groups and state belong to
    the inner optimizer, ``optimizer.optimizer``. ``p.grad`` is left unchanged. NaN and infinity are passed on to the
    inner optimizer, and count as 0 in μ. Do not wrap GrokAdamW, which has this filter itself. Source: arXiv:2405.20233,
    section 2.3.

    Args:
        optimizer: any optimizer, except one that evaluates its closure several times in a step (as LBFGS does) or is
            differentiable.
        alpha: α in [0, 1], the filter's memory: μ averages over about 1 / (1 − α) steps.
        lamb: λ ≥ 0; 0 turns the filter off.
        amplify_after: number of gradients of a parameter before λ acts on it. μ is updated from the first one on.
        amplify_when: a signal of no arguments (see ``grokadamw.signals``; it may return a bool), called at each step. λ
            is multiplied by its value, clamped to [0, 1], and by 0 while it has no value. With several processes, the
            mean of their values is used. Checkpoints save the signal's state; pickles contain the function.

    The groups hold ``grokfast_alpha``, ``grokfast_lamb`` and ``grokfast_amplify_after``, which may differ between
    groups and change at any time; and ``grokfast_signal_state``. Once λ has been above 0, ``state[p]`` holds
    ``grokfast_ema`` (μ, in the parameter's shape and dtype, but at least float32; for a complex parameter, two real
    numbers per element) and ``grokfast_step``, the number of gradients it has seen.

    Raises:
        TypeError, ValueError: an argument is not as described above. The message names it and its value.
    """

    _state_names: tuple[str, ...] = _OF_EMA
    _others = (_OF_MA, Accumulate._state_names)

    @with_hints
    def __init__(
        self,
        optimizer: Optimizer,
        alpha: float = 0.98,
        lamb: float = 2.0,
        *,
        amplify_after: int = 0,
        amplify_when: Callable[[], Any] | None = None,
    ) -> None:
        check_number("alpha", alpha, at_most=1)
        check_number("lamb", lamb)
        super().__init__(optimizer, {"grokfast_alpha": alpha, "grokfast_lamb": lamb}, amplify_after, amplify_when)

    def _described(self) -> str:
        return "an exponential moving average"

    def _check(self, group: dict[str, Any]) -> None:
        check_number("grokfast_alpha", group["grokfast_alpha"], at_most=1)
        super()._check(group)

    def _make_state(self, parts: list[Part]) -> None:
        for part in parts:
            if "grokfast_step" not in part.state and part.group["grokfast_lamb"] > 0:
                ema = torch.zeros_like(part.grad, dtype=wide(part.grad.dtype))
                self.state[part.param].update(grokfast_ema=ema, grokfast_step=0)
            self._widen(part, "grokfast_ema")

    def _take(self, parts: list[Part]) -> None:
        self._make_state(parts)
        gate = self._gate()

        def kind(part: Part) -> tuple[float, float, bool] | None:
            """Return α, λ, and whether this is the first gradient; None if no μ is kept."""
            group, seen = part.group, self.state.get(part.param, {}).get("grokfast_step")
            if seen is None:
                return None
            is_on = seen >= group["grokfast_amplify_after"]
            return float(group["grokfast_alpha"]), float(group["grokfast_lamb"]) * gate * is_on, seen == 0

        lists = by_kind(parts, kind)
        filtered = []
        for numbers, alike in lists:
            grads = [part.grad for part in alike]
            if numbers is None or numbers[1] == 0:
                filtered += [grad.clone() for grad in grads]  # hooks of the inner optimizer may write to them
            else:
                alpha, lamb, is_first = numbers
                # g + λ μ, with the new μ of this step
                slow = grads if is_first else [self._ema(part) for part in alike]
                amplified = torch._foreach_mul(slow, 1 + lamb if is_first else lamb * alpha)
                if not is_first:
                    torch._foreach_add_(amplified, grads, alpha=1 + lamb * (1 - alpha))
                filtered += amplified
        self._inner_step([part for _, alike in lists for part in alike], filtered)
        for numbers, alike in lists:
            if numbers is not None:
                emas = [self._ema(part) for part in alike]
                grads = [grad.to(ema.dtype) for grad, ema in zip(_usable(alike), emas, strict=True)]
                torch._foreach_lerp_(emas, grads, 1.0 if numbers[2] else 1 - numbers[0])
                for part in alike:
                    self.state[part.param]["grokfast_step"] += 1

    def _ema(self, part: Part) -> Tensor:
        ema: Tensor = self.state[part.param]["grokfast_ema"]
        return ema

    def _check_state(self, param: Tensor, state: State) -> None:
        check_saved("grokfast_ema", state["grokfast_ema"], as_real(param).shape)


class GrokfastMA(_Filter):
    r"""Grokfast around any optimizer: it steps with ``g + λ μ``, where μ is the mean of the last w gradients g.

    Use it like `Grokfast`. A step takes the same time for any w; the window takes w + 2 times the parameters' memory.
    Source: arXiv:2405.20233, section 2.2.

    Args:
        optimizer: any optimizer, except one that evaluates its closure several times in a step (as LBFGS does) or is
            differentiable.
        window_size: w ≥ 1, how many gradients to keep.
        lamb: λ ≥ 0; 0 turns the filter off.
        filter_type: ``"mean"``, or ``"sum"``.
        warmup: add nothing until a parameter has had w gradients. If False, μ is the mean or sum of those so far.
        window_dtype: dtype of the kept gradients. None: the parameter's, but float32 for float16, whose range is too
            small. ``torch.bfloat16`` halves the memory that a float32 model needs; sums stay at least float32.
        amplify_after, amplify_when: as for `Grokfast`.

    The groups hold ``grokfast_lamb``, ``grokfast_amplify_after`` and ``grokfast_signal_state``. ``state[p]`` gets
    ``grokfast_ring`` (w, \*shape), its sums ``grokfast_ring_sum`` and ``grokfast_ring_lap`` (shape), and
    ``grokfast_ring_count``, a 0-d int64 tensor on the CPU; for a complex parameter, two real numbers per element.

    Raises:
        TypeError, ValueError: an argument is not as described above. The message names it and its value.
    """

    _state_names = _OF_MA
    _others = (_OF_EMA, Accumulate._state_names)
    _settings: tuple[str, ...] = ("_signals", "_size", "_filter_type", "_warmup", "_dtype")

    @with_hints
    def __init__(
        self,
        optimizer: Optimizer,
        window_size: int = 100,
        lamb: float = 5.0,
        filter_type: str = "mean",
        warmup: bool = True,
        *,
        window_dtype: torch.dtype | None = None,
        amplify_after: int = 0,
        amplify_when: Callable[[], Any] | None = None,
    ) -> None:
        check_window(window_size, filter_type)
        if not isinstance(warmup, bool):
            raise TypeError(f"warmup={warmup!r} is neither True nor False")
        check_dtype("window_dtype", window_dtype)
        check_number("lamb", lamb)
        self._size, self._filter_type, self._warmup, self._dtype = window_size, filter_type, warmup, window_dtype
        super().__init__(optimizer, {"grokfast_lamb": lamb}, amplify_after, amplify_when)

    def _make_state(self, parts: list[Part]) -> None:
        for part in parts:
            if "grokfast_ring" not in part.state and part.group["grokfast_lamb"] > 0:
                empty = window.new(part.param, self._size, self._dtype, torch.device("cpu"))
                self.state[part.param].update(window.named(empty, "grokfast_"))
            if fitted := window.fitted(part.state, "grokfast_", part.param, self._dtype):
                self.state[part.param].update(fitted)

    def _take(self, parts: list[Part]) -> None:
        self._make_state(parts)
        gate = self._gate()

        def kind(part: Part) -> float | None:
            """Return the factor of the mean; None if no window is kept."""
            group, state = part.group, self.state.get(part.param, {})
            if "grokfast_ring" not in state:
                return None
            seen = int(state["grokfast_ring_count"])
            count = min(seen + 1, self._size)
            if seen < group["grokfast_amplify_after"] or (self._warmup and count < self._size):
                return 0.0
            return float(group["grokfast_lamb"]) * gate * (count if self._filter_type == "sum" else 1)

        lists = by_kind(parts, kind)
        filtered = []
        for lamb, alike in lists:
            grads = [part.grad for part in alike]
            if lamb:
                amplified = window.means(self._windows(alike), grads)
                torch._foreach_mul_(amplified, lamb)
                torch._foreach_add_(amplified, grads)
                filtered += amplified
            else:
                filtered += [grad.clone() for grad in grads]  # hooks of the inner optimizer may write to them
        self._inner_step([part for _, alike in lists for part in alike], filtered)
        for lamb, alike in lists:
            if lamb is not None:
                window.push(self._windows(alike), _usable(alike))

    def _windows(self, parts: list[Part]) -> list[window.Window]:
        return [window.of(self.state[part.param], "grokfast_") for part in parts]

    def _described(self) -> str:
        return f"window_size={self._size}, filter_type={self._filter_type!r}, warmup={self._warmup}"

    def _placed(self, name: str, value: Any, param: Tensor) -> Any:
        placed = super()._placed(name, value, param)
        return placed.to(window.dtype_of(param, self._dtype)) if name == "grokfast_ring" else placed

    def _check_state(self, param: Tensor, state: State) -> None:
        shape = as_real(param).shape
        for name, expected in zip(_OF_MA, ((self._size, *shape), shape, shape), strict=False):
            check_saved(name, state[name], expected)
