"""DTensors: how they are sharded over ranks, and this rank's part of them.

A step takes this rank's shard out of each DTensor, and works on plain tensors from there on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

PLAIN = {Tensor, nn.Parameter}


def mesh_of(tensor: Tensor) -> Any:
    """Return a DTensor's mesh; None for a plain tensor. (torch._foreach operations refuse lists that mix both.)"""
    return getattr(tensor, "device_mesh", None)


def whole(value: Tensor) -> Tensor:
    """Return the full tensor of a DTensor; return any other tensor unchanged."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


class Shards(NamedTuple):
    """How a DTensor is sharded. It is hashable, and equal for all DTensors that are sharded in the same way."""

    mesh: Any
    placements: tuple[Any, ...]

    @property
    def cut_rows(self) -> bool:
        """True if a row, which is a slice along the first dimension, may be split over several ranks."""
        return any(dim > 0 for _, dim in self.cuts())

    def sum(self, value: Tensor, rows: bool = False) -> Tensor:
        """Sum a value over all ranks that have different shards: one number or, with `rows`, one number per row."""
        for i, dim in self.cuts():
            if dim > 0 or not rows:
                value = value.clone()
                dist.all_reduce(value, group=self.mesh.get_group(i))
        return value

    def total(self, values: Iterable[Any], size: Sequence[int] = ()) -> Tensor:
        """Return the float64 sum of these tensors, all of one size, over all ranks that have different shards.

        All of these ranks must call it, even one that has no such tensor.
        """
        return self.sum(added(values, torch.device(self.mesh.device_type), size))

    def ranks_in(self, group: Any) -> int:
        """Return how many ranks of a process group are on the mesh, including this one."""
        return len({*self.mesh.mesh.flatten().tolist()} & {*dist.get_process_group_ranks(group)})

    def cuts(self) -> Iterable[tuple[int, int]]:
        """Yield each mesh dimension that tensors are sharded over, with the tensor dimension that it splits."""
        for i, placement in enumerate(self.placements):
            if not placement.is_replicate() and not placement.is_partial() and self.mesh.size(i) > 1:
                yield i, placement.dim


def shards_of(tensor: Tensor) -> Shards | None:
    """Return how a DTensor is sharded; None for a plain tensor."""
    mesh = mesh_of(tensor)
    return None if mesh is None else Shards(mesh, tuple(tensor.placements))  # type: ignore[attr-defined]


def divisions(groups: Iterable[Mapping[str, Any]]) -> list[Shards]:
    """Return the different ways in which the groups' parameters are sharded, in the same order on all ranks."""
    ways = (shards_of(param) for group in groups for param in group["params"])
    return list(dict.fromkeys(shards for shards in ways if shards is not None))


def local(tensor: Tensor, shards: Shards | None) -> Tensor:
    """Return this rank's part of a DTensor, redistributed to `shards` if needed; return a plain tensor unchanged."""
    return tensor if shards is None else part(placed(tensor, shards))


def placed(tensor: Tensor, shards: Shards) -> Tensor:
    """Return the DTensor sharded like `shards`. Unless it already is, this communicates, and all ranks must call it."""
    dtensor: Any = tensor
    if mesh_of(tensor) is None or tuple(dtensor.placements) == shards.placements:
        return tensor
    return dtensor.redistribute(placements=shards.placements)  # type: ignore[no-any-return]


def part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor; return a plain tensor unchanged."""
    if mesh_of(tensor) is None:
        return tensor
    inner: Any = tensor._local_tensor  # type: ignore[attr-defined]
    return inner.wait() if hasattr(inner, "trigger_wait") else inner  # type: ignore[no-any-return]


def parts(lists: Iterable[Sequence[Any]]) -> tuple[list[list[Any]], list[list[Any]]]:
    """Return torch's specs of how the tensors in these lists are sharded, and this rank's parts of the tensors.

    A plain tensor, or None, is returned unchanged, and its spec is None. Compare specs with `alike`.
    """
    specs, all_parts = [], []
    for tensors in lists:
        try:  # list comprehensions: from Python 3.11 on, they read slots in two thirds of the time of attrgetter
            described, own = [x._spec for x in tensors], [x._local_tensor for x in tensors]
        except AttributeError:
            described = [getattr(x, "_spec", None) for x in tensors]
            own = [x if spec is None else x._local_tensor for x, spec in zip(tensors, described, strict=True)]
        if not set(map(type, own)) <= {*PLAIN, type(None)}:  # an asynchronous result
            own = [x if spec is None else part(x) for x, spec in zip(tensors, described, strict=True)]
        specs.append(described)
        all_parts.append(own)
    return specs, all_parts


def alike(specs: Sequence[Any]) -> bool:
    """Return True if tensors with these specs are all sharded in the same way, or are all plain."""
    ways = [(spec.mesh, spec.placements) for spec in specs if spec is not None]
    return not ways or (len(ways) == len(specs) and all(way == ways[0] for way in ways))


def like(value: Tensor, shape: Sequence[int], tensor: Tensor) -> Tensor:
    """Return a DTensor of this shape, sharded like `tensor`, from this rank's part; the part if `tensor` is plain."""
    shards = shards_of(tensor)
    if shards is None:
        return value
    from torch.distributed.tensor import DTensor

    size = torch.Size(shape)
    stride = tensor.stride() if size == tensor.shape else torch.empty(size, device="meta").stride()
    return DTensor.from_local(value, shards.mesh, shards.placements, run_check=False, shape=size, stride=stride)


def cuts_blocks(tensor: Tensor, block: int) -> bool:
    """Return True if a block of `block` elements of a row (or of a vector) may be split over two ranks.

    All ranks get the same answer, whatever their own part is.
    """
    shards = shards_of(tensor)
    if shards is None:
        return False
    cuts = [cut for cut in shards.cuts() if cut[1] > 0 or tensor.dim() == 1]
    if not cuts:
        return False
    from torch.distributed.tensor import Shard

    i, dim = cuts[0]
    is_even = -(-tensor.shape[dim] // shards.mesh.size(i)) % block == 0
    return len(cuts) > 1 or tensor.dim() > 2 or type(shards.placements[i]) is not Shard or not is_even


def blocks_before(tensor: Tensor, block: int) -> int:
    """Return how many blocks of a parameter's rows (or of a vector) are on ranks before this one.

    The number is not exact for parts of rows and for torch's strided shards. Ranks may get the same number if their
    parts of a row begin within the same block.
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
    width = tensor.numel() // tensor.shape[0]
    inside = sum(start * (width // size) for start, size in zip(starts[1:], tensor.shape[1:], strict=True))
    return starts[0] * -(-width // block) + sizes[0] * (inside // block)


def local_parts(tensors: Iterable[Tensor], ways: Iterable[Shards]) -> list[tuple[Shards | None, list[Tensor]]]:
    """Return this rank's parts, grouped by how they are sharded: a list for each of `ways`, and for any other way."""
    lists: dict[Shards | None, list[Tensor]] = {shards: [] for shards in ways}
    for tensor in tensors:
        shards = shards_of(tensor)
        if shards is not None and any(placement.is_partial() for placement in shards.placements):
            from torch.distributed.tensor import Replicate

            summed = tuple(Replicate() if placement.is_partial() else placement for placement in shards.placements)
            shards = Shards(shards.mesh, summed)
        lists.setdefault(shards, []).append(local(tensor, shards))
    return list(lists.items())


def added(values: Iterable[Any], device: torch.device, size: Sequence[int] = ()) -> Tensor:
    """Return the float64 sum of these numbers, or tensors of one size, on a device."""
    total = torch.zeros(size, dtype=torch.float64, device=device)
    for value in values:
        total += value.detach().to(device).reshape(size) if isinstance(value, Tensor) else value
    return total
