"""Support for steps that run again without Python: replays of CUDA graphs, and compiled steps.

Such steps read nothing back, and keep values that change from step to step in the same memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _get_capturable_supported_devices

from .._numbers import Number, accumulator
from ..backends.types import Batch, Scalars
from ..state.slots import misfits, needs_mu
from .batches import Entry, Given


def is_capturing(optimizer: Optimizer) -> bool:
    """Return True if a CUDA graph is being captured; raise RuntimeError if the optimizer does not support that."""
    newer = getattr(optimizer, "_accelerator_graph_capture_health_check", None)  # torch 2.6 has an older name for it
    (newer or optimizer._cuda_graph_capture_health_check)()
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def any_capturable(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Return True if any group is `capturable`."""
    return any(map(itemgetter("capturable"), groups))


def check_devices(groups: Sequence[dict[str, Any]]) -> None:
    """Raise RuntimeError, in the words of torch's optimizers, if a capturable group is on an unsupported device."""
    supported = _get_capturable_supported_devices()
    for i, group in enumerate(groups):
        with_gradient = (param for param in group["params"] if param.grad is not None)
        if group["capturable"] and any(param.device.type not in supported for param in with_gradient):
            raise RuntimeError(
                f"If capturable=True, params and state_steps must be on supported devices: {supported}, but "
                f"param_groups[{i}] has some on other devices: leave capturable out of that group"
            )


def check_state(entries: Iterable[Entry], given: Given, has_evaluated: bool) -> None:
    """Raise RuntimeError if a capture would read a value back, or create state that every replay would create again."""
    if given.options["nonfinite"] == "raise":
        raise RuntimeError(
            'nonfinite="raise" reads the gradients back, which a CUDA graph of step() cannot do: construct the '
            'optimizer with nonfinite="skip", which counts such steps'
        )
    for entry in entries:
        group, needed = given.groups[entry.member.group], {"step"}
        if needs_mu(given.options, group["lamb"]):
            needed |= {"grok_ema"} if group["window_size"] is None else {"grok_ema", "grok_ring"}
        state = given.state.get(entry.param, {})
        if not has_evaluated or needed - state.keys() or misfits(state, entry.param, given.options):
            raise RuntimeError(
                "a CUDA graph of step() needs state that exists: before capturing, take a few steps on a side "
                "stream, as torch.cuda.graph requires anyway; do so again after loading a checkpoint, calling "
                "free_slow_gradient(), switching lamb on, changing parameters' memory format or dtype, or setting "
                "state by hand"
            )


def for_compiler(batch: Batch, scalars: Scalars) -> Scalars:
    """Return the scalars. Those that change from step to step become tensors, so that no guard depends on their values.

    Also mark the addresses of parameters and state as static, as torch does for its own optimizers. A CUDA graph made
    by the compiler then needs no copies of them.
    """
    for static in (batch.params, batch.exp_avgs, batch.exp_avg_sqs, batch.grok_emas or [], batch.steps):
        for tensor in static:
            torch._dynamo.mark_static_address(tensor, guard=False)
    device = batch.params[0].device

    def on_device(x: Number) -> Tensor:
        return x if isinstance(x, Tensor) else torch.full((), x, dtype=accumulator(device), device=device)

    lr, alpha, lamb, clip = map(on_device, (scalars.lr, scalars.alpha, scalars.lamb, scalars.clip))
    scalars = scalars._replace(lr=lr, alpha=alpha, lamb=lamb, clip=clip)
    if scalars.limits_change:
        scalars = scalars._replace(max_row_change=on_device(scalars.max_row_change))
    if scalars.weight_decay:
        scalars = scalars._replace(weight_decay=on_device(scalars.weight_decay))
    return scalars
