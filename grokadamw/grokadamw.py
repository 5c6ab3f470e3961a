"""The optimizer: arguments, state, and one step read from top to bottom."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from types import ModuleType
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable

from . import gradients, layers, metrics, update
from .arguments import PER_OPTIMIZER, check_group, check_options
from .signals import Combine, Signal, Signals, as_number, filter_memory, mean_over_ranks
from .state import State, loaded, prepare, restored
from .update.reference import Number, Numbers
from .work import Work, alike, collect

__all__ = ["GrokAdamW"]

# Plain data in every group beside the arguments, from the start: sharded checkpoints want the same keys on both sides.
_KEPT_IN_GROUPS = {"layer": None, "train_loss": None, "eval_loss": None, "signal_state": None, "skipped_steps": 0}


class GrokAdamW(Optimizer):
    r"""AdamW on gradients whose slow part is amplified, with a memory that adapts to how far generalisation lags.

    One step, for a parameter θ of layer l with gradient g at its step t:

    .. code-block:: text

        c   = min(1, gradient_clipping / (N + 1e-6))          N: the norm of all gradients together
        α_t = alpha_init · exp(−κ · max(GS_t, 0))             GS_t: the combined grokking signal
        μ   = α_t μ + (1 − α_t) c g                           the slow gradient, an exponential moving average
        ĝ   = c g + λ μ
        m   = β1_l m + (1 − β1_l) ĝ,  β1_l = β1 (1 − γ)^l
        v   = β2 v + (1 − β2) ĝ²
        θ   = θ (1 − lr · wd) − lr · m̂ / (√v̂ + ε),            m̂ = m / (1 − β1_l^t),  v̂ = v / (1 − β2^t)

    With ``lamb=0, gamma=0, gradient_clipping=0`` that is :class:`torch.optim.AdamW`.

    Sources: Grokfast (Lee et al. 2024, arXiv:2405.20233, section 2.3) for μ and ĝ; AdamW (Loshchilov & Hutter,
    arXiv:1711.05101, algorithm 2) for m, v and θ; the published GrokAdamW description for α_t and β1_l.

    Args:
        params: parameters, ``(name, parameter)`` pairs such as ``model.named_parameters()``, or dicts of either; of
            float16, bfloat16, float32, float64 or complex dtype. With names, layers are the model's modules; without,
            every tensor is a layer of its own. A dict may set any number from ``lr`` to ``gradient_clipping``,
            ``amplify_after``, ``maximize``, and ``layer``, an integer ≥ 0: the layer of all its parameters.
        lr: learning rate η ≥ 0, a float or a tensor of one element.
        betas: (β1, β2), each in [0, 1): decay of the first and second moment.
        eps: ε ≥ 0.
        weight_decay: decoupled decay wd ≥ 0, as AdamW's.
        alpha_init: α_init in [0, 1], the filter's memory while no signal shortens it: an average over about
            1 / (1 − α) steps.
        lamb: λ ≥ 0, how much of the slow gradient is added; 0 is no filter.
        gamma: γ in [0, 1), how much β1 falls from layer to layer.
        grokking_signal_fns: a callable or a list of them, of no arguments or of ``(train_loss, eval_loss)``; see
            :mod:`grokadamw.signals`. None is :func:`~grokadamw.signals.loss_gap` of the losses given to
            :meth:`record`; an empty list is no signal. ``grokking_signal_fn`` is an alias.
        grokking_signal_decay_rate: κ ≥ 0, how strongly the signal shortens the memory.
        gradient_clipping: largest norm ≥ 0 of all gradients together; 0 is off.
        combine: how several signals become one: ``"mean"``, ``"max"``, ``"min"``, or a callable of the list of usable
            values. A callable reads values back from a GPU; the others do not.
        second_moment: ``"filtered"``, v averages ĝ²; or ``"raw"``, (c g)².
        amplify_after: steps of a parameter before λ acts on it. μ is kept from the first step on.
        nonfinite: what to do with a step whose gradients hold NaN or infinity, or whose Σg² overflows float64.
            ``"skip"``: write nothing, and count it (``metrics()["skipped_steps"]``). ``"raise"``: write nothing, and
            raise; this reads the norm back from a GPU. ``"propagate"``: take it, as AdamW does. The first two read the
            gradients once more, unless clipping does so anyway.
        compat: ``"0.1.2"`` repeats runs of that release to rounding: bias correction by β1 instead of β1_l, ε added
            before v's correction, clipping tensor by tensor, layers counted over the tensors that have a gradient,
            signals evaluated for each group, no limit to α, state in the parameter's dtype, no rule for NaN.
        foreach: None or True for lists of tensors at a time; False for one at a time, with the least scratch memory.
        maximize: climb instead of descend.
        differentiable: let autograd pass through the step.

    Raises:
        TypeError, ValueError: an argument is not what is written above. The message names it and its value.

    ``optimizer.state[p]`` holds ``step`` (0-d float32), ``exp_avg`` m, ``exp_avg_sq`` v, and ``grok_ema`` μ once λ was
    above 0: in the parameter's shape, and in its dtype, but float32 at least.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        alpha_init: float = 0.98,
        lamb: float = 2.0,
        gamma: float = 0.1,
        grokking_signal_fns: Signal | Iterable[Signal] | None = None,
        grokking_signal_decay_rate: float = 0.1,
        gradient_clipping: float = 1.0,
        *,
        combine: Combine = "mean",
        second_moment: str = "filtered",
        amplify_after: int = 0,
        nonfinite: str = "skip",
        compat: str | None = None,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        grokking_signal_fn: Signal | Iterable[Signal] | None = None,
    ) -> None:
        if grokking_signal_fn is not None:
            if grokking_signal_fns is not None:
                raise ValueError(
                    "grokking_signal_fns and its alias grokking_signal_fn are both given: leave out the alias"
                )
            grokking_signal_fns = grokking_signal_fn
        signals = Signals(grokking_signal_fns, combine)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha_init": alpha_init,
            "lamb": lamb,
            "gamma": gamma,
            "grokking_signal_fns": None,  # never in a group; the key is there for 0.1.2's readers
            "grokking_signal_decay_rate": grokking_signal_decay_rate,
            "gradient_clipping": gradient_clipping,
            "second_moment": second_moment,
            "amplify_after": amplify_after,
            "nonfinite": nonfinite,
            "compat": compat,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            **_KEPT_IN_GROUPS,
        }
        check_options(defaults)
        check_group(defaults, defaults)
        self._reset(signals)
        super().__init__(params, defaults)
        signals.bind(self)

    def _reset(self, signals: Signals) -> None:
        """The attributes that torch's __getstate__ leaves behind: everything but defaults, state and groups."""
        self._signals = signals
        self._pending_signal_state: list[Any] | None = None  # loaded before its functions were registered
        self._layers_checked = False
        self._skipped_on_device: Tensor | None = None
        self._last = metrics.LastStep()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step. A parameter without a gradient stays as it is, with its state; ``p.grad`` is never written to.

        Args:
            closure: re-evaluates the model and returns the loss. It runs first: gradients and losses are read after it.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: a gradient is sparse, or not finite with ``nonfinite="raise"``. Nothing was written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_layers()
        signal, alphas = self._filter_memories()  # rows 4 and 5
        work = collect(self.param_groups, alphas, self._published)
        rows = update.choose(differentiable=self.defaults["differentiable"], use_foreach=self.defaults["foreach"])
        norms = self._norms(work, rows)  # row 2
        clips = [gradients.clip_coefficient(n, w.group["gradient_clipping"]) for n, w in zip(norms, work, strict=True)]
        self._last = metrics.LastStep(signal, alphas, norms, clips)
        finite = self._finite(work, norms)
        if finite is False:
            return loss
        for w, clip in zip(work, clips, strict=True):
            states = [self.state[param] for param in w.params]
            for param, state in zip(w.params, states, strict=True):
                prepare(state, param, self._published, with_slow_gradient=w.group["lamb"] > 0)
            for tensors, beta1 in alike(w, states):
                device = tensors.params[0].device
                writable = self._number(finite, device)
                if writable is not False:
                    rows.step(tensors, self._numbers(w, beta1, clip, writable, device))  # rows 6 to 10
        return loss

    def _check_layers(self) -> None:
        """Warn where β1 falls far: at the first step, when set_layers has had its chance."""
        if not self._layers_checked and not self._published:
            sentence = layers.warning_for(self.param_groups)
            if sentence is not None:
                warnings.warn(sentence, UserWarning, stacklevel=5)
        self._layers_checked = True

    def _filter_memories(self) -> tuple[Number | None, list[Number]]:
        """GS_t, and α_t of every group. The signals are evaluated once, in compat once a group."""
        signals, groups = self._signals, self.param_groups
        combined: list[Number | None]
        if self._published:
            combined = [signals.evaluate(g["train_loss"], g["eval_loss"], keep_nonfinite=True) for g in groups]
        else:
            train_loss, eval_loss = (
                next((group[loss] for group in groups if group[loss] is not None), None)
                for loss in ("train_loss", "eval_loss")
            )
            signal = signals.evaluate(train_loss, eval_loss)
            if signals.in_use(train_loss, eval_loss):
                params = chain.from_iterable(group["params"] for group in groups)
                signal = mean_over_ranks(signal, next(param.device for param in params))
            combined = [signal] * len(groups)
        return combined[0], [
            filter_memory(group["alpha_init"], group["grokking_signal_decay_rate"], signal, clamp=not self._published)
            for group, signal in zip(groups, combined, strict=True)
        ]

    def _norms(self, work: list[Work], rows: ModuleType) -> list[Number | None]:
        """N for each entry of work, if anything asks for it: that of all gradients, in compat that of the tensor."""
        if self._nonfinite == "propagate" and not any(w.group["gradient_clipping"] > 0 for w in work):
            return [None] * len(work)
        grads = [grad for w in work for grad in w.grads]
        home = next((grad.device for grad in grads if not self._on_host(grad.device)), None)
        if self._published:
            return [gradients.global_norm(w.grads, rows.sum_of_squares, home) for w in work]
        return [gradients.global_norm(grads, rows.sum_of_squares, home)] * len(work)

    def _finite(self, work: list[Work], norms: list[Number | None]) -> bool | Tensor:
        """Whether this step may be written: a tensor where reading it would make the host wait."""
        if self._nonfinite == "propagate" or not norms or norms[0] is None:
            return True
        finite = gradients.is_finite(norms[0])
        if self._nonfinite == "raise" and not finite:
            pairs = chain.from_iterable(zip(w.params, w.grads, strict=True) for w in work)
            names = [self._name(param) for param, grad in pairs if not grad.isfinite().all()]
            raise RuntimeError(
                f"the gradients are not finite: {', '.join(names) or 'their sum of squares overflows'}. Nothing was "
                'written; nonfinite="skip" goes on without such a step'
            )
        if isinstance(finite, Tensor):
            skipped = torch.logical_not(finite).long()
            self._skipped_on_device = skipped if self._skipped_on_device is None else self._skipped_on_device + skipped
        elif not finite:
            self._count_skipped(1)
        return finite

    def _numbers(
        self, w: Work, beta1: list[float], clip: Number, finite: bool | Tensor, device: torch.device
    ) -> Numbers:
        group = w.group
        return Numbers(
            beta1=beta1,
            bias_beta1=[float(group["betas"][0])] * len(beta1) if self._published else beta1,
            beta2=float(group["betas"][1]),
            lr=self._number(group["lr"], device),
            eps=float(group["eps"]),
            eps_before_correction=self._published,
            weight_decay=float(group["weight_decay"]),
            alpha=self._number(w.alpha, device),
            lamb=float(group["lamb"]),
            amplify_after=group["amplify_after"],
            clip=self._number(clip, device),
            raw_second_moment=self.defaults["second_moment"] == "raw",
            maximize=group["maximize"],
            finite=finite if isinstance(finite, Tensor) else None,
        )

    def _number(self, value: Any, device: torch.device) -> Any:
        """A number for parameters on this device: a tensor is moved there, or read where that is free."""
        if not isinstance(value, Tensor):
            return value if isinstance(value, bool) else float(value)
        if self._on_host(value.device) or self._on_host(device):
            return value.item()
        return value.reshape(()).to(device, non_blocking=True)

    def _on_host(self, device: torch.device) -> bool:
        """Whether numbers for parameters on this device are Python's: reading is free, and loses no derivative."""
        return gradients.reads_are_free(device) and not self.defaults["differentiable"]

    # Options of the whole optimizer live in `defaults`, which every way of copying one keeps.

    @property
    def _published(self) -> bool:
        return self.defaults["compat"] is not None

    @property
    def _nonfinite(self) -> Any:
        return "propagate" if self._published else self.defaults["nonfinite"]

    def _name(self, param: Tensor) -> str:
        for i, group in enumerate(self.param_groups):
            for name, p in zip(layers.names(group, i), group["params"], strict=True):
                if p is param:
                    return name
        raise KeyError(param)

    def record(self, *, train_loss: Any = None, eval_loss: Any = None) -> None:
        """Keep losses for the signals, in every group's ``train_loss`` and ``eval_loss``; a checkpoint holds them.

        The next step evaluates the signals. With several processes, call it on all of them.

        Args:
            train_loss, eval_loss: a number, or a tensor of one element; one on a GPU stays there, not waited for. None
                leaves the loss recorded before.

        Raises:
            TypeError: a loss is not one number.
        """
        given = {"train_loss": train_loss, "eval_loss": eval_loss}
        losses = {name: as_number(loss, name) for name, loss in given.items() if loss is not None}
        for group in self.param_groups:
            group.update(losses)

    def set_signals(self, fns: Signal | Iterable[Signal] | None, combine: Combine | None = None) -> None:
        """Replace the signals: as the constructor's ``grokking_signal_fns`` and ``combine``; None keeps ``combine``."""
        signals = Signals(fns, self._signals.combine if combine is None else combine)
        signals.bind(self)
        self._signals = signals
        self._resume_signals()

    def set_layers(self, model: nn.Module) -> None:
        """Take layers from a model: its modules in their order, for all groups but those that were given ``layer``.

        Raises:
            ValueError: a parameter of the optimizer is not the model's.
        """
        found = layers.layers_in(model.named_parameters())
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            if param not in found:
                raise ValueError(
                    f"model: this {type(model).__name__} has no {self._name(param)}; give the model that is optimized"
                )
        for group in self.param_groups:
            if group["layer"] is None:
                group["layers"] = [found[param] for param in group["params"]]
        self._layers_checked = False

    def layer_table(self) -> list[layers.Layer]:
        """What the layers came out as, in order: ``layer``, the ``names`` of its parameters, ``beta1`` (its β1_l)."""
        return layers.table(self.param_groups)

    def metrics(self) -> dict[str, float]:
        """What the last step did, as plain floats. Reading them waits for the device.

        ``step`` (steps taken, the most of any parameter), ``signal`` (GS), ``signal/<name>`` (each function's last
        usable value), ``alpha`` (α), ``grad_norm`` (N, before clipping), ``clip_coefficient`` (c), ``skipped_steps``,
        ``signal_failures``, ``beta1_min`` and ``beta1_max`` (of β1_l). Where groups differ, ``alpha`` and
        ``clip_coefficient`` are the smallest. NaN stands for what is not known: before the first step, without a
        usable signal, or a norm that nothing asked for.
        """
        self._settle()
        return metrics.as_floats(self._last, self.param_groups, self.state.values(), self._signals)

    def _count_skipped(self, steps: int) -> None:
        total = self.param_groups[0]["skipped_steps"] + steps
        if total == steps:
            warnings.warn(
                "a step was skipped: its gradients hold NaN or infinity, and nothing was written. "
                "metrics()['skipped_steps'] counts such steps; nonfinite=\"raise\" stops at the first",
                RuntimeWarning,
                stacklevel=6,
            )
        for group in self.param_groups:
            group["skipped_steps"] = total

    def _settle(self) -> None:
        """Read back what was counted on a device."""
        skipped, self._skipped_on_device = self._skipped_on_device, None
        if skipped is not None and (steps := int(skipped)) > 0:
            self._count_skipped(steps)
        self._signals.settle()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. The group may set what the constructor lists; its layers follow those that are there.

        Raises:
            TypeError, ValueError: a value is not allowed, or holds for the whole optimizer. Nothing was added then.
        """
        if isinstance(param_group, dict):
            check_group({**self.defaults, **param_group}, self.defaults)
        super().add_param_group(param_group)
        *earlier, group = self.param_groups
        group["betas"] = tuple(group["betas"])
        group["skipped_steps"] = self.param_groups[0]["skipped_steps"]
        if len(group.get("layers", ())) != len(group["params"]):
            group["layers"] = layers.layers_of(group, earlier)
        self._layers_checked = False

    def state_dict(self) -> dict[str, Any]:
        """As torch's: tensors and plain data alone, for ``torch.load(weights_only=True)``.

        Signal functions are left out; what those with a ``state_dict`` of their own remember is kept.
        """
        self._write_signal_state()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every state tensor keeps its precision where its parameter has less.

        Signals, and the options of the whole optimizer, stay as they were constructed.

        Raises:
            ValueError: groups, parameters or shapes are not those that were saved. Nothing was loaded then.
        """
        states: list[tuple[Tensor, State]] = []

        def keep(_: Optimizer, given: dict[str, Any]) -> None:
            states.extend(loaded(given, self.param_groups))

        def restore(_: Optimizer) -> None:
            for param, state in states:
                self.state[param] = restored(param, state, self._published)
            self._skipped_on_device, self._last = None, metrics.LastStep()
            self._pending_signal_state = self.param_groups[0]["signal_state"]
            self._resume_signals()

        # after the user's own pre-hooks, and before their post-hooks
        hooks = [
            self.register_load_state_dict_pre_hook(keep),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _write_signal_state(self) -> None:
        self._settle()
        self.param_groups[0]["signal_state"] = self._signals.state() or self._pending_signal_state

    def _resume_signals(self) -> None:
        """Hand a loaded state to the signals: now, or once the functions that it belongs to are registered."""
        if self._pending_signal_state is not None and self._signals.resume(self._pending_signal_state):
            self._pending_signal_state = None

    def __getstate__(self) -> dict[str, Any]:
        self._write_signal_state()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        earlier = self.__dict__.get("param_groups", [])
        if "_signals" not in self.__dict__:
            self._reset(Signals())
        super().__setstate__(state)
        fixed = {name: self.defaults[name] for name in PER_OPTIMIZER} | {"grokking_signal_fns": None}
        for i, group in enumerate(self.param_groups):
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            group.update(fixed, betas=tuple(group["betas"]))
            if len(group.get("layers", ())) != len(group["params"]):  # saved by another optimizer
                kept = i < len(earlier)
                group["layers"] = earlier[i]["layers"] if kept else layers.layers_of(group, self.param_groups[:i])

    def __deepcopy__(self, memo: dict[int, Any]) -> GrokAdamW:
        """As torch's, and the signals come along. Pickle leaves them out, as most functions cannot be pickled."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied._signals = copy.deepcopy(self._signals, memo)
        return copied
