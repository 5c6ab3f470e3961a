"""Grokking signals: how far generalisation lags behind memorisation, and the filter memory α that follows.

A signal is a callable of no arguments, or of `(train_loss, eval_loss)`, that returns a number: 0 or less where nothing
lags, larger where more does. α_t = α_init · exp(−κ · max(signal, 0)): the larger the signal, the shorter the filter's
memory. Which of the two it is goes by the arguments that it requires; one of losses waits until both are there.

Ready-made, and when to use which:

- `loss_gap`, the default: both losses are recorded, and mean the same thing on both sets.
- `AccuracyGap`: the share of right answers is what matters, as on algorithmic tasks, whose losses move on after it.
- `Plateau`: the filter is to be left alone until training is as good as done.
- `SlowGradient`: there is no evaluation data, or evaluating is dear.

A signal that is an object may also have

- `bind(optimizer)`, called when it is registered;
- `state_dict()` and `load_state_dict(state)` of plain data, kept in the optimizer's checkpoints, so that a resumed run
  goes on where it stopped.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .gradients import as_real, reads_are_free
from .update.foreach import sum_of_squares
from .update.reference import Number, accumulator, whole

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["AccuracyGap", "Plateau", "SlowGradient", "loss_gap"]

Signal: TypeAlias = Callable[..., Any]
Combine: TypeAlias = str | Callable[[list[Any]], Any]


def loss_gap(train_loss: Number, eval_loss: Number) -> Number:
    """max(0, eval − train) / max(eval, train), in [0, 1] for losses ≥ 0; 0 where neither loss is positive."""
    if isinstance(train_loss, Tensor) or isinstance(eval_loss, Tensor):
        gap = eval_loss - train_loss
        larger = train_loss + gap.clamp(min=0)  # type: ignore[union-attr]
        return torch.where(larger > 0, gap.clamp(min=0) / larger, 0)  # type: ignore[union-attr]
    larger = max(eval_loss, train_loss)
    return max(0.0, eval_loss - train_loss) / larger if larger > 0 else 0.0


class AccuracyGap:
    """max(0, training accuracy − evaluation accuracy), from the two accuracies recorded last; 0 until there are two.

    gap = AccuracyGap()
    optimizer = GrokAdamW(model.named_parameters(), grokking_signal_fns=gap)
    gap.record(train=0.99, eval=0.31)  # whenever they are known
    """

    def __init__(self) -> None:
        self._accuracies: dict[str, Number] = {}

    def record(self, *, train: Any = None, eval: Any = None) -> None:
        """Keep accuracies, as fractions of 1; None leaves the one recorded before."""
        given = {"train": train, "eval": eval}
        self._accuracies |= {which: as_number(value, which) for which, value in given.items() if value is not None}

    def __call__(self) -> Number:
        if len(self._accuracies) < 2:
            return 0.0
        return _positive(self._accuracies["train"] - self._accuracies["eval"])

    def state_dict(self) -> dict[str, Any]:
        return dict(self._accuracies)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._accuracies = dict(state)


class Plateau:
    """Training is done and evaluation is not: d(train) · (1 − d(eval)), with d(loss) = max(0, 1 − loss / threshold).

    0 while the training loss is above the threshold, and again once the evaluation loss has come down; at most 1.

    Args:
        threshold: the loss, > 0, below which a set begins to count as done (default 0.1).
    """

    def __init__(self, threshold: float = 0.1) -> None:
        if not threshold > 0:
            raise ValueError(f"threshold={threshold!r} is not a loss that can be reached: give a number above 0")
        self.threshold = threshold

    def __call__(self, train_loss: Number, eval_loss: Number) -> Number:
        done_train, done_eval = (_positive(1 - loss / self.threshold) for loss in (train_loss, eval_loss))
        return done_train * (1 - done_eval)


class SlowGradient:
    """How much of the gradient is slow: max(0, cos(μ, g)) over all parameters. Needs no evaluation data.

    μ is the last step's, g this step's. Near 0 the slow part is lost in noise, and the filter keeps its full memory;
    near 1 the gradient points where it has long been pointing, and a shorter memory, quicker to follow a turn, loses
    nothing. 0 until there is a μ.

    Args:
        every: steps from one evaluation to the next, ≥ 1. Each reads μ and g once; its value stands in between.
    """

    def __init__(self, every: int = 10) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r} is not a number of steps: give an integer of at least 1")
        self.every = every
        self._calls = 0
        self._value: Number = 0.0
        self._optimizer: Optimizer | None = None

    def bind(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def __call__(self) -> Number:
        if self._calls % self.every == 0:
            self._value = self._cosine()
        self._calls += 1
        return self._value

    @torch.no_grad()
    def _cosine(self) -> Number:
        mu: list[Tensor] = []
        g: list[Tensor] = []
        for group in [] if self._optimizer is None else self._optimizer.param_groups:
            for param in group["params"]:
                average = self._optimizer.state.get(param, {}).get("grok_ema")  # type: ignore[union-attr]
                if average is not None and param.grad is not None:
                    mu.append(as_real(average))
                    g.append(as_real(-param.grad if group["maximize"] else param.grad))
        if not mu:
            return 0.0
        device = mu[0].device
        dtype = accumulator(device)
        dot = torch.stack([whole((m * x).sum(dtype=dtype)).to(device) for m, x in zip(mu, g, strict=True)]).sum()
        squares = [torch.stack([sum_of_squares([x]).to(device) for x in tensors]).sum() for tensors in (mu, g)]
        cosine = dot / (squares[0].sqrt() * squares[1].sqrt())
        return as_number(torch.where(cosine > 0, cosine, 0))  # 0 for a zero vector, and for NaN

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self._calls, "value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._calls, self._value = state["calls"], state["value"]


def filter_memory(alpha_init: float, decay_rate: float, signal: Number | None, clamp: bool = True) -> Number:
    """Row 5: α_t from GS_t; α_init without one. Without clamp a negative signal raises α, as in release 0.1.2."""
    if signal is None or decay_rate == 0:
        return alpha_init
    if isinstance(signal, Tensor):
        return alpha_init * torch.exp(-decay_rate * signal.clamp(min=0))
    return alpha_init * math.exp(-decay_rate * (max(signal, 0.0) if clamp else signal))


class Signals:
    """The functions that are registered, how they combine, and what they said last.

    Args:
        functions: one callable, several, or None for `loss_gap`; an empty list for none at all.
        combine: "mean", "max", "min", or a callable from the list of usable values to one.
    """

    def __init__(self, functions: Signal | Iterable[Signal] | None = None, combine: Combine = "mean") -> None:
        if functions is None:
            functions = [loss_gap]
        elif callable(functions):
            functions = [functions]
        elif not isinstance(functions, Iterable):
            raise TypeError(f"grokking_signal_fns={functions!r} is neither a callable nor a list of callables")
        if not callable(combine) and combine not in _COMBINED:
            raise ValueError(
                f'combine={combine!r} is unknown: give "mean", "max", "min" or a callable of a list of values'
            )
        self.functions = list(functions)
        self.takes_losses = [_takes_losses(function) for function in self.functions]
        self.names = _names(self.functions)
        self.combine = combine
        self.values: dict[str, Number] = {}  # each function's last usable value
        self.failures = 0
        self._warned: set[str] = set()
        self._failures_on_device: dict[str, Tensor] = {}

    def bind(self, optimizer: Optimizer) -> None:
        for function in self.functions:
            if hasattr(function, "bind"):
                function.bind(optimizer)

    def in_use(self, train_loss: Number | None, eval_loss: Number | None) -> bool:
        """Whether there is anything to evaluate: a function that needs no losses, or a loss for those that do."""
        return not all(self.takes_losses) or (bool(self.functions) and (train_loss, eval_loss) != (None, None))

    def evaluate(
        self, train_loss: Number | None, eval_loss: Number | None, keep_nonfinite: bool = False
    ) -> Number | None:
        """Row 4, GS_t: every function called once and the usable values combined; None where there is none."""
        values: list[Number] = []
        for name, function, takes_losses in zip(self.names, self.functions, self.takes_losses, strict=True):
            if takes_losses and (train_loss is None or eval_loss is None):
                continue
            try:
                result = function(train_loss, eval_loss) if takes_losses else function()
                value = None if result is None else as_number(result)
            except Exception as error:  # whatever a user's function raises, training goes on
                self._left_out(name, f"raised {error!r}")
                continue
            if value is None:
                self._left_out(name, "returned None")
            elif isinstance(value, float) and not math.isfinite(value) and not keep_nonfinite:
                self._left_out(name, f"returned {value}")
            else:
                if isinstance(value, Tensor):
                    failed = torch.logical_not(torch.isfinite(value)).long()
                    self._failures_on_device[name] = failed + self._failures_on_device.get(name, 0)
                self.values[name] = value
                values.append(value)
        return self._combined(values)

    def _combined(self, values: list[Number]) -> Number | None:
        if not values:
            return None
        if isinstance(self.combine, str):
            tensors = [value for value in values if isinstance(value, Tensor)]
            return _combined_on_device(self.combine, values, tensors[0]) if tensors else _COMBINED[self.combine](values)
        try:
            usable = [value for value in map(float, values) if math.isfinite(value)]
            combined = float(self.combine(usable)) if usable else math.nan
        except Exception as error:
            self._left_out("combine", f"raised {error!r}")
            return None
        return None if math.isnan(combined) else combined

    def _left_out(self, name: str, what: str) -> None:
        self.failures += 1
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"the grokking signal {name} {what}: it is left out of this step, and of any other where it fails. "
                "metrics()['signal_failures'] counts them",
                RuntimeWarning,
                stacklevel=2,
            )

    def settle(self) -> None:
        """Count, and warn of, values on a device that turned out not to be finite: reads them back."""
        failures, self._failures_on_device = self._failures_on_device, {}
        for name, count in failures.items():
            if (times := int(count)) > 0:
                self._left_out(name, "returned NaN or infinity")
                self.failures += times - 1

    def state(self) -> list[Any] | None:
        """The states of the functions that have one, for a checkpoint; None where none has."""
        states = [function.state_dict() if hasattr(function, "state_dict") else None for function in self.functions]
        return states if any(state is not None for state in states) else None

    def resume(self, states: list[Any]) -> bool:
        """Give the functions their states back; False where these are not the functions that the states came from."""
        loaders = [getattr(function, "load_state_dict", None) for function in self.functions]
        if [state is None for state in states] != [load is None for load in loaders]:
            return False
        for load, state in zip(loaders, states, strict=True):
            if load is not None:
                load(state)
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Signals:
        """Functions are shared, as closures may hold anything; objects that keep a state or a binding are copied."""
        copied = Signals(
            [copy.deepcopy(f, memo) if hasattr(f, "bind") or hasattr(f, "state_dict") else f for f in self.functions],
            self.combine,
        )
        copied.values, copied.failures, copied._warned = dict(self.values), self.failures, set(self._warned)
        copied._failures_on_device = dict(self._failures_on_device)
        return copied


def mean_over_ranks(signal: Number | None, device: torch.device) -> Number | None:
    """The mean of the signal over the ranks that have one: a collective, so that every rank goes on with the same α."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return signal
    value = 0.0 if signal is None else signal
    pair = torch.zeros(2, dtype=accumulator(device), device=device)
    pair[0] += value
    pair[1] += signal is not None
    dist.all_reduce(pair)
    return as_number(pair[0] / pair[1].clamp(min=1))  # 0, which is as good as none, where no rank has one


def as_number(value: Any, name: str = "the value") -> Number:
    """A signal's or loss's value: a float, or a detached 0-d tensor where reading it would make the host wait.

    Raises:
        TypeError: it is not one number.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise TypeError(f"{name} is a tensor of shape {tuple(value.shape)}, not one number")
        value = whole(value.detach()).reshape(())
        return float(value) if reads_are_free(value.device) else value.to(accumulator(value.device), copy=True)
    if not hasattr(value, "__float__"):
        raise TypeError(f"{name}={value!r} is not one number")
    return float(value)


def _positive(value: Number) -> Number:
    return value.clamp(min=0) if isinstance(value, Tensor) else max(value, 0.0)


_COMBINED: dict[str, Callable[[Sequence[Any]], Any]] = {
    "mean": lambda values: sum(values) / len(values),
    "max": max,
    "min": min,
}


def _combined_on_device(combine: str, values: list[Number], like: Tensor) -> Tensor:
    """The same without reading a value back. What is not finite is left out; all of it: 0, as good as no signal."""
    stacked = torch.stack(
        [value.to(like) if isinstance(value, Tensor) else torch.full_like(like, value) for value in values]
    )
    usable = torch.isfinite(stacked)
    if combine == "mean":
        return torch.where(usable, stacked, 0).sum() / usable.sum().clamp(min=1)
    worst = -math.inf if combine == "max" else math.inf
    kept = torch.where(usable, stacked, worst)
    return torch.where(usable.any(), kept.max() if combine == "max" else kept.min(), 0)


def _takes_losses(function: Any) -> bool:
    """Whether a signal wants (train_loss, eval_loss) rather than nothing, by the arguments that it requires."""
    if not callable(function):
        raise TypeError(f"grokking_signal_fns holds {function!r}, which cannot be called")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False  # some built-in callables have no signature to read
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(required) not in (0, 2) or any(p.kind is p.KEYWORD_ONLY for p in required):
        raise TypeError(
            f"grokking_signal_fns holds {_name(function)}, which requires ({', '.join(p.name for p in required)}): a "
            "signal takes no arguments, or (train_loss, eval_loss); give others with a lambda or functools.partial"
        )
    return len(required) == 2


def _name(function: Any) -> str:
    return getattr(function, "__name__", None) or type(function).__name__


def _names(functions: Sequence[Any]) -> list[str]:
    """A name for each function, numbered where several have the same."""
    names = [_name(function) for function in functions]
    return [name if names.count(name) == 1 else f"{name}_{names[: i + 1].count(name)}" for i, name in enumerate(names)]
