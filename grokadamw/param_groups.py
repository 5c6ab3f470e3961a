"""The entries of parameter groups besides their parameters: options, and the progress of a run.

All entries are plain data, which checkpoints keep. This module creates them, checks changes made by hand, prepares them
for saving, and completes loaded groups.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain, compress
from operator import is_, is_not, itemgetter
from typing import Any, NamedTuple

from . import layers
from ._hints import misspelt
from ._numbers import Number, as_float, as_number, plain
from ._warn import warn
from .options import IN_GROUPS, KEPT, OPTIONS, check_settings

_OPTIONS_IN = itemgetter(*IN_GROUPS)
RECORDED = ("train_loss", "eval_loss", "train_acc", "eval_acc")  # by `GrokAdamW.record`


class CycleNumbers(NamedTuple):
    """The numbers that the first micro-batch of a cycle fixes for a group. The group keeps them as a tuple, `cycle`."""

    alpha: Number = 0.0
    amplification: float = 0.0  # the factor of λ
    lamb: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    gamma: float = 0.0
    boost: Number = 1.0  # the factor of lr and max_row_change
    decay_boost: Number = 1.0  # the factor of weight_decay

    @classmethod
    def of(cls, group: Mapping[str, Any], amplification: float, alpha: Number, *boosts: Number) -> CycleNumbers:
        """Take λ, the betas and γ from a group."""
        beta1, beta2 = map(float, group["betas"])
        return cls(alpha, amplification, float(group["lamb"]), beta1, beta2, float(group["gamma"]), *boosts)


# the micro-batches of a cycle so far, and its numbers
CYCLE_AT_REST: dict[str, Any] = {"micro_step": 0, "cycle": tuple(CycleNumbers())}
# The progress of a run, which groups hold besides their options; "last_norm" is N of `step_in_backward`'s last pass.
PROGRESS = {**dict.fromkeys(RECORDED), "signal_state": None, "skipped_steps": 0, **CYCLE_AT_REST, "last_norm": 0.0}
GROUP_KEYS = (*IN_GROUPS, *PROGRESS, "layers")


def recorded(groups: Sequence[dict[str, Any]], name: str) -> Any:
    """Return the last value that `GrokAdamW.record` got under a name: that of the first group that has one."""
    for group in groups:
        if group.get(name) is not None:
            return group[name]
    return None


def check_pickled(state: Mapping[str, Any]) -> None:
    """Raise ValueError for a pickled optimizer of release 0.1.2, which cannot be read."""
    if "defaults" in state and "skipped_steps" not in state["defaults"]:
        raise ValueError(
            "this is a pickled optimizer of grokadamw 0.1.2, and cannot be read: under that release, save its "
            "state_dict(), which load_state_dict can load"
        )


def group_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's initial entries, as plain data, from the constructor's arguments.

    All keys exist from the start, because sharded checkpoints need the same keys when they are saved and loaded.
    """
    options = {name: arguments.get(name, OPTIONS[name].default) for name in IN_GROUPS}
    return {**options, "grokking_signal_fns": None, **PROGRESS}


def check_changed(
    groups: Sequence[dict[str, Any]],
    defaults: Mapping[str, Any],
    checked: list[tuple[Any, ...]],
    checked_layers: list[list[int]],
) -> None:
    """Check options and layers set by hand since the last step. The lists hold the checked values, and are updated."""
    layers.check_changed(groups, checked_layers)
    # compare the number of keys, too: an added key may be an option that groups must not set
    now = [(len(group), *_OPTIONS_IN(group)) for group in groups]
    if len(now) == len(checked) and all(map(is_, chain.from_iterable(now), chain.from_iterable(checked))):
        return
    for i, (group, new) in enumerate(zip(groups, now, strict=True)):
        before = checked[i] if i < len(checked) else None
        different: Collection[str] = OPTIONS
        if before is not None and new[0] == before[0]:
            different = list(compress(IN_GROUPS, map(is_not, new[1:], before[1:])))
        elif before is not None:
            for sentence in misspelt(group, GROUP_KEYS):
                warn(sentence, UserWarning)
        if different:
            try:
                check_settings(group, defaults, different)
            except (TypeError, ValueError, RuntimeError) as error:
                raise type(error)(f"in param_groups[{i}]: {error}") from None
            if "layer" in different and group["layer"] is not None:
                group["layers"] = [group["layer"]] * len(group["params"])
        if list in map(type, new):  # a list may be changed in place: check it at every step
            now[i] = tuple([... if type(value) is list else value for value in new])
    checked[:] = now


def check_loaded(
    saved: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]], defaults: Mapping[str, Any]
) -> None:
    """Raise ValueError if a step would refuse the groups that `fill_in` makes from saved ones."""
    for i, (old, own) in enumerate(zip(saved, groups, strict=True)):
        group = {**defaults, **own, **old, **{name: own[name] for name in KEPT}}
        try:
            check_settings(group, defaults)
            layers.as_integers("layers", group["layers"])
            for name in (*RECORDED, "skipped_steps", "last_norm", "micro_step"):
                if group[name] is not None or name not in RECORDED:
                    as_number(group[name], name)
            cycle, count = group["cycle"], len(CycleNumbers._fields)
            if not isinstance(cycle, (tuple, list)) or len(cycle) != count:
                raise ValueError(f"cycle={cycle!r} is not a list of {count} numbers")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"state_dict: param_groups[{i}] cannot be loaded, as {error}") from None


def make_plain(groups: Sequence[dict[str, Any]]) -> None:
    """Turn all numbers into Python numbers, as sharded checkpoints load a tensor only in place of another tensor."""
    for group in groups:
        for name, value in group.items():
            group[name] = plain(value)  # a scheduler may set NumPy numbers
        for name in RECORDED:
            if group[name] is not None:
                group[name] = as_float(as_number(group[name], name))
        group["layers"] = layers.as_integers("layers", group["layers"])
        group["cycle"] = tuple(map(as_float, group["cycle"]))
        group["last_norm"] = as_float(group["last_norm"])


def fill_in(groups: list[dict[str, Any]], earlier: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
    """Complete loaded or unpickled groups: missing keys, and options that loading keeps, get their earlier values.

    The groups may come from another optimizer or an older version. `earlier` has the groups that they replace, if any.
    """
    for i, group in enumerate(groups):
        before = defaults | (earlier[i] if i < len(earlier) else {})
        for name, value in (before | {"signal_state": None, **CYCLE_AT_REST, "last_norm": 0.0}).items():
            if name in defaults or name in GROUP_KEYS:  # a scheduler's keys are dropped, as torch does
                group.setdefault(name, value)
        if i < len(earlier):
            group.update({name: before[name] for name in KEPT})
        group.update(betas=tuple(group["betas"]), cycle=tuple(group["cycle"]))
        if len(group.get("layers", ())) != len(group["params"]):
            known = earlier[i].get("layers", ()) if i < len(earlier) else ()
            fits = len(known) == len(group["params"])
            group["layers"] = known if fits else layers.layers_of(group, groups[:i])
