"""Inside torch's ZeroRedundancyOptimizer, which gives each rank's optimizer a part of every group.

It copies its groups, but for the parameters, over those of the rank's optimizer before each step and when it loads a
checkpoint, and back after a step. So what is written between steps has to be written to its groups, too.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any

from .distributed import check_shard_group
from .options import KEPT, OF_NO_GROUP, PROGRESS, fill_in, place_recorded, rules_of


def caller() -> Any:
    """Return the ZeroRedundancyOptimizer that is making its rank's optimizer; None if there is none.

    It does not say who it is: so this looks among the callers.
    """
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame: FrameType | None = sys._getframe(1) if module is not None else None
    while frame := frame and frame.f_back:
        if frame.f_code.co_name == "_init_local_optimizer":
            zero = frame.f_locals.get("self")
            return zero if isinstance(zero, module.ZeroRedundancyOptimizer) else None  # type: ignore[union-attr]
    return None


def follow(zero: Any, optimizer: Any, params: Any, arguments: dict[str, Any]) -> list[Any]:
    """Make it known to a rank's optimizer; return that one's parameters, without what is no option of a group.

    It puts all arguments into groups, which process groups and signals do not belong in.
    """
    given = {name: arguments[name] for name in OF_NO_GROUP if name in arguments}
    zero.defaults = _without(given, zero.defaults)
    for group in zero.param_groups:
        kept = _without(given, group)
        group.clear()
        group.update(kept)
    if zero.world_size > 1 and not rules_of(arguments).clips_each_tensor:
        check_shard_group(zero.process_group, [arguments])
        optimizer._run.shard_group = zero.process_group
    optimizer._run.zero, this = weakref.ref(zero), weakref.ref(optimizer)

    def keep_own(_: Any) -> None:  # before those that were loaded are copied over them; if twice, before the first time
        if (optimizer := this()) is not None and not optimizer._run.before_loading:
            optimizer._run.before_loading = [dict(group) for group in optimizer.param_groups]

    zero.register_load_state_dict_post_hook(keep_own)
    return [_without(given, group) if isinstance(group, dict) else group for group in params]


def _without(given: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in given or value is not given[name]}


def tell(optimizer: Any) -> None:
    """Let it have what its groups would else overwrite at the next step."""
    if (zero := optimizer._run.zero()) is not None:
        for group, outer in zip(optimizer.param_groups, zero.param_groups, strict=False):
            outer.update({name: group[name] for name in ("layers", *PROGRESS)})


def take_places(optimizer: Any) -> None:
    """Number the layers of the group that was added last by the places in the whole group, of which it is a part."""
    *earlier, group = optimizer.param_groups
    if (zero := optimizer._run.zero()) is None or group["layer"] is not None or "param_names" in group:
        return
    whole = [each["params"] for each in zero.param_groups[len(earlier) : len(earlier) + 1]]
    places = {param: place for params in whole for place, param in enumerate(params)}
    group["layers"] = [places.get(param, own) for param, own in zip(group["params"], group["layers"], strict=True)]


def go_on_after_loading(optimizer: Any) -> None:
    """Do what `load_state_dict` does, where it has loaded a checkpoint without that."""
    run = optimizer._run
    if not run.before_loading:
        return
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
    place_recorded(optimizer.param_groups)
    run.restart(optimizer.param_groups[0]["signal_state"])
    tell(optimizer)
