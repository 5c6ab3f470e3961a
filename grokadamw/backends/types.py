"""The values that a backend gets: a batch of tensors, their addresses, and the scalars of a step."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from .._numbers import Number


class Choice(NamedTuple):
    """A backend, and why it was chosen."""

    module: ModuleType
    reason: str


NOBODY = Choice(ModuleType("none"), "")


class Addresses(NamedTuple):
    """The addresses of a batch's tensors, 8 bytes each, and the sizes of the tensors."""

    # code takes slices, so the order matters: the fields up to `ends` stay the same from step to step
    params: bytes
    exp_avgs: bytes
    exp_avg_sqs: bytes
    grok_emas: bytes | None
    steps: bytes
    ends: bytes  # for each tensor, the number of elements of all tensors up to and including it
    grads: bytes
    table: Any = None  # the data that the backend keeps for these tensors between steps


class Coded(NamedTuple):
    """The additional data of a batch whose state or parameters are kept in fewer bits than a step computes with.

    Lists are parallel to the batch's. See `state/formats.py`.
    """

    # code takes slices, so the order matters: scales are in the order of `STATES`
    exp_avg_scales: list[Tensor] | None
    exp_avg_sq_scales: list[Tensor] | None
    grok_ema_scales: list[Tensor] | None
    lows: list[Tensor] | None  # the low bits of parameters
    rounds: bool  # True if parameters without low bits are rounded by a dither
    blocks_before: Sequence[int] = ()  # for each parameter, its blocks on ranks before this one; () if none has any


class Batch(NamedTuple):
    """The tensors that one call of a backend takes: parallel lists, with one entry per parameter.

    They are on one device, and their parameter groups have the same options. All parameters have the same dtype; so do
    all gradients, and all tensors of one state. All of them are plain and real: complex tensors come as their real
    views, DTensors as this rank's shard. Arithmetic is done in the state's dtype, or in float32 if the state is coded.
    """

    # code takes slices, so the order matters: the first six fields are those of `Columns`, and `exp_avgs` to
    # `grok_emas` are in the order of `STATES`
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    grok_emas: list[Tensor] | None  # None: no slow gradient is kept, and ĝ = c g
    steps: list[Tensor]  # 0-d, the number of steps before this one
    addresses: Addresses | None = None  # None: the backend looks them up
    row_widths: list[int] | None = None  # elements in a row; 0 if the backend does not limit the rows
    unlimited: Sequence[int] = ()  # indices of the tensors whose rows the backend leaves to rows.py
    choice: Choice = NOBODY  # the backend
    group: int = 0  # index of the first parameter group with these options
    layers: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()  # the parameters' places in the optimizer, which dithers depend on, too
    shards: Any = None  # a `Shards`, if the tensors are parts of DTensors
    begun: bool = False  # True if the averages have begun this cycle of micro-batches
    windows: Any = None  # a list of `window.Window` if μ is the mean of a window
    coded: Coded | None = None  # None: no tensor is coded


class MicroStep(NamedTuple):
    """One of the micro-batches of a step. It adds a k-th of its gradient to the averages."""

    k: int  # micro-batches per step
    decays: bool  # True in the first of a cycle for these tensors: averages decay
    moves: bool  # True in the last of a cycle: μ is added to m, θ moves, and the step is counted
    nth: int = 0  # its number in the cycle, from 0


WHOLE = MicroStep(1, True, True)


class Scalars(NamedTuple):
    """The numbers that the stages slow_grad to limit_rows need; sequences are parallel to the tensors."""

    beta1: Sequence[float]  # β1_l of each tensor
    bias_beta1: Sequence[float]  # the β1 for m's bias correction, of each tensor
    beta2: float
    lr: Number
    eps: float
    eps_before_correction: bool  # ε joins √v before v's bias correction, as in release 0.1.2
    weight_decay: Number
    alpha: Number  # α_t
    lamb: Number  # λ; a tensor only in a compiled step
    amplify_after: int  # λ acts on a tensor only after this many steps
    clip: Number  # c
    raw_second_moment: bool  # v averages (c g)² instead of ĝ²
    maximize: bool
    finite: Tensor | None  # 0-d bool: if it is False, nothing is written. If it is None, everything is
    micro_step: MicroStep = WHOLE  # if it is one of several and `finite` is False, the gradient counts as 0
    max_row_change: Number = 0.0
    max_row_norm: float = 0.0

    def writable(self) -> Tensor | None:  # not a property: torch 2.6 cannot compile one that is None
        """Return `finite` if it decides what this step writes. In a micro-batch return None: see `micro_step`."""
        return self.finite if self.micro_step.k == 1 else None

    @property
    def limits_rows(self) -> bool:
        """True if parameters move in this step and a limit on their rows is on."""
        return self.micro_step.moves and (self.limits_change or self.max_row_norm > 0)

    @property
    def limits_change(self) -> bool:
        """True if max_row_change is on. A tensor counts as on, because it is not read back from its device."""
        return isinstance(self.max_row_change, Tensor) or self.max_row_change > 0


Calls: TypeAlias = Sequence[tuple[Batch, Scalars]]  # the arguments of the calls of backends in a step


def written(batch: Batch, moves: bool = True) -> list[list[Tensor]]:
    """Return the lists that a step writes to; without `moves`, those that every micro-batch of a step writes to."""
    columns = [batch.exp_avgs, batch.exp_avg_sqs, batch.grok_emas, *(batch.coded[:3] if batch.coded else ())]
    if moves:
        columns = [batch.params, *columns, batch.steps, batch.coded.lows if batch.coded else None]
    return [column for column in columns if column is not None]


def limited_widths(batch: Batch, scalars: Scalars) -> list[int]:
    """Return the elements in a row of each tensor; 0 if this step does not limit the tensor's rows."""
    return list(batch.row_widths) if scalars.limits_rows and batch.row_widths else [0] * len(batch.params)
