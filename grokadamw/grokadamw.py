"""The GrokAdamW class, with its arguments and public methods. The stages of a step are in `step/stages.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing the compiler
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable

from . import layers, zero
from ._base import Base
from ._hints import check_params, with_hints, with_model
from ._numbers import as_number, as_share
from .backends.gpu_tables import Tables
from .backends.types import Calls
from .distributed import check_shard_group, overflow_of_all
from .groups import check_model, grokking_groups
from .options import check_group
from .param_groups import RECORDED, group_defaults
from .signals import memorisation
from .state.slots import WINDOW, states_of
from .step import capture, stages
from .step.alpha import Combine, Signal, Signals
from .step.batches import Given
from .step.run import Preset, Run

__all__ = ["GrokAdamW"]


class GrokAdamW(Base):
    r"""A replacement for AdamW that amplifies the part of the gradients that stays the same over many steps.

    Grokfast's filter finds that part. Its memory adapts to how far generalisation lags behind training. One step, for a
    parameter θ of layer l with gradient g at its step t:

    ```text
    c   = min(1, gradient_clipping / (N + 1e-6))          N: the norm of all gradients together
    α_t = alpha_init · exp(−κ · max(s_t, 0))              s_t: the combined grokking signal
    μ   = α_t μ + (1 − α_t) c g                           the slow gradient
    ĝ   = c g + λ μ
    m   = β1_l m + (1 − β1_l) ĝ,  β1_l = β1 (1 − γ)^l
    v   = β2 v + (1 − β2) ĝ²
    θ   = θ (1 − lr · wd) − lr · m̂ / (√v̂ + ε)
    m̂   = m / (1 − β1_l^t),  v̂ = v / (1 − β2^t)
    ```

    With ``lamb=0, gamma=0, gradient_clipping=0`` this is ``torch.optim.AdamW``.

    Sources: Grokfast (Lee et al. 2024, arXiv:2405.20233, section 2.3) for μ and ĝ; AdamW (Loshchilov & Hutter,
    arXiv:1711.05101, algorithm 2) for m, v and θ; the published GrokAdamW description for α_t and β1_l.

    Args: Parameters, and AdamW's numbers
        params: parameters, ``(name, parameter)`` pairs such as ``model.named_parameters()``, or dicts of either, with
            dtype float16, bfloat16, float32, float64 or complex. With names, the layers are the model's modules;
            without, every tensor is its own layer. A dict may set options for its group: the arguments from ``lr`` to
            ``gradient_clipping`` except the signals; ``max_row_norm``, ``max_row_change``, ``amplify_after``,
            ``signal_boost``, ``decay_boost``, ``foreach``, ``fused``, ``maximize`` and ``capturable``; and ``layer``,
            an integer ≥ 0, which is then the layer of all parameters in the group.
        lr: learning rate η ≥ 0, a float or a tensor of one element.
        betas: (β1, β2), each in [0, 1): decay rates of the first and second moment.
        eps: ε ≥ 0, added to the denominator of the update.
        weight_decay: decoupled weight decay wd ≥ 0, as in AdamW.

    Args: The filter, and its signals
        alpha_init: α_init in [0, 1], the filter's memory while no signal shortens it: μ averages over about
            1 / (1 − α) steps. A float or a tensor of one element.
        lamb: λ ≥ 0, the factor of the slow gradient that is added; 0 turns the filter off.
        gamma: γ in [0, 1), the fraction by which β1 falls from one layer to the next.
        grokking_signal_fns: a callable, or a list of callables, that take no arguments or ``(train_loss, eval_loss)``;
            see ``grokadamw.signals``. None: ``loss_gap`` of the losses given to ``record``. An empty list: no signal.
            ``grokking_signal_fn`` is an alias.
        grokking_signal_decay_rate: κ ≥ 0, how strongly the signal shortens the memory.
        combine: how to combine several signals into one: ``"mean"``, ``"max"``, ``"min"``, or a callable that takes the
            list of usable values. Only with a callable are values on a GPU read back to the host.
        second_moment: ``"filtered"``: v averages ĝ². ``"raw"``: v averages (c g)².
        amplify_after: number of steps of a parameter before λ acts on it. μ is updated from the first step on.
        signal_boost: b ≥ 0. A step multiplies lr and ``max_row_change`` by 1 + b · s_t, with the combined signal s_t
            clamped to [0, 1]; 0 is off. Without a usable signal the factor is 1. ``metrics()["boost"]`` is the last
            factor. Schedulers and ``param_groups`` never see it.
        decay_boost: d ≥ 0. A step multiplies ``weight_decay`` by 1 + d · s_t in the same way. Weights then decay by
            this weight decay times the boosted lr. ``metrics()["decay_boost"]`` is the last factor.
        amplify_by_signal: multiply λ by the combined signal, clamped to [0, 1], so that the filter has no effect until
            the model overfits. Without a usable signal λ is 0. The signal still changes α, unless
            ``grokking_signal_decay_rate=0``. A signal on a GPU is read back.
        window_size: w ≥ 1. μ is the mean of a parameter's last w clipped gradients (of all of them until there are w),
            and α has no effect. A step takes the same time for any w; w + 2 more tensors of the parameter's size are
            kept. None: μ is the EMA above. ``amplify_after=w - 1`` waits for a full window, as Grokfast does. Source:
            arXiv:2405.20233, 2.2.
        window_dtype: dtype of the gradients in the window. None: the parameter's, or float32 for float16.

    Args: Limits
        gradient_clipping: largest norm ≥ 0 that all gradients together may have; 0 is off.
        max_row_norm: largest norm ≥ 0 that a row may have after a step; 0 is off. A row is a slice along the first
            dimension of a parameter with two or more dimensions: the weights of one output of a linear layer, or one
            embedding vector. Flattened parameters, as in FSDP1, have no rows. Source: Srivastava et al. 2014, JMLR 15,
            section 5.1.
        max_row_change: largest distance ≥ 0 that a row may move in a step (update and weight decay together), as a
            fraction of the row's norm before the step, or of 0.1 if that is more; 0 is off. It is applied before
            ``max_row_norm``. In bfloat16, rounding outweighs limits below 0.01. Source: LAMB's trust ratio
            (arXiv:1904.00962), used as a limit, and for each output as in arXiv:2102.06171, section 4.1.
        nonfinite: how to handle a step whose gradients contain NaN or infinity, or whose Σg² overflows float64.
            ``"skip"``: nothing is written, and ``metrics()["skipped_steps"]`` counts the step. ``"raise"``: nothing is
            written, and an error is raised; this reads the norm back from a GPU. ``"propagate"``: the step is taken, as
            in AdamW. Without clipping, the first two read the gradients one more time.

    Args: How a step runs
        accumulation_steps: k ≥ 1, micro-batches per step; call ``step`` after each. No buffer is needed: m, v and μ
            take in 1/k of each micro-batch's contribution, and parameters change at every k-th call. m and μ equal
            those of one large batch; v averages the squares of the micro-gradients, so steps are up to √k times
            shorter, and ``second_moment="raw"`` is required. Each micro-gradient is clipped on its own; with
            ``nonfinite="skip"`` a non-finite one counts as 0. The first micro-batch fixes signals, λ, γ and betas.
            ``Accumulate`` is exact, but needs a buffer. Source: Su Jianlin, https://kexue.fm/archives/8634.
        state_dtype: the format of m, v and μ. ``"float32"``: 12 bytes per parameter. ``"bfloat16"``: 6. ``"int8"``:
            3.2, as 8-bit codes with a scale per 64 elements of a row. A dict sets some of them, and the others are
            float32: ``{"grok_ema": "int8", "exp_avg": "bfloat16"}``. A step always computes in float32. Full precision
            is kept for parameters with fewer than 4,096 elements, for float64 and complex ones and, with int8, for rows
            shorter than 32.
        master_weight_bits: how many bits of a bfloat16 or float16 parameter a step works with: 32, as if it were
            float32; or 24, rounded stochastically. The bits that the parameter's dtype cannot hold are kept in the
            state ``param_low``, 2 bytes or 1 per element. None: no more bits than the dtype's; a bfloat16 weight of 1
            then moves by at least 0.004, or not at all.
        rounding: how a bfloat16 or float16 parameter is rounded to its dtype without master_weight_bits: ``"nearest"``,
            or ``"stochastic"``, which preserves small changes on average.
        shard_group: the process group over whose ranks all plain (non-DTensor) parameters are sharded, as with FSDP1,
            pipeline stages and DeepSpeed's ZeRO; for example ``torch.distributed.group.WORLD``, which is None before
            ``init_process_group``. N and the check for NaN and infinity then cover all of its ranks, which must all
            call ``step``. DTensors (FSDP2) on different meshes on different ranks count as different parts; those on
            one mesh count once. None: each rank has all plain parameters in full, as with DDP. DTensors alone and
            ``ZeroRedundancyOptimizer`` need no group: their sharding is known. Checkpoints and pickles do not save it.
        foreach: None: the fastest implementation that can take a tensor, see ``implementation``. True: torch's
            operations on lists of tensors. False: one tensor at a time, with nine times its size as temporary memory.
        maximize: maximize the loss instead of minimizing it.
        capturable: allow CUDA graphs to capture the step; all parameters must be on a GPU. See ``update_signals``.
        differentiable: let autograd differentiate through the step: by parameters, gradients and a tensor ``lr``.
        fused: None: ``foreach`` decides. False: like ``foreach=True``. True: like None, but only for parameters on the
            CPU and on CUDA or ROCm GPUs, and GradScaler leaves unscaling to the optimizer.
        compat: ``"0.1.2"`` reproduces that release, up to rounding: bias correction by β1 instead of β1_l, ε added
            before v's correction, clipping tensor by tensor, layers counted over tensors with a gradient, signals for
            each group, α without a limit, state in the parameter's dtype, μ even while λ is 0, no handling of NaN.

    Raises:
        TypeError, ValueError: an argument is not as described above. The message names it and its value.

    ``optimizer.state[p]`` holds ``step`` (0-d float32), ``exp_avg`` m, ``exp_avg_sq`` v and, once λ has been above 0,
    ``grok_ema`` μ. They have the parameter's shape, and are at least float32, or as state_dtype says; int8 codes have
    scales, such as ``exp_avg_scale`` (rows, blocks). A window adds ``grok_ring`` (w, \*shape), ``grok_ring_sum``,
    ``grok_ring_lap`` (shape) and ``grok_ring_count`` (0-d int64); accumulation_steps adds ``micro_step``.
    """

    @with_hints
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
        signal_boost: float = 0.0,
        decay_boost: float = 0.0,
        amplify_by_signal: bool = False,
        window_size: int | None = None,
        window_dtype: torch.dtype | None = None,
        accumulation_steps: int = 1,
        state_dtype: str | Mapping[str, str] = "float32",
        master_weight_bits: int | None = None,
        rounding: str = "nearest",
        nonfinite: str = "skip",
        compat: str | None = None,
        shard_group: dist.ProcessGroup | None = None,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        grokking_signal_fn: Signal | Iterable[Signal] | None = None,
    ) -> None:
        arguments = locals()  # before there are other local variables
        if grokking_signal_fns is None:
            grokking_signal_fns = grokking_signal_fn
        elif grokking_signal_fn is not None:
            raise ValueError("grokking_signal_fns and its alias grokking_signal_fn are both given: leave out the alias")
        signals = Signals(grokking_signal_fns, combine)
        defaults = group_defaults(arguments)
        defaults |= check_group(defaults, defaults)
        signals.check_amplifies(amplify_by_signal)
        check_shard_group(shard_group, [defaults])
        params = check_params(params)
        self._run = Run(signals, shard_group=shard_group)
        if (outer := zero.caller()) is not None:
            params = zero.follow(outer, self, params, arguments)
        super().__init__(params, defaults)
        self._set_amp_support()
        signals.bind(self)

    @classmethod
    @with_model
    def for_grokking(
        cls,
        model: nn.Module,
        lr: float | Tensor | None = None,
        weight_decay: float | None = None,
        *,
        norms: bool | None = None,
        **options: Any,
    ) -> GrokAdamW:
        """Create an optimizer with the settings that worked best on small models that memorise before they generalise.

        In models with norm layers, the settings are lr 3e-3, weight decay 1, α 0.9, γ 0.6 and betas (0.9, 0.98). If a
        row of weights has n > 180 inputs on average, and you pass no lr, lr is 3e-3 · c and weight decay 1 / c, with
        c = (180 / n)^(2/3). In a step, no row moves by more than 0.035 of its length (``max_row_change``). While the
        model has memorised and evaluation lags, updates are up to five times as large (``signal_boost`` 4, signal
        ``grokadamw.signals.memorisation``), and weight decay up to four times as strong (``decay_boost`` 3). For that,
        record both losses every few steps: ``record(train_loss=…, eval_loss=…)``.

        Without norms, filter, γ and row limit are off. The rest depends on the number of weights (convolution kernels
        count, embeddings do not). One or two: lr 2e-2, weight decay 0.5, ``signal_boost`` 2, ``decay_boost`` 1. Three:
        lr 1e-2. More, or none: lr 3e-3, weight decay 0.1, ``signal_boost`` 10, ``decay_boost`` 30 (docs/tuning.md).

        Args:
            model: the model. Its parameters that require gradients are optimized in these groups, with their names and
                layers: weights; parameters of norm layers, with a third of the decay; other vectors (also with two or
                more extra dimensions of 1), without decay or row limit; and one group per embedding. If an embedding's
                rows are longer than 1 on average, as torch's are, it gets ``lr`` times that length and ``weight_decay``
                divided by it: its rows turn and shrink as quickly as those of weights. Embeddings are ``nn.Embedding``
                and ``nn.EmbeddingBag``. Norm layers are torch's, and modules of vectors with "norm" in their class
                name. Without norms, vectors count as weights. A mostly frozen model causes a warning.
            norms: whether the model normalises its activations. None: look for norm layers, and for calls of
                ``torch.nn.functional``'s norms in the modules' code. Pass True if its code computes norms itself.
            lr, weight_decay, options: as for the constructor; they replace the preset's values. A weight decay that you
                pass stays constant, unless you also pass ``decay_boost``. If lr is a tensor, each group has its own
                copy: change it in ``param_groups``. A scheduler that sets one lr for all groups, as ``OneCycleLR``
                does, slows down the embeddings: give it a list with one lr per group.

        Raises:
            TypeError, ValueError: model is not a module, comes from TorchScript or torch.export, or is frozen as a
                whole; a parameter has no shape yet, or an embedding no finite values; or an argument is not allowed.
        """
        groups, preset = grokking_groups(model, lr, weight_decay, norms)
        if options.get("grokking_signal_fns") is None and options.get("grokking_signal_fn") is None:
            options["grokking_signal_fns"] = memorisation
        optimizer = cls(groups, **preset | options)
        optimizer.set_layers(model)  # number layers in the model's order, not the groups'
        gamma = None if "gamma" in options else preset["gamma"]
        optimizer._run.preset = Preset(gamma, [group["lr"] for group in optimizer.param_groups])
        return optimizer

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. A parameter without a gradient keeps its value and its state; ``p.grad`` is never written to.

        With ``step_in_backward``, this call ends a backward pass that has already used and freed its gradients.

        Args:
            closure: re-evaluates the model and returns the loss. It runs before gradients and recorded losses are read.

        Returns:
            The closure's return value; None without a closure.

        Raises:
            RuntimeError: a gradient is sparse, or not finite (``nonfinite="raise"``); a parameter's elements overlap.
            TypeError, ValueError: a value set by hand in a group is not allowed. In every case, nothing was written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        calls, tables = self._prepared(torch.compiler.is_compiling())
        stages.write(calls, tables)  # slow_grad to limit_rows, the only stages that torch.compile sees
        return loss

    @_disable_dynamo  # so that values which change each step reach the graph as tensors, and none is a guard
    def _prepared(self, compiling: bool) -> tuple[Calls, Tables | None]:
        """Run the stages before slow_grad. Groups and state are read again after signals, which may replace them."""
        self._complete_groups()
        run, options = self._run, self.defaults
        run.stepped = False
        may_capture = torch.cuda._initialized or capture.any_capturable(self.param_groups)
        capturing = may_capture and capture.is_capturing(self)
        given = Given(
            self.param_groups,
            self.state,
            options,
            scale=getattr(self, "grad_scale", None),
            found_inf=overflow_of_all(getattr(self, "found_inf", None), self.param_groups, run.shard_group),
            capturing=capturing,
            compiling=compiling,
            shard_group=run.shard_group,
        )
        if run.in_backward is not None:
            return run.in_backward.end(self, given)  # type: ignore[no-any-return]
        overflow = stages.is_overflow(given)
        if overflow or not stages.check_given(run, given):
            return [], None
        stages.begin(run, given)
        found_inf = given.found_inf if overflow is None else None  # needed only if the host cannot read it
        return stages.prepare(run, given._replace(groups=self.param_groups, state=self.state, found_inf=found_inf))

    @_disable_dynamo
    def update_signals(self) -> None:
        """Evaluate the signals, and set the filter memory α and the boosts of lr and weight decay from them.

        ``step`` does this itself, but the replay of a CUDA graph does not. Call this method between replays, whenever
        signals should take effect; until then α and the boosts stay constant. All processes must call it.
        """
        self._complete_groups()
        stages.evaluate_signals(self._run, self.param_groups, self.defaults)

    def free_slow_gradient(self) -> None:
        """Drop the slow gradients μ to free their memory. The next step starts them at 0 if λ > 0 (or compat is set).

        With ``lamb`` set to 0 the filter is off, but μ is still updated, so that the filter can be turned on again.
        """
        for state in states_of(self.param_groups, self.state):
            for name in ("grok_ema", "grok_ema_scale", *WINDOW):
                state.pop(name, None)

    @property
    def stepped(self) -> bool:
        """True if the last call of ``step`` completed a step, not just a micro-batch. Step schedulers only then."""
        return self._run.stepped

    @with_hints
    def record(
        self, *unnamed: Any, train_loss: Any = None, eval_loss: Any = None, train_acc: Any = None, eval_acc: Any = None
    ) -> None:
        """Record losses and accuracies for the signals. Groups and checkpoints store them under these names.

        The next step evaluates the signals. With several processes, call this on all of them, or on one if all of them
        are known to take every step, as with DDP and FSDP. A ``Monitor`` reads each evaluation accuracy, and counts it
        as one evaluation.

        Args:
            train_loss, eval_loss: a number, or a tensor or NumPy array of one element. A tensor on a GPU stays there,
                and the host does not wait for it. None keeps the previous loss.
            train_acc, eval_acc: the same for accuracies, fractions in [0, 1]. The range is not checked on a GPU.

        Raises:
            TypeError, ValueError: a value is not one number, or an accuracy is not in [0, 1]. Then nothing is recorded.
        """
        if unnamed:
            raise TypeError("record takes its values by name: record(train_loss=…, eval_loss=…)")
        values = (train_loss, eval_loss, train_acc, eval_acc)
        checks = zip(RECORDED, values, (as_number, as_number, as_share, as_share), strict=True)
        given = {name: check(value, name) for name, value, check in checks if value is not None}
        self._complete_groups()
        self._run.signals.warn_of_unscaled_losses(given, self.param_groups)
        for group in self.param_groups:
            group.update(given)
        zero.update_outer_groups(self)
        self._run.signals.records_are_loaded &= not given
        self._run.signals.warn_of_old_evaluation(given, self.param_groups)
        if eval_acc is not None:
            for listener in self._run.evaluation_listeners:
                listener()

    def set_signals(self, fns: Signal | Iterable[Signal] | None, combine: Combine | None = None) -> None:
        """Replace the signals. The arguments are the constructor's, but ``combine=None`` keeps the current setting."""
        old = self._run.signals
        signals = Signals(fns, old.combine if combine is None else combine)
        signals.check_amplifies(self.defaults["amplify_by_signal"])
        if self._run.in_backward is not None:
            self._run.in_backward.check_signals(signals)
        signals.bind(self)
        signals.restore(old.waiting)
        signals.records_are_loaded = old.records_are_loaded
        self._run.signals = signals

    def set_layers(self, model: nn.Module) -> None:
        """Number the layers by a model's modules, in the model's order, in all groups except those with ``layer``.

        Raises:
            TypeError, ValueError: model is not a module, or it lacks a parameter of the optimizer.
        """
        check_model(model)
        self._complete_groups()
        self._run.names = layers.take_from(model, self.param_groups, self._run.names)
        self._run.layers_checked = False
        zero.update_outer_groups(self)
