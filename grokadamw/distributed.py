"""Everything that knows of ranks, device meshes and DTensors.

A step takes the shard of this rank out of each DTensor, and is plain from there on. What must be summed over ranks (the
norm of all gradients, the norms of rows that are cut) is summed here, and so is the signal, so that every
rank goes on with the same α and the same length of steps.

Plain tensors count as whole, unless the optimizer has a `shard_group`: then each rank has others, as with FSDP1,
pipeline stages, and torch's ZeroRedundancyOptimizer, which is known by being around the optimizer.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

_PLAIN = {Tensor, nn.Parameter}
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")


def mesh_of(tensor: Tensor) -> Any:
    """Return the mesh that a DTensor is on, None for a plain tensor: torch takes no list that mixes them."""
    return getattr(tensor, "device_mesh", None)


def whole(value: Tensor) -> Tensor:
    """Return the full tensor behind a DTensor; any other tensor as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


class Shards(NamedTuple):
    """How DTensors are divided. Hashable, and the same for all that are divided in the same way."""

    mesh: Any
    placements: tuple[Any, ...]

    @property
    def cut_rows(self) -> bool:
        """Return True if a row, a slice along the first dimension, may lie on several ranks."""
        return any(dim > 0 for _, dim in self.cuts())

    def sum(self, value: Tensor, rows: bool = False) -> Tensor:
        """Return the sum over all ranks that have another shard: of one number, or of one for each of their `rows`."""
        for i, dim in self.cuts():
            if dim > 0 or not rows:
                value = value.clone()
                dist.all_reduce(value, group=self.mesh.get_group(i))
        return value

    def total(self, values: Iterable[Any], size: Sequence[int] = ()) -> Tensor:
        """Return the sum, in float64, of this rank's tensors of that size and those of ranks that have another shard.

        All of them call it, one that has no such tensor, too.
        """
        return self.sum(_added(values, torch.device(self.mesh.device_type), size))

    def ranks_in(self, group: Any) -> int:
        """Return how many ranks of a process group are on the mesh, this one among them."""
        return len({*self.mesh.mesh.flatten().tolist()} & {*dist.get_process_group_ranks(group)})

    def cuts(self) -> Iterable[tuple[int, int]]:
        """Yield the mesh dimensions that tensors are divided over, with the tensor's dimension."""
        for i, placement in enumerate(self.placements):
            if not placement.is_replicate() and not placement.is_partial() and self.mesh.size(i) > 1:
                yield i, placement.dim


def shards_of(tensor: Tensor) -> Shards | None:
    """Return how a DTensor is divided, None for a plain tensor."""
    mesh = mesh_of(tensor)
    return None if mesh is None else Shards(mesh, tuple(tensor.placements))  # type: ignore[attr-defined]


def divisions(groups: Iterable[Mapping[str, Any]]) -> list[Shards]:
    """Return the ways in which the groups' parameters are divided, in an order that is the same on all ranks."""
    found = (shards_of(param) for group in groups for param in group["params"])
    return list(dict.fromkeys(shards for shards in found if shards is not None))


def local(tensor: Tensor, shards: Shards | None) -> Tensor:
    """Return the part of this rank, once a DTensor is divided in that way; a plain tensor as it is."""
    return tensor if shards is None else part(placed(tensor, shards))


def placed(tensor: Tensor, shards: Shards) -> Tensor:
    """Return a DTensor that is divided in that way: itself if it is. If not, all ranks must call this."""
    found: Any = tensor
    if mesh_of(tensor) is None or tuple(found.placements) == shards.placements:
        return tensor
    return found.redistribute(placements=shards.placements)  # type: ignore[no-any-return]


def part(tensor: Tensor) -> Tensor:
    """Return the part of a DTensor that this rank has; a plain tensor as it is."""
    if mesh_of(tensor) is None:
        return tensor
    inner: Any = tensor._local_tensor  # type: ignore[attr-defined]
    return inner.wait() if hasattr(inner, "trigger_wait") else inner  # type: ignore[no-any-return]


def parts(lists: Iterable[Sequence[Any]]) -> tuple[list[list[Any]], list[list[Any]]]:
    """Return torch's descriptions of how the tensors of some lists are divided, and the parts of this rank.

    A plain tensor, or None, stays as it is, and has None for a description. Descriptions are compared by `alike`.
    """
    specs, found = [], []
    for tensors in lists:
        try:  # list comprehensions, as Python 3.11 and newer read slots in these in two thirds of attrgetter's time
            described, own = [x._spec for x in tensors], [x._local_tensor for x in tensors]
        except AttributeError:
            described = [getattr(x, "_spec", None) for x in tensors]
            own = [x if spec is None else x._local_tensor for x, spec in zip(tensors, described, strict=True)]
        if not set(map(type, own)) <= {*_PLAIN, type(None)}:  # a result that is still under way
            own = [x if spec is None else part(x) for x, spec in zip(tensors, described, strict=True)]
        specs.append(described)
        found.append(own)
    return specs, found


def alike(specs: Sequence[Any]) -> bool:
    """Return True if tensors that are described so are divided in the same way; or are plain, all of them."""
    ways = [(spec.mesh, spec.placements) for spec in specs if spec is not None]
    return not ways or (len(ways) == len(specs) and all(way == ways[0] for way in ways))


def like(value: Tensor, shape: Sequence[int], tensor: Tensor) -> Tensor:
    """Return a DTensor of that shape, divided as `tensor`, out of this rank's part; the part itself if it is plain."""
    shards = shards_of(tensor)
    if shards is None:
        return value
    from torch.distributed.tensor import DTensor

    size = torch.Size(shape)
    stride = tensor.stride() if size == tensor.shape else torch.empty(size, device="meta").stride()
    return DTensor.from_local(value, shards.mesh, shards.placements, run_check=False, shape=size, stride=stride)


def cuts_blocks(tensor: Tensor, block: int) -> bool:
    """Return True if a block of so many elements of a row (of a vector: of all elements) may lie on two ranks.

    All ranks get the same answer, whatever their own part is.
    """
    shards = shards_of(tensor)
    cuts = [] if shards is None else [cut for cut in shards.cuts() if cut[1] > 0 or tensor.dim() == 1]
    if shards is None or not cuts:
        return False
    from torch.distributed.tensor import Shard

    i, dim = cuts[0]
    is_even = -(-tensor.shape[dim] // shards.mesh.size(i)) % block == 0
    return len(cuts) > 1 or tensor.dim() > 2 or type(shards.placements[i]) is not Shard or not is_even


def blocks_before(tensor: Tensor, block: int) -> int:
    """Return how many blocks of a parameter's rows (of a vector: of all elements) ranks before this one have.

    Parts of rows, and shards of torch's that lie in strides, have no numbers of their own, but other ones on each rank.
    """
    shards = shards_of(tensor)
    if shards is None or not tensor.dim() or not tensor.numel():
        return 0
    starts, sizes, place = [0] * tensor.dim(), list(tensor.shape), shards.mesh.get_coordinate()
    for i, dim in shards.cuts():
        size = -(-sizes[dim] // shards.mesh.size(i))
        start = min(place[i] * size, sizes[dim])
        starts[dim], sizes[dim] = starts[dim] + start, min(size, sizes[dim] - start)
    if tensor.dim() == 1:
        return starts[0] // block
    rows, width = tensor.shape[0], tensor.numel() // tensor.shape[0]
    inside = sum(start * (width // size) for start, size in zip(starts[1:], tensor.shape[1:], strict=True))
    return starts[0] * -(-width // block) + rows * (inside // block)


def local_parts(tensors: Iterable[Tensor], ways: Iterable[Shards] = ()) -> list[tuple[Shards | None, list[Tensor]]]:
    """Return the parts of this rank in lists that are divided alike: one for each of the `ways`, and for any other."""
    lists: dict[Shards | None, list[Tensor]] = {shards: [] for shards in ways}
    for tensor in tensors:
        shards = shards_of(tensor)
        if shards is not None and any(placement.is_partial() for placement in shards.placements):
            from torch.distributed.tensor import Replicate

            whole_ones = tuple(Replicate() if each.is_partial() else each for each in shards.placements)
            shards = Shards(shards.mesh, whole_ones)
        lists.setdefault(shards, []).append(local(tensor, shards))
    return list(lists.items())


def ranks() -> int:
    """Return how many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def span_all_ranks(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Return True if parameters are on a mesh of several ranks, and of all there are: then each of them takes steps."""
    if ranks() == 1:
        return False
    last = None  # so that each mesh is asked once, as all parameters may be on one that is smaller
    for group in groups:
        for param in group["params"]:
            mesh = None if type(param) in _PLAIN else mesh_of(param)
            if mesh is not None and mesh is not last:
                if mesh.size() == ranks():
                    return True
                last = mesh
    return False


def mean_over_ranks(signal: Any, groups: Sequence[dict[str, Any]]) -> tuple[Any, Any]:
    """Return the mean of a signal over the ranks that have one, and how many others they are.

    All ranks call it; one that hears nothing, or has no parameters, too: else the others would wait for it. If none has
    a signal the mean is None, or 0 on a GPU, which is not read back.
    """
    if ranks() == 1:
        return signal, 0
    device = _meeting_place(groups)
    pair = torch.zeros(2, dtype=torch.float64, device=device)
    pair[0] += 0.0 if signal is None else signal
    pair[1] += signal is not None
    dist.all_reduce(pair)
    others = pair[1] - int(signal is not None)
    if device.type == "cpu" and pair[1] == 0:
        return None, others
    return pair[0] / pair[1].clamp(min=1), others


def _meeting_place(groups: Sequence[Mapping[str, Any]], group: Any = None) -> torch.device:
    """Return the device that this rank talks to others from: that of its parameters, if ranks talk there."""
    device = next((param.device for each in groups for param in each["params"]), None)
    config = dist.get_backend_config(group)  # as in "cpu:gloo,cuda:nccl"
    if device is not None and f"{device.type}:" in config:
        return device  # type: ignore[no-any-return]
    on_gpu = "cuda:nccl" in config and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def sum_over_ranks(values: Iterable[Any], groups: Sequence[Mapping[str, Any]], shard_group: Any) -> Tensor:
    """Return the sum of numbers over these ranks, in float64. All of them call it, one that has no number, too."""
    total = _added(values, _meeting_place(groups, shard_group))
    if dist.get_world_size(shard_group) > 1:
        dist.all_reduce(total, group=shard_group)
    return total


def _added(values: Iterable[Any], device: torch.device, size: Sequence[int] = ()) -> Tensor:
    total = torch.zeros(size, dtype=torch.float64, device=device)
    for value in values:
        total += value.detach().to(device).reshape(size) if isinstance(value, Tensor) else value
    return total


def check_shard_group(shard_group: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse ranks that plain parameters cannot be divided over: no process group, or not with a group's options."""
    if shard_group is None:
        return
    if not dist.is_available() or not isinstance(shard_group, dist.ProcessGroup):
        raise TypeError(
            f"shard_group={shard_group!r} is no process group: give one that this rank is in, such as "
            "torch.distributed.group.WORLD once init_process_group was called"
        )
    for group in groups:
        for name in ("compat", "differentiable", "capturable"):
            if group[name]:
                raise ValueError(
                    f"{name}={group[name]!r} with shard_group, or ranks of ZeroRedundancyOptimizer: leave one out"
                )


def state_is_asked_for() -> bool:
    """Return True if torch.distributed.checkpoint calls, which takes a step to have state made."""
    frame: FrameType | None = sys._getframe(1)
    while frame := frame and frame.f_back:
        if frame.f_code.co_name == "_init_optim_state" and frame.f_globals["__name__"].startswith("torch.distributed"):
            return True
    return False


def why_not_early(params: set[Tensor]) -> str | None:
    """Return what of these parameters' ranks still happens to a gradient once it is there; None if nothing does.

    Parameters do not know of the wrapper that averages their gradients, so this looks through all objects.
    """
    if any(mesh_of(param) is not None for param in params):
        return "that are DTensors, as FSDP2 makes"
    if dist.is_available() and dist.is_initialized():
        for thing in gc.get_objects():
            name = type(thing).__name__
            if name in _WRAPPERS and isinstance(thing, nn.Module) and not params.isdisjoint(thing.parameters()):
                return f"in {name}, which averages their gradients later"
    return None
