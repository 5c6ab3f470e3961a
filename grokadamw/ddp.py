"""Find the DDP and FSDP1 modules that average or shard parameters. (A parameter has no reference to its wrapper.)"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

DDP, FSDP1 = "DistributedDataParallel", "FullyShardedDataParallel"
_found: weakref.WeakSet[Any] = weakref.WeakSet()  # the wrappers that the last search through all objects found


def kind_of(module: object) -> str | None:
    """Return the name of torch's DDP or FSDP1 if a module is an instance of it or of a subclass; None otherwise."""
    of_torch = (kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch."))
    return next((name for name in of_torch if name in (DDP, FSDP1)), None)


def wrappers_of(params: set[Tensor]) -> list[Any]:
    """Return the DDP and FSDP1 modules, including nested ones, that hold any of these parameters, in arbitrary order.

    This searches all Python objects, unless the wrappers found earlier hold all parameters.
    """
    if not dist.is_available() or not dist.is_initialized():
        return []
    found = _around(params)
    if params <= {param for wrapper in found for param in wrapper.parameters()}:
        return found
    found = _around(params, gc.get_objects())
    if not found and gc.get_freeze_count() and not all(hasattr(param, "device_mesh") for param in params):
        gc.unfreeze()  # gc.get_objects() leaves out frozen objects
        found = _around(params, gc.get_objects())
        if found:  # else freezing would include models that were not frozen, and these could then never be freed
            gc.collect()
            gc.freeze()
    return found


def _around(params: set[Tensor], objects: Iterable[object] = ()) -> list[Any]:
    """Add the wrappers among `objects` to the known ones, and return those that hold any of these parameters."""
    _found.update(x for x in objects if issubclass(type(x), nn.Module) and kind_of(x))
    return [wrapper for wrapper in list(_found) if not params.isdisjoint(wrapper.parameters())]


def holds_whole(wrapper: Any) -> bool:
    """Return True for DDP, and for FSDP1 with NO_SHARD."""
    return kind_of(wrapper) == DDP or wrapper.sharding_strategy.name == "NO_SHARD"


def own_parameters(wrapper: Any) -> set[Tensor]:
    """Return the parameters that a wrapper averages or shards: those in it, but not in a wrapper inside it."""
    inner = (module for module in wrapper.modules() if module is not wrapper and kind_of(module))
    own = {*wrapper.parameters()} - {param for module in inner for param in module.parameters()}
    return own - ignored_by(wrapper)


def ignored_by(wrapper: Any) -> set[Tensor]:
    """Return the parameters that a wrapper was told to ignore: each rank has its own gradients for them."""
    names = getattr(wrapper, "parameters_to_ignore", ())
    of_ddp = {param for name, param in wrapper.module.named_parameters() if name in names} if names else set()
    return of_ddp | {*getattr(wrapper, "_ignored_params", ())}


def copies_of(wrapper: Any) -> set[int]:
    """Return the ranks that hold the same parameters as this rank, or the same shards, as with HYBRID_SHARD."""
    groups = [vars(wrapper).get("_inter_node_pg"), wrapper.process_group if holds_whole(wrapper) else None]
    return {rank for group in groups if group is not None for rank in dist.get_process_group_ranks(group)}


def why_not_early(params: set[Tensor]) -> str | None:
    """Return why ranks still change these parameters' gradients after backward made them; None if they do not."""
    if any(hasattr(param, "device_mesh") for param in params):
        return "that are DTensors, as FSDP2 makes"
    wrappers = wrappers_of(params)
    return f"in {kind_of(wrappers[0])}, which averages their gradients later" if wrappers else None
