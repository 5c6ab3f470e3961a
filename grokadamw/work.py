"""What there is to do in a step: the parameters that have a gradient, in lists that one call can take.

Finding that out costs more than small steps do, so a `Plan` keeps it for as long as it sees that all is as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from itertools import accumulate, chain
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import layers, update
from .looks import Looks
from .numbers import as_real, mesh_of
from .state import MOMENTS, State, step_device
from .update import BY_ADDRESS, Choice, cpu, gpu, memory
from .update.gpu_tables import Tables
from .update.reference import Tensors, written


class Work(NamedTuple):
    """A parameter group's parameters that have a gradient, with what belongs to each."""

    group_index: int
    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    layers: list[int]


class Call(NamedTuple):
    """What one call of an implementation takes: tensors of one kind out of one entry of work."""

    work_index: int
    places: list[int]  # of its parameters there
    layers: list[int]
    tensors: Tensors
    choice: Choice
    matrices: list[int]  # which of the tensors have rows that this implementation leaves to rows.py


def collect(
    groups: Sequence[dict[str, Any]],
    published: bool,
    known: Mapping[Tensor, str],
    begun: Container[Tensor] = (),
) -> list[Work]:
    """One entry a group; as release 0.1.2 does it, one a tensor, since that clips tensor by tensor.

    Args:
        begun: parameters that take part in any case: where they have no gradient, with one of 0.

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
        for j, (param, layer) in enumerate(zip(group["params"], group["layers"], strict=True)):
            if param.grad is None:
                if param in begun:
                    w.params.append(param)
                    w.grads.append(torch.zeros_like(param))
                    w.layers.append(layer)
                continue
            if param.grad.layout != torch.strided:
                name = layers.names(group, i, known)[j]
                raise RuntimeError(
                    f"GrokAdamW does not support sparse gradients, and {name} has one: build its module with "
                    "sparse=False (torch.nn.Embedding), or give it to torch.optim.SparseAdam"
                )
            w.params.append(param)
            w.grads.append(param.grad.resolve_conj())
            w.layers.append(layer)
        if published:  # and there a layer is a place among the tensors that have a gradient
            pairs = enumerate(zip(w.params, w.grads, strict=True))
            work += [Work(i, group, [param], [grad], [place]) for place, (param, grad) in pairs]
        elif w.params:
            work.append(w)
    return work


def calls_for(work: Sequence[Work], state: Mapping[Tensor, State]) -> list[Call]:
    """The tensors as real ones, in lists of one kind: device, dtypes, implementation, all with or all without μ.

    Those that share a launch are looked at together, over all groups: where they share memory, foreach takes them.
    """
    calls: list[Call] = []
    for i, w in enumerate(work):
        lists: dict[Any, Call] = {}
        for place, (param, grad, layer) in enumerate(zip(w.params, w.grads, w.layers, strict=True)):
            s = state[param]
            row = [as_real(x) for x in (param, grad, *(s[name] for name in MOMENTS if name in s))]
            choice = update.choose(row, s["step"], w.group)
            kind = (choice, param.device, mesh_of(param), bool(s.get("micro_step")), *(x.dtype for x in row))
            if kind not in lists:
                lists[kind] = Call(i, [], [], Tensors([], [], [], [], [] if len(row) == 5 else None, []), choice, [])
            call = lists[kind]
            call.places.append(place)
            call.layers.append(layer)
            for column, x in zip(call.tensors, row, strict=False):
                column.append(x)
            call.tensors.steps.append(s["step"])
        calls += [call._replace(choice=update.checked(call.choice, call.tensors)) for call in lists.values()]
    together = [call for call in calls if call.choice.module is gpu]  # which share launches
    if len(together) > 1:
        choice = update.checked(together[0].choice, *(call.tensors for call in together))
        calls = [call._replace(choice=choice) if call.choice.module is gpu else call for call in calls]
    return [_with_rows(call, work[call.work_index].params) for call in calls]


def _with_rows(call: Call, params: Sequence[Tensor]) -> Call:
    matrices = [i for i, place in enumerate(call.places) if params[place].dim() > 1]
    if call.choice.module not in (cpu, gpu):
        return call._replace(matrices=matrices)
    widths = [0] * len(call.places)
    for i in matrices:
        widths[i] = call.choice.module.row_width(call.tensors.params[i])
    return call._replace(
        tensors=call.tensors._replace(row_widths=widths), matrices=[i for i in matrices if not widths[i]]
    )


def choices_of(
    groups: Sequence[dict[str, Any]], state: Mapping[Tensor, State], calls: Sequence[Call] | None
) -> Counter[Choice]:
    """How many parameters get which implementation: by the calls, or as far as that is known without them."""
    choices: Counter[Choice] = Counter()
    for call in calls or ():
        choices[call.choice] += len(call.places)
    if choices.total() == sum(len(group["params"]) for group in groups):
        return choices
    choices.clear()
    for group in groups:
        for param in group["params"]:
            s = state.get(param, {})
            row = [param if x is None else x for x in (param, param.grad, *map(s.get, MOMENTS))]
            count = s.get("step", torch.zeros((), device=step_device(param)))
            choices[update.choose(list(map(as_real, row)), count, group)] += 1
    return choices


class Now(NamedTuple):
    """This step's work, and the calls that do it."""

    work: list[Work]
    calls: list[Call]
    gradients: bytes  # where they lie


class Plan:
    """The calls of a step, to be made again for as long as all that they follow from looks as it did.

    It keeps no tensors, whose memory is others': each step has its own, and is asked what they look like.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], work: Sequence[Work], calls: Sequence[Call]) -> None:
        grads = list(chain.from_iterable(w.grads for w in work))
        tensors = [x for call in calls for column in written(call.tensors) for x in column]
        mine = list(chain.from_iterable(w.params for w in work))
        has_grad = set(map(id, mine))  # when the work was collected: signals, which were heard since, may change it
        params = [param for group in groups for param in group["params"]]
        self._has_grad = [id(param) in has_grad for param in params]
        # what is behind a complex view, a DTensor or a subclass would have to be looked up each time
        kinds, complex_ = set(map(type, [*tensors, *grads])), any(map(torch.is_complex, mine))
        in_order = list(map(id, mine)) == [id(param) for param in params if id(param) in has_grad]
        self.lasts = kinds <= {Tensor, nn.Parameter} and not complex_ and in_order
        if self.lasts:
            try:
                self._looks, self._grad_looks = Looks(tensors), Looks(grads)
            except RuntimeError:  # of a device that torch cannot show
                self.lasts = False
        if not self.lasts:
            return
        self._facts = [_facts(group) for group in groups]
        self._work = [w._replace(group={}, params=[], grads=[]) for w in work]
        self._ends = list(accumulate(len(w.params) for w in work))
        self._calls: list[Call] = []
        self._beta1s: dict[int, tuple[Any, list[float]]] = {}
        for call in calls:
            t = call.tensors
            empty = Tensors([], [], [], [], None if t.grok_emas is None else [], [])
            kept = memory.where(t) if call.choice.module in (cpu, gpu) else None
            self._calls.append(call._replace(tensors=empty._replace(kept=kept, row_widths=t.row_widths)))
        # a real tensor whose sign is yet to be turned is another's imaginary part: it has gaps, or is one number
        self._of_one = [i for i, grad in enumerate(grads) if grad.numel() == 1]
        on_gpu = [call.tensors.params[0].device for call in calls if call.choice.module is gpu]
        self._gpus, self._tables = list(dict.fromkeys(on_gpu)), dict[Any, Tables]()
        self.devices = list(dict.fromkeys(grad.device for grad in grads))
        # whether one GPU has all gradients, and can sum them
        self.can_be_judged = len(self.devices) == 1 and gpu.is_for(self.devices[0]) and gpu.can_sum(grads)
        self._gradients, self._flat = self._grad_looks.addresses, cpu.flat(grads)
        by_address = [call.tensors for call in calls if call.choice.module in BY_ADDRESS]
        self._ranges = memory.Ranges([x for t in by_address for column in written(t) for x in column], grads)

    def now(self, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, State]) -> Now | None:
        """The calls with the tensors of this step; None where something has changed, and a new plan is due."""
        if [_facts(group) for group in groups] != self._facts:
            return None
        params = list(chain.from_iterable(group["params"] for group in groups))
        grads = list(map(attrgetter("grad"), params))
        if [grad is not None for grad in grads] != self._has_grad:
            return None
        if not all(self._has_grad):
            params, grads = ([x for x, has in zip(y, self._has_grad, strict=True) if has] for y in (params, grads))
        try:
            # a parameter's hash is Python's to compute: where the state is theirs and in their order, none is needed
            in_order = len(state) == len(params) and all(map(is_, state, params))
            calls = self._with_tensors(params, grads, list(state.values() if in_order else map(state.get, params)))
            if calls is None or any(grads[i].is_neg() for i in self._of_one) or set(map(type, grads)) - {Tensor}:
                return None
            tensors = [x for call in calls for column in written(call.tensors) for x in column]
            if set(map(type, tensors)) - {Tensor, nn.Parameter} or not self._looks.hold(tensors):
                return None
            gradients = self._grad_looks.of(grads)
        except (KeyError, TypeError, RuntimeError):  # a state that lacks something, a tensor that has no memory
            return None
        if gradients is None or (gradients != self._gradients and self._ranges.meet(gradients)):
            return None
        self._gradients = gradients
        work = []
        for w, end in zip(self._work, self._ends, strict=True):
            place = slice(end - len(w.layers), end)
            work.append(Work(w.group_index, groups[w.group_index], params[place], grads[place], w.layers))
        return Now(work, [self._with_addresses(call, gradients) for call in calls], gradients)

    def again(self, now: Now, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, State]) -> Now | None:
        """`now` once more, after somebody else's code has run; None where it has changed something."""
        new = self.now(groups, state)
        pairs = zip(new.work, now.work, strict=True) if new is not None else ()
        return new if all(a is b for w, x in pairs for a, b in zip(w.grads, x.grads, strict=True)) else None

    def _with_tensors(self, params: list[Tensor], grads: list[Tensor], states: list[Any]) -> list[Call] | None:
        calls = []
        for call in self._calls:
            end = self._ends[call.work_index]
            start = end - len(self._work[call.work_index].layers)
            if len(call.places) == end - start:
                p, g, mine = params[start:end], grads[start:end], states[start:end]
            else:
                p, g, mine = ([y[start + place] for place in call.places] for y in (params, grads, states))
            m, v, steps = (list(map(itemgetter(name), mine)) for name in ("exp_avg", "exp_avg_sq", "step"))
            has_mu = call.tensors.grok_emas is not None
            if not has_mu and any("grok_ema" in s for s in mine):
                return None
            mu = list(map(itemgetter("grok_ema"), mine)) if has_mu else None
            tensors = Tensors(p, g, m, v, mu, steps, *call.tensors[6:])
            calls.append(Call(call.work_index, call.places, call.layers, tensors, *call[4:]))  # quicker than _replace
        return calls

    def _with_addresses(self, call: Call, gradients: bytes) -> Call:
        kept = call.tensors.kept
        if kept is None:
            return call
        end = self._ends[call.work_index]
        start = end - len(self._work[call.work_index].layers)
        if len(call.places) == end - start:
            here = gradients[8 * start : 8 * end]
        else:
            here = b"".join(gradients[8 * (start + place) : 8 * (start + place) + 8] for place in call.places)
        tensors = Tensors(*call.tensors[:6], kept._replace(grads=here), *call.tensors[7:])
        return Call(*call[:3], tensors, *call[4:])

    def tables(self, capturing: bool, capturable: bool) -> Tables | None:
        """What is kept on the GPU for the current stream, if there is one; for a capture what is the graph's own."""
        if not self._gpus:
            return None
        if capturing:
            return next((own for tables in self._tables.values() if (own := tables.captured())), None)
        tables = self._tables.setdefault(gpu.streams(self._gpus), Tables())
        if capturable:
            tables.may_be_captured(self._ends[-1], len(self._work) + len(self._calls))
        return tables

    def sum_of_squares(self, now: Now) -> float | None:
        """Of all gradients, as `cpu.sum_of_squares` has it; None where it takes several sums."""
        return None if self._flat is None else self._flat(now.gradients)

    def beta1s(self, i: int, group: dict[str, Any]) -> list[float]:
        """β1_l of the i-th call's parameters, which are of that group."""
        numbers = group["betas"][0], group["gamma"]
        if i not in self._beta1s or self._beta1s[i][0] != numbers:
            self._beta1s[i] = numbers, layers.beta1s(group, self._calls[i].layers)
        return self._beta1s[i][1]


def with_gradients(groups: Sequence[dict[str, Any]]) -> tuple[bool, ...]:
    """Return for each parameter whether it has a gradient."""
    return tuple(param.grad is not None for group in groups for param in group["params"])


def _facts(group: dict[str, Any]) -> tuple[Any, ...]:
    """What the calls follow from in a group, besides what its tensors look like."""
    return len(group["params"]), list(group["layers"]), float(group["lamb"]) > 0, group["foreach"], group["fused"]
