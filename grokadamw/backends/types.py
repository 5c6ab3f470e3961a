"""The values that go to a backend: a batch of tensors, where they lie, and the scalars of a step."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from .._numbers import Number


class Choice(NamedTuple):
    """A backend, and why it is that one."""

    module: ModuleType
    reason: str


NOBODY = Choice(ModuleType("none"), "")


class Addresses(NamedTuple):
    """Where the tensors of a batch lie, 8 bytes for each address; and how large they are."""

    params: bytes
    exp_avgs: bytes
    exp_avg_sqs: bytes
    grok_emas: bytes | None
    steps: bytes
    ends: bytes  # elements of all tensors up to and including each
    grads: bytes
    table: Any = None  # what the backend keeps for these tensors between steps


class Coded(NamedTuple):
    """What a batch has besides, if its state or its parameters are kept in fewer bits than a step computes with.

    Lists are parallel to the batch's. See `state/formats.py`.
    """

    exp_avg_scales: list[Tensor] | None
    exp_avg_sq_scales: list[Tensor] | None
    grok_ema_scales: list[Tensor] | None
    lows: list[Tensor] | None  # the low bits of parameters
    numbers: list[int]  # of the parameters in the optimizer, which random bits depend on
    rounds: bool  # whether parameters without low bits are rounded by a dither
    firsts: Sequence[int] = ()  # blocks of each parameter that lie on ranks before this one; () for none


class Batch(NamedTuple):
    """The tensors that one call of a backend takes: parallel lists, one entry a parameter.

    They are out of one parameter group, on one device, with one dtype for parameters, gradients and state each. All of
    them are plain and real: complex tensors come as their real views, DTensors as the shard of this rank. Arithmetic
    is done in the state's dtype, float32 if that is coded.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    grok_emas: list[Tensor] | None  # None: no slow gradient is kept, and ĝ = c g
    steps: list[Tensor]  # 0-d, the steps taken before this one
    addresses: Addresses | None = None  # None: the backend finds them out
    row_widths: list[int] | None = None  # elements of a row, where the backend limits the rows; 0 where it does not
    unlimited: Sequence[int] = ()  # places of the tensors whose rows the backend leaves to rows.py
    choice: Choice = NOBODY  # the backend
    group: int = 0  # index of the parameter group
    layers: tuple[int, ...] = ()
    shards: Any = None  # a `distributed.Shards`, where the tensors are parts of DTensors
    begun: bool = False  # whether the averages have begun this cycle of micro-batches
    windows: Any = None  # a list of `window.Window`, where μ is a window's mean
    coded: Coded | None = None  # None: all tensors are numbers as they are


class MicroStep(NamedTuple):
    """One of several micro-batches of a step, which adds a k-th of its gradient to the averages."""

    of: int  # k
    decays: bool  # it is the cycle's first for these tensors: averages decay
    moves: bool  # it is the cycle's last: μ joins m, θ moves, and the step is counted
    nth: int = 0  # of the cycle


WHOLE = MicroStep(1, True, True)


class Scalars(NamedTuple):
    """What the stages slow_grad to limit_rows need besides the tensors; sequences are parallel to these."""

    beta1: Sequence[float]  # β1_l, one a tensor
    bias_beta1: Sequence[float]  # the β1 that the update corrects m with, one a tensor
    beta2: float
    lr: Number
    eps: float
    eps_before_correction: bool  # ε joins √v before v's bias correction, as in release 0.1.2
    weight_decay: float
    alpha: Number  # α_t
    lamb: float  # λ
    amplify_after: int  # λ acts on a tensor's steps after this many
    clip: Number  # c
    raw_second_moment: bool  # v of (c g)² instead of ĝ²
    maximize: bool
    finite: Tensor | None  # 0-d bool: where it is False, nothing is written. None: everything is
    micro_step: MicroStep = WHOLE  # of more than one: where `finite` is False, the gradient is 0
    max_row_change: Number = 0.0
    max_row_norm: float = 0.0

    @property
    def limits_rows(self) -> bool:
        """Whether parameters move in this step, and a limit on their rows is on."""
        return self.micro_step.moves and (self.limits_change or self.max_row_norm > 0)

    @property
    def limits_change(self) -> bool:
        """Whether max_row_change is on; on a device it is a tensor, and not read for that."""
        return isinstance(self.max_row_change, Tensor) or self.max_row_change > 0


def written(batch: Batch, moves: bool = True) -> list[list[Tensor]]:
    """Return the lists that a step writes to, without those that only the last of several micro-batches does."""
    columns = [batch.exp_avgs, batch.exp_avg_sqs, batch.grok_emas, *(batch.coded[:3] if batch.coded else ())]
    if moves:
        columns = [batch.params, *columns, batch.steps, batch.coded.lows if batch.coded else None]
    return [column for column in columns if column is not None]


def limited_widths(batch: Batch, scalars: Scalars) -> list[int]:
    """Return the elements of a row for each tensor; 0 for those whose rows this step does not limit."""
    return list(batch.row_widths) if scalars.limits_rows and batch.row_widths else [0] * len(batch.params)
