"""Hints for arguments that people mistype or mix up: messages that say what to write instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")

# other packages' names for an option, and common misspellings
_MEANT = {
    "alpha": "alpha_init",
    "lambda_": "lamb",
    "lambd": "lamb",
    "lamda": "lamb",
    "learning_rate": "lr",
    "wd": "weight_decay",
    "epsilon": "eps",
    "adam_epsilon": "eps",
    "beta": "betas",
    "beta1": "betas",
    "beta2": "betas",
    "kappa": "grokking_signal_decay_rate",
    "accumulation_steps": "steps",
    "signals": "grokking_signal_fns",
    "clip": "gradient_clipping",
    "max_grad_norm": "gradient_clipping",
    "max_norm": "gradient_clipping",
}

# options of torch.optim.AdamW and Adam that this optimizer lacks; in a group they mark it as AdamW's
OF_ADAMW = {"amsgrad": "there is no AMSGrad here", "decoupled_weight_decay": "weight decay is always decoupled"}


def meant(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that an unknown name most likely means; None if there is none.

    Names that extend a known one, such as lr_scale or weight_decay_mult, are assumed to belong to other packages.
    """
    known = list(known)
    if any(name.startswith(f"{option}_") for option in known):
        return None
    if _MEANT.get(name) in known:
        return _MEANT[name]
    return next(iter(get_close_matches(name, known, n=1, cutoff=0.8)), None)


def with_hints(function: Callable[P, None]) -> Callable[P, None]:
    """Make a method's TypeError for an unknown argument suggest what to give instead, if that can be guessed."""
    known = inspect.signature(function).parameters
    is_constructor = function.__name__ == "__init__"
    by_name = [name for name, parameter in known.items() if parameter.kind is parameter.KEYWORD_ONLY]

    @functools.wraps(function)
    def checked(*args: P.args, **options: P.kwargs) -> None:
        for name in options:
            if name in known:
                continue
            what = type(args[0]).__name__ if is_constructor else function.__name__
            instead = meant(name, known)
            if instead is not None:
                way_out = f"give {instead}"
            elif "optimizer" in known:
                way_out = f"if the optimizer takes it, give it there, as in {what}(torch.optim.AdamW(params, {name}=…))"
            elif name in OF_ADAMW:
                way_out = f"leave it out, as {OF_ADAMW[name]}"
            elif not is_constructor:
                way_out = f"it takes {', '.join(by_name)}"
            else:
                continue
            raise TypeError(f"{what} has no argument {name}: {way_out}")
        function(*args, **options)

    return checked


def with_model(method: Callable[P, T]) -> Callable[P, T]:
    """Make a class method that needs a model raise a helpful TypeError if it is called without one."""

    @functools.wraps(method)
    def checked(*args: P.args, **options: P.kwargs) -> T:
        if len(args) < 2 and "model" not in options:
            raise TypeError(
                "for_grokking needs the model: GrokAdamW.for_grokking(model). If the Trainer makes the optimizer, "
                "give optimizer_cls_and_kwargs=grokadamw.huggingface.for_grokking(arguments, decay_boost=3)"
            )
        return method(*args, **options)

    return checked


def check_iterable(params: Any) -> None:
    """Raise TypeError if the parameters of an optimizer or group are a model, a dict, or not iterable."""
    if isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList):
        raise TypeError(f"params is a {type(params).__name__}: give its parameters, model.named_parameters()")
    if isinstance(params, Tensor):  # torch checks this: a group may have one
        return
    try:
        iter(params)
    except TypeError:
        can_iterate = False
    else:
        can_iterate = not isinstance(params, Mapping)
    if not can_iterate:
        what = ", which must be called" if inspect.isroutine(params) else ""
        raise TypeError(f"params is a {type(params).__name__}{what}: give a list, or model.named_parameters()")


def check_params(params: Any) -> Any:
    """Return an optimizer's `params` argument, with an iterator turned into a list.

    Raises TypeError if it cannot hold parameters, and ValueError if it is empty.
    """
    check_iterable(params)
    if isinstance(params, Iterator):
        params = list(params)
    if isinstance(params, Sequence) and not params:
        raise ValueError(
            "optimizer got an empty parameter list: the model has no parameters, or params is a generator that was "
            "used up before: call model.named_parameters() again"
        )
    return params


def misspelt(group: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """Return a warning for each unknown key of a parameter group that looks like a misspelt option."""
    pairs = [(key, meant(key, known)) for key in group if key not in known and key not in ("params", "param_names")]
    return [f"a parameter group has {key!r}, which has no effect: did you mean {name}?" for key, name in pairs if name]
