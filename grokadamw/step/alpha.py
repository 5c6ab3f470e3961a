"""The stages signal and alpha: register signals, combine their values, agree between ranks, and compute α."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._checks import check_keys
from .._numbers import Number, as_float, as_number
from .._warn import is_new, warn
from ..distributed import AllRanks, mean_over_ranks, ranks
from ..options import Rules
from ..param_groups import recorded
from ..signals import AccuracyGap, loss_gap, memorisation
from .effects import BOOSTS, Effect, are_boosted, effect_on
from .signatures import names_of, takes_losses

Signal: TypeAlias = Callable[..., Any]
Combine: TypeAlias = str | Callable[[list[Any]], Any]
# options that decide how the signal acts
_SIGNAL_OPTIONS = itemgetter("alpha_init", "grokking_signal_decay_rate", *BOOSTS)


def filter_memory(alpha_init: Number, decay_rate: float, signal: Number | None, clamp: bool = True) -> Number:
    """Return α_t for s_t, or α_init if s_t is None. Without `clamp` a negative s_t raises α, as in release 0.1.2."""
    if signal is None or decay_rate == 0:
        return alpha_init
    if isinstance(signal, Tensor):
        return alpha_init * torch.exp(-decay_rate * (signal.clamp(min=0) if clamp else signal))
    exponent = -decay_rate * (max(signal, 0.0) if clamp else signal)
    return alpha_init * math.exp(min(exponent, 709.0))  # above 709.78 math.exp raises an error


def evaluate(
    signals: Signals, groups: Sequence[dict[str, Any]], rules: Rules, all_ranks: AllRanks, shard_group: Any
) -> list[Number | None]:
    """Evaluate the signals, and return s_t for every group."""
    if rules.signals_for_each_group:
        # a generator, as a signal may add a group
        losses = ([x if x == x else None for x in (group["train_loss"], group["eval_loss"])] for group in groups)
        return [signals.evaluate(train, evaluation, keep_nonfinite=True) for train, evaluation in losses]
    train_loss, eval_loss = recorded(groups, "train_loss"), recorded(groups, "eval_loss")
    signal = signals.evaluate(train_loss, eval_loss)
    elsewhere: Number = 0
    boosts = are_boosted(groups)
    is_asked_for = signals.are_given or boosts or any(group["amplify_by_signal"] for group in groups)
    # Ask the other ranks even if this one has recorded nothing, as they may have recorded more. But if the user neither
    # chose signals nor records losses, ask only if all ranks are known to take this step.
    wanted = is_asked_for or (train_loss, eval_loss) != (None, None)
    if signals.functions and ranks() > 1 and all_ranks.meet(groups, shard_group, wanted):
        signal, elsewhere = mean_over_ranks(signal, groups, signals.are_loaded, all_ranks.compares())
        signal = as_number(signal) if isinstance(signal, Tensor) else signal
    signals.warn_of_missing(train_loss, eval_loss, is_asked_for, boosts, elsewhere)
    return [signal] * len(groups)


def effects_of(signals: Sequence[Number | None], groups: Sequence[dict[str, Any]], rules: Rules) -> list[Effect]:
    """Return the `Effect` of each group's signal. Groups with the same options and the same signal share one."""
    made: dict[Any, Effect] = {}
    effects = []
    for group, signal in zip(groups, signals, strict=True):
        key = (*map(id, _SIGNAL_OPTIONS(group)), id(signal))
        if key not in made:
            alpha_init, decay_rate = as_number(group["alpha_init"]), group["grokking_signal_decay_rate"]
            alpha = filter_memory(alpha_init, decay_rate, signal, not rules.raises_alpha)
            made[key] = effect_on(group, alpha, signal)
        effects.append(made[key])
    return effects


class Signals:
    """The registered signals, how they are combined, and their last values.

    Args:
        functions: one callable, several, or None for `loss_gap`; an empty list for no signal.
        combine: "mean", "max", "min", or a callable that turns the list of usable values into one value.
        counted: True if the optimizer's metrics() count failures.
    """

    def __init__(
        self, functions: Signal | Iterable[Signal] | None, combine: Combine = "mean", counted: bool = True
    ) -> None:
        self.are_given = functions is not None
        if functions is None:
            functions = [loss_gap]
        elif callable(functions):
            functions = [functions]
        elif not isinstance(functions, Iterable) or isinstance(functions, (str, Mapping)) or hasattr(functions, "ndim"):
            raise TypeError(
                f"grokking_signal_fns={functions!r} is neither a callable nor a list of callables: give one, such as "
                "grokadamw.signals.loss_gap"
            )
        if not callable(combine) and (not isinstance(combine, str) or combine not in _COMBINED):
            raise ValueError(
                f'combine={combine!r} is unknown: give "mean", "max", "min" or a callable of a list of values'
            )
        self.functions: list[Any] = list(functions)
        self.takes_losses = [takes_losses(function) for function in self.functions]  # "", "by name" or "in order"
        self.names = names_of(self.functions)
        self.combine, self.counted = combine, counted
        self.values: dict[str, Number] = {}  # each function's last usable value
        self.failures = 0
        self.waiting: dict[str, Any] = {}  # states from a checkpoint, for functions that are not registered yet
        self._warned: set[str] = set()
        self.records_are_loaded = False  # True if a checkpoint brought recorded values, and none was recorded since
        self._failures_on_device: dict[str, Tensor] = {}
        self._steps_without = 0
        self._alone = {"loss": 0, "acc": 0}  # training losses and accuracies recorded since the last evaluation
        self._began_small = False  # True if the first evaluation loss was below an untrained model's cross entropy

    @property
    def are_loaded(self) -> bool:
        """True if the signals may come from recorded values that a checkpoint brought, perhaps from another rank."""
        return self.records_are_loaded and any(map(_reads_records, self.functions, self.takes_losses))

    def check_amplifies(self, amplify_by_signal: bool) -> None:
        """Raise ValueError if λ is multiplied by the signal and there is no signal."""
        if amplify_by_signal and not self.functions:
            raise ValueError(
                "amplify_by_signal=True without a signal: give grokking_signal_fns, or leave it None, for the gap of "
                "the losses that record() gets"
            )

    def bind(self, optimizer: Optimizer) -> None:
        for function in self.functions:
            if hasattr(function, "bind"):
                function.bind(optimizer)

    def for_pickle(self) -> list[Any] | None:
        """Return loss_gap, memorisation, AccuracyGap, and the names of all other functions; None if none were given."""
        if not self.are_given:
            return None
        known = [AccuracyGap if type(function) is AccuracyGap else function for function in self.functions]
        named = zip(known, self.names, strict=True)
        return [function if function in (loss_gap, memorisation, AccuracyGap) else name for function, name in named]

    @classmethod
    def from_pickle(cls, kept: list[Any] | None, combine: Combine | None) -> Signals:
        """Return the signals of a pickle. Leave out those that it keeps only by name, and warn about them."""
        lost = [name for name in kept or () if isinstance(name, str)]
        if combine is None:
            lost.append("combine")
        if lost:
            warn(
                "pickles and shallow copies keep only loss_gap, memorisation and AccuracyGap: this optimizer is "
                f"without {', '.join(lost)}. Call optimizer.set_signals to restore what it had",
                UserWarning,
            )
        if kept is not None:
            kept = [AccuracyGap() if f is AccuracyGap else f for f in kept if not isinstance(f, str)]
        return cls(kept, combine or "mean")

    def warn_of_missing(
        self,
        train_loss: Number | None,
        eval_loss: Number | None,
        is_asked_for: bool,
        boosts: bool,
        elsewhere: Number,
    ) -> None:
        """Warn once if functions do not get the losses or accuracies that they need: nothing adapts without them.

        The warning comes after 100 steps, or after 1,000 if only evaluation is missing and no boost is on (`boosts`).
        There is none if nothing was recorded and no signal was asked for, or if other ranks had a signal (`elsewhere`
        is the number of these ranks).
        """
        needed: dict[str, Number | None] = {}
        if any(self.takes_losses):
            needed |= {"train_loss": train_loss, "eval_loss": eval_loss}
        for function in self.functions:
            if isinstance(function, AccuracyGap):
                needed |= function.accuracies()
        missing = [name for name, value in needed.items() if value is None]
        if not missing or (len(missing) == len(needed) and not is_asked_for):
            return
        self._steps_without += 1
        limit = 100 if boosts or any(name.startswith("train") for name in missing) else 1000
        if self._steps_without < limit or not is_new("missing values", self._warned):
            return
        if as_float(elsewhere) == 0:
            names = ", ".join(f"{name}=…" for name in missing)
            if any(name.endswith("acc") for name in missing):
                instead = "give a trainer's callback their names as train_acc= and eval_acc="
            else:
                instead = "for accuracies instead give grokking_signal_fns=AccuracyGap(), from grokadamw.signals"
            way_out = f"call optimizer.record({names}), {instead}, or pass grokking_signal_fns=[] to turn signals off"
            if not self.counted:  # as in amplify_when
                way_out = "call AccuracyGap's own record(train=…, eval=…); until then λ is 0"
            warn(f"the grokking signals wait for {' and '.join(missing)}: {way_out}", UserWarning)

    def warn_of_old_evaluation(self, given: Mapping[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        """Warn once if 100 training losses or accuracies follow one evaluation: progress looks like memorisation."""
        by_accuracy = any(isinstance(function, AccuracyGap) for function in self.functions)
        for kind, one, many, uses in (
            ("loss", "loss", "losses", any(self.takes_losses)),
            ("acc", "accuracy", "accuracies", by_accuracy),
        ):
            train, evaluation = f"train_{kind}", f"eval_{kind}"
            if evaluation in given:
                self._alone[kind] = 0
            elif train in given:
                self._alone[kind] += 1
            is_used = uses and are_boosted(group for group in groups if group[evaluation] is not None)
            if is_used and self._alone[kind] >= 100 and is_new("an old evaluation", self._warned):
                warn(
                    f"100 training {many} were recorded since the last evaluation {one}: what the model has "
                    f"learnt since then looks like memorisation, and signal_boost or decay_boost reacts to it. Record "
                    f"both {many} together: optimizer.record({train}=…, {evaluation}=…), after each evaluation",
                    UserWarning,
                )

    def warn_of_unscaled_losses(self, given: Mapping[str, Any], groups: Sequence[dict[str, Any]]) -> None:
        """Warn once if the losses are too small for `memorisation` to act. Call this before they are stored.

        Cross entropy begins at ln 2 or more. Losses that stay on a GPU are not checked.
        """
        loss = given.get("eval_loss")
        if not isinstance(loss, float) or self.functions != [memorisation] or not are_boosted(groups):
            return
        if recorded(groups, "eval_loss") is None:
            self._began_small = loss < 0.5
        train_loss = given.get("train_loss")
        if not self._began_small or not isinstance(train_loss, float) or not 0 <= train_loss < loss / 10:
            return
        if as_float(memorisation(train_loss, loss)) < 0.25 and is_new("unscaled losses", self._warned):
            warn(
                "the losses look like squared errors that are not scaled: the first eval_loss was below 0.5, and now "
                f"train_loss={train_loss:.3g} is far below eval_loss={loss:.3g}. The signal `memorisation` is near 0 "
                "for such losses, so neither signal_boost nor decay_boost acts. Record both divided by the targets' "
                "variance; or pass grokking_signal_fns=AccuracyGap(), from grokadamw.signals, and record train_acc and "
                "eval_acc. If they are cross entropies of a pretrained model, ignore this warning",
                UserWarning,
            )

    def silence_missing(self) -> None:
        """Suppress the warning of `warn_of_missing`, because the caller gives a better one."""
        self._warned.add("missing values")

    def evaluate(
        self, train_loss: Number | None, eval_loss: Number | None, keep_nonfinite: bool = False
    ) -> Number | None:
        """Call every function once, and return the usable values combined, s_t; None if no value is usable."""
        values: list[Number] = []
        for name, function, how in zip(self.names, self.functions, self.takes_losses, strict=True):
            if how and (train_loss is None or eval_loss is None):
                continue
            try:
                if not getattr(function, "ready", True):
                    continue
                if how == "by name":
                    result = function(train_loss=train_loss, eval_loss=eval_loss)
                else:
                    result = function(train_loss, eval_loss) if how else function()
                value = None if result is None else as_number(result)
            except Exception as error:  # training goes on after any error of a user's function
                self._left_out(f"the grokking signal {name}", f"raised {error!r}")
                continue
            if value is None:
                self._left_out(f"the grokking signal {name}", "returned None")
            elif isinstance(value, float) and not math.isfinite(value) and not keep_nonfinite:
                self._left_out(f"the grokking signal {name}", f"returned {value}")
            else:
                if isinstance(value, Tensor):
                    failed = torch.logical_not(torch.isfinite(value)).long()
                    self._failures_on_device[name] = failed + self._failures_on_device.get(name, 0)
                self.values[name] = value
                values.append(value)
        return self._combined(values) if values else None

    def _combined(self, values: list[Number]) -> Number | None:
        if isinstance(self.combine, str):
            tensors = [value for value in values if isinstance(value, Tensor)]
            return _combined_on_device(self.combine, values, tensors[0]) if tensors else _COMBINED[self.combine](values)
        try:
            usable = [value for value in map(as_float, values) if math.isfinite(value)]
            combined = self.combine(usable) if usable else math.nan
            number = as_float(as_number(combined)) if combined is not None else math.nan
        except Exception as error:
            self._left_out("`combine`", f"raised {error!r}")
            return None
        if usable and not math.isfinite(number):
            self._left_out("`combine`", f"returned {combined}")
        return number if math.isfinite(number) else None

    def _left_out(self, who: str, what: str) -> None:
        self.failures += 1
        if is_new(who, self._warned):
            where = ". metrics()['signal_failures'] counts them" if self.counted else ""
            warn(
                f"{who} {what}: it is left out of this step, and of every other step in which it fails{where}",
                RuntimeWarning,
            )

    def settle(self) -> None:
        """Read back how many values on a device were not finite, count them as failures, and warn."""
        failures, self._failures_on_device = self._failures_on_device, {}
        for name, count in failures.items():
            if (times := int(count)) > 0:
                self._left_out(f"the grokking signal {name}", "returned NaN or infinity")
                self.failures += times - 1

    def state(self) -> str | None:
        """Return the functions' states by name, as JSON: every way of saving keeps a string in one piece."""
        states = dict(self.waiting)
        for name, function in zip(self.names, self.functions, strict=True):
            if _remembers(function):
                states[name] = function.state_dict()
                try:
                    json.dumps(states[name], default=_plain)
                    check_keys(states[name])
                except Exception as error:
                    raise TypeError(
                        f"the state_dict() of the grokking signal {name} is not plain data ({error}): give numbers, "
                        "strings, lists, and dicts of them with strings for keys"
                    ) from None
        return json.dumps(states, default=_plain) if states else None

    def load(self, state: str | None) -> None:
        """Restore the functions' states by name. A state without a function waits until one is registered."""
        try:
            states = {} if state is None else dict(json.loads(state))
        except (TypeError, ValueError) as error:
            warn(
                f"the checkpoint's state of grokking signals is not JSON ({error}): they start from scratch",
                RuntimeWarning,
            )
            states = {}
        self.restore(states)

    def restore(self, states: dict[str, Any]) -> None:
        """Give each function the state that was saved under its name."""
        self.waiting = dict(states)
        for name, function in zip(self.names, self.functions, strict=True):
            if name in self.waiting and _remembers(function):
                try:
                    function.load_state_dict(self.waiting.pop(name))
                except Exception as error:
                    warn(
                        f"the grokking signal {name} cannot load its state from the checkpoint ({error!r}): it starts "
                        "from scratch",
                        RuntimeWarning,
                    )

    def __deepcopy__(self, memo: dict[int, Any]) -> Signals:
        """Copy the signals. Functions may hold anything and are shared; objects with state or `bind` are copied."""
        copied = copy.copy(self)
        copied.functions = [
            copy.deepcopy(f, memo) if hasattr(f, "bind") or _remembers(f) else f for f in self.functions
        ]
        for name in ("values", "waiting", "_warned", "_failures_on_device", "_alone"):
            setattr(copied, name, copy.copy(getattr(self, name)))
        return copied


_COMBINED: dict[str, Callable[[Sequence[Any]], Any]] = {
    "mean": lambda values: sum(values) / len(values),
    "max": max,
    "min": min,
}


def _combined_on_device(combine: str, values: list[Number], like: Tensor) -> Tensor:
    """Combine the finite values without reading them back; return 0 if none is finite."""
    moved = [value.to(like) if isinstance(value, Tensor) else torch.full_like(like, value) for value in values]
    stacked = torch.stack(moved)
    usable = torch.isfinite(stacked)
    if combine == "mean":
        return torch.where(usable, stacked, 0).sum() / usable.sum().clamp(min=1)
    worst = -math.inf if combine == "max" else math.inf
    kept = torch.where(usable, stacked, worst)
    return torch.where(usable.any(), kept.max() if combine == "max" else kept.min(), 0)


def _reads_records(function: Any, takes_losses: str) -> bool:
    """Return True if a signal depends on the values given to the optimizer's `record`, or may do so."""
    return bool(takes_losses) or getattr(function, "reads_records", hasattr(function, "bind"))


def _remembers(function: Any) -> bool:
    """Return True if a signal has state to save. A module's weights do not count: their owner saves them."""
    return hasattr(function, "state_dict") and not isinstance(function, torch.nn.Module)


def _plain(value: Any) -> int | float:
    """Convert a NumPy number, or a tensor of one element, to a Python number."""
    return int(value) if isinstance(value, Integral) else as_float(as_number(value))
