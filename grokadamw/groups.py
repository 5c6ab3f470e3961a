"""Divide a model's parameters into groups by their role, such as weights, norms and embeddings."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ._checks import check_number
from ._numbers import Number, as_float
from ._warn import warn
from .ddp import FSDP1, kind_of
from .layers import layers_in
from .norms import has_norms, is_norm, is_vector
from .shards import whole

__all__ = ["decay_groups"]

Named: TypeAlias = list[tuple[str, nn.Parameter]]
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

# the preset for models with norm layers; above NARROW inputs a row, lr is smaller and weight decay larger
WITH_NORMS = {
    "lr": 3e-3,
    "weight_decay": 1.0,
    "decay_boost": 3.0,
    "gamma": 0.6,
    "max_row_change": 0.035,
    "signal_boost": 4.0,
}
NARROW = 180  # mean inputs of a row of weights; a transformer of width 128 has about 170
# and without, where the lengths of rows matter. The keys are the least numbers of weights, not counting embeddings
WITHOUT_NORMS = {
    1: {"lr": 2e-2, "weight_decay": 0.5, "decay_boost": 1.0, "signal_boost": 2.0, "lamb": 0.0, "gamma": 0.0},
    3: {"lr": 1e-2, "weight_decay": 1.0, "decay_boost": 3.0, "signal_boost": 4.0, "lamb": 0.0, "gamma": 0.0},
    4: {"lr": 3e-3, "weight_decay": 0.1, "decay_boost": 30.0, "signal_boost": 10.0, "lamb": 0.0, "gamma": 0.0},
}
# names of parameters that do not make a model deeper: the reverse direction of a recurrent layer, parametrized or not,
# and the lengths of weight_norm
_REVERSE = re.compile(r"\bweight\w*_reverse(_g|_v|_orig|\.original\d*)?$")
_LENGTHS = re.compile(r"\bweight\w*(_g|\.original0)$")
_KERNEL = re.compile(r"\bweight\w*$|\bparametrizations\.weight\.")  # names of a convolution's kernel


def decay_groups(
    model: nn.Module, weight_decay: float = 1e-2, no_decay: Callable[[str, Tensor], bool] | None = None
) -> list[dict[str, Any]]:
    """Return two parameter groups: weights, with weight decay; and biases, norms and embeddings, without.

    ```python
    optimizer = GrokAdamW(decay_groups(model, weight_decay=0.1), lr=3e-4)
    ```

    Parameters keep their names. Layers are numbered in the order of the whole model, not within each group.

    Args:
        model: the model. Its parameters that require gradients are returned, shared ones once.
        weight_decay: weight decay wd ≥ 0 of the first group.
        no_decay: a function of name and parameter that returns True for a parameter that does not decay, as in
            ``lambda name, param: param.dim() < 2``. None: parameters with fewer than two dimensions, and those of norm
            layers and embeddings, do not decay. If none has two dimensions, as in a model that FSDP1 flattened, all
            decay.

    Returns:
        ``[{"params": [(name, parameter), …], "layers": [l, …], "weight_decay": …}, …]``, for GrokAdamW, and for torch's
        optimizers. A group without parameters is left out.

    Raises:
        TypeError, ValueError: an argument is not as described above, or all of the model is frozen.
    """
    _check_modules(model)
    check_number("weight_decay", weight_decay)
    if no_decay is not None and not callable(no_decay):
        raise TypeError(
            f"no_decay={no_decay!r} cannot be called: give a function of a name and a parameter, as in "
            "lambda name, param: name.endswith('bias')"
        )
    named = trained(model)
    if no_decay is None:
        exempt = of_modules(model, lambda module: isinstance(module, _EMBEDDINGS) or is_norm(module))
        flat = is_flat(model)

        def no_decay(name: str, param: Tensor) -> bool:
            return not flat and (param.dim() < 2 or param in exempt)

    parts: tuple[Named, Named] = ([], [])
    for name, param in named:
        parts[bool(no_decay(name, param))].append((name, param))
    layers = layers_in({param: name for name, param in model.named_parameters()})
    return [
        {"params": part, "layers": [layers[param] for _, param in part], "weight_decay": decay}
        for part, decay in zip(parts, (weight_decay, 0.0), strict=True)
        if part
    ]


def grokking_groups(
    model: nn.Module, lr: float | Tensor | None, weight_decay: float | None, norms: bool | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the parameter groups of `GrokAdamW.for_grokking`, and its other options.

    The groups are: weights; the parameters of norm layers, which decay a third as fast; other vectors, without decay or
    limits; and one group per embedding. If the mean length of an embedding's rows is above 1, its lr is multiplied by
    that length and its weight decay divided by it. In a model without norms, vectors count as weights. `norms` says
    whether the model has norms; None searches it for them.

    With norms, lr is lower in wide models, because Adam moves a row of n weights by about lr · √n: if the mean of n is
    above `NARROW`, lr is multiplied by (NARROW / n)^(2/3), and weight decay divided by that, unless lr is given.
    Without norms, the numbers depend on how many weights the model has: deep models need a lower lr, and shallow ones
    longer rows. The set of groups depends only on the modules, so a model with loaded weights has the same groups as
    the model that the weights come from.
    """
    _check_modules(model)
    if norms is not None and not isinstance(norms, bool):
        raise TypeError(f"norms={norms!r} is neither True, False nor None")
    named = trained(model)
    _check_frozen(model)
    if any(kind_of(module) == FSDP1 and is_flat(module) for module in model.modules()):
        raise ValueError(
            "model: FSDP1 has made vectors of its weights, and the preset's groups and limits need their shapes: use "
            "FSDP2 (torch.distributed.fsdp.fully_shard), or GrokAdamW(...) with groups of your own"
        )
    normed = has_norms(model) if norms is None else norms
    embeddings = of_modules(model, lambda module: isinstance(module, _EMBEDDINGS))
    of_convolutions = of_modules(model, lambda module: isinstance(module, nn.modules.conv._ConvNd))
    kernels = {param for name, param in named if param in of_convolutions and _KERNEL.search(name)}

    def is_weight(param: Tensor) -> bool:
        """Return True for weights, such as a matrix of one row; a class token with dimensions of 1 is a vector."""
        return param.dim() == 2 or (param.dim() > 2 and (not is_vector(param) or param in kernels))

    def is_beside(name: str, param: Tensor) -> bool:
        return bool(_REVERSE.search(name) or (is_vector(param) and _LENGTHS.search(name)))

    of_norms = of_modules(model, is_norm)
    others = embeddings | of_norms
    inner = [param for name, param in named if is_weight(param) and param not in others and not is_beside(name, param)]
    count = len(inner)
    # embeddings or vectors alone tell nothing about depth (a vector may be a whole model): then take the lowest lr
    of_count = max(least for least in WITHOUT_NORMS if least <= count or not count)
    numbers = WITH_NORMS if normed else WITHOUT_NORMS[of_count]
    preset: dict[str, Any] = {"betas": (0.9, 0.98), "alpha_init": 0.9, **numbers}
    if normed and lr is None:  # a lower lr needs more decay: their product is what shrinks a weight in a step
        share = (NARROW / max(_mean_inputs(inner, kernels), NARROW)) ** (2 / 3)
        preset |= {"lr": share * preset["lr"], "weight_decay": preset["weight_decay"] / share}
    lr = preset["lr"] if lr is None else lr
    decay = preset["weight_decay"] if weight_decay is None else weight_decay
    if not isinstance(lr, Tensor):
        check_number("lr", lr)
    check_number("weight_decay", decay)
    preset |= {"lr": lr, "weight_decay": decay}
    if weight_decay is not None:
        preset.pop("decay_boost", None)  # a weight decay that the user gives stays constant
    all_are_weights = is_flat(model) or not normed
    weights, gains, vectors = list[Any](), list[Any](), list[Any]()
    groups: list[dict[str, Any]] = [
        {"params": weights, "lr": lr, "weight_decay": decay},
        {"params": gains, "lr": lr, "weight_decay": decay / 3},
        {"params": vectors, "lr": lr, "weight_decay": 0.0, "max_row_change": 0.0},
    ]
    for name, param in named:
        if param in embeddings and param.dim() > 1:
            length = max(_mean_row_length(name, param), 1.0)
            groups.append({"params": [(name, param)], "lr": lr * length, "weight_decay": decay / length})
        elif param in of_norms and not all_are_weights:
            gains.append((name, param))
        else:
            (weights if all_are_weights or is_weight(param) else vectors).append((name, param))
    groups = [group for group in groups if group["params"]]
    for group in groups if isinstance(lr, Tensor) else ():
        group["lr"] = torch.clone(group["lr"])  # schedulers write into it, so each group needs its own
    return groups, preset


def lost_rates(groups: Sequence[Mapping[str, Any]], first: Sequence[Number]) -> str | None:
    """Return a warning if all groups have one learning rate, and `grokking_groups` had given them different ones.

    A rate of 0 tells nothing: a warm-up may begin with it, or a schedule end.
    """
    rates = [group["lr"] for group in groups]
    if len(rates) != len(first) or any(isinstance(rate, Tensor) for rate in (*rates, *first)):
        return None
    if len({*first}) == 1 or len({*rates}) > 1 or rates[0] == 0:
        return None
    return (
        f"all parameter groups have lr={rates[0]:g}, but the preset gave each embedding its own, up to "
        f"{max(first):g}: a scheduler or a loop has replaced it. Let the schedule multiply each group's lr, as "
        'LambdaLR does; or give it a list: max_lr=[group["lr"] for group in optimizer.param_groups]'
    )


def _mean_inputs(weights: Iterable[Tensor], kernels: Set[Tensor]) -> float:
    """Return the mean number of inputs of a row, as of ``nn.Linear``'s weights; 0 if there are no weights."""
    sizes = [(param.numel(), param.shape[1:].numel() if param in kernels else param.shape[-1]) for param in weights]
    rows = sum(size // inputs for size, inputs in sizes if size)
    return sum(size for size, _ in sizes) / max(rows, 1)


@torch.no_grad()
def _mean_row_length(name: str, weight: Tensor) -> float:
    """Return the mean 2-norm of an embedding's rows; 0 if it has none."""
    if weight.numel() == 0:
        return 0.0
    length = math.nan if weight.is_meta else as_float(whole(weight.abs().float().norm(dim=1).mean()))
    if not math.isfinite(length):
        what = "is on the meta device" if weight.is_meta else "holds numbers that are not finite"
        raise ValueError(
            f"model: the embedding {name} {what}, so its rows have no length yet: initialise or load the weights first"
        )
    return length


def _check_frozen(model: nn.Module) -> None:
    """Warn if most of a model is frozen, as in fine-tuning."""
    sizes = [(param.numel(), param.requires_grad) for param in model.parameters()]
    frozen = sum(size for size, is_trained in sizes if not is_trained)
    share = frozen / max(sum(size for size, _ in sizes), 1)
    if share > 0.5:
        warn(
            f"{share:.0%} of the model is frozen, as for fine-tuning with PEFT: the preset was made for training from "
            "scratch, and its learning rate and weight decay make a model forget. To fine-tune, use "
            "GrokAdamW(decay_groups(model), lr=3e-4, lamb=0.5)",
            UserWarning,
        )


def check_model(model: Any) -> None:
    """Raise TypeError if the model is not a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, and not a torch.nn.Module: give the model itself")


def _check_modules(model: Any) -> None:
    """Raise TypeError or ValueError for a model whose modules do not show the roles of its parameters."""
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and list(module.parameters()):
            raise TypeError(
                f"model{name and '.'}{name} is TorchScript, which does not show its embeddings and norm layers: give "
                "the model that it was made from, whose parameters it shares"
            )
    if any(kind.__module__.startswith("torch.export.") for module in model.modules() for kind in type(module).__mro__):
        raise TypeError(
            "model comes from torch.export, whose modules do not show which parameters are embeddings and norm layers: "
            "make the optimizer from the model that was exported"
        )
    for name, param in model.named_parameters():
        if isinstance(param, nn.parameter.UninitializedParameter):
            raise ValueError(f"model: {name} has no shape yet: run the model once, and then make the optimizer")


def is_flat(model: nn.Module) -> bool:
    """Return True if no parameter has two dimensions, so that dimensions do not tell weights from vectors."""
    return all(param.dim() < 2 for param in model.parameters())


def trained(model: nn.Module) -> Named:
    """Return the parameters that require gradients, in the model's order. Raise ValueError if all are frozen."""
    named = list(model.named_parameters())
    found = [(name, param) for name, param in named if param.requires_grad]
    if named and not found:
        raise ValueError("all parameters of the model are frozen: set requires_grad on those that are to be trained")
    return found


def of_modules(model: nn.Module, of_kind: Callable[[nn.Module], bool]) -> set[Tensor]:
    """Return the parameters that belong directly to modules of a kind, parametrized or not."""
    found = [module for module in model.modules() if of_kind(module)]
    found += [originals for module in found for originals in getattr(module, "parametrizations", {}).values()]
    return {param for module in found for param in module.parameters(recurse=False)}
