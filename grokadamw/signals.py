"""Grokking signals measure how far generalisation lags behind memorisation; the filter's memory α depends on them.

A signal is a callable of no arguments, or of `(train_loss, eval_loss)`, that returns a number: 0 or less if
generalisation does not lag, and larger the more it lags. The larger the signal, the shorter the filter's memory:
α_t = α_init · exp(−κ · max(signal, 0)). A signal gets the losses if it has arguments named `train_loss` and
`eval_loss`, in any order or as `**kwargs`, or if it requires two arguments. It is not called before both losses are
recorded.

Ready-made signals, and when to use them:

- `loss_gap`, the default: use it if both losses are recorded, and mean the same thing on both sets.
- `memorisation`, the preset's: use it with cross entropy, or squared errors of targets of variance 1. It is like
  `loss_gap`, but near 0 while the losses are close, as before anything is learnt, and once the evaluation loss has come
  down.
- `AccuracyGap`: use it if accuracies are recorded and correct answers are what matters, as on algorithmic tasks, where
  losses still change once the answers are correct.
- `Plateau`: use it if the signal should not act on the filter until training is nearly done.
- `SlowGradient`: use it if there is no evaluation data, or evaluation is expensive.

A signal that is an object may also have

- `ready`: while it is False, the signal is not called;
- `bind(optimizer)`, called when the signal is registered;
- `state_dict()` and `load_state_dict(state)`, of numbers, strings, lists, and dicts of them with strings as keys. The
  optimizer's checkpoints save that state under the signal's name, so that a resumed run continues where it stopped.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._checks import check_count, check_number
from ._numbers import Number, accumulator, as_float, as_number, as_real, as_share, reads_are_free, resolved
from .param_groups import recorded
from .shards import Shards, divisions, local, shards_of
from .state.formats import unpacked

__all__ = ["AccuracyGap", "Plateau", "SlowGradient", "loss_gap", "memorisation"]


def loss_gap(train_loss: Number, eval_loss: Number) -> Number:
    """Return the relative gap between the losses, max(0, eval − train) / max(eval, train).

    It is in [0, 1] for losses ≥ 0, and 0 if neither loss is positive.
    """
    gap = eval_loss - train_loss
    if isinstance(gap, Tensor):
        positive = gap.clamp(min=0)
        larger = train_loss + positive
        return torch.where(larger > 0, positive / larger, 0) + 0 * gap  # NaN, as below
    if not math.isfinite(gap):
        return math.nan  # not 0: a loss that is not finite means "no signal", not "no gap"
    largest = max(float(eval_loss), float(train_loss))
    return max(0.0, gap) / largest if largest > 0 else 0.0


def memorisation(train_loss: Number, eval_loss: Number) -> Number:
    """Return (loss_gap · min(1, eval − train))², in [0, 1]: near 1 while a model only knows its training data.

    The first factor keeps it small while both losses are high, the second once both are low. Losses must be ≥ 0, in
    nats or squared errors of targets of variance 1, and from about the same step, because a training loss that has
    fallen since the evaluation looks like memorisation.
    """
    share, gap = loss_gap(train_loss, eval_loss), eval_loss - train_loss
    product = share * (gap.clamp(max=1) if isinstance(gap, Tensor) else min(gap, 1.0))
    return product * product


class _OfOptimizer:
    """A signal that reads from the optimizer that it was last registered with, without keeping it alive.

    An optimizer has its signals. If they had it, too, its state would stay in memory until the garbage collector runs.
    """

    _reference: Callable[[], Optimizer | None] = staticmethod(lambda: None)

    def bind(self, optimizer: Optimizer) -> None:
        self._reference = weakref.ref(optimizer)

    @property
    def _optimizer(self) -> Optimizer | None:
        return self._reference()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_reference"}


class AccuracyGap(_OfOptimizer):
    """Signal max(0, training accuracy − evaluation accuracy) of the last recorded values; silent until both exist.

    ```python
    optimizer = GrokAdamW(model.named_parameters(), grokking_signal_fns=AccuracyGap())
    optimizer.record(train_acc=0.99, eval_acc=0.31)  # whenever they are known
    ```

    It reads the accuracies from the optimizer that it was last registered with. An accuracy given to its own ``record``
    takes precedence over the optimizer's.
    """

    def __init__(self) -> None:
        self._train: float | None = None
        self._eval: float | None = None

    def record(self, *, train: Any = None, eval: Any = None) -> None:
        """Record accuracies here, for optimizers without ``record``, such as ``Grokfast``. None keeps the last value.

        A tensor on a GPU is read back.

        Args:
            train, eval: fractions of correct answers, in [0, 1].

        Raises:
            TypeError, ValueError: an accuracy is not one number, or not in [0, 1].
        """
        new_train = self._train if train is None else _read_share(train, "train")
        new_eval = self._eval if eval is None else _read_share(eval, "eval")
        self._train, self._eval = new_train, new_eval

    @property
    def ready(self) -> bool:
        return None not in self.accuracies().values()

    @property
    def reads_records(self) -> bool:
        return None in (self._train, self._eval)

    def __call__(self) -> Number:
        train, evaluation = self.accuracies().values()
        if train is None or evaluation is None:
            raise RuntimeError(
                "AccuracyGap has no accuracies: record both. If a function calls it, call its bind(optimizer) first"
            )
        gap = train - evaluation
        return gap.clamp(min=0) if isinstance(gap, Tensor) else max(gap, 0.0)

    def accuracies(self) -> dict[str, Number | None]:
        """Return the last ``train_acc`` and ``eval_acc``; None for one that was not recorded."""
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return {
            "train_acc": recorded(groups, "train_acc") if self._train is None else self._train,
            "eval_acc": recorded(groups, "eval_acc") if self._eval is None else self._eval,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"train": self._train, "eval": self._eval}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._train, self._eval = state["train"], state["eval"]


def _read_share(value: Any, name: str) -> float:
    return as_float(as_share(as_float(as_number(value, name)), name))


class Plateau:
    """Signal d(train) · (1 − d(eval)), which is high, at most 1, while training is done and evaluation is not.

    Here d(loss) is 1 − loss / threshold, clamped to [0, 1]. The signal is 0 while the training loss is above the
    threshold, and again once the evaluation loss has come down.

    Args:
        threshold: the loss, > 0, below which a set begins to count as done.
    """

    def __init__(self, threshold: float = 0.1) -> None:
        self.threshold = check_number("threshold", threshold)
        if self.threshold == 0:
            raise ValueError(f"threshold={threshold!r} is not a loss that can be reached: give a number above 0")

    def __call__(self, train_loss: Number, eval_loss: Number) -> Number:
        return self._done(train_loss) * (1 - self._done(eval_loss))

    def _done(self, loss: Number) -> Number:
        done = 1 - loss / self.threshold
        return done.clamp(0, 1) if isinstance(done, Tensor) else min(max(done, 0.0), 1.0)


_SLOW = ("grok_ema", "grokfast_ema", "grokfast_ring_sum")  # μ, or a multiple of it


class SlowGradient(_OfOptimizer):
    """Signal max(0, cos(μ, g)) over all parameters, which says how much of the gradient is slow. Needs no evaluation.

    μ is from the last step, g from this one. Near 0, the slow part is lost in noise, and the filter keeps its full
    memory. Near 1, the gradient has kept its direction for a long time; a shorter memory then loses nothing, and
    follows a turn more quickly. The signal is 0 until there is a μ. Around another optimizer, μ is that of ``Grokfast``
    or ``GrokfastMA``. The signal serves one optimizer, the one that it was last registered with. It does not work with
    ``step_in_backward``, which never has all gradients at once.

    Args:
        every: steps from one evaluation to the next, ≥ 1. Each reads μ and g once; in between, the value stays.
    """

    reads_records = False

    def __init__(self, every: int = 10) -> None:
        self.every = check_count("every", every, at_least=1)
        self._calls = 0
        self._value: Number = 0.0

    def __call__(self) -> Number:
        if self._optimizer is None:
            raise RuntimeError(
                "SlowGradient has no optimizer: pass the object itself as a signal, or call its bind(optimizer)"
            )
        if self._calls % self.every == 0:
            self._value = self._cosine()
        self._calls += 1
        return self._value

    @torch.no_grad()
    def _cosine(self) -> Number:
        # for each way of sharding, [[μ·μ, μ·g], [g·μ, g·g]] of its tensors
        products: dict[Shards | None, list[Tensor]] = {shards: [] for shards in divisions(self._groups())}
        for group in self._groups():
            for param in group["params"]:
                state = self._optimizer.state.get(param, {})  # type: ignore[union-attr]
                name = next((name for name in _SLOW if name in state), None)
                if name is not None and param.grad is not None:
                    is_negated = name == "grok_ema" and group["maximize"]  # wrappers average gradients as they are
                    shards, g = shards_of(param), resolved(-param.grad if is_negated else param.grad)
                    pair = [as_real(local(x, shards)).flatten() for x in (unpacked(state, name), g)]
                    # in a wider dtype, as products of small float32 numbers underflow
                    both = torch.stack([x.to(accumulator(x.device)) for x in pair])
                    products.setdefault(shards, []).append(both @ both.T)
        sums = products.pop(None, [])
        sums += [shards.total(matrices, (2, 2)) for shards, matrices in products.items() if shards is not None]
        if not sums:
            return 0.0
        (mm, mg), (_, gg) = torch.stack([x.to(sums[0].device) for x in sums]).sum(0)
        cosine = mg / (mm.sqrt() * gg.sqrt())
        return as_number(torch.where(cosine > 0, cosine, 0))  # 0 for a zero vector, and for NaN

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self._calls, "value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._calls, self._value = state["calls"], state["value"]
        device = next((p.device for group in self._groups() for p in group["params"]), torch.device("cpu"))
        if not reads_are_free(device):  # back on its device, so that α is computed there as before
            self._value = torch.tensor(self._value, dtype=accumulator(device), device=device)

    def _groups(self) -> list[dict[str, Any]]:
        return [] if self._optimizer is None else self._optimizer.param_groups
