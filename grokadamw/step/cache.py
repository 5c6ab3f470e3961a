"""The cache of batches: reuse the batches of earlier steps while they are still valid.

Building batches takes longer than a small step. So `Cache` keeps a plan for each of the most recent sets of gradients,
and checks at every step that the whole plan still holds. No other module knows if batches were cached or rebuilt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain, compress, count
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from .._numbers import as_real, reads_are_free, resolved
from ..backends import cpu, gpu, memory
from ..backends.gpu_tables import Tables
from ..backends.memory import Ranges, TensorSignature
from ..backends.types import Batch, Choice
from ..options import GROUP_OPTIONS, STATES, may_be_coded, rules_of
from ..shards import PLAIN, Shards, alike, blocks_before, divisions, local, parts, shards_of
from ..state.formats import BLOCK, EXTRAS
from ..state.sizes import is_frozen
from ..state.slots import WINDOW, State, add_missing, lay_out, needs_mu
from . import batches
from .batches import Batches, Columns, Given, Kind, Member
from .capture import any_capturable

SETS = 8  # how many plans are kept, each for one set of parameters with gradients
_MOST_KINDS = 1 << 12  # how many looks of parameters are kept with their kind
_EXP_AVG, _EXP_AVG_SQ, _STEP = itemgetter("exp_avg"), itemgetter("exp_avg_sq"), itemgetter("step")
_PARAMS, _LAYERS = itemgetter("params"), itemgetter("layers")
_OPTIONS = itemgetter(*[name for name in GROUP_OPTIONS if name not in ("betas", "layer")])
# fields of a batch that a plan keeps as they are; the others hold tensors or are derived from tensors
_WITHOUT_TENSORS = ("row_widths", "unlimited", "choice", "group", "layers", "indices", "shards", "begun")


class Cache:
    """Provides the batches of a step, from the plan of an earlier step if that plan still holds.

    It holds no tensors, so it never keeps their memory alive. Each step brings its own tensors, and the plan checks
    that they look as before. A tensor's look is its type, device, dtype, shape and strides.
    """

    def __init__(self) -> None:
        # by which parameters have a gradient and which of them have begun a cycle; the least recently used comes first
        self.plans: dict[tuple[tuple[bool, ...], ...], _Plan] = {}
        self._kinds: dict[Any, tuple[Kind, int]] = {}  # look → kind and row width

    def find(self, given: Given, names: Mapping[int, str], missing: Collection[Tensor] = ()) -> Batches:
        """Return the batches of this step, and create missing state. See `collect` for arguments and errors."""
        made: list[tuple[Tensor, list[str]]] = []
        known: tuple[Batches, _Plan | None] | None = None if missing else self._recall(given)
        if known is None:
            entries = batches.collect(given, names, missing)
            made = batches.make_state(entries, given)
            known = None if missing else self._recall(given, checked=True)
            known = known or (batches.found_anew(entries, given), None)
        found, plan = known
        if made:
            found = found._replace(made=made)
        tables = None
        if plan is not None and plan.gpus and not given.compiling:
            tables = plan.tables(given.capturing, any_capturable(given.groups))
            found = found._replace(tables=tables)
        if not memory.memory_is_all(given.compiling):
            return found._replace(batches=list(map(batches.without_addresses, found.batches)), squares=None)
        if given.capturing and tables is None:
            off_gpu = [batches.without_addresses(b) if b.choice.module is gpu else b for b in found.batches]
            return found._replace(batches=off_gpu)
        return found

    def describe(self, given: Given) -> str:
        """Return a line per backend: how many parameters it takes, and why. Missing gradients and state are guessed."""
        groups, state = given.groups, given.state
        found = self._recall(given)
        choices = [batch.choice for batch in found[0].batches for _ in batch.params] if found else []
        pairs = [(param, group) for group in groups for param in group["params"]]
        pairs = [(param, group) for param, group in pairs if not is_frozen(param, state)] or pairs
        if len(choices) != len(pairs):
            choices = [_likely_choice(param, state.get(param, {}), group, given.options) for param, group in pairs]
        lines = []
        for choice, uses in Counter(choices).items():
            share = "" if uses == len(choices) else f" for {uses} parameter{'s' * (uses > 1)}"
            lines.append(f"{choice.module.__name__.rpartition('.')[2]}{share}: {choice.reason}")
        return "\n".join(lines)

    def _recall(self, given: Given, checked: bool = False) -> tuple[Batches, _Plan] | None:
        """Return the batches of this step and their plan, or None if `collect` must check something first."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return None
        windows = given.options["window_size"] is not None
        try:
            seen = _seen(given)
        except (KeyError, TypeError):  # an incomplete state
            return None
        try:
            plan = self.plans.get(seen.key)
            found = plan.batches_for(seen) if plan is not None and plan.facts == seen.facts else None
            if found is None and (checked or not windows):  # signatures do not include the shapes of windows
                plan = self._new_plan(seen, given, checked)
                found = None if plan is None else plan.batches_for(seen)
        except RuntimeError:  # a tensor without memory
            return None
        if found is None or plan is None:
            return None
        if len(self.plans) > 1:
            self.plans[seen.key] = self.plans.pop(seen.key)
        if windows:
            of_batches = [[given.state[p] for p in batch.params] for batch in found.batches]
            found = found._replace(batches=list(map(batches.with_windows, found.batches, of_batches)))
        return found, plan

    def _new_plan(self, seen: Seen, given: Given, checked: bool) -> _Plan | None:
        """Make a plan and keep it. Return None if there can be none, or if `collect` must check a new look first."""
        groups, options, columns, facts = given.groups, given.options, seen.columns, seen.facts
        if not _are_plain(columns, seen.written) or any(len(g["layers"]) != len(g["params"]) for g in groups):
            return None
        # Check that all tensors of a parameter are divided alike. Plain tensors have the spec None. Missing ones have
        # it, too, and are left out. Without DTensors there are no specs, and this loop does nothing.
        tensors_of = zip(columns.params, *columns[2:5], *columns.extras, columns.grads, strict=True)
        for tensors, specs in zip(tensors_of, zip(*facts.specs, strict=True), strict=False):
            if not alike([spec for x, spec in zip(tensors, specs, strict=True) if x is not None]):
                return None
        shards = list(map(shards_of, seen.params))
        indices = count(given.first_index)
        places = [
            (i, layer, next(indices))
            for i, layers in zip(facts.first_alike, facts.layers, strict=True)
            for layer in layers
        ]
        has_blocks, members = may_be_coded(options), []
        for i, (place, param) in enumerate(zip(compress(places, seen.present), seen.params, strict=True)):
            begun = bool(facts.begun) and facts.begun[i]
            members.append(Member(*place, param.dim() > 1, begun, blocks_before(param, BLOCK) if has_blocks else 0))
        needing = [needs_mu(options, group["lamb"]) for group in groups]
        if any(mu is None and needing[m.group] for m, mu in zip(members, columns.grok_emas, strict=True)):
            return None
        watched = [*seen.written, *columns.grads]
        signature = TensorSignature(watched, len(seen.written))
        look_of = dict(zip(map(id, watched), signature.looks(), strict=True)) | {id(None): None}
        looks = _looks(columns, look_of, shards, [groups[member.group] for member in members])
        if checked:
            if len(self._kinds) > _MOST_KINDS:
                self._kinds.clear()
            for i, (look, member) in enumerate(zip(looks, members, strict=True)):
                if look not in self._kinds:
                    row, extras = [column[i] for column in columns[:6]], [column[i] for column in columns.extras]
                    kind = batches.kind_of(row, extras, groups[member.group], member.is_matrix, shards[i])
                    self._kinds[look] = kind
        kinds = [self._kinds[look] for look in looks if look in self._kinds]
        if len(kinds) < len(looks):
            return None
        made, ranges = batches.assemble(columns, members, kinds, options)
        divided: dict[Shards | None, list[int]] = {way: [] for way in divisions(groups)}
        for i, way in enumerate(shards):
            divided.setdefault(way, []).append(i)
        self.plans.pop(seen.key, None)
        if len(self.plans) >= SETS:
            del self.plans[next(iter(self.plans))]
        self.plans[seen.key] = plan = _Plan(seen, members, made, ranges, signature, options, divided)
        return plan


def _likely_choice(param: Tensor, state: State, group: dict[str, Any], options: dict[str, Any]) -> Choice:
    """Return the backend for a parameter with all the state that a step needs.

    A gradient that is missing, or placed in another way, is taken to be like the parameter: placing it would make other
    ranks wait. No window is made: it may be large, and decides nothing.
    """
    shards, whole, options = shards_of(param), dict(state), {**options, "window_size": None}
    add_missing(whole, param, options, group["lamb"])
    lay_out(whole, param, options)
    grad = param if param.grad is None or shards_of(param.grad) != shards else resolved(param.grad)
    columns = (param, grad, *map(whole.get, STATES)), map(whole.get, EXTRAS)
    row, extras = ([None if x is None else as_real(local(x, shards)) for x in column] for column in columns)
    kind, _ = batches.kind_of([*row, whole["step"]], extras, group, param.dim() > 1, shards)
    return kind.choice


class Facts(NamedTuple):
    """The conditions under which a plan holds, besides the looks of the tensors."""

    sizes: list[int]  # each group's number of parameters
    first_alike: list[int]  # for each group, the index of the first with the same options
    asked: list[tuple[bool, Any, Any, bool]]  # for each group: is λ above 0, foreach, fused, are rows limited
    layers: list[list[int]]  # of each group
    begun: list[bool]  # for each parameter: has it begun its cycle of micro-batches? Empty without cycles
    specs: list[list[Any]]  # torch's specs, which say how DTensors are divided; empty without DTensors
    first_index: int  # the index of the groups' first parameter in the optimizer


class Seen(NamedTuple):
    """The tensors that a step finds: the parameters that have a gradient, and their state."""

    params: list[Tensor]  # as the groups hold them
    columns: Columns  # this rank's parts
    written: list[Tensor]  # all tensors that a step writes, in the order of the columns
    has: list[bool]  # for each parameter: does it have μ? Then the same for each of `EXTRAS`
    dtensors: list[Tensor]  # DTensors that are written through their shards
    present: tuple[bool, ...]  # for each parameter: does it have a gradient?
    facts: Facts

    @property
    def key(self) -> tuple[tuple[bool, ...], ...]:
        """The key of the plan: which parameters have a gradient, and which of them have begun a cycle."""
        return self.present, tuple(self.facts.begun)


def _seen(given: Given) -> Seen:
    """Collect parameters, gradients and state; raise KeyError or TypeError if anything that a plan needs is missing."""
    groups, state, options = given.groups, given.state, given.options
    params = [param for group in groups for param in group["params"]]
    are_plain = set(map(type, params)) <= PLAIN
    grads: list[Any] = [param.grad for param in params]
    present = tuple([grad is not None for grad in grads])
    if not all(present):
        params, grads = list(compress(params, present)), list(compress(grads, present))
    # Hashing a parameter runs Python code. Skip the lookups if `state` holds exactly these parameters, in this order.
    in_order = len(state) == len(params) and all(map(is_, state, params))
    states: list[State] = list(state.values() if in_order else map(state.get, params))  # type: ignore[arg-type]
    if options["window_size"] is not None and not (
        are_plain and all(WINDOW[0] in s or "grok_ema" not in s for s in states)
    ):
        raise KeyError(WINDOW[0])
    p, m, v, steps = params, list(map(_EXP_AVG, states)), list(map(_EXP_AVG_SQ, states)), list(map(_STEP, states))
    mus = [s.get("grok_ema") for s in states]
    extras: list[list[Any]] = []
    if may_be_coded(options):
        extras = [[s.get(name) for s in states] for name in EXTRAS]
    specs, dtensors = list[list[Any]](), list[Tensor]()
    if not are_plain:
        lists = [params, m, v, mus, *extras]
        specs, (p, m, v, mus, *extras, grads) = parts([*lists, grads])
        # strict=False leaves out the gradients' specs, which come last
        of_lists = zip(chain.from_iterable(lists), chain.from_iterable(specs), strict=False)
        dtensors = [x for x, spec in of_lists if spec is not None]
    has = [mu is not None for mu in mus]
    written = [*p, *m, *v, *compress(mus, has), *steps]
    if extras:
        has_extras = [x is not None for column in extras for x in column]
        written += compress(chain.from_iterable(extras), has_extras)
        has += has_extras
    begun = [bool(s.get("micro_step")) for s in states] if options["accumulation_steps"] > 1 else []
    facts = Facts(
        sizes=list(map(len, map(_PARAMS, groups))),
        first_alike=_first_alike(groups, options),
        # written out, as a call for each of many groups would take longer than the rest
        asked=[
            (g["lamb"] > 0, g["foreach"], g["fused"], bool(g["max_row_norm"] or g["max_row_change"])) for g in groups
        ],
        layers=list(map(_LAYERS, groups)),
        begun=begun,
        specs=specs,
        first_index=given.first_index,
    )
    return Seen(params, Columns(p, grads, m, v, mus, steps, extras), written, has, dtensors, present, facts)


def _first_alike(groups: Sequence[dict[str, Any]], options: dict[str, Any]) -> list[int]:
    """Return, for each group, the index of the first with the same options: their parameters share batches."""
    if len(groups) == 1 or options["accumulation_steps"] > 1 or rules_of(options).signals_for_each_group:
        return list(range(len(groups)))  # each group has its own cycle numbers, or signal
    # a CUDA graph reads α and the boosts separately for each group
    keys = [(*_OPTIONS(g), *g["betas"], g["capturable"] and i) for i, g in enumerate(groups)]
    firsts: dict[Any, int] = {}
    return [firsts.setdefault(key, i) for i, key in enumerate(keys)]


def _are_plain(columns: Columns, written: list[Tensor]) -> bool:
    """Return True if a signature describes these tensors completely."""
    if not set(map(type, written)) <= PLAIN or not set(map(type, columns.grads)) <= {Tensor}:
        return False
    if any(map(torch.is_complex, columns.params)) or any(map(Tensor._is_zerotensor, columns.grads)):
        return False
    return not any(map(Tensor.is_neg, [*written, *columns.grads]))


def _looks(
    columns: Columns, look_of: Mapping[int, Any], shards: Sequence[Shards | None], groups: Sequence[dict[str, Any]]
) -> list[Any]:
    """Return, for each parameter, all that decides its kind; `look_of` holds the look of each tensor, by its id."""
    rows = zip(*columns[:6], *columns.extras, strict=True)
    return [
        (group["foreach"], group["fused"], backends.has_limits(group), way, *[look_of[id(x)] for x in row])
        for group, way, row in zip(groups, shards, rows, strict=True)
    ]


class _Plan:
    """The batches for a set of gradients, without their tensors, and the looks that the tensors must have."""

    def __init__(
        self,
        seen: Seen,
        members: Sequence[Member],
        made: Sequence[tuple[Batch, list[int]]],
        ranges: Ranges | None,
        signature: TensorSignature,
        options: dict[str, Any],
        divided: Mapping[Shards | None, list[int]],
    ) -> None:
        self._ranges, self._signature, self._has = ranges, signature, seen.has
        # copy the layers: the group's list may be changed in place
        self.facts = seen.facts._replace(layers=list(map(list, seen.facts.layers)))
        self._places, self._members, self._options = [places for _, places in made], members, options
        order = [place for _, places in made for place in places]
        self._order = None if order == list(range(len(order))) else order
        ends = list(accumulate(len(places) for _, places in made))
        self._spans = list(zip([0, *ends], ends, strict=False))
        self._batches = []
        for batch, _ in made:
            rest = {name: getattr(batch, name) for name in _WITHOUT_TENSORS}
            self._batches.append((batch.grok_emas is not None, backends.keep(batch), rest))
        self._coded = [batch.coded is not None for batch, _ in made]
        grads, gpus = seen.columns.grads, [batch.params[0].device for batch, _ in made if batch.choice.module is gpu]
        # A signature does not show `is_neg`. It is set only on views of imaginary parts. These have gaps in memory,
        # unless they have one element, so gradients of one element are checked at each step.
        self._of_one = [i for i, grad in enumerate(grads) if grad.numel() == 1]
        self.gpus, self._tables = list(dict.fromkeys(gpus)), dict[Any, Tables]()
        self._devices = list(dict.fromkeys(grad.device for grad in grads))
        self._can_be_judged = len(self._devices) == 1 and gpu.can_sum(grads)
        readable = all(map(reads_are_free, self._devices)) and not rules_of(options).clips_each_tensor
        is_fastest = readable and backends.sum_of_squares(options, False) is backends.fastest_sum_of_squares
        # the places of the gradients, for each way of division
        self._divided = list(divided.items()) or [(None, list[int]())]
        is_fastest &= len(self._divided) == 1
        self._at, self._squares = memory.addresses(grads), cpu.squares_by_address(grads) if is_fastest else None

    def batches_for(self, seen: Seen) -> Batches | None:
        """Return the batches with the tensors of this step; None if something has changed."""
        columns, grads = seen.columns, seen.columns.grads
        at = self._signature.other_addresses([*seen.written, *grads]) if seen.has == self._has else None
        if at is None or any(map(Tensor.is_neg, [grads[i] for i in self._of_one])):
            return None
        if at != self._at and self._ranges is not None and self._ranges.meet(at):
            return None
        self._at, order = at, self._order
        lists = columns[:6]
        p, g, m, v, mu, steps = lists if order is None else ([column[i] for i in order] for column in lists)
        made = []
        for (has_mu, addresses, rest), (start, end) in zip(self._batches, self._spans, strict=True):
            if addresses is not None:
                here = at[8 * start : 8 * end]
                if order is not None:
                    here = b"".join([at[8 * i : 8 * i + 8] for i in order[start:end]])
                addresses = addresses._replace(grads=here)
            own = slice(start, end)
            slow = mu[own] if has_mu else None
            made.append(Batch(p[own], g[own], m[own], v[own], slow, steps[own], addresses, **rest))
        for i in compress(range(len(made)), self._coded):
            coded = batches.coded_of(columns, self._places[i], self._members, self._options)
            made[i] = made[i]._replace(coded=coded)
        lists_of_grads = [(self._divided[0][0], grads)]
        if len(self._divided) > 1:
            lists_of_grads = [(shards, [grads[i] for i in places]) for shards, places in self._divided]
        squares = None if self._squares is None else partial(self._squares, at)
        known = lists_of_grads, self._devices, None, at, squares, self._can_be_judged
        return Batches(seen.params, made, *known, seen.dtensors)

    def tables(self, capturing: bool, capturable: bool) -> Tables | None:
        """Return the tables on the GPU for the current stream, or during a capture the graph's own tables."""
        if capturing:
            return next((own for tables in self._tables.values() if (own := tables.captured())), None)
        tables = self._tables.setdefault(gpu.streams(self.gpus), Tables())
        if capturable:
            tables.may_be_captured(len(self._members), 2 * len(self._batches))
        return tables
