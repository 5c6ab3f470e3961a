"""The optimizer: arguments, state, and one step read from top to bottom."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from numbers import Real
from operator import attrgetter
from types import ModuleType
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing the compiler
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable

from . import accumulation, capture, gradients, layers, metrics, update, window
from .arguments import HOW_TO_RUN, PER_OPTIMIZER, check_group, check_options, check_settings, make_plain, settings
from .filter_memory import Combine, Signal, Signals, filter_memories
from .groups import check_model, grokking_groups, has_norms
from .notices import warn
from .numbers import Number, accumulator, as_float, as_number, detached, reads_are_free
from .state import WINDOW, State, check, keeping_precision, new_counts, prepare
from .update.gpu_tables import Tables
from .update.reference import Numbers, Tensors
from .window import Window
from .work import Now, Plan, Work, calls_for, choices_of, collect

__all__ = ["GrokAdamW"]

_SumOfSquares: TypeAlias = Callable[[Sequence[Tensor]], Tensor]

# Plain data in every group beside the arguments, from the start: sharded checkpoints want the same keys on both sides.
_KEPT_IN_GROUPS = {
    "layer": None,
    "train_loss": None,
    "eval_loss": None,
    "signal_state": None,
    "skipped_steps": 0,
    **accumulation.AT_REST,
}
# What older versions of this package did not know, and so is not in what they pickled.
_ADDED_LATER = {
    "capturable": False,
    "fused": None,
    "amplify_by_signal": False,
    "window_size": None,
    "window_dtype": None,
    "accumulation_steps": 1,
    "max_row_norm": 0.0,
    "max_row_change": 0.0,
    **accumulation.AT_REST,
}


@dataclass
class _Run:
    """What a running optimizer keeps beside defaults, state and groups.

    One object, as wrappers copy attributes (Lightning's does): what changes later must be inside, not replaced.
    """

    signals: Signals
    last: metrics.LastStep = metrics.LastStep()
    captured: dict[int, Tensor] = field(default_factory=dict)  # the α that a CUDA graph reads, by group
    layers_checked: bool = False
    checked: list[list[Any]] = field(default_factory=list)  # what the groups said when they were last found right
    skipped: Tensor | None = None  # counts the steps skipped on a device that were not yet read back
    names: dict[Tensor, str] = field(default_factory=dict)  # of parameters, as set_layers found them
    stepped: bool = False  # whether the last step was a whole one, or the last of its micro-batches
    plan: Plan | None = None  # how the last step was called, for the next
    graphs: list[Any] = field(default_factory=list)  # what CUDA graphs of the step read, besides tensors that users see


class GrokAdamW(Optimizer):
    r"""AdamW on gradients whose slow part is amplified, with a memory that adapts to how far generalisation lags.

    One step, for a parameter θ of layer l with gradient g at its step t:

    ```text
    c   = min(1, gradient_clipping / (N + 1e-6))          N: the norm of all gradients together
    α_t = alpha_init · exp(−κ · max(GS_t, 0))             GS_t: the combined grokking signal
    μ   = α_t μ + (1 − α_t) c g                           the slow gradient, an exponential moving average
    ĝ   = c g + λ μ
    m   = β1_l m + (1 − β1_l) ĝ,  β1_l = β1 (1 − γ)^l
    v   = β2 v + (1 − β2) ĝ²
    θ   = θ (1 − lr · wd) − lr · m̂ / (√v̂ + ε),            m̂ = m / (1 − β1_l^t),  v̂ = v / (1 − β2^t)
    ```

    With ``lamb=0, gamma=0, gradient_clipping=0`` that is ``torch.optim.AdamW``.

    Sources: Grokfast (Lee et al. 2024, arXiv:2405.20233, section 2.3) for μ and ĝ; AdamW (Loshchilov & Hutter,
    arXiv:1711.05101, algorithm 2) for m, v and θ; the published GrokAdamW description for α_t and β1_l.

    Args:
        params: parameters, ``(name, parameter)`` pairs such as ``model.named_parameters()``, or dicts of either; of
            float16, bfloat16, float32, float64 or complex dtype. With names, layers are the model's modules; without,
            every tensor is a layer of its own. A dict may set any number from ``lr`` to ``gradient_clipping``,
            ``max_row_norm``, ``max_row_change``, ``amplify_after``, ``foreach``, ``maximize``, ``capturable``, and
            ``layer``, an integer ≥ 0: the layer of all its parameters.
        lr: learning rate η ≥ 0, a float or a tensor of one element.
        betas: (β1, β2), each in [0, 1): decay of the first and second moment.
        eps: ε ≥ 0.
        weight_decay: decoupled decay wd ≥ 0, as AdamW's.
        alpha_init: α_init in [0, 1], the filter's memory while no signal shortens it: an average over about
            1 / (1 − α) steps. A float or a tensor of one element.
        lamb: λ ≥ 0, how much of the slow gradient is added; 0 is no filter.
        gamma: γ in [0, 1), how much β1 falls from layer to layer.
        grokking_signal_fns: a callable or a list of them, of no arguments or of ``(train_loss, eval_loss)``; see
            ``grokadamw.signals``. None is ``loss_gap`` of the losses given to
            ``record``; an empty list is no signal. ``grokking_signal_fn`` is an alias.
        grokking_signal_decay_rate: κ ≥ 0, how strongly the signal shortens the memory.
        gradient_clipping: largest norm ≥ 0 of all gradients together; 0 is off.
        max_row_norm: largest norm ≥ 0 of a row of a parameter with two dimensions or more, which is its slice along the
            first: a linear layer's weights of one output, an embedding's vector. After a step longer rows are shortened
            to it. 0 is off. It costs a pass over those parameters. What a wrapper has flattened, as FSDP1 does, has no
            rows. Source: the max-norm constraint of Srivastava et al. 2014, JMLR 15, section 5.1.
        max_row_change: largest distance ≥ 0 that such a row moves in a step, by the update and by decay, as a share of
            its norm before; of a row shorter than 0.1, as a share of 0.1. It comes before ``max_row_norm``. 0 is off.
            It costs a copy of those parameters while a step runs, and a pass over them: on the CPU less than the rest
            of the step where the native kernel takes them, else a few times as much, and on a GPU many small launches
            for each parameter. Below 0.01, rounding outweighs it in bfloat16. Source: the ratio to the weights' norm
            of LAMB (arXiv:1904.00962), as a limit, and by unit, as in arXiv:2102.06171, section 4.1.
        combine: how several signals become one: ``"mean"``, ``"max"``, ``"min"``, or a callable of the list of usable
            values. A callable reads values back from a GPU; the others do not.
        second_moment: ``"filtered"``, v averages ĝ²; or ``"raw"``, (c g)².
        amplify_after: steps of a parameter before λ acts on it. μ is kept from the first step on.
        amplify_by_signal: multiply λ by the combined signal, limited to [0, 1]; without a usable signal, as before the
            losses are recorded, it is 0. So the filter can wait until a model overfits. The signal acts on α, too, but
            with ``grokking_signal_decay_rate=0``. One on a GPU is read back.
        window_size: w ≥ 1: μ is the mean of a parameter's last w clipped gradients, and α does not act. It costs the
            same for any w, in memory w + 2 more tensors of the parameter's size. Until there are w, it is the mean of
            those; ``amplify_after=w - 1`` waits for them, as Grokfast does. None is the EMA. Source: arXiv:2405.20233,
            section 2.2.
        window_dtype: that those gradients are kept in, None for the parameter's, but float32 for float16; sums are
            float32 at least.
        accumulation_steps: k ≥ 1, micro-batches that make one step, each by a call of ``step``, without a buffer
            for gradients: m, v and μ collect a k-th of each, and parameters change at every k-th. m and μ are then
            what the joined batch would give, v is the mean of the micro-gradients' squares; so
            ``second_moment="raw"`` is required, and steps are up to √k times shorter. Each micro-gradient is clipped
            on its own; with ``nonfinite="skip"`` one that is not finite counts as 0. Signals are heard, and λ, γ and
            betas taken, at the first micro-batch. ``Accumulate`` has a buffer, and is exact. Source:
            Su Jianlin, https://kexue.fm/archives/8634.
        nonfinite: what to do with a step whose gradients hold NaN or infinity, or whose Σg² overflows float64.
            ``"skip"``: write nothing, and count it (``metrics()["skipped_steps"]``). ``"raise"``: write nothing, and
            raise; this reads the norm back from a GPU. ``"propagate"``: take it, as AdamW does. The first two read the
            gradients once more, unless clipping does so anyway.
        compat: ``"0.1.2"`` repeats runs of that release, in float32 and float64 to rounding: bias correction by β1
            instead of β1_l, ε added before v's correction, clipping tensor by tensor, layers counted over the tensors
            that have a gradient, signals evaluated for each group, no limit to α, state in the parameter's dtype, no
            rule for NaN.
        foreach: None for the fastest implementation that can take a tensor, see ``implementation``; True for
            torch's operations on lists of tensors; False for one tensor at a time, with the least scratch memory.
        maximize: climb instead of descend.
        capturable: let CUDA graphs capture the step; all parameters are on a GPU then. See ``update_signals``.
        differentiable: let autograd pass through the step.
        fused: None as with ``foreach``; False for foreach. True is None, for parameters on the CPU and on CUDA
            or ROCm GPUs, and lets GradScaler leave the loss scale to the optimizer, as torch's fused optimizers do.

    Raises:
        TypeError, ValueError: an argument is not what is written above. The message names it and its value.

    ``optimizer.state[p]`` holds ``step`` (0-d float32), ``exp_avg`` m, ``exp_avg_sq`` v, and ``grok_ema`` μ once λ was
    above 0: in the parameter's shape, and in its dtype, but float32 at least. With a window also ``grok_ring``
    (w, \*shape), ``grok_ring_sum``, ``grok_ring_lap`` (shape) and ``grok_ring_count`` (0-d int64); with
    accumulation_steps above 1 ``micro_step``, the gradients that it has had since its last step.
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
        max_row_norm: float = 0.0,
        max_row_change: float = 0.0,
        combine: Combine = "mean",
        second_moment: str = "filtered",
        amplify_after: int = 0,
        amplify_by_signal: bool = False,
        window_size: int | None = None,
        window_dtype: torch.dtype | None = None,
        accumulation_steps: int = 1,
        nonfinite: str = "skip",
        compat: str | None = None,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
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
            "max_row_norm": max_row_norm,
            "max_row_change": max_row_change,
            "second_moment": second_moment,
            "amplify_after": amplify_after,
            "amplify_by_signal": amplify_by_signal,
            "window_size": window_size,
            "window_dtype": window_dtype,
            "accumulation_steps": accumulation_steps,
            "nonfinite": nonfinite,
            "compat": compat,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            **_KEPT_IN_GROUPS,
        }
        check_options(defaults)
        signals.check_amplifies(amplify_by_signal)
        check_group(defaults, defaults)
        make_plain(defaults)
        self._run = _Run(signals)
        super().__init__(params, defaults)
        self._say_whether_it_unscales()
        signals.bind(self)

    @classmethod
    def for_grokking(
        cls, model: nn.Module, lr: float | Tensor = 3e-3, weight_decay: float = 3.0, **options: Any
    ) -> GrokAdamW:
        """With what did best on small models that memorise first, and that begin large, as embeddings do in torch.

        α 0.8, γ 0.3, betas (0.9, 0.98); lr and weight decay are high on purpose. Biases and norms do not decay.
        Embeddings, which torch makes √width long, become no longer than 1 (``max_row_norm``) in the first step. In a
        model with norm layers, in which weights turn rather than grow, rows move by no more than 0.015 of their norm a
        step (``max_row_change``). Evidence: benchmarks/results/GROKKING_REPORT.md. Not for models that are trained
        already, whose embeddings it would shorten.

        Args:
            model: whose parameters that require gradients are optimized, under their names and in its layers, in up to
                three groups: weights; embeddings, which are what ``nn.Embedding`` and ``nn.EmbeddingBag`` hold; and
                what has less than two dimensions. Where nothing has two, as in what FSDP1 flattened, all decay. Norm
                layers are torch's, and those of classes with the word "Norm" in their name.
            lr, weight_decay, options: as the constructor's; what is given wins, ``max_row_norm`` for all rows.

        Raises:
            TypeError: model is no module.
        """
        groups = grokking_groups(model, options.get("max_row_norm", 1.0))
        if isinstance(lr, Tensor):
            for group in groups:
                group["lr"] = lr.clone()  # what a scheduler writes into one group's is that group's
        preset: dict[str, Any] = {"betas": (0.9, 0.98), "alpha_init": 0.8, "gamma": 0.3}
        preset["max_row_change"] = 0.015 if has_norms(model) else 0.0
        optimizer = cls(groups, lr=lr, weight_decay=weight_decay, **preset | options)
        optimizer.set_layers(model)  # in the model's order, and not in that of the groups
        optimizer._run.layers_checked = "gamma" not in options  # a low β1 is meant
        return optimizer

    def _say_whether_it_unscales(self) -> None:
        """By GradScaler's word for it. With micro-batches it does, so that `stepped` hears of one that is none."""
        if self.defaults["fused"] or self.defaults["accumulation_steps"] > 1:
            self._step_supports_amp_scaling = True

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
            RuntimeError: a gradient is sparse, or not finite with ``nonfinite="raise"``; a parameter overlaps itself.
            TypeError, ValueError: what was set by hand in a group is not allowed. Nothing was written in any case.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls, tables, averages, limited = self._calls(torch.compiler.is_compiling())
        before = [update.rows.before(rows) for rows in limited]
        for each in averages:  # row 6 of moving averages
            update.average(*each)
        update.steps(calls, tables)  # rows 6 to 10, and all that torch.compile sees
        for rows, old in zip(limited, before, strict=True):  # row 11
            update.rows.limit(rows, old)
        return loss

    @_disable_dynamo  # so that what changes from step to step comes as tensors, and no value becomes a guard
    def _calls(
        self, compiling: bool
    ) -> tuple[
        list[tuple[ModuleType, Tensors, Numbers]],
        Any,
        list[tuple[list[Window], Tensors, Numbers]],
        list[update.rows.Rows],
    ]:
        """All of a step but its writing: what is to be called with which tensors and numbers, its state being there.

        And what the GPU's implementation keeps of them, the windows that are to be filled first, and the parameters
        whose rows are limited last.
        """
        capturing = capture.is_capturing(self)
        self._run.stepped = False
        found_inf = getattr(self, "found_inf", None)  # GradScaler's, where `_step_supports_amp_scaling` is set
        if not isinstance(found_inf, Tensor):  # it is 0 where there are no gradients
            found_inf = None
        cycle = accumulation.Cycle(self.defaults["accumulation_steps"], self.param_groups, self.state)
        if found_inf is not None and (self._may_read(found_inf.device) or cycle.of > 1):
            if found_inf.item():
                return [], None, [], []  # as if this step had not been called
            found_inf = None
        self._check_settings()
        plan, groups = self._run.plan, cycle.groups
        now = None if plan is None else plan.now(groups, self.state)
        if now is not None and not (cycle.fits(call.tensors.params for call in now.calls) and self._has_windows(now)):
            now = None
        work = self._collected(groups, cycle.begun) if now is None else now.work
        capture.check_devices(work)
        if capturing:
            capture.check_state(work, self.state, bool(self._run.last.alphas), self._nonfinite)
        sum_of_squares = update.sum_of_squares(self.defaults, compiling)
        if self._is_for_state_alone(work, sum_of_squares):
            self._make_state(work, compiling)
            return [], None, [], []
        self._check_layers()
        tables = None if plan is None or now is None or compiling else plan.tables(capturing, self._is_capturable)
        if capturing and tables is not None:
            self._run.graphs.append(tables)
        measured = self._measured(work, now, sum_of_squares, found_inf, tables, capturing)
        if not capturing and cycle.is_first:
            self.update_signals()  # rows 4 and 5
        amplification = self._amplification() if cycle.is_first else cycle.amplification
        if cycle.of > 1:
            if cycle.is_first:
                cycle.begin(self._run.last.alphas, amplification)
            self._run.last = self._run.last._replace(alphas=cycle.alphas)
        self._run.last = self._run.last._replace(norms=detached(measured.norms), clips=detached(measured.clips))
        if measured.finite is False:
            self._count_skipped(1)
            if cycle.of == 1:
                return [], None, [], []
        if plan is not None and now is not None and self._run.signals.are_others:  # which may have changed something
            now = plan.again(now, groups, self.state)
        if now is None:
            tables = None
            self._make_state(work, compiling)
            calls_to_make = calls_for(work, self.state)
            plan = Plan(groups, work, calls_to_make) if cycle.is_regular else None
            self._run.plan = plan if plan and plan.lasts else None
        else:
            calls_to_make = now.calls
        memory_is_all = update.memory_is_all(compiling)
        calls, averages = [], []
        for i, call in enumerate(calls_to_make):
            w = work[call.work_index]
            alpha = self._run.last.alphas[w.group_index]
            beta1 = layers.beta1s(w.group, call.layers) if now is None or plan is None else plan.beta1s(i, w.group)
            numbers = self._numbers(call.tensors, w, beta1, alpha, measured.factors[call.work_index], measured.finite)
            if amplification != 1:
                numbers = numbers._replace(lamb=numbers.lamb * amplification)
            if cycle.of > 1:
                numbers = numbers._replace(micro_step=cycle.micro_step(w.params[call.places[0]]))
            is_windowed = self.defaults["window_size"] is not None and call.tensors.grok_emas is not None
            if is_windowed:
                numbers = numbers._replace(alpha=1.0)
            if compiling:
                numbers = capture.for_compiler(call.tensors, numbers)
            module = call.choice.module
            if not (memory_is_all or module is update.reference) or (module is update.gpu and capturing and not tables):
                module = update.foreach
            calls.append((module, call.tensors, numbers))
            if is_windowed:
                windows = [window.of(self.state[w.params[place]], "grok_") for place in call.places]
                averages.append((windows, call.tensors, numbers))
        self._run.stepped = cycle.end(param for w in work for param in w.params)
        # of what is not finite in the last micro-batch the others are a step all the same
        finite = measured.finite if cycle.of == 1 else True
        limited = self._limited(work, finite, memory_is_all) if self._run.stepped else []
        return calls, tables, averages, limited

    def _limited(self, work: list[Work], finite: bool | Tensor, memory_is_all: bool) -> list[update.rows.Rows]:
        """Row 11: the parameters that have rows, with what limits these."""
        limits = ((w, float(w.group["max_row_change"]), float(w.group["max_row_norm"])) for w in work)
        return [
            update.rows.Rows(
                [p for p in w.params if p.dim() > 1],
                change,
                norm,
                finite,
                not memory_is_all or update.is_by_torch(w.group),
            )
            for w, change, norm in limits
            if change or norm
        ]

    def _amplification(self) -> float:
        """What the signal multiplies λ by."""
        if not self.defaults["amplify_by_signal"]:
            return 1.0
        signal = self._run.last.signal
        value = 0.0 if signal is None else as_float(signal)
        return min(max(value, 0.0), 1.0) if value == value else 0.0

    def _has_windows(self, now: Now) -> bool:
        """Whether there is a window wherever there is a slow gradient, as there is to be."""
        if self.defaults["window_size"] is None:
            return True
        states = (self.state[param] for w in now.work for param in w.params)
        return all(WINDOW[0] in state for state in states if "grok_ema" in state)

    def _collected(self, groups: list[dict[str, Any]], begun: Container[Tensor]) -> list[Work]:
        """Row 1: what there is to do, looked through for what a step cannot go on with."""
        work = collect(groups, self._published, self._run.names, begun)
        for w in work:
            for param in w.params:
                check(self.state.get(param, {}), param)
                if w.group["fused"] and not update.is_fused_on(param.device):
                    raise RuntimeError(
                        "`fused=True` requires all the params to be floating point Tensors of supported devices: "
                        f"{update.FUSED_ON}, and param_groups[{w.group_index}] has one on {param.device}: leave fused "
                        "out"
                    )
        return work

    @_disable_dynamo
    def update_signals(self) -> None:
        """Evaluate the signals, and set the filter memory α from them.

        ``step`` does so itself, once the gradients are there. The replay of a CUDA graph does not: call this
        between replays, at the steps whose signals are to be heard; α stays as it is in between. With several
        processes, call it on all of them.
        """
        signal, alphas = filter_memories(self._run.signals, self.param_groups, self._published)
        if self._run.skipped is None:
            self._run.skipped = capture.counter(self.param_groups)
        pairs = zip(self.param_groups, alphas, strict=True)
        alphas = [capture.in_place(self._run.captured, i, group, alpha) for i, (group, alpha) in enumerate(pairs)]
        self._run.last = self._run.last._replace(signal=signal, alphas=alphas)

    def _is_for_state_alone(self, work: list[Work], sum_of_squares: _SumOfSquares) -> bool:
        """Whether torch.distributed.checkpoint takes this step, to have the state made that it loads into.

        There is no state yet, the learning rate is 0, and so are the gradients. A warm-up's first step has gradients.
        """
        if self.state or not work or any(as_float(group["lr"]) != 0 for group in self.param_groups):
            return False
        return as_float(gradients.global_norm([grad for w in work for grad in w.grads], sum_of_squares, None)) == 0

    def _make_state(self, work: list[Work], compiling: bool) -> None:
        counts = {} if compiling else new_counts(self.state, [param for w in work for param in w.params])
        for w in work:
            with_mu = float(w.group["lamb"]) > 0
            for param in w.params:
                prepare(self.state[param], param, self.defaults, with_mu, counts.get(param))

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        grok_emas: list[Tensor | None],
        steps: list[Tensor],
    ) -> bool:
        """As that of torch's optimizers: make the state of a group's parameters that have a gradient, and list it all.

        Returns:
            Whether one of the parameters is complex.
        """
        with_gradient = [param for param in group["params"] if param.grad is not None]
        for param in with_gradient:
            state = self.state[param]
            prepare(state, param, self.defaults, with_slow_gradient=float(group["lamb"]) > 0)
            params.append(param)
            grads.append(param.grad)
            exp_avgs.append(state["exp_avg"])
            exp_avg_sqs.append(state["exp_avg_sq"])
            grok_emas.append(state.get("grok_ema"))
            steps.append(state["step"])
        return any(map(torch.is_complex, with_gradient))

    def free_slow_gradient(self) -> None:
        """Drop the slow gradients μ, and the memory that they take. Where λ is not 0, the next step starts them at 0.

        With ``lamb`` set to 0 the filter is off, but μ is kept up to date so that it can be switched on again.
        """
        for _, state in self._states():
            for name in ("grok_ema", *WINDOW):
                state.pop(name, None)

    def _states(self) -> Iterator[tuple[Tensor, State]]:
        """The parameters that have a state, with it; `self.state` may hold what hooks put there, too."""
        for param in chain.from_iterable(group["params"] for group in self.param_groups):
            if param in self.state:
                yield param, self.state[param]

    def _check_settings(self) -> None:
        """Refuse what was set wrong by hand in a group since the last step."""
        now = [settings(group) for group in self.param_groups]
        if now != self._run.checked:
            for group in self.param_groups:
                check_settings(group, self.defaults)
            self._run.checked = now

    def _check_layers(self) -> None:
        """Warn of doubtful layers: at the first step, when set_layers has had its chance."""
        if not self._run.layers_checked and not self._published:
            for sentence in layers.warnings_for(self.param_groups, self._run.names):
                warn(sentence, UserWarning)
        self._run.layers_checked = True

    def _measured(
        self,
        work: list[Work],
        now: Now | None,
        sum_of_squares: _SumOfSquares,
        found_inf: Tensor | None,
        tables: Tables | None,
        capturing: bool,
    ) -> gradients.Measured:
        """Rows 2 and 3, the quickest way there is."""
        plan, nonfinite = self._run.plan if now is not None else None, self._nonfinite
        lists, limits = [w.grads for w in work], [float(w.group["gradient_clipping"]) for w in work]
        scale = getattr(self, "grad_scale", None)  # GradScaler's, where it has left that to the optimizer
        if scale is None and found_inf is None and not gradients.norm_is_wanted(limits, nonfinite):
            return gradients.Measured([None] * len(work), [1.0] * len(work), [1.0] * len(work), True, None)
        grads = chain.from_iterable(lists)
        devices = plan.devices if plan else list(dict.fromkeys(map(attrgetter("device"), grads)))
        home = next((device for device in devices if not self._on_host(device)), None)
        fastest = sum_of_squares is update.fastest_sum_of_squares and not self._published
        without_tables = capturing and tables is None  # and what a graph reads must not come and go
        if fastest and home is not None and len(devices) == 1 and nonfinite != "raise" and not without_tables:
            known = now if plan and plan.can_be_judged else None
            measured = gradients.judge(
                lists,
                limits,
                scale=scale,
                found_inf=found_inf,
                nonfinite=nonfinite,
                counter=partial(self._counter, capturing=capturing),
                at=known and known.gradients,
                tables=tables if known else None,
            )
            if measured is not None:
                return measured
        measured = gradients.measure(
            lists,
            limits,
            sum_of_squares=update.foreach.sum_of_squares if fastest and capturing else sum_of_squares,
            known=partial(plan.sum_of_squares, now) if fastest and plan and now else None,
            scale=scale,
            found_inf=found_inf,
            nonfinite=nonfinite,
            apart=self._published,
            home=home,
        )
        if nonfinite == "raise" and not measured.finite:
            pairs = chain.from_iterable(zip(w.params, w.grads, strict=True) for w in work)
            names = [self._name(param) for param, grad in pairs if not grad.isfinite().all()]
            raise RuntimeError(
                f"the gradients are not finite: {', '.join(names) or 'their sum of squares overflows'}. Nothing was "
                'written; nonfinite="skip" goes on without such a step'
            )
        if measured.skipped is not None:
            counter = self._counter(measured.skipped.device, capturing)
            counter.add_(measured.skipped.to(counter.device))  # in place, for CUDA graphs
        return measured

    def _counter(self, device: torch.device, capturing: bool) -> Tensor:
        """Of the steps that are skipped on a device; where a graph is to go on with it, in its place."""
        if self._run.skipped is None:
            self._run.skipped = torch.zeros((), dtype=torch.int64, device=device)
        elif self._run.skipped.device != device and not capturing and not self._is_capturable:
            self._run.skipped = self._run.skipped.to(device)
        return self._run.skipped

    @property
    def _is_capturable(self) -> bool:
        return any(group["capturable"] for group in self.param_groups)

    def _numbers(
        self, tensors: Tensors, w: Work, beta1: list[float], alpha: Number, clip: Number, finite: bool | Tensor
    ) -> Numbers:
        group, device = w.group, tensors.params[0].device
        return Numbers(
            beta1=beta1,
            bias_beta1=[float(group["betas"][0])] * len(beta1) if self._published else beta1,
            beta2=float(group["betas"][1]),
            lr=self._number(group["lr"], device),
            eps=float(group["eps"]),
            eps_before_correction=self._published,
            weight_decay=float(group["weight_decay"]),
            alpha=self._number(alpha, device),
            lamb=float(group["lamb"]),
            amplify_after=int(group["amplify_after"]),
            clip=self._number(clip, device),
            raw_second_moment=self.defaults["second_moment"] == "raw",
            maximize=group["maximize"],
            finite=None if finite is True else torch.as_tensor(finite, device=device),
        )

    def _number(self, value: Number, device: torch.device) -> Number:
        """A number for parameters on this device: a tensor is moved there, or read where that is free."""
        if not isinstance(value, Tensor):
            return float(value)
        if self._on_host(value.device) or self._on_host(device):
            return value.item()
        return value.reshape(()).to(device, accumulator(device), non_blocking=True)

    def _may_read(self, device: torch.device) -> bool:
        """Whether the host may read from this device in a step."""
        return self._on_host(device) or self._nonfinite == "raise"

    def _on_host(self, device: torch.device) -> bool:
        """Whether numbers for parameters on this device are Python's: reading is free, and loses no derivative."""
        return reads_are_free(device) and not self.defaults["differentiable"]

    # Options of the whole optimizer live in `defaults`, which every way of copying one keeps.

    @property
    def _published(self) -> bool:
        return self.defaults["compat"] is not None

    @property
    def _nonfinite(self) -> Any:
        return "propagate" if self._published else self.defaults["nonfinite"]

    def _name(self, param: Tensor) -> str:
        for i, group in enumerate(self.param_groups):
            for name, p in zip(layers.names(group, i, self._run.names), group["params"], strict=True):
                if p is param:
                    return name
        raise KeyError(param)

    @property
    def stepped(self) -> bool:
        """Whether the last ``step`` was the last micro-batch of ``accumulation_steps``: a scheduler's turn."""
        return self._run.stepped

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
        old = self._run.signals
        signals = Signals(fns, old.combine if combine is None else combine)
        signals.check_amplifies(self.defaults["amplify_by_signal"])
        signals.bind(self)
        signals.claim(old.unclaimed)
        self._run.signals = signals

    def set_layers(self, model: nn.Module) -> None:
        """Take layers from a model: its modules in their order, for all groups but those that were given ``layer``.

        Raises:
            TypeError, ValueError: that is no module, or it lacks a parameter of the optimizer.
        """
        check_model(model)
        told = {param for group in self.param_groups if group["layer"] is not None for param in group["params"]}
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p not in told}
        found = layers.layers_in(names)
        params = [param for group in self.param_groups for param in group["params"]]
        for param in params:
            if param not in found and param not in told:
                raise ValueError(
                    f"model: this {type(model).__name__} has no {self._name(param)}, of shape {tuple(param.shape)}: "
                    "give the model that is optimized; parameters beside it go in a group that says layer="
                )
        for group in self.param_groups:
            if group["layer"] is None:
                group["layers"] = [found[param] for param in group["params"]]
        self._run.names = {param: layers.unwrapped(names[param]) for param in params if param in names}
        self._run.layers_checked = False

    def implementation(self) -> str:
        """Which implementation updates the parameters, and why: a line for each, ``"name: reason"``.

        ``gpu`` is one Triton launch for all tensors of a kind; ``cpu`` is the native kernel, one pass through memory;
        ``blocks`` takes its place where it was not built; ``foreach`` are torch's operations on lists of tensors;
        ``reference`` is one tensor at a time. A parameter without a gradient or state counts as if they were like
        itself. Parameters that share memory, and everything under torch.compile or FakeTensorMode, go to foreach in any
        case.
        """
        plan = self._run.plan
        now = None if plan is None else plan.now(self.param_groups, self.state)
        choices = choices_of(self.param_groups, self.state, None if now is None else now.calls)
        names = {choice: choice.module.__name__.rpartition(".")[2] for choice in choices}
        if len(choices) == 1:
            return "".join(f"{names[choice]}: {choice.reason}" for choice in choices)
        return "\n".join(f"{names[c]} for {count} parameters: {c.reason}" for c, count in choices.items())

    def layer_table(self) -> list[layers.Layer]:
        """What the layers came out as, in order: ``layer``, the ``names`` of its parameters, ``beta1`` (its β1_l)."""
        return layers.table(self.param_groups, self._run.names)

    def metrics(self) -> dict[str, float]:
        """What the last step did, or ``update_signals`` since, as plain floats. Reading them waits for the device.

        ``step`` (steps taken, the most of any parameter), ``signal`` (GS), ``signal/<name>`` (each function's last
        usable value), ``alpha`` (α, which a window does without), ``grad_norm`` (N, before clipping),
        ``clip_coefficient`` (c), ``skipped_steps``, ``signal_failures``, ``beta1_min`` and ``beta1_max`` (of β1_l).
        Where groups differ, ``alpha`` and ``clip_coefficient`` are the smallest. NaN stands for what is not known:
        before the first step, without a usable signal, or a norm that nothing asked for.
        """
        self._settle()
        run = self._run
        states = (state for _, state in self._states())
        return metrics.as_floats(run.last, self.param_groups, states, run.signals, self._published)

    def _count_skipped(self, steps: int) -> None:
        total = self.param_groups[0]["skipped_steps"] + steps
        for group in self.param_groups:
            group["skipped_steps"] = total
        if total == steps:
            what = "a step was skipped: its gradients hold NaN or infinity, and nothing was written"
            if self.defaults["accumulation_steps"] > 1:
                what = "the gradients of a micro-batch hold NaN or infinity, and it counts as 0"
            warn(
                f"{what}. metrics()['skipped_steps'] counts such steps; nonfinite=\"raise\" stops at the first",
                RuntimeWarning,
            )

    def _settle(self) -> None:
        """Read back what was counted on a device."""
        skipped = self._run.skipped
        if skipped is not None and (steps := int(skipped)) > 0:
            skipped.zero_()
            self._count_skipped(steps)
        self._run.signals.settle()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. The group may set what the constructor lists; its layers follow those that are there.

        Raises:
            TypeError, ValueError: a value is not allowed, or holds for the whole optimizer. Nothing was added then.
        """
        if isinstance(param_group, dict):
            check_group({**self.defaults, **param_group}, self.defaults)
            # torch fills in the defaults, and the caller may use it again; what AdamW's groups hold beside ours goes
            param_group = {k: v for k, v in param_group.items() if k not in ("amsgrad", "decoupled_weight_decay")}
        super().add_param_group(param_group)
        *earlier, group = self.param_groups
        make_plain(group)
        group["skipped_steps"] = self.param_groups[0]["skipped_steps"]
        accumulation.join(group, self.param_groups[0])
        given = group.get("layers")
        if given is None or len(given) != len(group["params"]) or group["layer"] is not None:
            group["layers"] = layers.layers_of(group, earlier)
        group["layers"] = list(group["layers"])
        self._run.layers_checked = False

    def state_dict(self) -> dict[str, Any]:
        """As torch's: tensors and plain data alone, for ``torch.load(weights_only=True)``.

        Signal functions are left out; what those with a ``state_dict`` of their own remember is kept.
        """
        self._before_saving()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every state tensor keeps its precision where its parameter has less.

        Parameters are found by name where both sides have the same names, else by order. Signals, the options of the
        whole optimizer, ``foreach``, ``fused`` and ``capturable`` stay as they were constructed.

        Args:
            state_dict: of a GrokAdamW, release 0.1.2's too, or of a ``torch.optim.AdamW`` or ``Adam``. What that
                does not know stays as it was, and μ starts at 0. See ``grokadamw.checkpoints``.

        Raises:
            ValueError: groups, parameters or shapes are not those that were saved, or it cannot be gone on from.
                Nothing was loaded then.
        """
        with keeping_precision(self, self._published) as doubts:
            super().load_state_dict(state_dict)
        for sentence in doubts:
            warn(sentence, UserWarning)
        for group, param in ((group, group["params"][0]) for group in self.param_groups if group["params"]):
            for name in ("train_loss", "eval_loss"):  # as record() had them, so that α is computed where it was
                if isinstance(group[name], Tensor):
                    group[name] = as_number(group[name].to(param.device), name)
        if self._run.skipped is not None:
            self._run.skipped.zero_()
        self._run.graphs.clear()  # which no longer hold
        self._run.last = metrics.LastStep()
        self._run.signals.values.clear()
        self._run.signals.load(self.param_groups[0]["signal_state"])

    def _before_saving(self) -> None:
        self._settle()
        for group in self.param_groups:
            for name, value in group.items():
                if isinstance(value, Real) and type(value).__module__ != "builtins":  # NumPy's, by a scheduler
                    group[name] = float(value)
            for name in ("train_loss", "eval_loss"):
                if group[name] is not None:  # set by hand, it may have a graph, which cannot be copied
                    group[name] = as_number(group[name], name)
            group["cycle"] = tuple(map(as_float, group["cycle"]))
        for group in self.param_groups[:1]:
            group["signal_state"] = self._run.signals.state()

    def __getstate__(self) -> dict[str, Any]:
        self._before_saving()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "second_moment" not in state.get("defaults", {"second_moment": None}):
            raise ValueError(
                "this is a whole optimizer of grokadamw 0.1.2, pickled, and cannot be read: under that release, save "
                "its state_dict(), which load_state_dict goes on from"
            )
        earlier = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        for name, value in _ADDED_LATER.items():
            self.defaults.setdefault(name, value)
        self._say_whether_it_unscales()
        fixed = {name: self.defaults[name] for name in PER_OPTIMIZER} | {"grokking_signal_fns": None}
        for i, group in enumerate(self.param_groups):
            # what another optimizer's checkpoint does not say stays as it was
            kept = self.defaults | (earlier[i] if i < len(earlier) else {})
            kept |= {"signal_state": None, **accumulation.AT_REST}
            for name, value in kept.items():
                if name != "param_names":
                    group.setdefault(name, value)
            if i < len(earlier):
                group.update({name: kept[name] for name in HOW_TO_RUN})
            group.update(fixed, betas=tuple(group["betas"]), cycle=tuple(group["cycle"]))
            if len(group.get("layers", ())) != len(group["params"]):
                group["layers"] = layers.layers_of(group, self.param_groups[:i])
        if "_run" not in self.__dict__:  # unpickled, or a copy
            self._run = _Run(Signals())
            for group in self.param_groups[:1]:
                self._run.signals.load(group["signal_state"])

    def __deepcopy__(self, memo: dict[int, Any]) -> GrokAdamW:
        """As torch's, and the signals come along. Pickle leaves them out, as most functions cannot be pickled."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        copied._run.signals = copy.deepcopy(self._run.signals, memo)
        copied._run.names = copy.deepcopy(self._run.names, memo)
        # what a CUDA graph of the copy will read and write is its own
        copied._run.captured, copied._run.skipped = copy.deepcopy((self._run.captured, self._run.skipped), memo)
        alphas = [copied._run.captured.get(i, alpha) for i, alpha in enumerate(self._run.last.alphas)]
        copied._run.last = copy.deepcopy(self._run.last, memo)._replace(alphas=alphas)
        copied._run.layers_checked, copied._run.stepped = self._run.layers_checked, self._run.stepped
        return copied
