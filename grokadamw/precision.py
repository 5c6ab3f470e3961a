"""Save and load the float32 weights that `master_weight_bits` keeps for a bfloat16 or float16 model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import zero
from ._trainers import grokadamw_in
from .grokadamw import GrokAdamW
from .groups import check_model
from .shards import like, local, part, shards_of
from .state.formats import HALVES, full, low_dtype, split
from .state.sizes import is_frozen
from .state.slots import add_missing

__all__ = ["full_precision_state_dict", "load_full_precision_state_dict"]


def full_precision_state_dict(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the model's state dict, with float32 weights for parameters whose low bits the optimizer keeps.

    With ``master_weight_bits=32`` these are the weights that training works with, bit for bit; with 24, they agree to
    16 bits of the mantissa. The other entries, such as parameters outside the optimizer, are those of
    ``model.state_dict()``, and share the model's memory.

    Args:
        model: a model with the parameters that `optimizer` updates; it may have more.
        optimizer: a GrokAdamW with ``master_weight_bits``, or one that a framework or this package has wrapped. Before
            its first step, all low bits are 0. A rank of ``ZeroRedundancyOptimizer`` has those of its own parameters.

    Raises:
        TypeError, ValueError: the optimizer keeps no low bits for this model, which has bfloat16 or float16 parameters;
            the model was cast to another dtype after its last step; or its state dict does not hold its parameters, as
            FSDP1's does not.
    """
    optimizer = _keeper(model, optimizer, "model.state_dict() returns the weights as they are")
    for param in model.parameters():
        if "param_low" in optimizer.state.get(param, {}) and param.dtype not in HALVES:
            raise ValueError(
                f"model was cast to {param.dtype} after its last step, and without the low bits that the optimizer "
                "keeps: call full_precision_state_dict before the cast, or delete 'param_low' from the states"
            )
    state_dict: dict[str, Any] = model.state_dict()
    own = {param for group in optimizer.param_groups for param in group["params"]}
    for name, param in _with_low_bits(model, optimizer):
        low = optimizer.state.get(param, {}).get("param_low")
        if low is not None:
            state_dict[name] = like(full(part(param.detach()), part(low)), param.shape, param)
        elif param in own:
            state_dict[name] = param.detach().float()
    return state_dict


def load_full_precision_state_dict(model: nn.Module, optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load float32 weights into a bfloat16 or float16 model, and their low bits into its optimizer.

    The rest of the optimizer's state stays as it is, so load the optimizer's own state dict first.

    Raises:
        TypeError, ValueError: as for ``full_precision_state_dict``; or a finite weight is too large for float16. Then
            nothing was loaded.
        RuntimeError: names or shapes differ from the model's, as in ``model.load_state_dict``.
    """
    optimizer = _keeper(model, optimizer, "model.load_state_dict(state_dict) rounds them")
    named = _with_low_bits(model, optimizer)
    for name, param in named:
        given = state_dict.get(name)
        if param.dtype == torch.float16 and isinstance(given, Tensor) and _overflows_float16(given):
            raise ValueError(
                f"state_dict[{name!r}] has weights that are too large for float16: make the model bfloat16"
            )
    model.load_state_dict(state_dict)
    groups = {param: group for group in optimizer.param_groups for param in group["params"]}
    for name, param in named:
        if param not in groups or is_frozen(param, optimizer.state):
            continue  # `model.load_state_dict` has rounded it
        low = low_dtype(param, optimizer.defaults)
        state = optimizer.state[param]
        # create the whole state, so that the optimizer can be saved before its first step
        add_missing(state, param, optimizer.defaults, lamb=groups[param]["lamb"])
        weights: Tensor = local(state_dict[name].detach().to(param.device, torch.float32), shards_of(param))
        half = torch.full((), 1 << 31, dtype=torch.int64, device=param.device)  # rounds to nearest
        rounded, bits = split(weights.contiguous(), param.dtype, low, half, False)
        assert bits is not None
        with torch.no_grad():
            part(param).copy_(rounded)
        part(state["param_low"]).copy_(bits)


def _overflows_float16(weights: Tensor) -> bool:
    values = part(weights.detach())
    return not values.is_meta and bool((values.isfinite() & values.to(torch.float16).isinf()).any())


def _with_low_bits(model: nn.Module, optimizer: GrokAdamW) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that can have low bits, by their names in the model's state dict.

    The names may differ from those in `named_parameters`, because hooks remove the names of wrappers.
    """
    named = [(name, x) for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, nn.Parameter)]
    missing = {*optimizer.state}.intersection(model.parameters()).difference(param for _, param in named)
    if any("param_low" in optimizer.state[param] for param in missing):
        raise ValueError(
            f"model.state_dict() has other tensors than the parameters of this {type(model).__name__}: low "
            "bits cannot be matched to them"
        )
    return [(name, param) for name, param in named if low_dtype(param, optimizer.defaults) is not None]


def _keeper(model: nn.Module, optimizer: Optimizer, otherwise: str) -> GrokAdamW:
    """Return the GrokAdamW inside the optimizer. Raise TypeError or ValueError if it has no low bits of this model."""
    check_model(model)
    found = grokadamw_in(optimizer)
    if found is None:
        raise TypeError(
            f"optimizer is of type {type(optimizer).__name__}, and has no GrokAdamW in it: give the one that trains "
            f"the model. Without one, {otherwise}"
        )
    halves = [param for param in model.parameters() if param.dtype in HALVES]
    trained = {param for group in zero.groups_of_all_ranks(found) for param in group["params"]}
    if halves and trained.isdisjoint(model.parameters()):
        raise ValueError("optimizer has no parameter of this model: give the GrokAdamW that trains it")
    if found.defaults["master_weight_bits"] is None and not trained.isdisjoint(halves):
        raise ValueError(
            "optimizer has master_weight_bits=None, and so keeps no low bits of the model's bfloat16 or float16 "
            f"weights: construct it with master_weight_bits=32 or 24. Without them, {otherwise}"
        )
    return found
