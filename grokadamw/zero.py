"""Support for torch's ZeroRedundancyOptimizer, which gives each rank's optimizer a part of every group.

Before each step, and when it loads a checkpoint, ZeroRedundancyOptimizer copies its groups, except for the parameters,
over those of the rank's optimizer. After a step, it copies them back. Values that are written between steps must
therefore be written to its groups, too.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from traceback import walk_stack
from typing import Any

from .distributed import check_shard_group
from .options import KEPT, OF_NO_GROUP, rules_of
from .param_groups import PROGRESS, fill_in


def caller() -> Any:
    """Return the ZeroRedundancyOptimizer that is constructing its rank's optimizer; None if there is none.

    It does not pass itself on, so this looks for it on the call stack.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return None
    for frame, _ in walk_stack(sys._getframe()):
        if frame.f_code.co_name == "_init_local_optimizer":
            zero = frame.f_locals.get("self")
            return zero if isinstance(zero, module.ZeroRedundancyOptimizer) else None
    return None


def follow(zero: Any, optimizer: Any, params: Any, arguments: dict[str, Any]) -> list[Any]:
    """Connect a rank's optimizer to its ZeroRedundancyOptimizer. Return params without options that no group may hold.

    ZeroRedundancyOptimizer puts all arguments into groups, even process groups and signals, which do not belong there.
    """
    of_no_group = {name: arguments[name] for name in OF_NO_GROUP if name in arguments}
    zero.defaults = _without(of_no_group, zero.defaults)
    for group in zero.param_groups:
        kept = _without(of_no_group, group)
        group.clear()
        group.update(kept)
    if zero.world_size > 1 and not rules_of(arguments).clips_each_tensor:
        check_shard_group(zero.process_group, [arguments])
        optimizer._run.shard_group = zero.process_group
    optimizer._run.zero, this = weakref.ref(zero), weakref.ref(optimizer)

    def keep_own(_: Any) -> None:  # before loaded groups replace them; a second load keeps the first copy
        if (optimizer := this()) is not None and not optimizer._run.before_loading:
            optimizer._run.before_loading = [dict(group) for group in optimizer.param_groups]

    zero.register_load_state_dict_post_hook(keep_own)
    return [_without(of_no_group, group) if isinstance(group, dict) else group for group in params]


def _without(dropped: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in dropped or value is not dropped[name]}


def groups_of_all_ranks(optimizer: Any) -> list[dict[str, Any]]:
    """Return ZeroRedundancyOptimizer's groups, with the parameters of all ranks; without it, the optimizer's groups."""
    zero = optimizer._run.zero()
    return optimizer.param_groups if zero is None else zero.param_groups  # type: ignore[no-any-return]


def update_outer_groups(optimizer: Any) -> None:
    """Copy these groups' values to ZeroRedundancyOptimizer's groups, which replace them before the next step."""
    if (zero := optimizer._run.zero()) is not None:
        for group, outer in zip(optimizer.param_groups, zero.param_groups, strict=False):
            outer.update({name: group[name] for name in ("layers", *PROGRESS)})
            outer.pop("param_names", None)  # a state dict would only have this rank's names


def take_places(optimizer: Any) -> None:
    """Set the last group's names and layers from the whole group that it is a part of, by its parameters' positions.

    If the whole group has no names and no layers, these positions are the layers.
    """
    *earlier, group = optimizer.param_groups
    zero = optimizer._run.zero()
    if zero is None or len(zero.param_groups) <= len(earlier):
        return
    whole = zero.param_groups[len(earlier)]
    places = {param: place for place, param in enumerate(whole["params"])}
    own = [places[param] for param in group["params"]]
    for name in ("param_names", "layers") if group["layer"] is None else ("param_names",):
        if isinstance(whole.get(name), list | tuple) and len(whole[name]) == len(places):
            group[name] = [whole[name][place] for place in own]
    if group["layer"] is None and "param_names" not in group and "layers" not in whole:
        group["layers"] = own


def go_on_after_loading(optimizer: Any) -> None:
    """Do the rest of `load_state_dict` after ZeroRedundancyOptimizer has loaded a checkpoint without calling it."""
    run = optimizer._run
    own, run.before_loading = run.before_loading, []
    outer_groups = run.zero().param_groups if run.zero() is not None else []
    for group, before in zip(optimizer.param_groups, own, strict=False):
        group.pop("param_names", None)
        group.update({name: before[name] for name in ("layers", "param_names") if name in before})
    fill_in(optimizer.param_groups, own, optimizer.defaults)
    for group, outer in zip(optimizer.param_groups, outer_groups, strict=False):
        if "param_names" not in group:
            outer.pop("param_names", None)
        outer.update({name: group[name] for name in KEPT})
    run.restart(optimizer.param_groups)
    update_outer_groups(optimizer)
