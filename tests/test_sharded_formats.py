"""Tests of low-bit state and weights sharded over real processes: they equal one process's, also in checkpoints."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from grokadamw import GrokAdamW, full_precision_state_dict, load_full_precision_state_dict
from grokadamw.checkpoints import to_float32
from grokadamw.options import STATES
from grokadamw.shards import blocks_before
from grokadamw.state.formats import BLOCK

from .test_distributed import RANKS, in_processes, whole
from .test_precision import FORMATS, LOSSES

# name: shape, placement, and whether its shards are stored as int8 codes, which needs whole blocks
PARAMETERS: dict[str, tuple[tuple[int, ...], Any, bool]] = {
    "even": ((64, 128), Shard(0), True),
    "uneven": ((77, 97), Shard(0), True),
    "one row": ((1, 5000), Shard(0), True),  # the second rank has nothing
    "cube": ((31, 8, 20), Shard(0), True),
    "cut cube": ((8, 128, 20), Shard(1), False),
    "vector": ((8192,), Shard(0), True),
    "uneven vector": ((5000,), Shard(0), False),
    "columns": ((64, 256), Shard(1), True),
    "uneven columns": ((64, 100), Shard(1), False),
    "replicated": ((64, 97), Replicate(), True),
    "small": ((8, 8), Shard(0), False),
}
# parameters that have the same format on any number of ranks
ALIKE = [name for name, (_, _, is_coded) in PARAMETERS.items() if is_coded or name == "small"]
ROWS = ["even", "uneven", "one row", "cube", "vector"]  # sharding does not renumber their blocks


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype, mesh: Any, names: Collection[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            shape, placement, _ = PARAMETERS[name]
            x = (0.1 * torch.randn(shape)).to(dtype)
            self.register_parameter(name, nn.Parameter(x if mesh is None else distribute_tensor(x, mesh, [placement])))


def started(
    options: dict[str, Any], mesh: Any = None, names: Collection[str] = PARAMETERS.keys()
) -> tuple[Model, GrokAdamW]:
    dtype = torch.bfloat16 if options.keys() & {"master_weight_bits", "rounding"} else torch.float32
    model = Model(dtype, mesh, names)
    return model, GrokAdamW(model.named_parameters(), lr=0.01, gradient_clipping=0, **options)


def train(model: nn.Module, optimizer: GrokAdamW, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        for param in model.parameters():
            grad = torch.randn(param.shape).to(param.dtype)
            is_sharded = isinstance(param, DTensor)
            param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if is_sharded else grad
        optimizer.step()


def values(model: nn.Module, optimizer: GrokAdamW) -> dict[str, dict[str, Tensor]]:
    """Return each parameter and its state, gathered on every rank."""
    found = {}
    for name, param in model.named_parameters():
        kept = {"param": param.detach(), **optimizer.state[param]}
        found[name] = {key: whole(x.int() if x.dtype == torch.int16 else x).clone() for key, x in kept.items()}
    return found


def same(ours: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> bool:
    pairs = [(kept, expected[name]) for name, kept in ours.items()]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs)


def _trained(options: dict[str, Any], rank: int) -> Any:
    model, optimizer = started(options, init_device_mesh("cpu", (RANKS,)))
    train(model, optimizer, 0, 4)
    placements = True
    for param in model.parameters():
        for x in optimizer.state[param].values():
            placements &= x.dim() == 0 or (isinstance(x, DTensor) and x.placements == param.placements)
    coded = [name for name, param in model.named_parameters() if "exp_avg_scale" in optimizer.state[param]]
    return values(model, optimizer), placements, coded


def _before(rank: int) -> dict[str, int]:
    model, _ = started({}, init_device_mesh("cpu", (RANKS,)))
    return {name: blocks_before(param, BLOCK) for name, param in model.named_parameters()}


@pytest.mark.filterwarnings("ignore")
def test_ranks_have_dithers_of_their_own(tmp_path: Path) -> None:
    first, second = in_processes(_before, tmp_path)
    assert {*first.values()} == {0}
    # a shard that begins within a row's first block is not told apart from the first rank's
    assert {name for name, before in second.items() if before == 0} == {"uneven columns", "replicated"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("foreach", [None, True], ids=["the kernel", "decoded"])
@pytest.mark.parametrize("name", ["bfloat16", "int8", "24 bits", "32 bits", "stochastic"])
def test_two_ranks_have_the_bits_of_one_process(name: str, foreach: bool | None, tmp_path: Path) -> None:
    """With equal gradients, shards of whole rows or blocks have one process's bits; other weights are nearly equal."""
    options = {**FORMATS[name], "foreach": foreach}
    model, optimizer = started(options)
    train(model, optimizer, 0, 4)
    expected = values(model, optimizer)
    for found, placements, coded in in_processes(functools.partial(_trained, options), tmp_path):
        assert placements
        if "int8" in FORMATS[name].values():
            assert coded == [name for name, (_, _, is_coded) in PARAMETERS.items() if is_coded]
        for param_name in ROWS + ["replicated"]:
            assert same({param_name: found[param_name]}, {param_name: expected[param_name]}), param_name
        for param_name, kept in expected.items():
            torch.testing.assert_close(found[param_name]["param"], kept["param"], atol=0.01, rtol=0.02)


def _full_weights(rank: int) -> bool:
    """Return True if float32 weights exported from shards equal one process's, and can be loaded back exactly."""
    alone, plain = started(FORMATS["32 bits"] | {"foreach": True})
    model, optimizer = started(FORMATS["32 bits"] | {"foreach": True}, init_device_mesh("cpu", (RANKS,)))
    train(alone, plain, 0, 3)
    train(model, optimizer, 0, 3)
    expected, found = full_precision_state_dict(alone, plain), full_precision_state_dict(model, optimizer)
    equal = [torch.equal(whole(found[name]), expected[name]) for name in [*ROWS, "replicated"]]
    other, resumed = started(FORMATS["32 bits"], init_device_mesh("cpu", (RANKS,)))
    load_full_precision_state_dict(other, resumed, found)
    again = full_precision_state_dict(other, resumed)
    return all(equal) and all(torch.equal(again[name].to_local(), x.to_local()) for name, x in found.items())


@pytest.mark.filterwarnings("ignore")
def test_float32_weights_come_out_of_shards_and_go_in(tmp_path: Path) -> None:
    assert in_processes(_full_weights, tmp_path) == [True, True]


def _codes_on_one_rank(rank: int) -> str:
    """Return the error for codes in place of float32 numbers. The second rank's part of the row is empty."""
    model = nn.Linear(5000, 1, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = GrokAdamW(model.named_parameters())
    model(torch.ones(2, 5000)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["state_dtype"] = "int8"
    saved["state"][0]["exp_avg"] = torch.full_like(saved["state"][0]["exp_avg"], 3.0)
    with pytest.raises(ValueError, match="without their scales") as caught:
        optimizer.load_state_dict(saved)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_all_ranks_refuse_codes_that_one_rank_has(tmp_path: Path) -> None:
    first, second = in_processes(_codes_on_one_rank, tmp_path)
    assert first == second


def save(model: nn.Module, optimizer: GrokAdamW, folder: Path) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder, no_dist=not dist.is_initialized())


def begin_to_save(model: nn.Module, optimizer: GrokAdamW, folder: Path) -> Any:
    """Start to save a checkpoint, and return a future, so that training can continue meanwhile.

    A thread writes the checkpoint. Its collectives need their own group, because a step's may run in between.
    """
    of_model, of_optimizer = get_state_dict(model, optimizer)
    both = {"model": of_model, "optimizer": of_optimizer}
    return dcp.async_save(both, checkpoint_id=folder, process_group=dist.new_group(backend="gloo"))


def load(model: nn.Module, optimizer: GrokAdamW, folder: Path) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    loaded = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(loaded, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])


def _saved_by_two(options: dict[str, Any], folder: Path, rank: int) -> Any:
    """Save and resume on two ranks. Return whether loading changed bits, whether resuming is exact, and the values."""
    mesh = init_device_mesh("cpu", (RANKS,))
    model, optimizer = started(options, mesh, ALIKE)
    train(model, optimizer, 0, 3)
    at_save = values(model, optimizer)
    saving = begin_to_save(model, optimizer, folder / "of two")
    train(model, optimizer, 3, 5)
    saving.result()
    other, resumed = started(options, mesh, ALIKE)
    load(other, resumed, folder / "of two")
    moved = not same(values(other, resumed), at_save)
    train(other, resumed, 3, 5)
    return moved, same(values(model, optimizer), values(other, resumed)), at_save


def _loaded_by_two(options: dict[str, Any], folder: Path, rank: int) -> Any:
    model, optimizer = started(options, init_device_mesh("cpu", (RANKS,)), ALIKE)
    load(model, optimizer, folder / "of one")
    found = values(model, optimizer)
    train(model, optimizer, 5, 6)
    return found, values(model, optimizer)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "int8",
        "24 bits",
        *(pytest.param(x, marks=pytest.mark.long) for x in ("float32", "bfloat16", "32 bits", "stochastic")),
    ],
)
def test_checkpoints_go_from_two_ranks_to_one_and_back(name: str, tmp_path: Path) -> None:
    options = {**FORMATS[name], "foreach": True}
    (moved, goes_on, at_save), *others = in_processes(functools.partial(_saved_by_two, options, tmp_path), tmp_path)
    assert not moved
    assert goes_on
    assert all(other[1] for other in others)
    model, optimizer = started(options, None, ALIKE)
    load(model, optimizer, tmp_path / "of two")
    assert same(values(model, optimizer), at_save)
    train(model, optimizer, 3, 5)
    save(model, optimizer, tmp_path / "of one")
    at_save = values(model, optimizer)
    train(model, optimizer, 5, 6)
    for found, after in in_processes(functools.partial(_loaded_by_two, options, tmp_path), tmp_path):
        assert same(found, at_save)
        assert all(same({name: after[name]}, {name: values(model, optimizer)[name]}) for name in ROWS)


def _by_ranks(options: dict[str, Any], folder: Path, ranks: int, names: list[str], rank: int) -> list[Any]:
    """Resume from each of these checkpoints, save another on the way, and resume from that one, too."""
    found = []
    for name in names:
        model, optimizer = started(options, init_device_mesh("cpu", (ranks,)), ALIKE)
        if name:
            load(model, optimizer, folder / name)
        at_load = values(model, optimizer)
        train(model, optimizer, 3, 5)
        at_save, target = values(model, optimizer), folder / f"{name} {ranks}".strip()
        saving = begin_to_save(model, optimizer, target)
        train(model, optimizer, 5, 7)
        saving.result()
        twin, other = started(options, init_device_mesh("cpu", (ranks,)), ALIKE)
        load(twin, other, target)
        is_saved = same(values(twin, other), at_save)
        train(twin, other, 5, 7)
        found.append((is_saved and same(values(twin, other), values(model, optimizer)), at_load, at_save))
    return found


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8"])
def test_checkpoints_go_between_one_two_and_four_ranks(name: str, tmp_path: Path) -> None:
    """Two ranks save a checkpoint. One, two and four ranks resume from it and save, and then from each other's."""
    options = FORMATS[name]
    saved: dict[str, Any] = {}  # the keys list the numbers of ranks that the run had, in order

    def go_on(ranks: int, names: list[str]) -> None:
        for results in in_processes(functools.partial(_by_ranks, options, tmp_path, ranks, names), tmp_path, ranks):
            for start, (goes_on, at_load, at_save) in zip(names, results, strict=True):
                assert goes_on
                assert not start or same(at_load, saved[start])
                saved[f"{start} {ranks}".strip()] = at_save

    def go_on_alone(name: str) -> None:
        model, optimizer = started(options, None, ALIKE)
        load(model, optimizer, tmp_path / name)
        assert same(values(model, optimizer), saved[name])
        train(model, optimizer, 3, 5)
        saved[f"{name} 1"] = values(model, optimizer)
        save(model, optimizer, tmp_path / f"{name} 1")

    go_on(2, [""])
    go_on_alone("2")
    go_on(4, ["2", "2 1"])
    go_on(2, ["2", "2 1", "2 4"])
    go_on_alone("2 4")
    largest = 0.0
    for ways in (["2 1", "2 2", "2 4"], ["2 1 2", "2 4 2", "2 1 4", "2 4 1"]):
        for one, other in itertools.pairwise(ways):
            for param_name, kept in saved[one].items():
                for key, x in kept.items():
                    if param_name in ROWS:
                        assert torch.equal(x, saved[other][param_name][key])
                    if key == "param":
                        largest = max(largest, (x - saved[other][param_name][key]).abs().max().item())
    print(f"{name}: on 1, 2 and 4 ranks, and from each to each, weights differ by {largest:.1e} at most")
    # parts of rows are rounded with other dithers; the lr is 0.01
    assert largest <= {"float32": 0, "bfloat16": 0.001, "int8": 0.03}[name]


def _codes_of_other_ranks(rank: int) -> str:
    p = nn.Parameter(distribute_tensor(torch.ones(4160), init_device_mesh("cpu", (2,)), [Shard(0)]))
    p.grad = torch.ones_like(p)
    optimizer = GrokAdamW([p], state_dtype="int8")
    optimizer.step()
    state_dict = optimizer.state_dict()
    state_dict["state"][0]["exp_avg"].fill_(3.0)  # torch.distributed.checkpoint copies codes in this way
    with pytest.raises(ValueError, match="exp_avg of parameter 0 holds codes") as raised:
        optimizer.load_state_dict(state_dict)
    return str(raised.value)


def test_codes_of_another_number_of_ranks_name_the_way_out(tmp_path: Path) -> None:
    """The error asks for as many ranks as saved the codes. Before, it asked for the state_dtype already in use."""
    for said in in_processes(_codes_of_other_ranks, tmp_path):
        assert "on as many ranks as saved it: these cut its blocks of 64" in said


def _converted(name: str, rank: int) -> Any:
    """Convert sharded int8 state to float32, directly and by way of another format; let torch gather and load it."""
    mesh = init_device_mesh("cpu", (RANKS,))
    model, optimizer = started(FORMATS["int8"] | {"foreach": True}, mesh, ALIKE)
    train(model, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    numbers = [
        {key: whole(x) for key, x in state.items() if key in STATES} for state in to_float32(saved)["state"].values()
    ]
    other = started(FORMATS[name], mesh, ALIKE)[1]
    other.load_state_dict(saved)
    alike = [
        x.dim() == 0 or x.placements == param.placements for param, state in other.state.items() for x in state.values()
    ]
    found = [
        {key: whole(x) for key, x in state.items() if key in STATES}
        for state in to_float32(other.state_dict())["state"].values()
    ]
    settings = StateDictOptions(full_state_dict=True)
    gathered = get_optimizer_state_dict(model, optimizer, options=settings)
    twin, resumed = started(FORMATS["int8"] | {"foreach": True}, mesh, ALIKE)
    set_optimizer_state_dict(twin, resumed, gathered, options=settings)
    states, expected = optimizer.state.values(), resumed.state.values()
    same_bits = [torch.equal(whole(a[key]), whole(b[key])) for a, b in zip(states, expected, strict=True) for key in a]
    train(twin, resumed, 3, 4)
    return numbers, found, all(alike), all(same_bits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_shards_go_into_another_format(name: str, tmp_path: Path) -> None:
    model, optimizer = started(FORMATS["int8"] | {"foreach": True}, None, ALIKE)
    train(model, optimizer, 0, 3)
    expected = dict(zip(ALIKE, to_float32(optimizer.state_dict())["state"].values(), strict=True))
    for numbers, found, alike, same_bits in in_processes(functools.partial(_converted, name), tmp_path):
        assert alike
        assert same_bits
        for param_name, before, after in zip(ALIKE, numbers, found, strict=True):
            for key, x in before.items():
                assert (after[key] - x).norm() <= LOSSES[name] * x.norm()
                if param_name in ROWS:
                    assert torch.equal(x, expected[param_name][key])


def network() -> nn.Module:
    torch.manual_seed(0)
    # a cut between rows is harmless; a vector cut within a block would be rounded with other dithers: so no bias of 101
    return nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 101, bias=False), nn.GELU(), nn.Linear(101, 1))


CUT_ROWS: dict[str, tuple[dict[str, Any], torch.dtype, list[tuple[int, int]]]] = {
    "low bits and an empty shard": ({"master_weight_bits": 24}, torch.bfloat16, [(5, 1), (4, 6)]),
    "codes and an empty shard": ({"state_dtype": "bfloat16"}, torch.float32, [(4097, 1), (4, 6)]),
    "gradients of other strides": ({"state_dtype": "bfloat16"}, torch.float32, [(4, 6), (1400, 3)]),
}


def _cut_rows(name: str, rank: int | None) -> list[Tensor]:
    """Return weights whose rows were limited, by one process or with the columns divided between two."""
    options, dtype, shapes = CUT_ROWS[name]
    mesh = None if rank is None else init_device_mesh("cpu", (RANKS,))
    random = torch.Generator().manual_seed(0)

    def placed(x: Tensor) -> Any:
        return x if mesh is None else distribute_tensor(x, mesh, [Shard(1)])

    params = [nn.Parameter(placed(torch.randn(shape, generator=random).to(dtype))) for shape in shapes]
    optimizer = GrokAdamW(params, lr=0.1, max_row_norm=0.9, max_row_change=0.3, gradient_clipping=0, **options)
    for _ in range(3):
        for p in params:
            p.grad = placed(torch.randn(p.shape, generator=random).to(dtype))
            if mesh is not None and name == "gradients of other strides":
                transposed = p.grad.to_local().t().contiguous().t()
                how = {"run_check": False, "shape": p.shape, "stride": p.stride()}
                p.grad = DTensor.from_local(transposed, mesh, [Shard(1)], **how)
        optimizer.step()
    return [whole(p.detach()).float() for p in params]


@pytest.mark.parametrize("name", CUT_ROWS)
def test_ranks_add_up_rows_in_one_order_however_their_shards_lie(name: str, tmp_path: Path) -> None:
    expected = _cut_rows(name, None)
    for found in in_processes(functools.partial(_cut_rows, name), tmp_path):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert max(x.norm(dim=1).max() for x in expected) > 0.85


def _fsdp(options: dict[str, Any], rank: int | None) -> list[Tensor]:
    """Train on the same batches on every rank, or in one process if `rank` is None, and return the weights."""
    model = network().bfloat16() if "master_weight_bits" in options else network()
    if rank is not None:
        mesh = init_device_mesh("cpu", (RANKS,))
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=mesh)
    optimizer = GrokAdamW(model.named_parameters(), lr=0.01, foreach=True, gradient_clipping=0.0, **options)
    for step in range(5):
        x = torch.randn(32, 96, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert "exp_avg_scale" in optimizer.state[model[0].weight]
    return [whole(param.detach()) for param in model.parameters()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["int8", "24 bits"])
def test_fsdp_trains_as_one_process(name: str, tmp_path: Path) -> None:
    """Ranks that share a batch have one process's gradient, so the weights must equal one process's bit for bit."""
    expected = _fsdp(FORMATS[name], None)
    for found in in_processes(functools.partial(_fsdp, FORMATS[name]), tmp_path):
        assert all(map(torch.equal, found, expected))
