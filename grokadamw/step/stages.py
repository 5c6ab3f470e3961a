"""The stages of a step, in the order of `GrokAdamW._prepared` and `step`. Each passes values to the next.

    check settings → evaluate signals → α → batches → norm, clip, finite → scalars → write → limit rows

`write` does the last two. Options set by hand, and the tensors of a first step, are checked before signals are called.
Signals are called before tensors are collected: they are users' code, and the step uses the tensors that they leave.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .. import backends, layers
from .._numbers import Number, as_float, detached, is_on_host, number_on, resolved
from .._warn import is_new, warn
from ..backends import foreach, gpu, rows
from ..backends.gpu_tables import Tables
from ..backends.types import WHOLE, Batch, Calls, MicroStep, Scalars
from ..distributed import check_agreed, check_shard_group, is_for_state_alone
from ..groups import lost_rates
from ..options import rules_of
from ..param_groups import check_changed
from ..shards import divisions, part
from . import capture, metrics, norm
from .alpha import effects_of, evaluate
from .batches import Batches, Given, collect, forget_state, make_state
from .effects import Effect, amplification, boosted, in_places
from .micro_batches import Cycle, warn_if_not_zeroed
from .run import Run, count_skipped

_beta1s = lru_cache(maxsize=64)(layers.decayed)  # a small cache: a schedule of β1 adds an entry at every step


def is_overflow(given: Given) -> bool | None:
    """Return True if GradScaler found infinity, and so forbids the step; None if the host cannot read its flag.

    Raises RuntimeError if the host can read it, and only some ranks of the shard_group found infinity.
    """
    found_inf, options = given.found_inf, given.options
    if not isinstance(found_inf, Tensor):  # the number 0 if there are no gradients
        return False
    readable = is_on_host(found_inf.device, options["differentiable"]) or options["nonfinite"] == "raise"
    if not readable and options["accumulation_steps"] == 1:
        return None
    found = found_inf.item()
    check_agreed(found, given.shard_group)
    return bool(found)


def check_given(run: Run, given: Given) -> bool:
    """Check a step's inputs. Return True to take it, False if torch.distributed.checkpoint only needs its state."""
    groups, options = given.groups, given.options
    check_changed(groups, options, run.checked, run.checked_layers)
    if capture.any_capturable(groups):
        check_shard_group(given.shard_group, groups)
        capture.check_devices(groups)
    if given.capturing:
        capture.check_state(collect(given, run.names), given, bool(run.last.effects))
        return True
    if not given.state:
        entries = collect(given, run.names)  # which checks the tensors
        if is_for_state_alone():
            make_state(entries, given)
            return False
    if options["nonfinite"] == "raise":
        check_finite(run, given)
    return True


def check_finite(run: Run, given: Given) -> None:
    """Raise RuntimeError if gradients are not finite."""
    params = [p for group in given.groups for p in group["params"] if p.grad is not None]
    if not math.isfinite(_norm_now([resolved(p.grad) for p in params if p.grad.layout == torch.strided], given)):
        raise _not_finite(run, given, params)


def _norm_now(grads: list[Tensor], given: Given) -> float:
    sum_of_squares = backends.sum_of_squares(given.options, given.compiling)
    return as_float(norm.global_norm(grads, sum_of_squares, None, given.groups, given.shard_group))


def begin(run: Run, given: Given) -> None:
    """Warn once about doubtful layers, lrs and shards. Evaluate the signals at a step's first (or only) micro-batch."""
    if not run.layers_checked:  # at the first step, because set_layers may be called until then
        if not rules_of(given.options).layers_by_place:
            for sentence in layers.warnings_for(given.groups, run.names, run.preset.gamma):
                warn(sentence, UserWarning)
        is_own = run.shard_group is not None and run.zero() is None
        for sentence in run.all_ranks.doubts(given.groups, run.shard_group, is_own):
            warn(sentence, UserWarning)
        run.layers_checked = True
    if run.preset.lrs and (lost := lost_rates(given.groups, run.preset.lrs)) and is_new("lost lrs", run.said):
        warn(lost, UserWarning)
    steps, groups = given.options["accumulation_steps"], given.groups
    if not given.capturing and (steps == 1 or groups[0]["micro_step"] == 0):
        evaluate_signals(run, groups, given.options)


def evaluate_signals(run: Run, groups: Sequence[dict[str, Any]], options: dict[str, Any]) -> None:
    """Evaluate the signals, and set α and the boosts of every group from them."""
    rules = rules_of(options)
    signals = evaluate(run.signals, groups, rules, run.all_ranks, run.shard_group)
    effects = effects_of(signals, groups, rules)
    if capture.any_capturable(groups):
        devices = [group["params"][0].device for group in groups if group["capturable"] and group["params"]]
        if devices:  # a graph cannot create the count that it increments
            run.skip_counter(devices[0], movable=False)
        effects = [in_places(run.captured, i, group, effects[i]) for i, group in enumerate(groups)]
    run.last = run.last._replace(signal=signals[0] if signals else None, effects=effects)


def prepare(run: Run, given: Given) -> tuple[Calls, Tables | None]:
    """Do the stages from batches to scalars, create missing state, and return the arguments for `write`."""
    groups, state, options = given.groups, given.state, given.options
    factor_of_lamb = amplification(run.last.signal) if options["amplify_by_signal"] else 1.0
    effects, cycle, cycle_groups = run.last.effects, None, groups
    missing: Collection[Tensor] = ()
    if options["accumulation_steps"] > 1:
        warn_if_not_zeroed(groups, run.said)
        cycle = Cycle(options["accumulation_steps"], groups, state)
        cycle_groups, effects, factor_of_lamb = cycle.numbers(effects, factor_of_lamb)
        missing = cycle.missing

    found = run.cache.find(given._replace(groups=cycle_groups), run.names, missing)
    if given.capturing and found.tables is not None:
        run.graphs.append(found.tables)
    try:
        stats = _measured(run, given, found, cycle_groups)
        last_norm, clips = stats.norm, stats.clips
        if options["differentiable"]:
            (last_norm,), clips = detached([last_norm]), detached(clips)
        run.last = metrics.LastStep(run.last.signal, effects, last_norm, clips)
        if options["nonfinite"] == "raise" and not stats.finite:  # a signal changed the gradients after check_given
            raise _not_finite(run, given, found.params)
        if stats.finite is False:
            count_skipped(groups, 1)  # its warning may be raised as an error
        if not found.params:
            _warn_if_idle(run, given, last_norm)
    except BaseException:
        forget_state(found.made, state)
        raise
    if stats.finite is False and cycle is None:
        forget_state(found.made, state)
        return [], None

    finite = None
    if stats.finite is not True:
        finite = stats.finite if isinstance(stats.finite, Tensor) else torch.tensor(stats.finite, device="cpu")
    calls = []
    for batch, clip in zip(found.batches, stats.factors, strict=True):
        group, effect = cycle_groups[batch.group], effects[batch.group]
        micro_step = WHOLE if cycle is None else MicroStep(cycle.k, not batch.begun, cycle.is_last, cycle.nth)
        scalars = _scalars(batch, group, options, effect, factor_of_lamb, clip, finite, micro_step)
        calls.append((batch, capture.for_compiler(batch, scalars) if given.compiling else scalars))
    run.stepped = cycle is None or cycle.end(found.params)
    if found.dtensors:
        torch.autograd.graph.increment_version(found.dtensors)
    return calls, found.tables


def _scalars(
    batch: Batch, group: dict[str, Any], options: dict[str, Any], effect: Effect, factor_of_lamb: float, clip: Number,
    finite: Tensor | None, micro_step: MicroStep,
) -> Scalars:  # fmt: skip
    """Return the numbers with which a backend updates a batch."""
    device, differentiable, rules = batch.params[0].device, options["differentiable"], rules_of(options)
    beta1s = _beta1s(group["betas"][0], group["gamma"], batch.layers)
    lr, change, decay = boosted(group, effect, device, differentiable)
    alpha = 1.0 if batch.windows is not None else effect.alpha
    return Scalars(
        beta1=beta1s,
        bias_beta1=[float(group["betas"][0])] * len(beta1s) if rules.corrects_by_beta1 else beta1s,
        beta2=float(group["betas"][1]),
        lr=lr,
        eps=float(group["eps"]),
        eps_before_correction=rules.eps_before_correction,
        weight_decay=decay,
        alpha=alpha if type(alpha) is float else number_on(device, alpha, differentiable),
        lamb=float(group["lamb"]) * factor_of_lamb,
        amplify_after=min(int(group["amplify_after"]), 2**63 - 1),  # kernels count in 64 bits
        clip=clip if type(clip) is float else number_on(device, clip, differentiable),
        raw_second_moment=options["second_moment"] == "raw",
        maximize=group["maximize"],
        finite=None if finite is None else finite.to(device),
        micro_step=micro_step,
        max_row_change=change,
        max_row_norm=float(group["max_row_norm"]),
    )


def _measured(run: Run, given: Given, found: Batches, groups: Sequence[dict[str, Any]]) -> norm.GradStats:
    """Do the stages norm and clip."""
    options, rules = given.options, rules_of(given.options)
    nonfinite = "propagate" if rules.ignores_nonfinite else options["nonfinite"]
    limits = [float(groups[batch.group]["gradient_clipping"]) for batch in found.batches]
    are_divided = given.shard_group is not None or any(map(itemgetter(0), found.grads))
    counts_others = are_divided and not rules.clips_each_tensor
    # Other gradients may belong to the same norm: those of the rest of a backward pass, or of other ranks. All ranks
    # must take part in the norm, or none, whatever gradients they have: so the limits of all groups count.
    is_clipped = any(limits) or (run.in_backward is not None and run.in_backward.is_clipped)
    is_clipped = is_clipped or (counts_others and any(group["gradient_clipping"] > 0 for group in groups))
    needs_norm = (bool(limits) or are_divided) and (is_clipped or nonfinite != "propagate")
    movable = not given.capturing and not capture.any_capturable(given.groups)
    stats = norm.stats(found, limits, given, nonfinite, needs_norm, partial(run.skip_counter, movable=movable))
    if counts_others:  # show the same on all ranks, although their batches differ
        clips = [norm.clip_coefficient(stats.norm, group["gradient_clipping"]) for group in groups]
        stats = stats._replace(clips=clips)
    return stats


def _warn_if_idle(run: Run, given: Given, last_norm: Number | None) -> None:
    """Warn once if no parameter of this rank, nor of its shard_group, has a gradient in a step."""
    # with a shard_group, N covers all of its ranks: it is 0.0 if no rank has a gradient, None if nothing needed it
    elsewhere = given.shard_group is not None and last_norm != 0.0
    if elsewhere or run.has_updated_early or not any(group["params"] for group in given.groups):
        return
    if is_new("idle", run.said):
        warn(
            "a step found no gradient, and changed nothing: call loss.backward() before optimizer.step(). If you did, "
            "the optimizer no longer has the model's parameters: construct it again (with FSDP2, after fully_shard). "
            "If you skipped a batch on purpose, ignore this warning",
            UserWarning,
        )


def write(calls: Calls, tables: Tables | None) -> None:
    """Do the stages slow_grad to limit_rows: let each backend update its batches, then limit the remaining rows.

    Batches on a GPU go together, because they share launches. torch.compile sees only this part of a step.
    """
    if not calls and torch.compiler.is_compiling():
        torch.zeros(())  # any operation will do: dynamo skips code without one for good, and splits later steps
    before = [rows.before(batch, scalars) for batch, scalars in calls]
    on_gpu = []
    for batch, scalars in calls:
        if batch.windows is not None:
            foreach.average(batch, scalars)
        if batch.choice.module is gpu:
            on_gpu.append((batch, scalars))
        else:
            batch.choice.module.step(batch, scalars)
    if on_gpu:
        gpu.steps(on_gpu, tables)
    for batch, scalars, old in _left_to_limit(calls, before):
        rows.limit(batch, scalars, old)


def _left_to_limit(calls: Calls, before: Sequence[list[Tensor]]) -> list[tuple[Batch, Scalars, list[Tensor]]]:
    """Return the arguments for the calls of `rows.limit`.

    Ranks that have parts of rows add up norms one parameter at a time, in the optimizer's order. They cannot do it by
    batches, which depend on how a rank's tensors lie in memory.
    """
    whole: list[tuple[Batch, Scalars, list[Tensor]]] = []
    cut: dict[int, tuple[Batch, Scalars, list[Tensor]]] = {}
    for (batch, scalars), old in zip(calls, before, strict=True):
        if not batch.unlimited or not scalars.limits_rows:
            continue
        if batch.shards is None or not batch.shards.cut_rows:
            whole.append((batch, scalars, old))
            continue
        for j, i in enumerate(batch.unlimited):
            cut[batch.indices[i]] = batch._replace(unlimited=[i]), scalars, old[j : j + 1]
    return [*whole, *(cut[index] for index in sorted(cut))]


def _not_finite(run: Run, given: Given, params: Sequence[Tensor]) -> RuntimeError:
    found = [param for param in params if param.grad is not None and not part(param.grad).isfinite().all()]
    names = ", ".join(layers.name_of(param, given.groups, run.names) for param in found)
    is_alone = given.shard_group is None and not divisions(given.groups)
    others = (
        "their sum of squares overflows" if is_alone else "those of another rank, or their sum of squares overflows"
    )
    what = "Earlier parameters of this pass were updated" if run.has_updated_early else "Nothing was written"
    return RuntimeError(f'the gradients are not finite: {names or others}. {what}; nonfinite="skip" skips such steps')
