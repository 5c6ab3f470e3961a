"""Assign parameters to layers, and compute the β1 of each layer: β1_l = β1 (1 − γ)^l.

A layer is a number l = 0, 1, 2 …, kept in the parameter group as plain data: key `layers`, parallel to `params`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, count, islice
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn

from ._checks import check_count

# parts that wrappers add to parameter names: torch.compile, FSDP1 and activation checkpointing; and, in front, DDP
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_IN_FRONT = "module."


class Layer(NamedTuple):
    """One row of `GrokAdamW.layer_table()`."""

    layer: int  # l
    names: list[str]  # of its parameters; "parameter 3 of group 0" if they have no names
    beta1: float  # β1_l; the smallest, if groups of different β1 or γ share the layer


def unwrapped(names: Iterable[str]) -> list[str]:
    """Return a model's parameter names without the parts that wrappers add: "_orig_mod.layers.3.q" → "layers.3.q".

    DDP's prefix "module." is removed if all names have it; otherwise it is a module of the model.
    """
    found = list(map(_inside, names))
    while found and all(name.startswith(_IN_FRONT) for name in found):
        found = [name.removeprefix(_IN_FRONT) for name in found]
    return found


@lru_cache(maxsize=1 << 16)  # adding a group asks for the names of all groups before it
def _inside(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@lru_cache(maxsize=1 << 16)
def layer_path(name: str) -> str:
    """Return the module path that names the layer of a parameter with this `unwrapped` name.

    The path ends with its first all-digit component ("layers.3.attn.q.weight" → "layers.3"). If there is none, it is
    the whole module path ("head.weight" → "head"). A parametrized weight is in its module's layer. A parameter of the
    model itself ("scale" → "") is in layer 0, with the first module.
    """
    parts = name.split(".")
    path = parts[: parts.index("parametrizations")] if "parametrizations" in parts else parts[:-1]
    for i, part in enumerate(path):
        if part.isdigit():
            return ".".join(path[: i + 1])
    return ".".join(path)


def layers_of(group: dict[str, Any], earlier: Sequence[dict[str, Any]]) -> list[int]:
    """Return the layer of each of the group's parameters, continuing the layers of the earlier groups."""
    if group["layer"] is not None:
        return [group["layer"]] * len(group["params"])
    if "param_names" not in group:
        return list(range(len(group["params"])))
    others = [other for other in earlier if other["layer"] is None]
    *of_others, own = unwrapped_in([*others, group])
    known: dict[str, int] = {}
    for other, names in zip(others, of_others, strict=True):  # the next step raises an error if a name has no layer
        known.update(zip(map(layer_path, names), other["layers"], strict=False))
    return _numbered(own, known)


def without_none_names(group: dict[str, Any]) -> dict[str, Any]:
    """Return the group without its names if they are None. torch's optimizers allow both forms."""
    return {key: value for key, value in group.items() if key != "param_names" or value is not None}


def unwrapped_in(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the `unwrapped` names of each group's parameters; an empty list for a group without names."""
    own = [group.get("param_names", ()) for group in groups]
    names = iter(unwrapped(chain.from_iterable(own)))
    return [list(islice(names, len(of_group))) for of_group in own]


def _numbered(names: Iterable[str], known: Mapping[str, int]) -> list[int]:
    """Return the layer of each named parameter. Layers that are not `known` get the next numbers, in order."""
    paths = list(map(layer_path, names))
    numbers = {"": 0, **known}
    following = max((layer for path, layer in known.items() if path), default=-1) + 1
    new = dict.fromkeys(path for path in paths if path not in numbers)
    numbers.update(zip(new, count(following), strict=False))
    return [numbers[path] for path in paths]


def as_integers(name: str, value: Any) -> list[int]:
    """Return a group's layers as a list of Python integers; the same list object if it is one already.

    Raises:
        TypeError, ValueError: they are not integers of at least 0.
    """
    try:
        items = list(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} is not a list of integers, one for each parameter") from None
    integers = [check_count(f"{name}[{j}]", item) for j, item in enumerate(items)]
    return value if type(value) is list and all(map(is_, value, integers)) else integers


def check_length(group: dict[str, Any], i: int) -> None:
    """Raise RuntimeError if the i-th group does not have a layer for each parameter."""
    if len(group["layers"]) != len(group["params"]):
        raise RuntimeError(
            f"param_groups[{i}] has {len(group['params'])} parameters and {len(group['layers'])} layers, as its "
            "parameters were changed: call optimizer.set_layers(model), or set its 'layers' to a list of integers"
        )


def check_changed(groups: Sequence[dict[str, Any]], checked: list[list[int]]) -> None:
    """Check layers that were set by hand since the last step; `checked` has copies of the last ones, and is updated."""
    now = [group["layers"] for group in groups]
    if set(map(type, now)) <= {list} and now == checked:
        return
    for i, group in enumerate(groups):
        group["layers"] = as_integers(f"param_groups[{i}]['layers']", group["layers"])
        check_length(group, i)
    checked[:] = [list(group["layers"]) for group in groups]


def layers_in(named: Mapping[Tensor, str]) -> dict[Tensor, int]:
    """Return the layer of each of a model's parameters, numbered in order of appearance."""
    return dict(zip(named, _numbered(unwrapped(named.values()), {}), strict=True))


def take_from(model: nn.Module, groups: Sequence[dict[str, Any]], known: Mapping[int, str]) -> dict[int, str]:
    """Set the layers of all groups without `layer` from a model, and return their parameters' names, by id."""
    fixed = {param for group in groups if group["layer"] is not None for param in group["params"]}
    named: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p not in fixed}
    numbers = layers_in(named)
    params = [param for group in groups for param in group["params"]]
    for param in params:
        if param not in numbers and param not in fixed:
            raise ValueError(
                f"model: this {type(model).__name__} has no {name_of(param, groups, known)}, of shape "
                f"{tuple(param.shape)}: give the model that is optimized; parameters outside it go in a group with "
                "layer="
            )
    for group in groups:
        if group["layer"] is None:
            group["layers"] = [numbers[param] for param in group["params"]]
            if len(group.get("param_names", group["params"])) != len(group["params"]):  # the list was changed by hand
                group["param_names"] = [named[param] for param in group["params"]]
    names = dict(zip(named, unwrapped(named.values()), strict=True))
    return {id(param): names[param] for param in params if param in named}


def make_one(groups: Sequence[dict[str, Any]], are_shards: bool) -> str | None:
    """If a framework replaced a group's parameters by one flat tensor, give it one layer.

    Return a warning if this loses layers, rows or a part of the norm; None otherwise.

    Args:
        are_shards: True if other ranks may have other parts; the optimizer's norm leaves out their gradients.
    """
    lost: dict[str, str] = {}
    for group in groups:
        params = group["params"]
        if len(group["layers"]) == len(params) or len(params) != 1 or params[0].dim() != 1:
            continue
        several = len(set(group["layers"])) > 1
        group["layers"] = [0] if several else group["layers"][:1]
        group.pop("param_names", None)
        if several and group["gamma"]:
            lost["gamma=0"] = f"gamma={group['gamma']:g} finds no layers in it, and treats all of it as layer 0"
        for name in ("max_row_norm", "max_row_change"):
            if group[name]:
                lost[f"{name}=0"] = f"{name}={group[name]:g} finds no rows in it"
        if are_shards and (group["gradient_clipping"] or group["nonfinite"] != "propagate"):
            way_out = "gradient_clipping=0 and nonfinite='propagate', and let the wrapper clip, or shard_group"
            lost[way_out] = "the norm of the gradients leaves out what other ranks have, if each has a part"
    if not lost:
        return None
    return (
        "a parameter group holds one flat tensor instead of its parameters, as DeepSpeed makes it: "
        f"{'; '.join(lost.values())}. Give {'; '.join(lost)}"
    )


def decayed(beta1: float, gamma: float, layers: Sequence[int]) -> tuple[float, ...]:
    """Return β1_l = β1 (1 − γ)^l for each of these layers."""
    beta1, keep = float(beta1), 1 - float(gamma)
    return tuple([beta1 * keep**layer for layer in layers])


def beta1s(group: dict[str, Any]) -> tuple[float, ...]:
    """Return β1_l of each of the group's parameters."""
    return decayed(group["betas"][0], group["gamma"], group["layers"])


def names(group: dict[str, Any], i: int, known: Mapping[int, str]) -> list[str]:
    """Return the names of the i-th group's parameters: those known from a model, else the group's own."""
    own = group.get("param_names", ())
    if len(own) != len(group["params"]):  # there are none, or the list of parameters was changed by hand
        own = [f"parameter {j} of group {i}" for j in range(len(group["params"]))]
    return [known.get(id(param), name) for param, name in zip(group["params"], own, strict=True)]


def name_of(param: Tensor, groups: Sequence[dict[str, Any]], known: Mapping[int, str]) -> str:
    """Return the name that `names` gives a parameter of the groups."""
    i, j = next((i, j) for i, group in enumerate(groups) for j, p in enumerate(group["params"]) if p is param)
    return names(groups[i], i, known)[j]


def table(groups: Sequence[dict[str, Any]], known: Mapping[int, str]) -> list[Layer]:
    """Return one row for each layer, in order."""
    rows: dict[int, Layer] = {}
    for i, group in enumerate(groups):
        for layer, name, beta1 in zip(group["layers"], names(group, i, known), beta1s(group), strict=True):
            row = rows.setdefault(layer, Layer(layer, [], beta1))
            row.names.append(name)
            rows[layer] = row._replace(beta1=min(row.beta1, beta1))
    return [rows[layer] for layer in sorted(rows)]


def warnings_for(
    groups: Sequence[dict[str, Any]], known: Mapping[int, str], preset_gamma: float | None = None
) -> Iterator[str]:
    """Yield a warning if two layers may count as one by mistake, and one if γ lowers some β1_l below half of β1.

    This is called in the first step, and again in the first step after a group was added, layers were set, or a state
    dict was loaded. There is no warning about `preset_gamma`, the γ that `GrokAdamW.for_grokking` chose for its model.
    """
    of_names = [names(g, i, known) for i, g in enumerate(groups) if g["layer"] is None and "param_names" in g]
    twice = [name for name, uses in Counter(chain.from_iterable(of_names)).items() if uses > 1]
    if twice and any(group["gamma"] > 0 for group in groups):
        yield (
            f"two parameters are called {twice[0]!r}, and count as one layer: give names of the whole model, as "
            "model.named_parameters() does, or call optimizer.set_layers(model)"
        )
    for i, group in enumerate(groups):
        beta1, smallest = group["betas"][0], min(beta1s(group), default=0.0)
        if group["params"] and smallest < 0.499 * beta1 and group["gamma"] != preset_gamma:
            deepest = max(group["layers"])
            largest = math.floor((1 - 0.5 ** (1 / deepest)) * 1000) / 1000
            ways_out = f"choose a gamma of at most {largest:g}"
            if "param_names" not in group and not all(id(param) in known for param in group["params"]):
                ways_out = (
                    "pass model.named_parameters() or call optimizer.set_layers(model), so that the layers are its "
                    f"modules (GrokAdamWCallback does so in Hugging Face's Trainer); or {ways_out}"
                )
            yield (
                f"layer {deepest} of parameter group {i} has β1 = {smallest:.3g}, less than half of betas[0] = "
                f"{beta1:g}: gamma = {group['gamma']:g} lowers it layer by layer. If that is not wanted, {ways_out}. "
                "optimizer.layer_table() shows the layers"
            )
            return
