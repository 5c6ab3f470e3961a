"""All code that knows about ranks, device meshes and DTensors.

A step takes this rank's shard out of each DTensor, and works on plain tensors from there on. This module sums over
ranks the norm of all gradients, the norms of rows that are cut, and the signal, so that every rank uses the same α and
the same step length.

Plain tensors count as whole, unless the optimizer has a `shard_group`: then each rank has different ones, as with
FSDP1, pipeline stages, and torch's ZeroRedundancyOptimizer, which is detected as the optimizer's caller.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ddp import copies_of, holds_whole, ignored_by, kind_of, own_parameters, wrappers_of

_PLAIN = {Tensor, nn.Parameter}


def mesh_of(tensor: Tensor) -> Any:
    """Return a DTensor's mesh; None for a plain tensor. (torch's list operations refuse lists that mix them.)"""
    return getattr(tensor, "device_mesh", None)


def whole(value: Tensor) -> Tensor:
    """Return the full tensor behind a DTensor; any other tensor as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


class Shards(NamedTuple):
    """How DTensors are divided. Hashable, and equal for all DTensors that are divided in the same way."""

    mesh: Any
    placements: tuple[Any, ...]

    @property
    def cut_rows(self) -> bool:
        """Return True if a row, a slice along the first dimension, may lie on several ranks."""
        return any(dim > 0 for _, dim in self.cuts())

    def sum(self, value: Tensor, rows: bool = False) -> Tensor:
        """Return the sum over all ranks that have another shard: of one number, or with `rows` of one for each row."""
        for i, dim in self.cuts():
            if dim > 0 or not rows:
                value = value.clone()
                dist.all_reduce(value, group=self.mesh.get_group(i))
        return value

    def total(self, values: Iterable[Any], size: Sequence[int] = ()) -> Tensor:
        """Return the float64 sum of these tensors, all of one size, over this rank and ranks that have another shard.

        All these ranks must call it, even one that has no such tensor.
        """
        return self.sum(_added(values, torch.device(self.mesh.device_type), size))

    def ranks_in(self, group: Any) -> int:
        """Return how many ranks of a process group are on the mesh, including this one."""
        return len({*self.mesh.mesh.flatten().tolist()} & {*dist.get_process_group_ranks(group)})

    def cuts(self) -> Iterable[tuple[int, int]]:
        """Yield each mesh dimension that tensors are divided over, with the tensor dimension that it divides."""
        for i, placement in enumerate(self.placements):
            if not placement.is_replicate() and not placement.is_partial() and self.mesh.size(i) > 1:
                yield i, placement.dim


def shards_of(tensor: Tensor) -> Shards | None:
    """Return how a DTensor is divided; None for a plain tensor."""
    mesh = mesh_of(tensor)
    return None if mesh is None else Shards(mesh, tuple(tensor.placements))  # type: ignore[attr-defined]


def divisions(groups: Iterable[Mapping[str, Any]]) -> list[Shards]:
    """Return the ways in which the groups' parameters are divided, in the same order on all ranks."""
    ways = (shards_of(param) for group in groups for param in group["params"])
    return list(dict.fromkeys(shards for shards in ways if shards is not None))


def local(tensor: Tensor, shards: Shards | None) -> Tensor:
    """Return this rank's part of a DTensor, redistributed to `shards` if needed; a plain tensor as it is."""
    return tensor if shards is None else part(placed(tensor, shards))


def placed(tensor: Tensor, shards: Shards) -> Tensor:
    """Return the DTensor divided like `shards`. Unless it already is, this communicates: all ranks must call it."""
    dtensor: Any = tensor
    if mesh_of(tensor) is None or tuple(dtensor.placements) == shards.placements:
        return tensor
    return dtensor.redistribute(placements=shards.placements)  # type: ignore[no-any-return]


def part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor; a plain tensor as it is."""
    if mesh_of(tensor) is None:
        return tensor
    inner: Any = tensor._local_tensor  # type: ignore[attr-defined]
    return inner.wait() if hasattr(inner, "trigger_wait") else inner  # type: ignore[no-any-return]


def parts(lists: Iterable[Sequence[Any]]) -> tuple[list[list[Any]], list[list[Any]]]:
    """Return torch's specs of how the tensors in some lists are divided, and this rank's parts of the tensors.

    A plain tensor, or None, stays as it is, and its spec is None. Compare specs with `alike`.
    """
    specs, all_parts = [], []
    for tensors in lists:
        try:  # list comprehensions: from Python 3.11 on they read slots in two thirds of attrgetter's time
            described, own = [x._spec for x in tensors], [x._local_tensor for x in tensors]
        except AttributeError:
            described = [getattr(x, "_spec", None) for x in tensors]
            own = [x if spec is None else x._local_tensor for x, spec in zip(tensors, described, strict=True)]
        if not set(map(type, own)) <= {*_PLAIN, type(None)}:  # an asynchronous result
            own = [x if spec is None else part(x) for x, spec in zip(tensors, described, strict=True)]
        specs.append(described)
        all_parts.append(own)
    return specs, all_parts


def alike(specs: Sequence[Any]) -> bool:
    """Return True if tensors with these specs are all divided in the same way, or are all plain."""
    ways = [(spec.mesh, spec.placements) for spec in specs if spec is not None]
    return not ways or (len(ways) == len(specs) and all(way == ways[0] for way in ways))


def like(value: Tensor, shape: Sequence[int], tensor: Tensor) -> Tensor:
    """Return a DTensor of this shape, divided like `tensor`, from this rank's part; the part if `tensor` is plain."""
    shards = shards_of(tensor)
    if shards is None:
        return value
    from torch.distributed.tensor import DTensor

    size = torch.Size(shape)
    stride = tensor.stride() if size == tensor.shape else torch.empty(size, device="meta").stride()
    return DTensor.from_local(value, shards.mesh, shards.placements, run_check=False, shape=size, stride=stride)


def cuts_blocks(tensor: Tensor, block: int) -> bool:
    """Return True if a block of `block` elements of a row (of a vector: of all elements) may lie on two ranks.

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
    """Return how many blocks of a parameter's rows (of a vector: of all elements) lie on ranks before this one.

    For parts of rows, and for torch's strided shards, the number is not exact. Ranks may have the same one if their
    parts of a row begin within one block.
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


def local_parts(tensors: Iterable[Tensor], ways: Iterable[Shards]) -> list[tuple[Shards | None, list[Tensor]]]:
    """Return this rank's parts in lists that are divided alike: one list for each of `ways`, and for any other way."""
    lists: dict[Shards | None, list[Tensor]] = {shards: [] for shards in ways}
    for tensor in tensors:
        shards = shards_of(tensor)
        if shards is not None and any(placement.is_partial() for placement in shards.placements):
            from torch.distributed.tensor import Replicate

            summed = tuple(Replicate() if placement.is_partial() else placement for placement in shards.placements)
            shards = Shards(shards.mesh, summed)
        lists.setdefault(shards, []).append(local(tensor, shards))
    return list(lists.items())


def ranks() -> int:
    """Return how many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def span_all_ranks(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Return True if there are several ranks and parameters on a mesh of all of them: then every rank takes steps."""
    if ranks() == 1:
        return False
    last = None  # so that each mesh is asked once: all parameters may be on one smaller mesh
    for group in groups:
        for param in group["params"]:
            mesh = None if type(param) in _PLAIN else mesh_of(param)
            if mesh is not None and mesh is not last:
                if mesh.size() == ranks():
                    return True
                last = mesh
    return False


def mean_over_ranks(
    signal: Any, groups: Sequence[dict[str, Any]], is_loaded: bool = False, are_copies: bool = False
) -> tuple[Any, Any]:
    """Return the mean of a signal over the ranks that have one, and how many other ranks have one.

    A signal that `is_loaded` comes from values in a checkpoint, perhaps another rank's. It counts only while no rank
    has a signal from values recorded since. All ranks must call it, even one without a signal or parameters: the others
    would wait for it. If no rank has a signal the mean is None, or 0 on a GPU, which is not read back.

    Raises:
        RuntimeError: `are_copies` says that all ranks hold the same model, and their groups differ in lr or
            weight_decay.
    """
    if ranks() == 1:
        return signal, 0
    device = _meeting_place(groups)
    sums = torch.zeros(
        3, 2, dtype=torch.float64, device=device
    )  # (own, loaded) × (sum, count), and the groups' numbers
    sums[int(is_loaded), 0] += 0.0 if signal is None else signal
    sums[int(is_loaded), 1] += signal is not None
    numbers = [group.get(name) for group in groups for name in ("initial_lr", "lr", "weight_decay")]
    digest = sum(i * number for i, number in enumerate(numbers, 1) if isinstance(number, float))
    sums[2, 0] += digest
    sums[2, 1] += digest * digest
    dist.all_reduce(sums)
    own, loaded, digests = sums
    if are_copies:
        total, squares = digests.tolist()
        if ranks() * squares - total * total > 1e-12 * total * total:  # the digests vary; sums of 4,096 round less
            raise RuntimeError(
                "the ranks' parameter groups differ in lr or weight_decay, so that their copies of the model would "
                "drift apart. for_grokking looks at the initial weights of embeddings, and DDP makes these equal only "
                "later: give all ranks the same seed before the model is made, or call for_grokking(model) after "
                "DistributedDataParallel(model)"
            )
    total, count = torch.where(own[1] > 0, own, loaded)
    others = own[1] + loaded[1] - int(signal is not None)
    if device.type == "cpu" and count == 0:
        return None, others
    return total / count.clamp(min=1), others


def _meeting_place(groups: Sequence[Mapping[str, Any]], group: Any = None) -> torch.device:
    """Return the device for collectives: that of this rank's parameters, if the process group's backend supports it."""
    device = next((param.device for param_group in groups for param in param_group["params"]), None)
    config = dist.get_backend_config(group)  # as in "cpu:gloo,cuda:nccl"
    if device is not None and f"{device.type}:" in config:
        return device  # type: ignore[no-any-return]
    on_gpu = "cuda:nccl" in config and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def sum_over_ranks(values: Iterable[Any], groups: Sequence[Mapping[str, Any]], shard_group: Any) -> Tensor:
    """Return the float64 sum of numbers over these ranks. All of them must call it, even one that has no number."""
    total = _added(values, _meeting_place(groups, shard_group))
    if dist.get_world_size(shard_group) > 1:
        dist.all_reduce(total, group=shard_group)
    return total


def share_of(total: Any, shards: Shards | None, shard_group: Any) -> Any:
    """Return this rank's summand for `sum_over_ranks`: a plain total, or its share of a total that a mesh has."""
    return total if shards is None else total / shards.ranks_in(shard_group)


def overflow_of_all(found_inf: Any, groups: Sequence[Mapping[str, Any]], shard_group: Any) -> Any:
    """Return GradScaler's flag; with a shard_group the number of its ranks that have one above 0."""
    if found_inf is None or shard_group is None:
        return found_inf
    return sum_over_ranks([found_inf != 0], groups, shard_group)


def check_agreed(found: float, shard_group: Any) -> None:
    """Raise RuntimeError if `found` ranks of the shard_group, but not all, found infinity: scales would differ."""
    if shard_group is not None and 0 < found < (size := shard_group.size()):
        raise RuntimeError(
            f"{found:g} of the shard_group's {size} ranks found infinity in their gradients, and so each would go "
            "on with a loss scale of its own; nothing was written. Use ShardedGradScaler, and call "
            "scaler.unscale_(optimizer) before scaler.step(optimizer): all ranks then find what one of them finds"
        )


def _added(values: Iterable[Any], device: torch.device, size: Sequence[int] = ()) -> Tensor:
    total = torch.zeros(size, dtype=torch.float64, device=device)
    for value in values:
        total += value.detach().to(device).reshape(size) if isinstance(value, Tensor) else value
    return total


def check_shard_group(shard_group: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise TypeError if shard_group is no process group, or ValueError if a group's options do not work with it."""
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
    """Return True if torch.distributed.checkpoint is among the callers: it takes a step to create state."""
    frame: FrameType | None = sys._getframe(1)
    while frame := frame and frame.f_back:
        if frame.f_code.co_name == "_init_optim_state" and frame.f_globals["__name__"].startswith("torch.distributed"):
            return True
    return False


class AllRanks:
    """Knows whether every rank takes an optimizer's steps, as with FSDP2, DDP and FSDP1."""

    def __init__(self) -> None:
        self._wrappers: list[Callable[[], Any]] = []  # weak references to DDP and FSDP1 around the parameters
        self._wait, self._pause = 0, 1  # how many steps to the next look, and from there to the one after it
        self._are_copies = self._compared = False  # whether all ranks hold the same model; whether groups were compared

    def compares(self) -> bool:
        """Return True once: in the first step in which all ranks are known to hold the same model."""
        is_first, self._compared = self._are_copies and not self._compared, self._compared or self._are_copies
        return is_first

    def _look(self, groups: Sequence[Mapping[str, Any]]) -> list[Any]:
        found = wrappers_of({param for group in groups for param in group["params"]})
        self._wrappers = [weakref.ref(wrapper) for wrapper in found]
        self._wait, self._pause = self._pause, 2 * self._pause
        return found

    def wrappers(self, groups: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return the DDP and FSDP1 modules around the parameters; none if they are not known yet. Call it once a step.

        A model may be wrapped after its first steps, or anew. Looking for wrappers may take 50 ms: without one, look
        at the first step, the second, the fourth, and so on.
        """
        found = [wrapper for reference in self._wrappers if (wrapper := reference()) is not None]
        if found:
            self._wait, self._pause = 0, 1
            return found
        found = [] if self._wait else self._look(groups)
        self._wait -= 1
        return found

    def meet(self, groups: Sequence[Mapping[str, Any]], shard_group: Any, wanted: bool) -> bool:
        """Return True if ranks average signals in this step: all are known to take it, or this rank asks (`wanted`).

        Raises:
            RuntimeError: this rank asks for it in DDP's join(), where ranks that have no more data take no more steps.
        """
        if shard_group is not None:  # a rank may have none of its parameters
            return wanted or dist.get_world_size(shard_group) == ranks()
        if torch._C._current_graph_task_id() != -1:  # an optimizer for each parameter, which steps in the backward pass
            return wanted
        if all(reference() is None for reference in self._wrappers) and span_all_ranks(groups):
            return True
        wrappers = self.wrappers(groups)
        if any(getattr(getattr(wrapper, "_join_config", None), "enable", False) for wrapper in wrappers):
            if wanted:
                raise RuntimeError(
                    "signals are averaged over ranks, and in DDP's join() not all ranks take all steps: pass "
                    "grokking_signal_fns=[], or give all ranks the same number of batches"
                )
            return False
        over_all = any(dist.get_world_size(wrapper.process_group) == ranks() for wrapper in wrappers)
        self._are_copies = over_all and all(map(holds_whole, wrappers))
        return wanted or over_all

    def doubts(self, groups: Sequence[Mapping[str, Any]], shard_group: Any, is_own: bool) -> list[str]:
        """Return warnings if FSDP1 has divided parameters, and the optimizer takes its shards for whole parameters.

        Raises:
            ValueError: shard_group is the user's own (`is_own`), and several of its ranks hold the same parameters.
        """
        self._wait, self._pause = 0, 1  # its parameters may be others than those of its last step
        if ranks() == 1 or torch._C._current_graph_task_id() != -1:
            return []
        params = {param for group in groups for param in group["params"]}
        around = self._look(groups)
        wrappers = [wrapper for wrapper in around if not params.isdisjoint(own_parameters(wrapper))]
        divided = [wrapper for wrapper in wrappers if not holds_whole(wrapper)]
        for wrapper in wrappers if is_own else []:
            if len(copies_of(wrapper) & {*dist.get_process_group_ranks(shard_group)}) < 2:
                continue
            what, way_out = "whole parameters", "Leave shard_group out"
            if wrapper in divided:
                what, way_out = "the same parts", "With HYBRID_SHARD pass shard_group=model.process_group"
            elif divided:
                way_out = "Give what is divided and what is whole an optimizer each"
            raise ValueError(
                f"shard_group with {kind_of(wrapper)}, whose ranks hold {what}: the norm of the gradients would count "
                f"them several times. {way_out}"
            )
        ignored = {param for wrapper in around for param in ignored_by(wrapper)} & params
        if not divided and not ignored:
            return []
        found, needs_norm = list[str](), any(group["gradient_clipping"] for group in groups)
        needs_norm |= groups[0]["nonfinite"] != "propagate"
        if ignored and len(ignored) < len(params) and shard_group is None and needs_norm:
            found.append(
                "DDP or FSDP1 ignores some of the parameters, so that each rank has other gradients of them, and clips "
                "and skips all parameters by its own norm. Give these an optimizer of their own: if each rank has "
                "other parameters there, with shard_group=torch.distributed.group.WORLD"
            )
        if not divided:
            return found
        if shard_group is None and needs_norm:
            apart = "" if len(divided) == len(wrappers) else ", in an optimizer without the parameters that are whole"
            found.append(
                "FSDP1 has divided the parameters, and shard_group is not given: each rank clips and skips by the norm "
                "of its own part. Pass shard_group=torch.distributed.group.WORLD, or with HYBRID_SHARD "
                f"model.process_group{apart}"
            )
        if any(group["max_row_norm"] or group["max_row_change"] for group in groups):
            found.append(
                "FSDP1 has made vectors of weights, whose rows max_row_norm and max_row_change cannot limit: use FSDP2 "
                "(torch.distributed.fsdp.fully_shard), or set both to 0"
            )
        return found
