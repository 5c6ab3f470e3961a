"""What there is to do in a step: the parameters that have a gradient, in lists that one call can take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import layers
from .numbers import as_real, mesh_of
from .state import State
from .update.reference import Tensors


class Work(NamedTuple):
    """A parameter group's parameters that have a gradient, with what belongs to each."""

    group_index: int
    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    beta1: list[float]  # β1_l


def collect(groups: Sequence[dict[str, Any]], published: bool, known: Mapping[Tensor, str]) -> list[Work]:
    """One entry a group; as release 0.1.2 does it, one a tensor, since that clips tensor by tensor.

    Raises:
        RuntimeError: a gradient is sparse, or a group was changed by hand in a way that cannot be followed.
    """
    work = []
    for i, group in enumerate(groups):
        if len(group["layers"]) != len(group["params"]):
            raise RuntimeError(
                f"param_groups[{i}] has {len(group['params'])} parameters and {len(group['layers'])} layers, as its "
                "parameters were changed: call optimizer.set_layers(model), or set its 'layers' to a list of integers"
            )
        w = Work(i, group, [], [], [])
        for j, (param, beta1) in enumerate(zip(group["params"], layers.beta1s(group), strict=True)):
            if param.grad is None:
                continue
            if param.grad.layout != torch.strided:
                name = layers.names(group, i, known)[j]
                raise RuntimeError(
                    f"GrokAdamW does not support sparse gradients, and {name} has one: build its module with "
                    "sparse=False (torch.nn.Embedding), or give it to torch.optim.SparseAdam"
                )
            w.params.append(param)
            w.grads.append(param.grad.resolve_conj())
            w.beta1.append(beta1)
        if published:  # and there a layer is a place among the tensors that have a gradient
            beta1s = layers.beta1s({**group, "layers": range(len(w.params))})
            tensors = zip(w.params, w.grads, beta1s, strict=True)
            work += [Work(i, group, [param], [grad], [beta1]) for param, grad, beta1 in tensors]
        elif w.params:
            work.append(w)
    return work


def alike(w: Work, states: Iterable[State]) -> Iterator[tuple[Tensors, list[float]]]:
    """The tensors as real ones, in lists of one device and dtype, all with or all without μ; with their β1_l."""
    lists: dict[Any, tuple[Tensors, list[float]]] = {}
    for param, grad, beta1, state in zip(w.params, w.grads, w.beta1, states, strict=True):
        mu = state.get("grok_ema")
        kind = (param.device, mesh_of(param), param.dtype, grad.dtype, state["exp_avg"].dtype, mu is None)
        if kind not in lists:
            lists[kind] = Tensors([], [], [], [], None if mu is None else [], []), []
        tensors, beta1s = lists[kind]
        tensors.params.append(as_real(param))
        tensors.grads.append(as_real(grad))
        tensors.exp_avgs.append(as_real(state["exp_avg"]))
        tensors.exp_avg_sqs.append(as_real(state["exp_avg_sq"]))
        if tensors.grok_emas is not None and mu is not None:
            tensors.grok_emas.append(as_real(mu))
        tensors.steps.append(state["step"])
        beta1s.append(beta1)
    yield from lists.values()
