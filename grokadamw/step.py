"""One step up to its writing: which tensors go to which implementation, with which numbers.

What it finds out stays in the optimizer's `Run`, for `metrics` and for the next step.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from operator import attrgetter
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import capture, gradients, layers, metrics, update, window
from .accumulation import Cycle
from .filter_memory import Signals
from .notices import warn
from .numbers import Number, accumulator, as_float, detached, reads_are_free
from .options import check_settings, differing, settings
from .state import WINDOW, State, check, new_counts, prepare
from .update.gpu_tables import Tables
from .update.reference import Numbers, Tensors
from .window import Window
from .work import Call, Now, Plan, Work, calls_for, collect, with_gradients

if TYPE_CHECKING:
    from .grokadamw import GrokAdamW

PLANS = 8  # that are kept: of so many sets of parameters with a gradient
_SumOfSquares: TypeAlias = Callable[[Sequence[Tensor]], Tensor]


@dataclass
class Run:
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
    plans: dict[tuple[bool, ...], Plan] = field(default_factory=dict)  # of the last sets of parameters with a gradient
    evaluation_listeners: list[Callable[[], None]] = field(default_factory=list)  # called after record(eval_acc=…)
    graphs: list[Any] = field(default_factory=list)  # what CUDA graphs of the step read, besides tensors that users see


class Writes(NamedTuple):
    """What is left of a step: the stages slow_grad to limit_rows."""

    calls: Sequence[tuple[ModuleType, Tensors, Numbers]] = ()  # slow_grad to update
    tables: Tables | None = None  # what the GPU's implementation keeps of them
    averages: Sequence[tuple[list[Window], Tensors, Numbers]] = ()  # windows that are to be filled first
    limited: Sequence[update.rows.Rows] = ()  # parameters whose rows are limited last


class Step:
    """A step of an optimizer, up to its writing.

    Args:
        optimizer: its gradients are there.
        run: the optimizer's.
        compiling: whether torch.compile will see what is written.
    """

    def __init__(self, optimizer: GrokAdamW, run: Run, compiling: bool) -> None:
        self.optimizer, self.run, self.compiling = optimizer, run, compiling
        self.options = optimizer.defaults  # of the whole optimizer
        self.published = optimizer._published
        self.nonfinite = "propagate" if self.published else self.options["nonfinite"]
        self.capturing = capture.is_capturing(optimizer)
        run.stepped = False
        self.capturable = any(group["capturable"] for group in optimizer.param_groups)
        self.cycle = Cycle(self.options["accumulation_steps"], optimizer.param_groups, optimizer.state)
        self.plan = run.plan
        # GradScaler's, where it has left them to the optimizer; found_inf is 0 where there are no gradients
        self.scale: Tensor | None = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        self.found_inf = found_inf if isinstance(found_inf, Tensor) else None

    @property
    def state(self) -> MutableMapping[Tensor, State]:
        """The optimizer's of this moment: a signal may load another."""
        return self.optimizer.state

    def prepare(self) -> Writes:
        """Do the stages gradient to alpha, and return what the others are to do.

        Parameters' state is there then, and what `Run` keeps is about this step; a micro-batch counts.
        """
        run, cycle = self.run, self.cycle
        if self._found_infinity():
            return Writes()
        self._check_settings()
        now = self._planned()
        work = self._collected() if now is None else now.work
        capture.check_devices(work)
        if self.capturing:
            capture.check_state(work, self.state, bool(run.last.alphas), self.nonfinite)
        sum_of_squares = update.sum_of_squares(self.options, self.compiling)
        if self._is_for_state_alone(work, sum_of_squares):
            self._make_state(work)
            return Writes()
        self._check_layers()
        tables = None if now is None or self.compiling else self._tables()
        measured = self._measured(work, now, sum_of_squares, tables)
        amplification = self._hear_signals()
        run.last = run.last._replace(norms=detached(measured.norms), clips=detached(measured.clips))
        if measured.finite is False:
            count_skipped(self.optimizer.param_groups, 1)
            if cycle.of == 1:
                return Writes()
        if self.plan is not None and now is not None and run.signals.are_others:  # which may have changed something
            now = self.plan.again(now, cycle.groups, self.state)
        if now is None:
            tables, calls = None, self._planned_anew(work)
        else:
            calls = now.calls
        numbers = [
            self._numbers(
                call, work[call.work_index], self._beta1(i, call, work[call.work_index], now), measured, amplification
            )
            for i, call in enumerate(calls)
        ]
        memory_is_all = update.memory_is_all(self.compiling)
        windowed = [
            ([window.of(self.state[work[c.work_index].params[place]], "grok_") for place in c.places], c.tensors, n)
            for c, n in zip(calls, numbers, strict=True)
            if self._is_windowed(c.tensors)
        ]
        modules = [self._module(call, memory_is_all, tables) for call in calls]
        run.stepped = cycle.end(param for w in work for param in w.params)
        # of what is not finite in the last micro-batch the others are a step all the same
        finite = measured.finite if cycle.of == 1 else True
        return Writes(
            [(module, c.tensors, n) for module, c, n in zip(modules, calls, numbers, strict=True)],
            tables,
            windowed,
            self._limited(calls, modules, work, finite) if run.stepped else (),
        )

    def _found_infinity(self) -> bool:
        """Whether GradScaler has, where that may be read: it is as if this step had not been called."""
        found_inf = self.found_inf
        if found_inf is None or not (self._may_read(found_inf.device) or self.cycle.of > 1):
            return False
        self.found_inf = None  # which is known now
        return bool(found_inf.item())

    def _check_settings(self) -> None:
        """Refuse what was set wrong by hand in a group since the last step."""
        groups, before = self.optimizer.param_groups, self.run.checked
        now = [settings(group) for group in groups]
        if now != before:
            for group, new, old in zip_longest(groups, now, before[: len(groups)]):
                if new != old:
                    check_settings(group, self.options, differing(new, old))
            self.run.checked = now

    def _planned(self) -> Now | None:
        """The work and the calls of an earlier step's plan, with the tensors of now; None where none holds."""
        now = None if self.plan is None else self.plan.now(self.cycle.groups, self.state)
        if now is None and (plan := self.run.plans.get(with_gradients(self.cycle.groups))) not in (None, self.plan):
            self.plan = self.run.plan = plan  # the same parameters had gradients before, as with alternating heads
            now = plan.now(self.cycle.groups, self.state)
        if now is None or not self.cycle.fits(call.tensors.params for call in now.calls) or not self._has_windows(now):
            return None
        return now

    def _has_windows(self, now: Now) -> bool:
        """Whether there is a window wherever there is a slow gradient, as there is to be."""
        if self.options["window_size"] is None:
            return True
        states = (self.state[param] for w in now.work for param in w.params)
        return all(WINDOW[0] in state for state in states if "grok_ema" in state)

    def _collected(self) -> list[Work]:
        """Return what there is to do, looked through for what a step cannot go on with."""
        work = collect(self.cycle.groups, self.published, self.run.names, self.cycle.begun)
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

    def _is_for_state_alone(self, work: list[Work], sum_of_squares: _SumOfSquares) -> bool:
        """Whether torch.distributed.checkpoint takes this step, to have the state made that it loads into.

        There is no state yet, the learning rate is 0, and so are the gradients. A warm-up's first step has gradients.
        """
        if self.state or not work or any(as_float(group["lr"]) != 0 for group in self.optimizer.param_groups):
            return False
        return as_float(gradients.global_norm([grad for w in work for grad in w.grads], sum_of_squares, None)) == 0

    def _make_state(self, work: list[Work]) -> None:
        counts = {} if self.compiling else new_counts(self.state, [param for w in work for param in w.params])
        for w in work:
            with_mu = float(w.group["lamb"]) > 0
            for param in w.params:
                prepare(self.state[param], param, self.options, with_mu, counts.get(param))

    def _check_layers(self) -> None:
        """Warn of doubtful layers: at the first step, when set_layers has had its chance."""
        if not self.run.layers_checked and not self.published:
            optimizer = self.optimizer
            for sentence in layers.warnings_for(optimizer.param_groups, self.run.names, optimizer._preset_gamma):
                warn(sentence, UserWarning)
        self.run.layers_checked = True

    def _tables(self) -> Tables | None:
        tables = None if self.plan is None else self.plan.tables(self.capturing, self.capturable)
        if self.capturing and tables is not None:
            self.run.graphs.append(tables)
        return tables

    def _measured(
        self, work: list[Work], now: Now | None, sum_of_squares: _SumOfSquares, tables: Tables | None
    ) -> gradients.Measured:
        """Measure the gradients, the quickest way there is: norm and clip."""
        plan, nonfinite = self.plan if now is not None else None, self.nonfinite
        lists, limits = [w.grads for w in work], [float(w.group["gradient_clipping"]) for w in work]
        if self.scale is None and self.found_inf is None and not gradients.norm_is_wanted(limits, nonfinite):
            return gradients.Measured([None] * len(work), [1.0] * len(work), [1.0] * len(work), True, None)
        grads = chain.from_iterable(lists)
        devices = plan.devices if plan else list(dict.fromkeys(map(attrgetter("device"), grads)))
        home = next((device for device in devices if not self._on_host(device)), None)
        fastest = sum_of_squares is update.fastest_sum_of_squares and not self.published
        without_tables = self.capturing and tables is None  # and what a graph reads must not come and go
        if fastest and home is not None and len(devices) == 1 and nonfinite != "raise" and not without_tables:
            known = now if plan and plan.can_be_judged else None
            measured = gradients.judge(
                lists,
                limits,
                scale=self.scale,
                found_inf=self.found_inf,
                nonfinite=nonfinite,
                counter=self._counter,
                at=known and known.gradients,
                tables=tables if known else None,
            )
            if measured is not None:
                return measured
        measured = gradients.measure(
            lists,
            limits,
            sum_of_squares=update.foreach.sum_of_squares if fastest and self.capturing else sum_of_squares,
            known=partial(plan.sum_of_squares, now) if fastest and plan and now else None,
            scale=self.scale,
            found_inf=self.found_inf,
            nonfinite=nonfinite,
            apart=self.published,
            home=home,
        )
        if nonfinite == "raise" and not measured.finite:
            pairs = chain.from_iterable(zip(w.params, w.grads, strict=True) for w in work)
            groups, known_names = self.optimizer.param_groups, self.run.names
            names = [layers.name_of(param, groups, known_names) for param, grad in pairs if not grad.isfinite().all()]
            raise RuntimeError(
                f"the gradients are not finite: {', '.join(names) or 'their sum of squares overflows'}. Nothing was "
                'written; nonfinite="skip" goes on without such a step'
            )
        if measured.skipped is not None:
            counter = self._counter(measured.skipped.device)
            counter.add_(measured.skipped.to(counter.device))  # in place, for CUDA graphs
        return measured

    def _counter(self, device: torch.device) -> Tensor:
        """Of the steps that are skipped on a device; where a graph is to go on with it, in its place."""
        run = self.run
        if run.skipped is None:
            run.skipped = torch.zeros((), dtype=torch.int64, device=device)
        elif run.skipped.device != device and not self.capturing and not self.capturable:
            run.skipped = run.skipped.to(device)
        return run.skipped

    def _hear_signals(self) -> float:
        """Evaluate the signals at a cycle's first micro-batch, and return what they multiply λ by."""
        run, cycle = self.run, self.cycle
        if cycle.is_first and not self.capturing:
            self.optimizer.update_signals()
        amplification = self._amplification() if cycle.is_first else cycle.amplification
        if cycle.of > 1:
            if cycle.is_first:
                cycle.begin(run.last.alphas, amplification)
            run.last = run.last._replace(alphas=cycle.alphas)
        return amplification

    def _amplification(self) -> float:
        if not self.options["amplify_by_signal"]:
            return 1.0
        signal = self.run.last.signal
        value = 0.0 if signal is None else as_float(signal)
        return min(max(value, 0.0), 1.0) if value == value else 0.0

    def _planned_anew(self, work: list[Work]) -> list[Call]:
        """The calls for this work, and a plan for the steps that are like it."""
        self._make_state(work)
        calls = calls_for(work, self.state)
        plan = Plan(self.cycle.groups, work, calls) if self.cycle.is_regular else None
        self.run.plan = plan if plan and plan.lasts else None
        if self.run.plan is not None:
            plans, key = self.run.plans, with_gradients(self.cycle.groups)
            plans.pop(key, None)
            if len(plans) >= PLANS:
                del plans[next(iter(plans))]
            plans[key] = self.run.plan
        return calls

    def _beta1(self, i: int, call: Call, w: Work, now: Now | None) -> list[float]:
        """β1_l of the i-th call's parameters."""
        return layers.beta1s(w.group, call.layers) if now is None or self.plan is None else self.plan.beta1s(i, w.group)

    def _numbers(
        self, call: Call, w: Work, beta1: list[float], measured: gradients.Measured, amplification: float
    ) -> Numbers:
        group, device = w.group, call.tensors.params[0].device
        alpha, finite = self.run.last.alphas[w.group_index], measured.finite
        numbers = Numbers(
            beta1=beta1,
            bias_beta1=[float(group["betas"][0])] * len(beta1) if self.published else beta1,
            beta2=float(group["betas"][1]),
            lr=self._number(group["lr"], device),
            eps=float(group["eps"]),
            eps_before_correction=self.published,
            weight_decay=float(group["weight_decay"]),
            alpha=1.0 if self._is_windowed(call.tensors) else self._number(alpha, device),
            lamb=float(group["lamb"]) * amplification,
            amplify_after=int(group["amplify_after"]),
            clip=self._number(measured.factors[call.work_index], device),
            raw_second_moment=self.options["second_moment"] == "raw",
            maximize=group["maximize"],
            finite=None if finite is True else torch.as_tensor(finite, device=device),
            max_row_change=float(group["max_row_change"]),
            max_row_norm=float(group["max_row_norm"]),
        )
        if self.cycle.of > 1:
            numbers = numbers._replace(micro_step=self.cycle.micro_step(w.params[call.places[0]]))
        return capture.for_compiler(call.tensors, numbers) if self.compiling else numbers

    def _number(self, value: Number, device: torch.device) -> Number:
        """A number for parameters on this device: a tensor is moved there, or read where that is free."""
        if not isinstance(value, Tensor):
            return float(value)
        if self._on_host(value.device) or self._on_host(device):
            return value.item()
        dtype = accumulator(device)
        if value.dim() == 0 and value.dtype == dtype and value.device == device:
            return value
        return value.reshape(()).to(device, dtype, non_blocking=True)

    def _may_read(self, device: torch.device) -> bool:
        """Whether the host may read from this device in a step."""
        return self._on_host(device) or self.nonfinite == "raise"

    def _on_host(self, device: torch.device) -> bool:
        """Whether numbers for parameters on this device are Python's: reading is free, and loses no derivative."""
        return reads_are_free(device) and not self.options["differentiable"]

    def _is_windowed(self, tensors: Tensors) -> bool:
        """Whether μ is a moving average, which is taken before the other rows."""
        return self.options["window_size"] is not None and tensors.grok_emas is not None

    def _module(self, call: Call, memory_is_all: bool, tables: Tables | None) -> ModuleType:
        """The implementation that the call's choice comes to in this step."""
        module = call.choice.module
        without_tables = module is update.gpu and self.capturing and tables is None
        by_lists = without_tables or not (memory_is_all or module is update.reference)
        return update.foreach if by_lists else module

    def _limited(
        self, calls: Sequence[Call], modules: Sequence[ModuleType], work: list[Work], finite: bool | Tensor
    ) -> list[update.rows.Rows]:
        """limit_rows: the parameters that have rows which no implementation has limited, with what limits these."""
        limited = []
        for call, module in zip(calls, modules, strict=True):
            w = work[call.work_index]
            change, norm = float(w.group["max_row_change"]), float(w.group["max_row_norm"])
            if not (change or norm):
                continue
            matrices = call.matrices
            if module is not call.choice.module:
                matrices = [i for i, place in enumerate(call.places) if w.params[place].dim() > 1]
            params = [w.params[call.places[i]] for i in matrices]
            limited.append(update.rows.Rows(params, change, norm, finite))
        return limited


def count_skipped(groups: Sequence[dict[str, Any]], steps: int) -> None:
    """Add to what the groups say of skipped steps, and warn of the first."""
    total = groups[0]["skipped_steps"] + steps
    for group in groups:
        group["skipped_steps"] = total
    if total == steps:
        what = "a step was skipped: its gradients hold NaN or infinity, and nothing was written"
        if groups[0]["accumulation_steps"] > 1:
            what = "the gradients of a micro-batch hold NaN or infinity, and it counts as 0"
        warn(
            f"{what}. metrics()['skipped_steps'] counts such steps; nonfinite=\"raise\" stops at the first",
            RuntimeWarning,
        )
