"""Communication between ranks: the norm of all gradients and the signal, so that α and step lengths are the same.

Plain tensors count as whole, unless the optimizer has a `shard_group`. Then each rank has different ones, as with
FSDP1, pipeline stages, and torch's ZeroRedundancyOptimizer, which is detected on the call stack.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from traceback import walk_stack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ddp import copies_of, holds_whole, ignored_by, kind_of, own_parameters, wrappers_of
from .options import refuse
from .shards import PLAIN, Shards, added, mesh_of


def ranks() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def span_all_ranks(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Return True if there are several ranks, and parameters on a mesh of all ranks: then every rank takes steps."""
    if ranks() == 1:
        return False
    last = None  # to check each mesh only once: all parameters may be on one smaller mesh
    for group in groups:
        for param in group["params"]:
            mesh = None if type(param) in PLAIN else mesh_of(param)
            if mesh is not None and mesh is not last:
                if mesh.size() == ranks():
                    return True
                last = mesh
    return False


def mean_over_ranks(
    signal: Any, groups: Sequence[dict[str, Any]], is_loaded: bool = False, are_copies: bool = False
) -> tuple[Any, Any]:
    """Return the mean of a signal over the ranks that have one, and how many other ranks have one.

    `is_loaded` says that the signal comes from values in a checkpoint, perhaps another rank's. It counts only while no
    rank has a signal from values recorded since. All ranks must call this, even one without a signal or parameters,
    because the others wait for it. If no rank has a signal, the mean is None, or 0 on a GPU, which is not read back.

    Raises:
        RuntimeError: `are_copies` says that all ranks hold the same model, and their groups differ in lr or
            weight_decay.
    """
    if ranks() == 1:
        return signal, 0
    device = _meeting_place(groups)
    # (own, loaded) × (sum, count), and the groups' numbers
    sums = torch.zeros(3, 2, dtype=torch.float64, device=device)
    if signal is not None:
        sums[int(is_loaded), 0] = signal  # a tensor may be on another device
        sums[int(is_loaded), 1] = 1
    numbers = [group.get(name) for group in groups for name in ("initial_lr", "lr", "weight_decay")]
    # a hash, as a sum would hide a small number among many; rounded, as ranks may compute a number a little differently
    digest = hash(tuple([round(number, 12) for number in numbers if isinstance(number, float)])) % 2**32
    sums[2, 0] += digest
    sums[2, 1] += digest * digest
    dist.all_reduce(sums)
    own, loaded, digests = sums
    if are_copies:
        total, squares = digests.tolist()
        if ranks() * squares - total * total > 1e-12 * total * total:  # above the rounding of 4,096 summands
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
    """Return the float64 sum of numbers over the shard_group's ranks. All must call it, even one without numbers."""
    total = added(values, _meeting_place(groups, shard_group))
    if dist.get_world_size(shard_group) > 1:
        dist.all_reduce(total, group=shard_group)
    return total


def share_of(total: Any, shards: Shards | None, shard_group: Any) -> Any:
    """Return this rank's summand for `sum_over_ranks`: a plain total, or this rank's share of a mesh's total."""
    return total if shards is None else total / shards.ranks_in(shard_group)


def overflow_of_all(found_inf: Any, groups: Sequence[Mapping[str, Any]], shard_group: Any) -> Any:
    """Return GradScaler's found_inf flag; with a shard_group, return on how many of its ranks the flag is set."""
    if found_inf is None or shard_group is None:
        return found_inf
    return sum_over_ranks([found_inf != 0], groups, shard_group)


def check_agreed(found: float, shard_group: Any) -> None:
    """Raise RuntimeError if only some ranks of the shard_group (`found`) found infinity: loss scales would differ."""
    if shard_group is not None and 0 < found < (size := shard_group.size()):
        raise RuntimeError(
            f"{found:g} of the shard_group's {size} ranks found infinity in their gradients, so loss scales would "
            "differ between ranks; nothing was written. Use ShardedGradScaler, and call "
            "scaler.unscale_(optimizer) before scaler.step(optimizer): all ranks then find what one of them finds"
        )


def check_shard_group(shard_group: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise TypeError if shard_group is not a process group, or ValueError if a group's options exclude it."""
    if shard_group is None:
        return
    if not dist.is_available() or not isinstance(shard_group, dist.ProcessGroup):
        raise TypeError(
            f"shard_group={shard_group!r} is not a process group: give one that this rank is in, such as "
            "torch.distributed.group.WORLD after init_process_group was called"
        )
    refuse(groups, "shard_group, or ranks of ZeroRedundancyOptimizer")


def is_for_state_alone() -> bool:
    """Return True if torch.distributed.checkpoint takes this first step only to create the state that it loads into.

    It does so with lr 0 and gradients of 0. But a run may begin with such a step, too, so the call stack decides.
    """
    return any(
        frame.f_code.co_name == "_init_optim_state" and frame.f_globals["__name__"].startswith("torch.distributed")
        for frame, _ in walk_stack(sys._getframe())
    )


class AllRanks:
    """Finds out whether every rank takes an optimizer's steps, as with FSDP2, DDP and FSDP1."""

    def __init__(self) -> None:
        self._wrappers: list[Callable[[], Any]] = []  # weak references to DDP and FSDP1 around the parameters
        self._wait, self._pause = 0, 1  # steps until the next search, and from there to the one after it
        self._are_copies = self._compared = False  # all ranks hold the same model; groups were compared

    def compares(self) -> bool:
        """Return True once: in the first step in which all ranks are known to hold the same model."""
        is_first = self._are_copies and not self._compared
        self._compared |= self._are_copies
        return is_first

    def _look(self, groups: Sequence[Mapping[str, Any]]) -> list[Any]:
        found = wrappers_of({param for group in groups for param in group["params"]})
        self._wrappers = [weakref.ref(wrapper) for wrapper in found]
        self._wait, self._pause = self._pause, 2 * self._pause
        return found

    def wrappers(self, groups: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return the DDP and FSDP1 modules around the parameters, if they are known yet. Call this once per step.

        A model may be wrapped after its first steps, or wrapped again. A search may take 50 ms. As long as none finds a
        wrapper, search only at the first step, the second, the fourth, and so on.
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
            RuntimeError: this rank asks for it in DDP's join(), where ranks without more data take no more steps.
        """
        if shard_group is not None:  # a rank may have no parameters
            return wanted or dist.get_world_size(shard_group) == ranks()
        if torch._C._current_graph_task_id() != -1:  # one optimizer per parameter, which steps in the backward pass
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
        """Return warnings if FSDP1 has sharded parameters, and the optimizer takes the shards for whole parameters.

        Raises:
            ValueError: the user gave shard_group (`is_own`), and several of its ranks hold the same parameters.
        """
        self._wait, self._pause = 0, 1  # the parameters may have changed since the last step
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
                way_out = "Use separate optimizers for what is divided and what is whole"
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
                "DDP or FSDP1 ignores some of the parameters: their gradients differ between ranks, and each rank "
                "clips and skips all parameters by its own norm. Give these a separate optimizer: if each rank has "
                "different parameters there, with shard_group=torch.distributed.group.WORLD"
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
