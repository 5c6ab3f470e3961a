"""What a parameter group of GrokAdamW holds beside the constructor's arguments, and how all of it outlives a process.

It is plain data, for `torch.load(weights_only=True)`.
"""

from __future__ import annotations

from numbers import Real
from typing import Any

from . import accumulation, layers
from .arguments import HOW_TO_RUN, PER_OPTIMIZER
from .numbers import as_float, as_number

# What `GrokAdamW.record` keeps.
RECORDED = ("train_loss", "eval_loss", "train_acc", "eval_acc")
# In every group from the start: sharded checkpoints want the same keys on both sides.
AT_FIRST = {
    "layer": None,
    **dict.fromkeys(RECORDED),
    "signal_state": None,
    "skipped_steps": 0,
    **accumulation.AT_REST,
}
# What older versions of this package did not know, and so is not in what they pickled.
ADDED_LATER = {
    "capturable": False,
    "fused": None,
    "amplify_by_signal": False,
    "window_size": None,
    "window_dtype": None,
    "accumulation_steps": 1,
    "max_row_norm": 0.0,
    "max_row_change": 0.0,
    "train_acc": None,
    "eval_acc": None,
    **accumulation.AT_REST,
}


def make_savable(groups: list[dict[str, Any]]) -> None:
    """Python's own numbers in place of NumPy's, and what was recorded without the graph that it came from."""
    for group in groups:
        for name, value in group.items():
            if isinstance(value, Real) and type(value).__module__ != "builtins":  # NumPy's, by a scheduler
                group[name] = float(value)
        for name in RECORDED:
            if group[name] is not None:  # set by hand, it may have a graph, which cannot be copied
                group[name] = as_number(group[name], name)
        group["cycle"] = tuple(map(as_float, group["cycle"]))


def fill_in(groups: list[dict[str, Any]], earlier: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
    """Complete groups that were loaded or unpickled: what another optimizer's do not say stays as it was.

    Args:
        earlier: the groups that these take the place of; none where there was no optimizer before.
    """
    fixed = {name: defaults[name] for name in PER_OPTIMIZER} | {"grokking_signal_fns": None}
    for i, group in enumerate(groups):
        kept = defaults | (earlier[i] if i < len(earlier) else {})
        kept |= {"signal_state": None, **accumulation.AT_REST}
        for name, value in kept.items():
            if name != "param_names":
                group.setdefault(name, value)
        if i < len(earlier):
            group.update({name: kept[name] for name in HOW_TO_RUN})
        group.update(fixed, betas=tuple(group["betas"]), cycle=tuple(group["cycle"]))
        if len(group.get("layers", ())) != len(group["params"]):
            group["layers"] = layers.layers_of(group, groups[:i])
