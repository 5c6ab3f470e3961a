"""The parts of GrokAdamW that act between steps: parameter groups, reports, checkpoints, pickles and copies."""

from __future__ import annotations

import copy
from collections.abc import Sized
from typing import Any

import torch
from torch.optim import Optimizer

from . import layers, zero
from ._hints import OF_ADAMW, check_iterable, misspelt
from ._numbers import as_number
from ._warn import is_new, warn
from .checkpoints import check_form
from .distributed import ranks
from .options import check_group
from .param_groups import (
    CYCLE_AT_REST,
    GROUP_KEYS,
    PROGRESS,
    RECORDED,
    CycleNumbers,
    check_pickled,
    fill_in,
    group_defaults,
    make_plain,
    recorded,
)
from .state.loading import keeping_precision
from .state.sizes import sizes
from .state.slots import states_of
from .step import metrics
from .step.alpha import Signals
from .step.batches import Given
from .step.run import Preset, Run


class Base(Optimizer):
    """GrokAdamW without `step`: its groups, reports, checkpoints, pickles and copies."""

    _run: Run

    def __repr__(self) -> str:
        """Show each group's options and the signals, without layers and progress, which are for checkpoints."""
        lines, signals = [f"{type(self).__name__} ("], self._run.signals.names
        for i, group in enumerate(self.param_groups):
            group = {**group, "grokking_signal_fns": signals}
            shown = sorted(group.keys() - {"params", "param_names", "layers", *PROGRESS})
            lines += [f"Parameter Group {i}", *(f"    {name}: {group[name]}" for name in shown)]
        return "\n".join([*lines, ")"])

    def _set_amp_support(self) -> None:
        """Tell GradScaler if this optimizer unscales gradients: if fused, or to see overflows in micro-batches."""
        self._step_supports_amp_scaling = bool(self.defaults["fused"] or self.defaults["accumulation_steps"] > 1)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch. It may set the options that the constructor lists under ``params``.

        With names, parameters of a known module join its layer, and new modules become the next layers. Without names,
        each tensor is a layer, numbered from 0 within its group. A group can override this with ``layer``, or with
        ``layers``, a list of one integer for each parameter.

        Raises:
            TypeError, ValueError: a value is not allowed, or not allowed in a group. Then nothing was added.
        """
        checked = {}
        if isinstance(param_group, dict):
            if "params" not in param_group:
                keys = ", ".join(map(repr, param_group)) or "no keys"
                raise ValueError(f"a parameter group has {keys}, but no 'params': give its parameters under that key")
            check_iterable(param_group["params"])
            checked = check_group({**self.defaults, **param_group}, self.defaults)
            param_group = self._with_layers(param_group)
            for sentence in misspelt(param_group, GROUP_KEYS):
                warn(sentence, UserWarning)
            # copy the dict, as the caller may reuse it, and leave out keys that only AdamW's groups have
            param_group = {k: v for k, v in layers.without_none_names(param_group).items() if k not in OF_ADAMW}
        self._complete_appended()
        try:
            super().add_param_group(param_group)
        except ValueError as error:
            if "with/without names" not in str(error):
                raise
            raise ValueError(
                f"{error}: if the others have names, give (name, parameter) pairs, as in [(name, p) for name, p in "
                "model.named_parameters() if ...]; otherwise give parameters alone"
            ) from None
        *earlier, group = self.param_groups
        group.update(checked)
        _join(group, earlier)
        zero.take_places(self)
        self._run.layers_checked = False

    def _with_layers(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """Return the group. If it has `layers` that are used, they become a list with one integer per parameter."""
        given, params = param_group.get("layers"), param_group.get("params")
        # ZeroRedundancyOptimizer passes only some of the parameters, and `zero.take_places` sets their layers
        if given is None or params is None or param_group.get("layer") is not None or self._run.zero() is not None:
            return param_group
        if not isinstance(params, Sized):  # an iterator can be read only once
            params = list(params)
        integers, count = layers.as_integers("layers", given), 1 if isinstance(params, torch.Tensor) else len(params)
        if len(integers) != count:
            raise ValueError(
                f"layers={given!r} has {len(integers)} layers, but its group has {count} parameters: give one integer "
                "per parameter, or leave layers out"
            )
        return {**param_group, "params": params, "layers": integers}

    def _complete_appended(self) -> None:
        """Complete groups that were not added by `add_param_group`, such as those that an outer optimizer appends.

        Raises:
            TypeError, ValueError: a value is not allowed. Then its group was not completed.
        """
        for i, group in enumerate(self.param_groups):
            if "layers" not in group or "signal_state" not in group:  # `add_param_group` sets both
                whole = {**self.defaults, **self._with_layers(group)}
                group.update(whole | check_group(whole, self.defaults))
                _join(group, self.param_groups[:i])
                self._run.layers_checked = False

    def _complete_groups(self) -> None:
        """Do `_complete_appended`, with its errors, and fit layers to flat tensors that replaced parameters."""
        run = self._run
        if run.before_loading:
            zero.go_on_after_loading(self)
        self._complete_appended()
        # a step refuses layers without a length
        if [g for g in self.param_groups if hasattr(g["layers"], "__len__") and len(g["layers"]) != len(g["params"])]:
            sentence = layers.make_one(self.param_groups, run.shard_group is None and ranks() > 1)
            if sentence is not None and is_new("flat", run.said):  # DeepSpeed steps one group after another
                warn(sentence, UserWarning)

    def implementation(self) -> str:
        """Return which implementations update the parameters, and why: one line ``"name: reason"`` for each.

        ``gpu`` is one Triton launch for all tensors of a kind. ``cpu`` is the native kernel, one pass through memory,
        and ``blocks`` replaces it if it was not built. ``foreach`` uses torch's operations on lists of tensors,
        ``reference`` uses them on one tensor at a time, and ``decoded`` on float32 copies of tensors with fewer bits.
        These three also update parameters that share memory, and all parameters under torch.compile or FakeTensorMode.
        A missing gradient is assumed to look like its parameter. Missing state is created temporarily, one parameter at
        a time.
        """
        self._complete_groups()
        return self._run.cache.describe(Given(self.param_groups, self.state, self.defaults))

    def layer_table(self) -> list[layers.Layer]:
        """Return one row per layer, in order: ``layer``, the ``names`` of its parameters, and ``beta1`` (its β1_l)."""
        self._complete_groups()
        return layers.table(self.param_groups, self._run.names)

    def metrics(self) -> dict[str, float]:
        """Return numbers about the last step (or a later ``update_signals``) as floats. This waits for the device.

        The keys are ``step`` (steps taken, the most of any parameter), ``signal`` (s), ``signal/<name>`` (each
        signal's last usable value; a value on a GPU is not checked, and may be NaN), ``alpha`` (α, which a
        window does not use), ``boost`` (the signal's factor of lr), ``decay_boost`` (its factor of ``weight_decay``),
        ``grad_norm`` (N, before clipping), ``clip_coefficient`` (c), ``skipped_steps``, ``signal_failures``,
        ``beta1_min`` and ``beta1_max`` (of β1_l). If groups differ, ``alpha`` and ``clip_coefficient`` are the smallest
        values, and the boosts the largest. NaN means unknown: before the first step, without a usable signal, or if
        nothing needed the norm.
        """
        self._complete_groups()
        self._run.settle(self.param_groups)
        zero.update_outer_groups(self)
        run, states = self._run, states_of(self.param_groups, self.state)
        return metrics.as_floats(run.last, self.param_groups, states, run.signals)

    def memory(self) -> dict[str, int]:
        """Return the bytes that training takes on this rank, by kind; before the first step, those that it will take.

        The keys are ``parameters``, ``gradients`` (a missing one counts like its parameter), ``exp_avg``,
        ``exp_avg_sq`` and ``grok_ema`` with their scales, ``param_low``, ``window``, ``step``, and ``total``, the sum
        of these; and, for comparison, ``adamw``, the total with ``torch.optim.AdamW`` on the same parameters.
        Frozen parameters count as ``parameters`` alone. Activations, temporary memory of a step, and parameters outside
        the optimizer are not included.
        ``python -m grokadamw memory`` needs no model.
        """
        self._complete_groups()
        return sizes(self.param_groups, self.state, self.defaults)

    def state_dict(self) -> dict[str, Any]:
        """Return a state dict, as in torch: only tensors and plain data, for ``torch.load(weights_only=True)`` to read.

        Signal functions are not saved, but the state of signals that have a ``state_dict`` is.
        """
        self._before_saving()
        saved = super().state_dict()
        # an AdamW made from these groups has added its keys to them; a hook may return a dict without groups
        for group in saved.get("param_groups", ()):
            for name in OF_ADAMW:
                group.pop(name, None)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict as torch does, but do not round the state to the parameters' dtypes.

        Parameters are matched by name if both sides have the same names, otherwise by order. Signals, options of the
        whole optimizer, ``foreach``, ``fused`` and ``capturable`` stay as constructed.

        Args:
            state_dict: from a GrokAdamW (also of release 0.1.2), or from ``torch.optim.AdamW`` or ``Adam``. Options
                that AdamW and Adam lack stay as they are, and μ starts at 0. See ``grokadamw.checkpoints``.

        Raises:
            ValueError: groups, parameters or shapes differ from the saved ones, an option's saved value is not allowed,
                or the run cannot be continued. Then nothing was loaded.
        """
        if not isinstance(state_dict, dict):  # torch would copy it before our hook can refuse it
            check_form(state_dict)
        self._complete_groups()
        with keeping_precision(self, is_preset=bool(self._run.preset.lrs)):
            super().load_state_dict(state_dict)
        self._run.restart(self.param_groups)

    def _before_saving(self) -> None:
        early = self._run.in_backward
        if early is not None and early.is_open and self.defaults["accumulation_steps"] > 1:
            raise RuntimeError("a micro-batch of step_in_backward is not over: call optimizer.step() before you save")
        self._complete_groups()
        self._run.settle(self.param_groups)
        make_plain(self.param_groups)
        for group in self.param_groups[:1]:
            group["signal_state"] = self._run.signals.state()
        zero.update_outer_groups(self)

    def __getstate__(self) -> dict[str, Any]:
        self._before_saving()
        signals = self._run.signals.for_pickle()
        combine = self._run.signals.combine if isinstance(self._run.signals.combine, str) else None
        own = {"_preset": tuple(self._run.preset), "_signals": signals, "_combine": combine}
        return {**super().__getstate__(), **own, "_is_sharded": self._run.shard_group is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_pickled(state)
        state = dict(state)
        signals, combine = state.pop("_signals", None), state.pop("_combine", "mean")
        preset = Preset(*state.pop("_preset", ()))
        if state.pop("_is_sharded", False):
            warn(
                "a pickle keeps no process group: the unpickled optimizer treats its parameters as whole. Construct "
                "GrokAdamW(..., shard_group=...) and load a state_dict() instead",
                UserWarning,
            )
        earlier = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        for name, value in group_defaults({}).items():  # defaults that an older version lacked
            self.defaults.setdefault(name, value)
        fill_in(self.param_groups, earlier, self.defaults)
        if "_run" not in self.__dict__:  # unpickled, or a copy
            self._set_amp_support()
            self._run = Run(Signals.from_pickle(signals, combine), preset=preset)
            self._run.signals.bind(self)
            for group in self.param_groups[:1]:
                self._run.signals.load(group["signal_state"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Base:
        """Copy the optimizer with all its signals. (A pickle keeps only those of `Signals.for_pickle`.)"""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        state = {**self.__getstate__(), "_signals": None, "_combine": "mean", "_is_sharded": False}
        copied.__setstate__(copy.deepcopy(state, memo))
        copied._run.follow(self._run, memo)
        copied._run.signals.bind(copied)
        return copied


def _join(group: dict[str, Any], earlier: list[dict[str, Any]]) -> None:
    """Complete a group that has all its options: set its layers, and copy the run's progress from earlier groups."""
    first = earlier[0] if earlier else PROGRESS
    group.update(CYCLE_AT_REST, skipped_steps=first["skipped_steps"])  # it may come from another optimizer
    for name in RECORDED:
        if group[name] is None:
            group[name] = recorded(earlier, name)
    if first["micro_step"] > 0:  # the group joins the current cycle, with its own numbers
        amplification = CycleNumbers(*first["cycle"]).amplification
        group["cycle"] = tuple(CycleNumbers.of(group, amplification, as_number(group["alpha_init"])))
        group["micro_step"] = first["micro_step"]
    group_layers = group.get("layers")
    if group_layers is None or len(group_layers) != len(group["params"]) or group["layer"] is not None:
        group_layers = layers.layers_of(group, earlier)
    group["layers"] = list(group_layers)
