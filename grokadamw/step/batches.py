"""Group the parameters that have a gradient, with their state, into batches, one per backend call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends, layers
from .._numbers import as_real, resolved
from .._warn import warn
from ..backends import NO_SHARED_MEMORY, decoded, foreach, gpu, memory, reference
from ..backends.gpu_tables import Tables
from ..backends.memory import Ranges
from ..backends.types import Batch, Choice, Coded, written
from ..options import STATES, may_be_coded, rules_of
from ..shards import Shards, blocks_before, divisions, local, part, shards_of
from ..state import window
from ..state.formats import BLOCK, EXTRAS, is_coded, low_dtype
from ..state.slots import State, add_missing, check, check_grad, lay_out, new_counts

_FOREACH = Choice(foreach, "")


class Given(NamedTuple):
    """The inputs of a step."""

    groups: list[dict[str, Any]]
    state: MutableMapping[Tensor, State]
    options: dict[str, Any]  # of the whole optimizer
    scale: Any = None  # GradScaler's loss scale and overflow flag, if it leaves them to the optimizer
    found_inf: Any = None
    capturing: bool = False  # True while a CUDA graph is being captured
    compiling: bool = False  # True if torch.compile traces the writes of the step
    first_index: int = 0  # the index of the groups' first parameter in the optimizer
    shard_group: Any = None  # the ranks over which plain parameters are divided


class Member(NamedTuple):
    """Facts about a parameter, besides its tensors."""

    group: int  # index of the group whose options it has
    layer: int
    param_index: int  # its place among all parameters of the optimizer
    is_matrix: bool  # it has rows
    begun: bool = False  # it has begun its cycle of micro-batches
    blocks_before: int = 0  # number of its blocks on the ranks before this one


class Entry(NamedTuple):
    """A parameter that has a gradient."""

    param: Tensor
    grad: Tensor
    member: Member


class Kind(NamedTuple):
    """The properties that parameters with the same options must share to be in one batch."""

    choice: Choice
    device: torch.device
    shards: Shards | None
    dtypes: tuple[torch.dtype, ...]  # of the parameter, its gradient, m, v and, if there is one, μ
    coded: tuple[bool, ...] | None  # for each of `EXTRAS`, True if it exists; None if no tensor is coded


class Batches(NamedTuple):
    """The batches of one step, and facts about all of its gradients together."""

    params: list[Tensor]  # all that have a gradient, as the groups hold them
    batches: list[Batch]
    grads: list[tuple[Shards | None, list[Tensor]]]  # real, in group order; a list per division over ranks
    devices: list[torch.device]  # of the gradients
    tables: Tables | None = None  # the tables of the GPU's backend for these batches
    at: bytes | None = None  # the gradients' addresses, if they are known
    squares: Callable[[], float] | None = None  # returns Σ g² of all gradients
    can_be_judged: bool = False  # True if we know that the GPU's backend can measure all gradients at once
    dtensors: Sequence[Tensor] = ()  # DTensors that are written through their shards
    made: Sequence[tuple[Tensor, list[str]]] = ()  # the state that this step created, by name


def collect(given: Given, names: Mapping[int, str], missing: Collection[Tensor] = ()) -> list[Entry]:
    """Return the parameters that have a gradient, in group order. Those in `missing` get a gradient of zeros.

    Raises RuntimeError for a gradient, parameter or state that a step cannot use. `names` come from `set_layers`.
    """
    entries, indices = [], count(given.first_index)
    for i, group in enumerate(given.groups):
        layers.check_length(group, i)
        for param, layer in zip(group["params"], group["layers"], strict=True):
            index = next(indices)
            if param.grad is None and param not in missing:  # it may be a lazy module's, and have no shape yet
                continue
            member = Member(i, layer, index, param.dim() > 1)
            grad = torch.zeros_like(param) if param.grad is None else resolved(param.grad)
            entries.append(Entry(param, grad, member))
    for param, grad, member in entries:
        try:
            _check(param, grad, given.state.get(param, {}))
        except RuntimeError as error:
            raise RuntimeError(f"{layers.name_of(param, given.groups, names)}: {error}") from None
        if given.groups[member.group]["fused"] and param.device.type not in backends.FUSED_ON:
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of supported devices: "
                f"{backends.FUSED_ON}, but param_groups[{member.group}] has one on {param.device}: leave fused out"
            )
    return entries


def _check(param: Tensor, grad: Tensor, state: State) -> None:
    """Raise RuntimeError for a parameter, gradient or state that a step cannot use."""
    check(state, param)
    check_grad(param, grad)
    if any(memory.is_freed(x) for x in (param, grad, *state.values()) if isinstance(x, Tensor)):
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)}, its gradient or its state has no memory, as after "
            "untyped_storage().resize_(0): give it memory before optimizer.step()"
        )


def make_state(entries: Iterable[Entry], given: Given) -> list[tuple[Tensor, list[str]]]:
    """Create missing state as zeros and return its names for each parameter; convert state that no longer fits."""
    params = [entry.param for entry in entries]
    if any("param_low" in given.state[param] and low_dtype(param, given.options) is None for param in params):
        warn(
            "parameters were cast to another dtype after their last step, so the low bits of master_weight_bits are "
            "dropped: call full_precision_state_dict(model, optimizer) before the cast, and load it into the model "
            "after the cast",
            UserWarning,
        )
    counts = {} if given.compiling else new_counts(given.state, params)
    made = []
    for param, _, member in entries:
        lamb = given.groups[member.group]["lamb"]
        made.append((param, add_missing(given.state[param], param, given.options, lamb, counts.get(param))))
        lay_out(given.state[param], param, given.options)
    return made


def forget_state(made: Iterable[tuple[Tensor, list[str]]], state: MutableMapping[Tensor, State]) -> None:
    """Remove the state that was created for a step that was then skipped: such a step does not count."""
    for param, names in made:
        for name in names:
            del state[param][name]
        if not state[param]:
            del state[param]


class Columns(NamedTuple):
    """Parallel lists: the parameters that have a gradient, in the order of the groups, with their state."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    grok_emas: list[Any]  # None for a parameter without a slow gradient
    steps: list[Tensor]
    extras: Sequence[list[Any]] = ()  # a list for each of `EXTRAS`, with None where it is missing; empty without codes


def kind_of(
    row: Sequence[Any], extras: Sequence[Any], group: dict[str, Any], is_matrix: bool, shards: Shards | None
) -> tuple[Kind, int]:
    """Return the kind of a parameter and the width of the rows that its backend limits, from a row of `Columns`."""
    *tensors, step = (x for x in row if x is not None)
    coded = is_coded(tensors, extras, group)
    low = [extras[-1]] if coded and extras[-1] is not None else []
    choice = backends.choose([*tensors, *low], step, group, coded)
    cuts_rows = is_matrix and shards is not None and shards.cut_rows
    # rows.py cannot handle low bits; and all ranks must add up rows in one order, however their tensors lie in memory
    if cuts_rows and coded and (row[0].itemsize == 2 or backends.has_limits(group)):
        choice = Choice(decoded, "float32 copies, as ranks have parts of rows")
    has_rows = is_matrix and not (cuts_rows and choice.module is not decoded)
    there = tuple(x is not None for x in extras) if coded else None
    kind = Kind(choice, row[0].device, shards, tuple(x.dtype for x in tensors), there)
    return kind, backends.row_width(choice, row[0], coded) if has_rows else 0


def coded_of(columns: Columns, places: Sequence[int], members: Sequence[Member], options: dict[str, Any]) -> Coded:
    """Return the scales and low bits of the tensors at these places, how weights are rounded, and earlier blocks."""
    extras = [[column[i] for i in places] for column in columns.extras]
    m, v, mu, lows = (None if not column or column[0] is None else column for column in extras)
    before = [members[i].blocks_before for i in places]
    return Coded(m, v, mu, lows, options["rounding"] == "stochastic", before if any(before) else ())


def assemble(
    columns: Columns, members: Sequence[Member], kinds: Sequence[tuple[Kind, int]], options: dict[str, Any]
) -> tuple[list[tuple[Batch, list[int]]], Ranges | None]:
    """Return the batches, each with its tensors' places in the columns, and the memory that is written by address.

    `kinds` holds the kind of each parameter and the width of its rows.
    """
    rules = rules_of(options)
    lists: dict[Any, list[int]] = {}
    for i, (member, (kind, _)) in enumerate(zip(members, kinds, strict=True)):
        apart = i if rules.clips_each_tensor else member.begun
        lists.setdefault((member.group, kind, apart), []).append(i)
    made = []
    seen: Counter[int] = Counter()
    for (group, kind, _), places in lists.items():
        widths = [kinds[i][1] for i in places]
        of_batch = [members[i].layer for i in places]
        if rules.layers_by_place:
            of_batch, seen[group] = [seen[group]], seen[group] + 1
        p, g, m, v, mu, steps = ([column[i] for i in places] for column in columns[:6])
        batch = Batch(
            *(p, g, m, v, None if mu[0] is None else mu, steps),
            row_widths=widths,
            unlimited=[j for j, i in enumerate(places) if members[i].is_matrix and not widths[j]],
            choice=kind.choice,
            group=group,
            layers=tuple(of_batch),
            indices=tuple([members[i].param_index for i in places]),
            shards=kind.shards,
            begun=members[places[0]].begun,
            coded=None if kind.coded is None else coded_of(columns, places, members, options),
        )
        made.append((batch, places))
    ranges = _ranges(made, columns.grads)
    if ranges is None or not (ranges.overlap or ranges.meet(memory.addresses(columns.grads))):
        return made, ranges
    shared = [batch.choice.module in NO_SHARED_MEMORY and memory.share_memory(batch) for batch, _ in made]
    # batches on a GPU share launches, so they must not share memory with one another either
    on_gpu = [batch for (batch, _), is_shared in zip(made, shared, strict=True) if batch.choice.module is gpu]
    if len(on_gpu) > 1 and memory.share_memory(*on_gpu):
        shared = [is_shared or batch.choice.module is gpu for (batch, _), is_shared in zip(made, shared, strict=True)]
    made = [
        (without_addresses(batch, _for_shared(batch)) if is_shared else batch, places)
        for (batch, places), is_shared in zip(made, shared, strict=True)
    ]
    return made, _ranges(made, columns.grads)


def _for_shared(batch: Batch) -> Choice:
    """Return the backend for tensors that share memory. `foreach` copies halves, and loses all but one of the moves."""
    are_halves = batch.params[0].dtype != batch.exp_avgs[0].dtype
    return Choice(reference if are_halves else foreach, "parameters, gradients or state share memory")


def _ranges(made: Iterable[tuple[Batch, Any]], grads: list[Tensor]) -> Ranges | None:
    by_address = [batch for batch, _ in made if batch.choice.module in NO_SHARED_MEMORY]
    tensors = [x for batch in by_address for column in written(batch) for x in column]
    return Ranges(tensors, grads) if by_address else None


def without_addresses(batch: Batch, choice: Choice = _FOREACH) -> Batch:
    """Return the batch for a backend that takes no addresses: `foreach`, or `decoded` if tensors are coded."""
    if batch.choice.module in (reference, decoded):
        return batch
    if batch.coded is not None:
        # `decoded` limits all rows itself
        return batch._replace(choice=Choice(decoded, choice.reason), row_widths=None, unlimited=())
    limited = [i for i, width in enumerate(batch.row_widths or ()) if width]
    return batch._replace(choice=choice, row_widths=None, unlimited=sorted({*batch.unlimited, *limited}))


def with_windows(batch: Batch, states: Sequence[State]) -> Batch:
    """Return the batch with its windows. Their means are its slow gradients."""
    if batch.grok_emas is None:
        return batch
    return batch._replace(windows=[window.Window(*map(part, window.of(s, "grok_"))) for s in states])


def found_anew(entries: Sequence[Entry], given: Given) -> Batches:
    """Return batches for tensors that no signature describes: complex, traced, of subclasses, or some DTensors."""
    groups, state, options = given.groups, given.state, given.options
    rows, kinds, dtensors, extras, members = [], [], [], [], []
    grads: dict[Shards | None, list[Tensor]] = {shards: [] for shards in divisions(groups)}
    for entry in entries:
        s, shards = state[entry.param], shards_of(entry.param)
        if shards is not None:
            kept = [name for name in (*STATES, *EXTRAS) if name in s]
            dtensors += [entry.param, *map(s.__getitem__, kept)]
        tensors = (entry.param, entry.grad, s["exp_avg"], s["exp_avg_sq"], s.get("grok_ema"))
        row = [None if x is None else as_real(local(x, shards)) for x in tensors]
        rows.append((*row, s["step"]))
        extras.append([None if x is None else local(x, shards) for x in map(s.get, EXTRAS)])
        before = blocks_before(entry.param, BLOCK) if may_be_coded(options) else 0
        members.append(entry.member._replace(begun=bool(s.get("micro_step")), blocks_before=before))
        kinds.append(kind_of(rows[-1], extras[-1], groups[entry.member.group], entry.member.is_matrix, shards))
        grads.setdefault(shards, []).append(row[1])  # type: ignore[arg-type]
    columns = Columns(*map(list, zip(*rows, strict=True))) if rows else Columns([], [], [], [], [], [])
    columns = columns._replace(extras=list(map(list, zip(*extras, strict=True))))
    made, _ = assemble(columns, members, kinds, options)
    batches = [batch for batch, _ in made]
    if options["window_size"] is not None:
        batches = [with_windows(batch, [state[entries[i].param] for i in places]) for batch, places in made]
    devices = list(dict.fromkeys(grad.device for grad in columns.grads))
    return Batches([e.param for e in entries], batches, list(grads.items()), devices, dtensors=dtensors)
