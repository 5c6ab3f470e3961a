"""What a running optimizer keeps besides its groups, its state and its defaults."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._numbers import Number
from .._warn import warn
from ..distributed import AllRanks
from ..param_groups import RECORDED, make_plain, recorded
from . import metrics
from .alpha import Signals
from .cache import Cache
from .effects import Places


class Preset(NamedTuple):
    """The numbers of `for_grokking` that decide about warnings."""

    gamma: float | None = None  # the γ that it chose; it causes no warning
    lrs: Sequence[Number] = ()  # of the groups at the start; a warning tells if one lr has replaced them


@dataclass
class Run:
    """The data that a running optimizer keeps besides its defaults, state and groups.

    It is one object because wrappers, such as Lightning's, copy attributes. Change its fields, but do not replace it.
    """

    signals: Signals
    last: metrics.LastStep = metrics.LastStep()
    captured: Places = field(default_factory=dict)  # the α and boosts that a CUDA graph reads
    layers_checked: bool = False
    preset: Preset = Preset()
    checked: list[tuple[Any, ...]] = field(default_factory=list)  # each group's options when they were last checked
    checked_layers: list[list[int]] = field(default_factory=list)  # each group's layers at that time
    skipped: Tensor | None = None  # counts steps that were skipped on a device and were not read back yet
    # from set_layers, by id: torch cannot swap a tensor that has weak references, and FSDP2's model.cpu() swaps tensors
    names: dict[int, str] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)  # the warnings that were given, and come only once
    stepped: bool = False  # True if the last step was whole, or the last of its micro-batches
    cache: Cache = field(default_factory=Cache)  # the batches of earlier steps
    evaluation_listeners: list[Callable[[], None]] = field(default_factory=list)  # called after record(eval_acc=…)
    in_backward: Any = None  # `step_in_backward`'s handle, while parameters are updated in the backward pass
    all_ranks: AllRanks = field(default_factory=AllRanks)
    shard_group: Any = None  # the ranks over which plain parameters are divided
    zero: Callable[[], Any] = lambda: None  # the ZeroRedundancyOptimizer around this one, if any
    before_loading: list[dict[str, Any]] = field(default_factory=list)  # this rank's groups, before `zero` loads others
    graphs: list[Any] = field(default_factory=list)  # the tables that CUDA graphs of the step read, kept alive

    @property
    def has_updated_early(self) -> bool:
        """True if the open backward pass, which the next step ends, has already updated parameters."""
        return self.in_backward is not None and self.in_backward.has_updated

    def settle(self, groups: Sequence[dict[str, Any]]) -> None:
        """Read back the counts that are on a device."""
        if self.skipped is not None and not self.skipped.is_meta and (steps := int(self.skipped)) > 0:
            self.skipped.zero_()
            count_skipped(groups, steps)
        self.signals.settle()

    def restart(self, groups: Sequence[dict[str, Any]]) -> None:
        """Forget the last step after a checkpoint was loaded. Tensors that a CUDA graph uses keep their addresses."""
        make_plain(groups)
        if self.skipped is not None:
            self.skipped.zero_()
        self.graphs.clear()  # earlier graphs are no longer valid
        self.layers_checked, self.last, self.stepped = False, metrics.LastStep(), False
        if self.in_backward is not None:
            self.in_backward.is_open = False  # drop an unfinished pass
        self.signals.values.clear()
        self.signals.load(groups[0]["signal_state"])
        self.signals.records_are_loaded = any(recorded(groups, name) is not None for name in RECORDED)

    def follow(self, other: Run, memo: dict[int, Any]) -> None:
        """Take over `other`, the run of the optimizer that was copied, but with separate tensors for CUDA graphs."""
        self.signals, self.captured, self.skipped, self.last = copy.deepcopy(
            (other.signals, other.captured, other.skipped, other.last), memo
        )
        self.names = {id(memo[i]): name for i, name in other.names.items() if i in memo}
        self.layers_checked, self.stepped = other.layers_checked, other.stepped
        self.shard_group = other.shard_group  # process groups cannot be copied

    def skip_counter(self, device: torch.device, movable: bool) -> Tensor:
        """Return the tensor that counts steps skipped on a device. A CUDA graph continues with the same tensor."""
        if self.skipped is None:
            self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        elif self.skipped.device != device and movable:
            self.skipped = self.skipped.to(device)
        return self.skipped


def count_skipped(groups: Sequence[dict[str, Any]], steps: int) -> None:
    """Add to the groups' count of skipped steps, and warn about the first one."""
    total = groups[0]["skipped_steps"] + steps
    for group in groups:
        group["skipped_steps"] = total
    if total == steps:
        what = "a step was skipped: its gradients hold NaN or infinity, and nothing was written"
        if groups[0]["accumulation_steps"] > 1:
            what = "the gradients of a micro-batch hold NaN or infinity, and it counts as 0"
        warn(
            f"{what}. metrics()['skipped_steps'] counts such steps; nonfinite=\"raise\" raises an error at the first",
            RuntimeWarning,
        )
