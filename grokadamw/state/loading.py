"""Restore the state from a checkpoint: `load_state_dict` checks all of it, and keeps it as it was saved."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._numbers import as_number, as_real
from .._warn import warn
from ..checkpoints import to_grokadamw
from ..layers import unwrapped_in, without_none_names
from ..options import OPTIONS, STATES, WARN
from ..param_groups import check_loaded
from ..shards import cuts_blocks, mesh_of, part, placed, shards_of
from . import formats, window
from .slots import WINDOW, State, by_device, dtype_of, step_device


@contextmanager
def keeping_precision(optimizer: Optimizer, is_preset: bool) -> Iterator[None]:
    """Make optimizer.load_state_dict keep the state as it was saved. (torch would cast it to its parameter's dtype.)

    All copies are made before anything is replaced, so that a shortage of memory leaves the optimizer as it was.
    In this context it accepts the state dicts that `to_grokadamw` accepts, and matches parameters by name if both sides
    have names. It warns if the run will not continue as before.

    Raises:
        ValueError: a state does not have its parameter's shape, or cannot be continued, or an option is not allowed.
            Nothing is loaded then.
    """
    copies: dict[Tensor, State] = {}

    def keep(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        state_dict = in_order(to_grokadamw(given), optimizer.param_groups)
        check_loaded(state_dict["param_groups"], optimizer.param_groups, optimizer.defaults)
        _check_cycle(state_dict, optimizer.defaults["accumulation_steps"])
        _check_kinds(state_dict)
        _check_codes(state_dict)
        loaded = list(_states(state_dict, optimizer.param_groups, optimizer.defaults))
        for sentence in _doubts(state_dict, loaded, optimizer.defaults):  # now, as warnings may be errors
            warn(sentence, UserWarning)
        if is_preset and any("amsgrad" in group for group in given["param_groups"]):
            warn(
                "a state dict of AdamW or Adam was loaded into the preset: its lr, weight_decay, betas and eps replace "
                "the preset's. Start the preset with fresh moments, or set them again",
                UserWarning,
            )
        copies.update((param, _placed(param, state, optimizer.defaults)) for param, state in loaded)
        for params in by_device(param for param, state in copies.items() if "step" in state).values():
            counts = torch.stack([copies[param]["step"] for param in params]).unbind()
            for param, count in zip(params, counts, strict=True):
                copies[param]["step"] = count
        # hide our state from torch: it would copy it to the parameters' dtype, which may take four times the memory
        ours = set(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        others = {key: value for key, value in state_dict["state"].items() if key not in ours}
        return {**state_dict, "state": others}

    def restore(_: Optimizer) -> None:
        optimizer.state.update(copies)

    # run after the user's own pre-hooks, and before their post-hooks
    before = optimizer.register_load_state_dict_pre_hook(keep)
    after = optimizer.register_load_state_dict_post_hook(restore, prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def in_order(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the state dict in the order of `groups`, matched by name if both sides have the same names.

    Otherwise match parameters by position, as torch does; raise ValueError if a name that both sides have is elsewhere.
    """
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(
            f"state_dict has a different number of parameter groups, {len(saved)}, than the optimizer, {len(groups)}: "
            "construct the optimizer as it was when this was saved. (for_grokking makes its own groups.)"
        )
    saved = list(map(without_none_names, saved))
    saved = list(map(_as_listed, saved, unwrapped_in(saved)))
    state_dict = {**state_dict, "param_groups": saved}
    saved_names, own_names = _named(saved), _named(groups)
    if saved_names is None or own_names is None:
        return state_dict
    with_own_names = [{**old, "param_names": group["param_names"]} for old, group in zip(saved, groups, strict=True)]
    if saved_names == own_names:  # but perhaps not what wrappers have added to the names
        return {**state_dict, "param_groups": with_own_names}
    flat_saved, flat_own = list(chain.from_iterable(saved_names)), list(chain.from_iterable(own_names))
    if len(flat_saved) > len(set(flat_saved)) or len(flat_own) > len(set(flat_own)):
        if sorted(flat_saved) != sorted(flat_own):
            return state_dict
        raise ValueError(
            f"state_dict and the optimizer both name {max(flat_own, key=flat_own.count)!r} twice, and others in "
            "another order: states cannot be matched. Give the optimizer its parameters in the saved order"
        )
    by_names = {frozenset(names): (group, names) for names, group in zip(saved_names, saved, strict=True)}
    if all(frozenset(names) in by_names for names in own_names):
        ordered = []
        for group, own in zip(groups, own_names, strict=True):
            old, names = by_names[frozenset(own)]
            places = {name: i for i, name in enumerate(names)}
            ordered.append(_reordered(old, [places[name] for name in own], group))
        for group, first in zip(ordered, saved, strict=True):
            for name in ("signal_state", "grokfast_signal_state"):  # only the first group keeps these
                if name in first:
                    group[name] = first[name]
        return {**state_dict, "param_groups": ordered}
    shared = set(flat_saved) & set(flat_own)
    if moved := [a for a, b in zip_longest(flat_saved, flat_own) if a != b and a in shared]:
        raise ValueError(
            f"state_dict and the optimizer both name {moved[0]!r}, in different places, but do not name the same "
            "parameters in each group: states cannot be matched. Give the optimizer the groups and names that were "
            f"saved; only one side has {sorted(set(flat_saved) ^ set(flat_own)) or 'these groups'}"
        )
    return {**state_dict, "param_groups": with_own_names}


def _as_listed(old: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Put a group in one order: torch.distributed.checkpoint lists names as params, and the rest in another order.

    `names` are the group's, without the parts that wrappers add. If torch.distributed.checkpoint has regrouped the
    parameters, the rest belongs to another group: leave names and layers out then.
    """
    keys = old["params"]
    if all(isinstance(key, str) for key in keys) and set(keys) != set(names):
        return {key: value for key, value in old.items() if key not in ("param_names", "layers")}
    if len(names) != len(keys):
        old = {key: value for key, value in old.items() if key != "param_names"}
    if keys == names or len(set(names)) != len(keys) or set(keys) != set(names):
        return old
    places = {name: place for place, name in enumerate(names)}
    order = [places[key] for key in keys]
    listed = [name for name in ("param_names", "layers") if len(old.get(name, ())) == len(keys)]
    return {**old, **{name: [old[name][i] for i in order] for name in listed}}


def _reordered(old: dict[str, Any], order: Sequence[int], group: dict[str, Any]) -> dict[str, Any]:
    """Return a saved group with its parameters in the order of our `group`, which has the same names."""
    new = {**old, "params": [old["params"][i] for i in order], "param_names": group["param_names"]}
    if len(old.get("layers", ())) == len(order):
        new["layers"] = [old["layers"][i] for i in order]
    return new


def _named(groups: list[dict[str, Any]]) -> list[list[str]] | None:
    """Return the names of each group's parameters, without the parts that wrappers add; None if a group has none."""
    if not all(len(group.get("param_names", ())) == len(group["params"]) > 0 for group in groups):
        return None
    return unwrapped_in(groups)


def _states(
    state_dict: dict[str, Any], groups: list[dict[str, Any]], options: dict[str, Any]
) -> Iterator[tuple[Tensor, State]]:
    """Yield the parameters that have a state in a state dict, with the entries that these options use. Check shapes."""
    keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(group["params"] for group in groups)
    for key, param in zip(keys, params, strict=False):  # torch refuses a different number of parameters
        if (state := state_dict["state"].get(key)) is None:
            continue
        for name in (*STATES, *formats.EXTRAS):
            expected = formats.shape_of_scales(param) if name.endswith("_scale") else param.shape
            if name in state and state[name].shape != expected:
                raise ValueError(
                    f"state_dict: {name} of parameter {key} has shape {tuple(state[name].shape)}, the parameter itself "
                    f"{tuple(param.shape)}; parameters must come in the order that they were saved in"
                )
            if name in state:
                check_sharding(f"{name} of parameter {key}", state[name], param)
        if options["window_size"] is None:
            state = {name: value for name, value in state.items() if name not in WINDOW}
        _check_window(state, key, param, options["window_size"])
        if options["accumulation_steps"] == 1:
            state = {name: value for name, value in state.items() if name != "micro_step"}
        yield param, state


def check_sharding(name: str, value: Tensor, param: Tensor) -> None:
    """Raise ValueError if a saved tensor is whole and its parameter sharded over several ranks, or the reverse."""
    is_cut, was_cut = ((shards := shards_of(x)) is not None and any(shards.cuts()) for x in (param, value))
    if is_cut and mesh_of(value) is None:
        raise ValueError(
            f"state_dict: {name} is a full tensor, and this rank has a part of the parameter. Save by "
            "get_optimizer_state_dict, and load by set_optimizer_state_dict(model, optimizer, saved, "
            "options=StateDictOptions(full_state_dict=True)), both of torch.distributed.checkpoint.state_dict"
        )
    if was_cut and mesh_of(param) is None:
        raise ValueError(
            f"state_dict: {name} is sharded over several ranks, and the parameter is not. Save by "
            "get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict"
        )


def _check_window(state: Mapping[str, Any], key: Any, param: Tensor, size: int | None) -> None:
    """Raise ValueError if the window in the saved state of the parameter `key` is incomplete, or of another shape."""
    ring, *sums, _ = WINDOW
    missing = [name for name in WINDOW if name not in state]
    if len(missing) == len(WINDOW):
        return
    way_out = f"remove {', '.join(WINDOW)} from each state to start a new window"
    if missing:
        raise ValueError(f"state_dict: the window of parameter {key} lacks {', '.join(missing)}: {way_out}")
    shape = tuple(as_real(param).shape)
    if state[ring].shape != (size, *shape):
        raise ValueError(
            f"state_dict: the window of parameter {key} has shape {tuple(state[ring].shape)}, and with window_size="
            f"{size} {(size, *shape)}: construct the optimizer with window_size={len(state[ring])}, or {way_out}"
        )
    for name in sums:
        if state[name].shape != shape:
            raise ValueError(
                f"state_dict: {name} of parameter {key} has shape {tuple(state[name].shape)}, not {shape}: {way_out}"
            )


def _check_cycle(state_dict: dict[str, Any], steps: int) -> None:
    for group in state_dict["param_groups"]:
        if group.get("micro_step") and group["accumulation_steps"] != steps:
            raise ValueError(
                f"state_dict was saved after {group['micro_step']} of accumulation_steps={group['accumulation_steps']} "
                f"micro-batches, and the optimizer has accumulation_steps={steps}: construct it with "
                f"{group['accumulation_steps']}. A checkpoint saved between cycles loads with any accumulation_steps"
            )


def _check_kinds(state_dict: dict[str, Any]) -> None:
    """Raise ValueError if a state is not a tensor, or a count is not a number from 0 on."""
    for key in chain.from_iterable(group["params"] for group in state_dict["param_groups"]):
        state = state_dict["state"].get(key) or {}
        for name in (*STATES, *formats.EXTRAS, *WINDOW[:-1]):
            if name in state and not isinstance(state[name], Tensor):
                raise ValueError(f"state_dict: {name} of parameter {key} is {state[name]!r:.40}, not a tensor")
        for name in ("step", "micro_step", WINDOW[-1]):
            if name in state:
                check_count_loaded(f"{name} of parameter {key}", state[name])


def check_count_loaded(what: str, value: Any) -> None:
    """Raise ValueError if a saved count of steps is not a finite number from 0 on."""
    try:
        count = as_number(value, what)
    except TypeError as error:
        raise ValueError(f"state_dict: {error}") from None
    if isinstance(count, float) and not 0 <= count < math.inf:
        raise ValueError(f"state_dict: {what} is {count:g}: give a number of steps")


def _check_codes(state_dict: dict[str, Any]) -> None:
    """Raise ValueError for codes without scales, which torch.distributed.checkpoint copies to float32 like numbers."""
    for group in state_dict["param_groups"]:
        asked = group.get("state_dtype", "float32")
        for key in group["params"]:
            state = state_dict["state"].get(key) or {}
            for name in (name for name in STATES if name in state and f"{name}_scale" not in state):
                kept, was_coded = state[name], (asked.get(name) if isinstance(asked, dict) else asked) == "int8"
                if kept.is_complex():
                    continue
                may_be_codes = was_coded and kept.numel() >= formats.SMALL
                if not kept.is_floating_point() or (may_be_codes and _are_integers(kept)):
                    way = f"optimizer with state_dtype={asked!r}, and then its state_dict() into a new one of this kind"
                    if cuts_blocks(kept, formats.BLOCK):
                        way = "optimizer on as many ranks as saved it: these cut its blocks of 64; or save with float32"
                    raise ValueError(
                        f"state_dict: {name} of parameter {key} holds codes without their scales. "
                        f"torch.distributed.checkpoint copies them into whatever the optimizer has: load into an {way}"
                    )


def _are_integers(kept: Tensor) -> bool:
    """Return True if all numbers of a tensor, on all ranks, are integers, and not all are 0."""
    own, shards = part(kept), shards_of(kept)
    found = torch.stack([own.any(), (own != own.round()).any()])
    is_not_0, has_fractions = (found if shards is None else shards.total([found], (2,))).tolist()
    return bool(is_not_0 and not has_fractions)


def _has_16_bits(param: Tensor) -> bool:
    """Return True if all numbers of a wider parameter would fit into bfloat16 or float16."""
    values = part(param.detach())
    return not values.is_meta and any(torch.equal(values, values.to(half).to(values.dtype)) for half in formats.HALVES)


def _doubts(state_dict: dict[str, Any], loaded: list[tuple[Tensor, State]], defaults: dict[str, Any]) -> Iterator[str]:
    """Yield a warning for each way in which the run will not continue as before."""
    for name, option in OPTIONS.items():
        said = [group[name] for group in state_dict["param_groups"] if name in group]
        if option.on_load == WARN and said and said[0] != defaults[name]:
            yield (
                f"state_dict is of a run with {name}={said[0]!r}, and this optimizer keeps {name}="
                f"{defaults[name]!r}, as constructed"
            )
    dropped = [p for p, state in loaded if "param_low" in state and formats.low_dtype(p, defaults) is None]
    if any(param.dtype in formats.HALVES for param in dropped):
        yield (
            "state_dict has the low bits of its parameters, and this optimizer has master_weight_bits=None: they are "
            "dropped, and parameters keep only the bits of their dtype. Construct it with master_weight_bits=32 or 24"
        )
    elif dropped and all(map(_has_16_bits, dropped)):  # else the weights come from full_precision_state_dict
        yield (
            f"state_dict has the low bits of bfloat16 or float16 parameters, which are {dropped[0].dtype} here: they "
            "are dropped. To keep them, load what full_precision_state_dict(model, optimizer) returned in the run that "
            "saved this into the model"
        )
    for i, group in enumerate(state_dict["param_groups"]):
        states = [state_dict["state"].get(key) or {} for key in group["params"]]
        if group.get("lamb", 0) > 0 and any("exp_avg" in state and "grok_ema" not in state for state in states):
            yield (
                f"state_dict has lamb={group['lamb']:g} in group {i}, and no slow gradient (grok_ema): it starts at 0. "
                "(If torch.distributed.checkpoint loaded it, construct the optimizer with lamb above 0.)"
            )
            return


def _placed(param: Tensor, state: State, options: dict[str, Any]) -> State:
    """Return a copy of a loaded state, on the devices and in the formats that a step needs."""
    shards, ours = shards_of(param), (*STATES, *formats.EXTRAS)
    state = {name: x.to(param.device) if name in ours else x for name, x in state.items()}
    if shards is not None:
        state = {name: placed(x, shards) if name in ours else x for name, x in state.items()}
    fit: State = {}
    for name, value in state.items():
        if name in STATES:
            fit |= formats.packed(state, name, param, options, dtype_of(param, options))
        elif name in formats.EXTRAS:  # `packed` returns scales with their codes
            if name == "param_low" and (low := formats.low_dtype(param, options)):
                fit[name] = formats.low_bits(value, low).clone()
        elif name == "step":
            fit[name] = torch.as_tensor(value, dtype=torch.float32, device=step_device(param)).reshape(()).clone()
        elif name == WINDOW[-1]:
            fit[name] = torch.as_tensor(value, dtype=torch.int64, device=step_device(param)).reshape(()).clone()
        elif name in WINDOW:
            fit[name] = value.to(param.device, copy=True)
        elif isinstance(value, Tensor):
            fit[name] = value.to(param.device, dtype_of(param, options), copy=True)
        else:
            fit[name] = value
    return fit | window.fitted(fit, "grok_", param, options["window_dtype"])
