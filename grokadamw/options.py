"""All options of GrokAdamW in one table, and the checks of their values.

CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import partial
from itertools import product
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import (
    Check,
    check_betas,
    check_count,
    check_dtype,
    check_limit,
    check_number,
    check_scalar,
    one_of,
    or_none,
)
from ._numbers import reads_are_free

STATES = ("exp_avg", "exp_avg_sq", "grok_ema")  # m, v and μ
FORMATS = ("float32", "bfloat16", "int8")  # the formats in which states can be kept


def check_formats(name: str, value: Any) -> Any:
    """Check a format for all states, or a mapping from some states to formats."""
    if not isinstance(value, Mapping):
        return _check_format(name, value)
    if unknown := [key for key in value if key not in STATES]:
        raise ValueError(f"{name}={value!r} names {unknown[0]!r}: the states are {', '.join(map(repr, STATES))}")
    formats = {key: _check_format(f"{name}[{key!r}]", value[key]) for key in STATES if key in value}
    kinds = {formats.get(key, "float32") for key in STATES}
    return formats if len(kinds) > 1 else kinds.pop()


def _check_format(name: str, value: Any) -> str:
    given = str(value).removeprefix("torch.")
    if not isinstance(value, (str, torch.dtype)) or given not in FORMATS:
        raise ValueError(
            f"{name}={value!r} is not a format: give one of {', '.join(map(repr, FORMATS))}, or a dict of them for any "
            f"of {', '.join(map(repr, STATES))}"
        )
    return given


def not_in_a_group(name: str, value: Any) -> None:
    """Refuse signals or a shard_group in a group. (`Signals` and `check_shard_group` check the constructor's.)"""
    if value is not None:
        takers = "GrokAdamW(...)" + ("" if name == "shard_group" else " or set_signals(...)")
        raise ValueError(
            f"{name}={value!r} in a parameter group: it holds for the whole optimizer; pass it to {takers}"
        )


# The scope of an option:
GROUP = "group"  # each parameter group has its own value
OPTIMIZER = "optimizer"  # all groups have the constructor's value; a group with another value is refused
RUNNING = "running"  # only the running optimizer has it; groups and `defaults` do not, as it is not plain data

# What loading a checkpoint does:
TAKE = "take"  # take the checkpoint's value
KEEP = "keep"  # keep the value as constructed
WARN = "warn"  # keep the value as constructed, and warn if the checkpoint's differs: that run computed something else


class Option(NamedTuple):
    """One row of the table."""

    default: Any
    check: Check
    scope: str
    on_load: str


# fmt: off
OPTIONS: dict[str, Option] = {
    # name                               default       check                                 scope      load
    "lr":                         Option(1e-3,         check_scalar,                         GROUP,     TAKE),
    "betas":                      Option((0.9, 0.999), check_betas,                          GROUP,     TAKE),
    "eps":                        Option(1e-8,         check_number,                         GROUP,     TAKE),
    "weight_decay":               Option(1e-2,         check_number,                         GROUP,     TAKE),
    "alpha_init":                 Option(0.98,         partial(check_scalar, at_most=1),     GROUP,     TAKE),
    "lamb":                       Option(2.0,          check_number,                         GROUP,     TAKE),
    "gamma":                      Option(0.1,          partial(check_number, below=1),       GROUP,     TAKE),
    "grokking_signal_fns":        Option(None,         not_in_a_group,                       RUNNING,   KEEP),
    "grokking_signal_decay_rate": Option(0.1,          check_number,                         GROUP,     TAKE),
    "gradient_clipping":          Option(1.0,          check_limit,                          GROUP,     TAKE),
    "max_row_norm":               Option(0.0,          check_limit,                          GROUP,     TAKE),
    "max_row_change":             Option(0.0,          check_limit,                          GROUP,     TAKE),
    "combine":                    Option("mean",       not_in_a_group,                       RUNNING,   KEEP),
    "second_moment":              Option("filtered",   one_of("filtered", "raw"),            OPTIMIZER, WARN),
    "amplify_after":              Option(0,            check_count,                          GROUP,     TAKE),
    "signal_boost":               Option(0.0,          check_number,                         GROUP,     TAKE),
    "decay_boost":                Option(0.0,          check_number,                         GROUP,     TAKE),
    "amplify_by_signal":          Option(False,        one_of(True, False),                  OPTIMIZER, WARN),
    "window_size":                Option(None,         or_none(check_count, at_least=1),     OPTIMIZER, WARN),
    "window_dtype":               Option(None,         check_dtype,                          OPTIMIZER, KEEP),
    "accumulation_steps":         Option(1,            partial(check_count, at_least=1),     OPTIMIZER, WARN),
    "state_dtype":                Option("float32",    check_formats,                        OPTIMIZER, KEEP),
    "master_weight_bits":         Option(None,         one_of(None, 24, 32),                 OPTIMIZER, KEEP),
    "rounding":                   Option("nearest",    one_of("nearest", "stochastic"),      OPTIMIZER, KEEP),
    "nonfinite":                  Option("skip",       one_of("skip", "raise", "propagate"), OPTIMIZER, KEEP),
    "compat":                     Option(None,         one_of(None, "0.1.2"),                OPTIMIZER, WARN),
    "shard_group":                Option(None,         not_in_a_group,                       RUNNING,   KEEP),
    "foreach":                    Option(None,         one_of(None, True, False),            GROUP,     KEEP),
    "maximize":                   Option(False,        one_of(True, False),                  GROUP,     TAKE),
    "capturable":                 Option(False,        one_of(True, False),                  GROUP,     KEEP),
    "differentiable":             Option(False,        one_of(True, False),                  OPTIMIZER, KEEP),
    "fused":                      Option(None,         one_of(None, True, False),            GROUP,     KEEP),
    "grokking_signal_fn":         Option(None,         not_in_a_group,                       RUNNING,   KEEP),
    "layer":                      Option(None,         or_none(check_count),                 GROUP,     TAKE),
}
# fmt: on
GROUP_OPTIONS = [name for name, option in OPTIONS.items() if option.scope == GROUP]
OF_NO_GROUP = [name for name, option in OPTIONS.items() if option.scope == RUNNING]
# Groups hold no signals, but release 0.1.2 had this key, and its users read it. So the key stays, with the value None.
IN_GROUPS = [name for name, option in OPTIONS.items() if option.scope != RUNNING or name == "grokking_signal_fns"]
KEPT = [name for name in IN_GROUPS if OPTIONS[name].on_load != TAKE]  # loading does not change these


class Rules(NamedTuple):
    """The ways in which release 0.1.2 computes differently. `compat="0.1.2"` switches all of them on."""

    corrects_by_beta1: bool = False  # m is corrected by β1, not by β1_l
    eps_before_correction: bool = False  # ε is added to √v before v's bias correction
    clips_each_tensor: bool = False  # by its own norm, instead of clipping all by one norm
    layers_by_place: bool = False  # a layer is an index among the group's tensors that have a gradient
    signals_for_each_group: bool = False  # instead of once per step
    raises_alpha: bool = False  # by a negative signal
    state_in_param_dtype: bool = False  # even in fewer bits than float32 has
    always_has_mu: bool = False  # even before λ is above 0
    ignores_nonfinite: bool = False  # as if it were "propagate"


_RULES = {None: Rules(), "0.1.2": Rules(*[True] * len(Rules._fields))}


def rules_of(defaults: Mapping[str, Any]) -> Rules:
    """Return the rules of an optimizer's `compat`."""
    return _RULES[defaults["compat"]]


def may_be_coded(defaults: Mapping[str, Any]) -> bool:
    """Return True if an optimizer may keep state or parameters in fewer bits than a step computes with."""
    bits, rounding = defaults["master_weight_bits"], defaults["rounding"]
    return bool(defaults["state_dtype"] != "float32" or bits or rounding != "nearest")


def check_group(
    group: Mapping[str, Any],
    defaults: Mapping[str, Any],
    read_tensors: bool = True,
    names: Collection[str] = OPTIONS.keys(),
) -> dict[str, Any]:
    """Check options of a group whose defaults are filled in, and return them with NumPy numbers as Python numbers.

    Without `read_tensors`, the value of a tensor on a GPU is not read. Raises TypeError, ValueError or RuntimeError if
    an option's value is not allowed at all, not allowed in a group, or not allowed together with another option.
    """
    if group.get("amsgrad"):
        raise ValueError(
            f"amsgrad={group['amsgrad']!r} in a parameter group: GrokAdamW does not support it; leave it out"
        )
    checked = {}
    for name in names:
        option, given = OPTIONS[name], group.get(name)
        value = option.check(name, given)
        if option.scope == OPTIMIZER and given is not defaults[name] and value != defaults[name]:
            raise ValueError(
                f"{name}={given!r} in a parameter group: it holds for the whole optimizer, where it is "
                f"{defaults[name]!r}; pass it to GrokAdamW(...)"
            )
        if option.scope != RUNNING:
            checked[name] = value
    if not _ALONE.issuperset(names):
        _check_together({**group, **checked})
    for name, value in checked.items():
        if isinstance(value, Tensor) and (read_tensors or _is_readable(value)):
            OPTIONS[name].check(name, value.item())
    if read_tensors and group["foreach"] and isinstance(group["lr"], Tensor) and not group["capturable"]:
        raise ValueError(
            "lr as a Tensor is not supported for capturable=False and foreach=True: leave foreach out, or give a number"
        )
    return checked


def _is_readable(value: Tensor) -> bool:
    return reads_are_free(value.device) and not torch._C._functorch.is_functorch_wrapped_tensor(value)


# Options, other options, and the reason: if one of the first differs from its default, none of the others may differ.
_CONFLICTS = (
    (("max_row_norm", "max_row_change", "signal_boost", "decay_boost"), ("compat",), ", which lacks that option:"),
    (("accumulation_steps", "window_size"), ("compat", "differentiable"), ":"),
    (("state_dtype", "master_weight_bits", "rounding"), ("compat", "differentiable"), ":"),
    (("state_dtype",), ("window_size",), ", whose memory window_dtype controls:"),
    (("rounding",), ("master_weight_bits",), ", which has its own rounding:"),
    (("accumulation_steps", "amplify_by_signal"), ("capturable",), ": a CUDA graph does the same at every replay;"),
)
# options that schedulers change at any step: they are allowed with all others, so `_check_together` need not run again
_ALONE = frozenset(("lr", "betas", "weight_decay", "alpha_init", "lamb", "gamma"))


def refuse(groups: Iterable[Mapping[str, Any]], what: str) -> None:
    """Raise ValueError if a group has an option that excludes `what`."""
    for group in groups:
        for name in ("compat", "differentiable", "capturable"):
            if group[name]:
                raise ValueError(f"{name}={group[name]!r} with {what}: leave one of them out")


def _check_together(options: Mapping[str, Any]) -> None:
    """Raise an error for options that do not work together, in torch's words if torch's optimizers refuse them, too."""
    fused, foreach, differentiable = options["fused"], options["foreach"], options["differentiable"]
    if fused and differentiable:
        raise RuntimeError("`fused` does not support `differentiable`: leave one of them out")
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together. Leave one of them out")
    if foreach and differentiable:
        raise ValueError(
            "foreach=True with differentiable=True: torch's foreach operations have no autograd; leave foreach out"
        )
    compat, steps, size = options["compat"], options["accumulation_steps"], options["window_size"]
    if compat is not None and options["nonfinite"] == "raise":
        raise ValueError(
            f"nonfinite='raise' with compat={compat!r}: that release does not check for NaN or infinity; "
            "leave one of them out"
        )
    if size is None and options["window_dtype"] is not None:
        raise ValueError(f"window_dtype={options['window_dtype']} without a window: give window_size, or leave it out")
    if steps > 1 and options["second_moment"] != "raw":
        raise ValueError(
            f"accumulation_steps={steps} with second_moment={options['second_moment']!r}: the square of the amplified "
            "gradient cannot be collected from micro-batches, as the slow gradient is only added at the last; give "
            "second_moment='raw', or use Accumulate(GrokAdamW(...), steps), which needs a buffer"
        )
    if steps > 1 and size is not None:
        raise ValueError(
            f"accumulation_steps={steps} with window_size={size}: a window keeps each step's gradient, which never "
            "exists in one piece; leave one out, or use Accumulate(GrokAdamW(...), steps), which needs a buffer"
        )
    for names, others, why in _CONFLICTS:
        for a, b in product(names, others):
            if options[b] != OPTIONS[b].default and options[a] != OPTIONS[a].default:
                raise ValueError(f"{a}={options[a]!r} with {b}={options[b]!r}{why} leave one of them out")


def check_settings(
    group: Mapping[str, Any], defaults: Mapping[str, Any], names: Collection[str] = OPTIONS.keys()
) -> None:
    """Check the options of these names in a group after they were set by hand."""
    lr = group["lr"]
    if isinstance(lr, Real) and -1e-12 < lr < 0:  # type: ignore[operator]  # no float(lr), which may overflow
        group = {**group, "lr": 0.0}  # a scheduler's 0, up to rounding
    check_group(group, defaults, read_tensors=False, names=names)
