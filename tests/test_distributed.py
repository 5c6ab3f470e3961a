"""Tests with real processes over gloo: ranks agree on α, and shards on the norm."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

from grokadamw import (
    Accumulate,
    GrokAdamW,
    Grokfast,
    GrokfastMA,
    _numbers,
    distributed,
    grokadamw,
    signals,
    step_in_backward,
)
from grokadamw import _trainers as trainers
from grokadamw.distributed import span_all_ranks
from grokadamw.signals import AccuracyGap, SlowGradient, memorisation
from grokadamw.state import slots
from grokadamw.step import cache, stages

from .models import KEEPERS, network, train

RANKS = 2


def in_processes(function: Any, folder: Path, ranks: int = RANKS) -> list[Any]:
    """Return what function(rank) returns on each of the ranks."""
    (folder / "rendezvous").unlink(missing_ok=True)
    mp.start_processes(_process, args=(function, folder, ranks), nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _process(rank: int, function: Any, folder: Path, ranks: int) -> None:
    gc.freeze()  # looking for garbage among all that is imported would take longer than a test
    torch.set_num_threads(1)
    meeting, wait = f"file://{folder}/rendezvous", timedelta(seconds=30)  # a rank that waits longer fails
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=wait)
    try:
        torch.save(function(rank), folder / f"{rank}.pt")
    finally:
        gc.collect()  # sharded models hold process groups, which must be freed before the interpreter exits
        dist.destroy_process_group()


def _signals_that_differ(rank: int) -> list[float]:
    p = torch.nn.Parameter(torch.ones(3))
    alphas = []
    for fns in (lambda: float(rank), lambda: None if rank else 0.5, lambda: None, None, []):
        optimizer = GrokAdamW([p], grokking_signal_fns=fns)  # type: ignore[arg-type]
        optimizer.record(train_loss=1.0 + rank)
        if rank == 0:
            optimizer.record(eval_loss=2.0)  # one rank alone evaluates
        optimizer.step()
        alphas.append(optimizer.metrics()["alpha"])
    return alphas


def test_a_signal_on_a_gpu_may_meet_others_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are on a GPU, and parameters are offloaded. Fake tensors stand for both, so the count cannot be read."""
    monkeypatch.setattr(distributed, "ranks", lambda: RANKS)
    monkeypatch.setattr(distributed, "_meeting_place", lambda groups: torch.device("cpu"))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        distributed.mean_over_ranks(torch.ones((), device="cuda", dtype=torch.float64), [])


@pytest.mark.filterwarnings("ignore")
def test_ranks_agree_on_alpha(tmp_path: Path) -> None:
    first, second = in_processes(_signals_that_differ, tmp_path)
    assert first == second
    assert first == pytest.approx([0.98 * torch.exp(torch.tensor(-0.1 * s)).item() for s in (0.5, 0.5, 0, 0.5, 0)])


def _ranks_that_differ(rank: int) -> list[tuple[float, float]]:
    """Return α and the boost after each step under DDP, FSDP2 and neither, if something happens on one rank alone."""

    def fails() -> float:
        if rank == 1:
            raise RuntimeError("no signal here")
        return 0.5

    if rank == 0:  # an optimizer without chosen signals or recorded losses waits for no other rank
        probe = network()
        optimizer = GrokAdamW(probe.named_parameters())
        train(probe, range(2), lambda _, loss: optimizer.step())
        assert math.isnan(optimizer.metrics()["signal"])
    found = []
    for how in ("DDP", "FSDP2", "a model each"):
        for situation in ("records", "evaluates", "raises", "NaN", "no parameters"):
            model = network()
            if how == "DDP":
                model = torch.nn.parallel.DistributedDataParallel(model)
            if how == "FSDP2":
                fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
            params = [] if situation == "no parameters" and rank == 1 else list(model.parameters())
            optimizer = GrokAdamW([{"params": params}], signal_boost=1.0, nonfinite="propagate", gradient_clipping=0.0)
            if situation == "raises":
                optimizer.set_signals(fails)
            for step in range(3):
                train(model, range(step, step + 1), lambda _, loss: None)
                if rank == 0 or situation == "evaluates":
                    optimizer.record(train_loss=0.5)
                if rank == 0 and step > 0:
                    optimizer.record(eval_loss=1.0)
                if rank == 1 and situation == "NaN":
                    optimizer.record(train_loss=0.5, eval_loss=torch.nan)
                optimizer.step()
                metrics = optimizer.metrics()
                found.append((metrics["alpha"], metrics["boost"]))
    return found


def _what_ranks_are_told(rank: int) -> list[Any]:
    """Return the warnings if the first rank, or none, records losses, and the signal after that."""
    found: list[Any] = []
    for records in (True, False):
        model = network()
        optimizer = GrokAdamW.for_grokking(model)
        if records and rank == 0:
            optimizer.record(train_loss=0.5, eval_loss=1.0)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            train(model, range(101), lambda _, loss, take=optimizer.step: take())
        found.append(([str(warning.message).partition(" and ")[0] for warning in said], optimizer.metrics()["signal"]))
    return found


def test_a_rank_that_need_not_record_is_not_warned(tmp_path: Path) -> None:
    for ranks in in_processes(_what_ranks_are_told, tmp_path):
        (silent, heard), (warned, nothing) = ranks
        assert silent == []
        assert heard == memorisation(0.5, 1.0)
        assert warned == ["the grokking signals wait for train_loss"]
        assert math.isnan(nothing)


@pytest.mark.filterwarnings("ignore")
def test_no_rank_waits_for_another_that_hears_less(tmp_path: Path) -> None:
    first, second = in_processes(_ranks_that_differ, tmp_path)
    assert first == second
    assert len(first) == 45
    assert {boost for _, boost in first} == {1.0, 1.5}


class Averaging(torch.nn.parallel.DistributedDataParallel):
    """A subclass of DDP that also has the attributes of its module, as users write it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


class Dividing(FullyShardedDataParallel):
    """A subclass of FSDP1."""


def _default_signal(rank: int) -> list[float]:
    """Return α after each step. The first rank alone records losses, and not from the start."""
    alphas = []
    for way in ("DDP", "FSDP1", "ZeRO", "subclass", "frozen"):
        model = torch.nn.Linear(5, 3, bias=False)
        if way == "FSDP1":
            wrapped: Any = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        else:
            wrapped = Averaging(model) if way == "subclass" else _in_ddp(model)
        if way == "frozen":
            gc.freeze()
        make = functools.partial(ZeroRedundancyOptimizer, optimizer_class=GrokAdamW) if way == "ZeRO" else GrokAdamW
        optimizer = make(wrapped.parameters(), gradient_clipping=0.0, nonfinite="propagate")
        grok = optimizer.optim if way == "ZeRO" else optimizer
        assert (way == "ZeRO" and rank == 1) == (not any(group["params"] for group in grok.param_groups))
        for step in range(3):
            if rank == 0 and step > 0:
                grok.record(train_loss=0.5, eval_loss=1.0)
            train(wrapped, range(step, step + 1), lambda _, loss, take=optimizer.step: take())
            alphas.append(grok.metrics()["alpha"])
    assert gc.get_freeze_count()
    gc.unfreeze()
    return alphas


def _in_ddp(model: torch.nn.Module, group: Any = None) -> torch.nn.Module:
    return torch.nn.parallel.DistributedDataParallel(model, process_group=group)


def _fewer_steps(rank: int) -> None:
    """Take more steps on the first rank: in DDP's join(), with a process group for each rank, and in backward."""
    alone = [dist.new_group([member]) for member in range(RANKS)][rank]
    for group in (None, alone):
        model = _in_ddp(network(), group)
        optimizer = GrokAdamW(model.parameters())
        with model.join(enable=group is None):  # type: ignore[operator]
            train(model, range(1 if rank else 4), lambda _, loss, take=optimizer.step: take())
        dist.barrier()
    model = _in_ddp(network())
    optimizer = GrokAdamW(model.parameters())
    if rank == 0:  # as torch's _apply_optimizer_in_backward does
        x = torch.ones(1, requires_grad=True)
        x.register_hook(lambda _: optimizer.step())
        x.sum().backward()
    dist.barrier()


@pytest.mark.filterwarnings("ignore")
def test_ranks_of_a_wrapper_agree_on_the_default_signal(tmp_path: Path) -> None:
    first, second = in_processes(_default_signal, tmp_path)
    assert first == second == pytest.approx([0.98, *[0.98 * math.exp(-0.05)] * 2] * 5)


@pytest.mark.filterwarnings("ignore")
def test_ranks_that_take_fewer_steps_are_not_waited_for(tmp_path: Path) -> None:
    in_processes(_fewer_steps, tmp_path)


def _signals_in_join(rank: int) -> list[str]:
    """Return what ranks with unequal batch counts are told if they choose signals, record losses, or do neither."""
    found = []
    for options, records in (({"signal_boost": 1.0}, False), ({}, True), ({"grokking_signal_fns": []}, True)):
        model = _in_ddp(network())
        optimizer = GrokAdamW(model.parameters(), **options)
        before = copy.deepcopy(model.state_dict())

        def take(_: int, loss: torch.Tensor, optimizer: Any = optimizer, records: bool = records) -> None:
            if records:
                optimizer.record(train_loss=0.5, eval_loss=1.0)
            optimizer.step()

        try:
            with model.join():  # type: ignore[operator]
                train(model, range(2), take)
            found.append("trained")
        except RuntimeError as error:
            found.append(str(error))
            assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        dist.barrier()
    return found


def test_signals_in_join_are_refused(tmp_path: Path) -> None:
    """Averaging signals would collide with what DDP sends for the ranks that have no more data."""
    for refused, recorded, trained in in_processes(_signals_in_join, tmp_path):
        assert refused == recorded
        assert "in DDP's join() not all ranks take all steps: pass grokking_signal_fns=[]" in refused
        assert trained == "trained"


def _wrapped_late(rank: int) -> list[float]:
    """Return α if the model is wrapped after its first step, and again later; the first rank alone records losses."""
    inner, alphas = network(), []
    optimizer = GrokAdamW(inner.parameters(), gradient_clipping=0.0)
    train(inner, range(1), lambda _, loss: optimizer.step())
    for _ in range(2):
        model = _in_ddp(inner)
        for step in range(3):
            if rank == 0:
                optimizer.record(train_loss=0.5, eval_loss=1.0)
            train(model, range(step, step + 1), lambda _, loss: optimizer.step())
            alphas.append(optimizer.metrics()["alpha"])
        del model
        gc.collect()
    return alphas


def test_a_model_may_be_wrapped_late_and_anew(tmp_path: Path) -> None:
    first, second = in_processes(_wrapped_late, tmp_path)
    assert first == second == pytest.approx([0.98 * math.exp(-0.05)] * 6)


def test_wrappers_are_looked_for_at_the_first_step_the_second_the_fourth(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = list[int]()
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    monkeypatch.setattr(distributed, "wrappers_of", lambda params: looks.append(step) or [])
    groups, all_ranks = [{"params": [torch.zeros(2)]}], distributed.AllRanks()
    for step in range(1, 40):
        if step == 1:
            all_ranks.doubts(groups, None, False)
        all_ranks.meet(groups, None, False)
    assert looks == [1, 2, 4, 8, 16, 32]
    looks.clear()
    for step in range(1, 10):  # a group was added, and its parameters may be in a wrapper
        if step == 1:
            all_ranks.doubts(groups, None, False)
        all_ranks.meet(groups, None, False)
    assert looks == [1, 2, 4, 8]


def _resumed(rank: int) -> list[list[float]]:
    """Return the signals of a run without and with a stop in between. The first rank alone records losses."""

    def go_on(model: Any, optimizer: GrokAdamW, steps: range, found: list[float]) -> None:
        for step in steps:
            if rank == 0 and step % 3 == 0:
                optimizer.record(train_loss=1.0, eval_loss=2.0 + step)
            train(model, range(step, step + 1), lambda _, loss: optimizer.step())
            found.append(optimizer.metrics()["signal"])

    runs: list[list[float]] = [[], []]
    for found in runs:
        model = _in_ddp(network())
        optimizer = GrokAdamW(model.parameters())
        go_on(model, optimizer, range(4), found)
        if found is runs[1]:
            saved = [optimizer.state_dict()]
            dist.broadcast_object_list(saved)  # every rank loads the first rank's checkpoint
            optimizer = GrokAdamW(model.parameters())
            optimizer.load_state_dict(saved[0])
        go_on(model, optimizer, range(4, 9), found)
    return runs


def test_losses_of_a_checkpoint_do_not_count_beside_new_ones(tmp_path: Path) -> None:
    """Every rank loads the losses that one rank has recorded, and only that rank records again."""
    for whole, resumed in in_processes(_resumed, tmp_path):
        assert whole == resumed
        assert len(set(whole)) == 3


def _signals_without_records(rank: int) -> list[list[float]]:
    """Return the signals before and after every rank loaded the first rank's checkpoint. It alone records losses."""
    p, gap = torch.nn.Parameter(torch.ones(3)), AccuracyGap()
    gap.record(train=1.0, eval=rank)
    found = []
    for signal in (lambda: 1.0 - rank, gap):
        optimizer = GrokAdamW([p], grokking_signal_fns=signal)
        for _ in range(2):
            if rank == 0:
                optimizer.record(train_loss=0.5, eval_loss=0.6)
            p.grad = torch.ones(3)
            optimizer.step()
            found.append(optimizer.metrics()["signal"])
            saved = [optimizer.state_dict()]
            dist.broadcast_object_list(saved)
            optimizer = GrokAdamW([p], grokking_signal_fns=signal)
            optimizer.load_state_dict(saved[0])
            gap.record(train=1.0, eval=rank)
    return found


def test_signals_that_read_no_losses_count_after_loading_them(tmp_path: Path) -> None:
    assert in_processes(_signals_without_records, tmp_path) == [[0.5] * 4] * RANKS


def _asked_on_one_rank(rank: int) -> str:
    """Return which implementation the first rank uses. Gradients of divided activations have to be summed first."""
    norm = torch.nn.LayerNorm(4)
    parallelize_module(norm, init_device_mesh("cpu", (RANKS,)), SequenceParallel())
    optimizer = GrokAdamW(norm.named_parameters())
    norm(torch.ones(2, 3, 4).cumsum(1)).to_local().square().sum().backward()
    said = [optimizer.implementation() for _ in range(2) if rank == 0]
    optimizer.step()
    return "".join(said)


def test_one_rank_may_ask_for_its_implementation(tmp_path: Path) -> None:
    first, second = in_processes(_asked_on_one_rank, tmp_path)
    assert first.startswith("cpu: ")
    assert second == ""


def _wrong_norms(rank: int) -> list[Any]:
    """Return what is said if shards are taken for whole parameters, or whole parameters for shards."""
    device, found = torch.device("cpu"), list[Any]()
    ways = ("FSDP1", "without a norm", "FSDP1, with its ranks", "FSDP1, rows", "NO_SHARD", "DDP", "DDP, not over")
    for way in (*ways, "subclass", "without clipping", "FSDP1, norms of rows"):
        group = dist.group.WORLD
        strategy = ShardingStrategy.NO_SHARD if way == "NO_SHARD" else None
        if way.startswith("DDP"):
            apart = [dist.new_group([member]) for member in range(RANKS)][rank]
            model = _in_ddp(network(), apart if way == "DDP, not over" else None)
        else:
            kind = Dividing if way == "subclass" else FullyShardedDataParallel
            model = kind(network(), device_id=device, sharding_strategy=strategy)
        options: dict[str, Any] = {"gamma": 0.0, "shard_group": None if way in ("FSDP1", "subclass") else group}
        if way == "without clipping":
            options |= {"gradient_clipping": 0.0, "shard_group": None}
        if way == "without a norm":
            options |= {"gradient_clipping": 0.0, "nonfinite": "propagate", "shard_group": None}
        if way == "FSDP1, rows":
            options["max_row_change"] = 0.1
        if way == "FSDP1, norms of rows":
            options["max_row_norm"] = 1.0
        optimizer = GrokAdamW(model.parameters(), **options)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                for _ in range(2):
                    train(model, range(1), lambda _, loss, take=optimizer.step: take())
            except ValueError as error:
                found.append(str(error))
                continue
        found.append([str(warning.message) for warning in said if "FSDP1 has" in str(warning.message)])
    return found


@pytest.mark.filterwarnings("ignore")
def test_shards_and_whole_parameters_are_told_apart(tmp_path: Path) -> None:
    for found in in_processes(_wrong_norms, tmp_path):
        plain, unused, right, rows, no_shard, ddp, stages_of_ddp, subclass, skips, norms = found
        assert unused == right == stages_of_ddp == []
        assert ["shard_group is not given: each rank clips" in warning for warning in plain] == [True]
        assert subclass == plain == skips
        assert norms == rows
        assert ["max_row_norm and max_row_change cannot limit" in warning for warning in rows] == [True]
        assert no_shard.startswith("shard_group with FullyShardedDataParallel, whose ranks hold whole parameters")
        assert ddp.startswith("shard_group with DistributedDataParallel, whose ranks hold whole parameters")


def _told(model: torch.nn.Module, group: Any) -> list[str]:
    """Return what a first step says of FSDP1, or the error that it ends with."""
    optimizer = GrokAdamW(model.parameters(), gamma=0.0, shard_group=group)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            train(model, range(1), lambda _, loss: optimizer.step())
        except ValueError as error:
            return [str(error)]
    return [str(warning.message) for warning in said if "FSDP1 has" in str(warning.message)]


def _mixed(rank: int) -> list[list[str]]:
    """Return what is said of whole parameters among sharded ones."""
    divide = functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu"))
    whole, divided, found = ShardingStrategy.NO_SHARD, ShardingStrategy.FULL_SHARD, []
    for group, (inner, outer) in itertools.product((None, dist.group.WORLD), itertools.permutations((whole, divided))):
        model: Any = network()
        model[2] = divide(model[2], sharding_strategy=inner)
        found.append(_told(divide(model, sharding_strategy=outer), group))
    without_own = divide(torch.nn.Sequential(divide(network())), sharding_strategy=whole)
    return [*found, _told(without_own, dist.group.WORLD)]


@pytest.mark.filterwarnings("ignore")
def test_whole_parameters_are_found_among_divided_ones(tmp_path: Path) -> None:
    for *alone, first, second, right in in_processes(_mixed, tmp_path):
        assert [["in an optimizer without" in warning for warning in said] for said in alone] == [[True], [True]]
        assert first == second
        assert "whose ranks hold whole parameters" in first[0]
        assert "separate optimizers" in first[0]
        assert right == []


def _hybrid(rank: int) -> list[list[str]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    kind = functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu"), device_mesh=mesh)
    models = [kind(network(), sharding_strategy=ShardingStrategy.HYBRID_SHARD) for _ in range(2)]
    return [_told(models[0], dist.group.WORLD), _told(models[1], models[1].process_group)]


@pytest.mark.filterwarnings("ignore")
def test_copies_of_divided_parameters_do_not_count_twice(tmp_path: Path) -> None:
    for [refused], right in in_processes(_hybrid, tmp_path, 4):
        assert "whose ranks hold the same parts" in refused
        assert "pass shard_group=model.process_group" in refused
        assert right == []


def _preset_of_fsdp1(rank: int) -> None:
    for kind, original in itertools.product((FullyShardedDataParallel, Dividing), (True, False)):
        model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 5))
        model[2] = kind(model[2], use_orig_params=original, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=r"FSDP1 has made vectors .* use FSDP2"):
            GrokAdamW.for_grokking(model)


@pytest.mark.filterwarnings("ignore")
def test_the_preset_needs_shapes(tmp_path: Path) -> None:
    in_processes(_preset_of_fsdp1, tmp_path)


DEVICE = "numbers on the device"


def _numbers_on_the_device() -> None:
    """From here on, make steps act as if reading a tensor on the CPU made the host wait."""
    for module in (grokadamw, _numbers, signals, slots, stages, cache):
        module.reads_are_free = lambda device: False  # type: ignore[attr-defined]


def _sharded(rank: int) -> list[dict[str, Any]]:
    """Return results with all layers sharded, with the first one sharded and the others plain, with shards across rows,
    and with numbers kept as tensors."""
    mesh = init_device_mesh("cpu", (RANKS,))
    results = []
    for how in ("whole", "in part", "across rows", DEVICE):
        model = network()
        fully_shard(model[0], mesh=mesh)
        if how == "across rows":
            fully_shard(model[2], mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 else None)
            assert model[2].weight.placements == (Shard(1),)
        if how != "in part":
            fully_shard(model, mesh=mesh)
        if how == DEVICE:
            _numbers_on_the_device()
        optimizer = _run(model)
        assert isinstance(optimizer.state[model[0].weight]["exp_avg"], DTensor)
        assert optimizer.implementation().startswith("cpu: ")
        assert isinstance(model[2].weight, DTensor) == (how != "in part")
        weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}
        results.append({"weights": weights, "metrics": optimizer.metrics()})
    return results


def _run(model: torch.nn.Module) -> GrokAdamW:
    optimizer = GrokAdamW(
        model.named_parameters(),
        lr=0.01,
        gradient_clipping=0.5,
        max_row_norm=0.5,
        max_row_change=0.02,
        grokking_signal_fns=SlowGradient(every=2),
    )

    def take_step(step: int, loss: torch.Tensor) -> None:
        if step == 1:
            poisoned = next(model.parameters()).grad
            local = poisoned.to_local() if isinstance(poisoned, DTensor) else poisoned
            if not isinstance(poisoned, DTensor) or dist.get_rank() == 1:
                local.view(-1)[-1] = torch.nan  # on one rank alone
        optimizer.step()

    train(model, range(6), take_step)
    return optimizer


@pytest.mark.filterwarnings("ignore:a step was skipped")
def test_shards_train_as_the_whole(tmp_path: Path) -> None:
    model = network()
    optimizer = _run(model)
    metrics = copy.deepcopy(optimizer.metrics())
    for result in itertools.chain(*in_processes(_sharded, tmp_path)):
        assert result["metrics"] == pytest.approx(metrics, rel=1e-5)
        assert result["metrics"]["skipped_steps"] == 1
        for name, value in model.state_dict().items():
            torch.testing.assert_close(result["weights"][name], value, rtol=1e-5, atol=1e-6)


def _limited(rank: int) -> float:
    """Return the largest error of rows split over two ranks; torch 2.6, which has no FSDP2 on the CPU, runs it, too."""
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    rows = torch.randn(5, 4) * torch.tensor([[0.01], [0.3], [1], [1], [3]])
    grad = torch.randn(5, 4)
    results = []
    for placement in (None, Shard(0), Shard(1), Replicate()):
        params = []
        for _ in range(2):
            whole_or_not = rows if placement is None else distribute_tensor(rows, mesh, [placement])
            params.append(torch.nn.Parameter(whole_or_not.clone()))
            params[-1].grad = grad if placement is None else distribute_tensor(grad, mesh, [placement])
        limits = [{"max_row_change": 0.05, "max_row_norm": 1.5}, {"max_row_norm": 0.5}]
        groups = [{"params": [p], **limit} for p, limit in zip(params, limits, strict=True)]
        GrokAdamW(groups, lr=0.1).step()
        results.append(torch.stack([whole(p.detach()) for p in params]))
    return max((result - results[0]).abs().max().item() for result in results)


def test_rows_on_two_ranks_are_limited_as_the_whole(tmp_path: Path) -> None:
    assert max(in_processes(_limited, tmp_path)) < 1e-6


def _resumed_from(folder: Path, rank: int) -> bool:
    """Return True if a sharded run resumes as if it had not stopped, and the state built for loading was all 0."""
    mesh = init_device_mesh("cpu", (RANKS,))

    def start() -> tuple[torch.nn.Module, GrokAdamW]:
        model = network()
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, GrokAdamW(model.named_parameters(), lr=0.01, grokking_signal_fns=SlowGradient(every=2))

    model, optimizer = start()
    train(model, range(3), lambda step, loss: optimizer.step())
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / "checkpoint")
    train(model, range(3, 6), lambda step, loss: optimizer.step())
    twin, other = start()
    of_model, of_optimizer = get_state_dict(twin, other)
    built = all(not whole(value).any() for state in other.state.values() for value in state.values())
    loaded = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(loaded, checkpoint_id=folder / "checkpoint")
    set_state_dict(twin, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(twin, range(3, 6), lambda step, loss: other.step())
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    equal = [torch.equal(whole(a), whole(b)) for a, b in pairs]
    return built and len(other.state) == 6 and all(equal) and optimizer.metrics() == other.metrics()


def _whole_state(rank: int) -> tuple[str, bool, bool]:
    """Return the error of shards that load a whole state, whether nothing was loaded, and whether the way out works."""
    of_one, model = network(), network()
    plain = GrokAdamW(of_one.named_parameters(), lr=0.05)
    train(of_one, range(2), lambda step, loss: plain.step())
    fully_shard(model)
    optimizer = GrokAdamW(model.named_parameters(), lr=0.01)
    train(model, range(2), lambda step, loss: optimizer.step())
    groups, states = copy.copy(optimizer.param_groups), dict(optimizer.state)
    with pytest.raises(ValueError, match="of parameter 0 is a full tensor") as raised:
        optimizer.load_state_dict(plain.state_dict())
    kept = optimizer.param_groups == groups and optimizer.param_groups[0]["lr"] == 0.01 and optimizer.state == states
    saved = get_optimizer_state_dict(of_one, plain)
    set_optimizer_state_dict(model, optimizer, saved, options=StateDictOptions(full_state_dict=True))
    pairs = zip(of_one.parameters(), model.parameters(), strict=True)
    equal = [torch.equal(plain.state[p]["exp_avg"], whole(optimizer.state[q]["exp_avg"])) for p, q in pairs]
    return str(raised.value), kept, all(equal)


def test_shards_refuse_a_whole_state_before_anything_is_loaded(tmp_path: Path) -> None:
    """A later refusal would leave the groups loaded, and the next step would fail."""
    for said, kept, equal in in_processes(_whole_state, tmp_path):
        assert "set_optimizer_state_dict(model" in said
        assert kept
        assert equal


def _other_sharding(rank: int) -> None:
    makers: list[Callable[[Any], torch.optim.Optimizer]] = [
        GrokAdamW,
        lambda params: Grokfast(torch.optim.SGD(params)),
        lambda params: GrokfastMA(torch.optim.SGD(params), 2),
        lambda params: Accumulate(torch.optim.SGD(params), 3),
    ]
    for make in makers:
        plain, sharded = network(), network()
        fully_shard(sharded)
        of_plain, of_sharded = make(plain.parameters()), make(sharded.parameters())
        for _ in range(2):  # the second time after a load that was refused
            train(plain, range(1), lambda step, loss, it=of_plain: it.step())
            train(sharded, range(1), lambda step, loss, it=of_sharded: it.step())
            with pytest.raises(ValueError, match="is a full tensor, and this rank has a part"):
                of_sharded.load_state_dict(of_plain.state_dict())
            with pytest.raises(ValueError, match="is sharded over several ranks, and the parameter is not"):
                of_plain.load_state_dict(of_sharded.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_state_that_is_sharded_otherwise_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    """A shard that loads into a whole parameter would be broadcast, if it has one row."""
    in_processes(_other_sharding, tmp_path)


def _keepers(folder: Path, rank: int) -> dict[str, Any]:
    """For each optimizer that keeps more, return the weights of a sharded run, and True if a loaded run equals it."""
    mesh = init_device_mesh("cpu", (RANKS,))
    results = {}
    for i, make in enumerate(KEEPERS.values()):

        def start(make: Any = make) -> tuple[torch.nn.Module, Any]:
            model = network()
            fully_shard(model[0], mesh=mesh)  # the other layers stay plain
            return model, make(model)

        model, optimizer = start()
        train(model, range(5), lambda step, loss, optimizer=optimizer: optimizer.step())
        of_model, of_optimizer = get_state_dict(model, optimizer)
        dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / f"{i}")
        train(model, range(5, 9), lambda step, loss, optimizer=optimizer: optimizer.step())
        twin, other = start()
        of_model, of_optimizer = get_state_dict(twin, other)
        loaded = {"model": of_model, "optimizer": of_optimizer}
        dcp.load(loaded, checkpoint_id=folder / f"{i}")
        set_state_dict(twin, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        train(twin, range(5, 9), lambda step, loss, other=other: other.step())
        weights = [[whole(p.detach()) for p in m.parameters()] for m in (model, twin)]
        kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        results[list(KEEPERS)[i]] = {
            "weights": weights[0],
            "goes on": all(map(torch.equal, *weights)),
            "shards": sum(isinstance(value, DTensor) for value in kept),
        }
    return results


def _filters_that_differ(rank: int) -> float:
    """Return a weight after a step whose signal is above 0 on one rank alone; all ranks must amplify alike."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Grokfast(torch.optim.SGD([p], lr=1.0), lamb=1.0, amplify_when=lambda: float(rank))
    p.grad = torch.ones(3)
    optimizer.step()
    return p[0].item()


@pytest.mark.filterwarnings("ignore")
def test_ranks_agree_on_when_to_amplify(tmp_path: Path) -> None:
    assert in_processes(_filters_that_differ, tmp_path) == [-0.5, -0.5]  # 1 − (1 + 0.5 · 1)


@pytest.mark.filterwarnings("ignore")
def test_what_keeps_more_is_sharded_too(tmp_path: Path) -> None:
    first, second = in_processes(functools.partial(_keepers, tmp_path), tmp_path)
    for name, make in KEEPERS.items():
        model = network()
        optimizer = make(model)
        train(model, range(9), lambda step, loss, optimizer=optimizer: optimizer.step())
        for result in (first[name], second[name]):
            assert result["goes on"], name
            assert result["shards"] > 0, name
            for ours, expected in zip(result["weights"], model.parameters(), strict=True):
                torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-6)


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


@pytest.mark.filterwarnings("ignore")
def test_a_sharded_checkpoint_goes_on(tmp_path: Path) -> None:
    assert in_processes(functools.partial(_resumed_from, tmp_path), tmp_path) == [True, True]


# plain parameters that are divided over ranks

OPTIONS: dict[str, Any] = {
    "lr": 0.01,
    "gradient_clipping": 0.1,
    "gamma": 0.2,
    "signal_boost": 1.0,
    "grokking_signal_fns": memorisation,
}


def _trained(model: torch.nn.Module, optimizer: Any, steps: range, inner: Any = None) -> None:
    """Train with recorded losses, and with NaN in the gradients of one step."""

    def take_step(step: int, loss: torch.Tensor) -> None:
        if step % 3 == 0:
            (inner or optimizer).record(train_loss=0.1, eval_loss=0.2 + 0.01 * step)
        if step == 5:
            params = [p for p in model.parameters() if p.grad is not None and p.grad.numel()]
            params[-1].grad.view(-1)[0] = torch.nan  # with FSDP1, in each rank's own shard
        optimizer.step()

    train(model, steps, take_step)


def _with_zero(rank: int) -> dict[str, Any]:
    """Return the largest differences between ZeRO on two ranks and one optimizer that has everything."""
    found: dict[str, Any] = {}
    for how in (
        "as it comes",
        "layers of the model",
        "groups",
        "added",
        "loaded",
        "a bucket",
        "a group is given",
        DEVICE,
    ):
        if how == DEVICE:
            _numbers_on_the_device()
        models = [network(torch.float64) for _ in range(3)]
        params: list[list[Any]] = [list(model.parameters()) for model in models]
        later = [{"params": own[4:], "lr": 0.02} for own in params]
        if how in ("groups", "added"):
            params = [[{"params": own[:4]}] for own in params]
        if how == "groups":
            params = [[*own, group] for own, group in zip(params, later, strict=True)]
        one = GrokAdamW(params[0], **OPTIONS)
        extra = {"shard_group": dist.group.WORLD} if how == "a group is given" else {}
        zeros = [
            ZeroRedundancyOptimizer(own, GrokAdamW, parameters_as_bucket_view=how == "a bucket", **OPTIONS, **extra)
            for own in params[1:]
        ]
        if how == "added":
            for optimizer, group in zip((one, *zeros), later, strict=True):
                optimizer.add_param_group(group)
        if how in ("layers of the model", "loaded"):
            for optimizer, model in zip((one, *(zero.optim for zero in zeros)), models, strict=True):
                optimizer.set_layers(model)
        (zero, other), end = zeros, 10 if how == "loaded" else 20
        _trained(models[0], one, range(20))
        _trained(models[1], zero, range(end), zero.optim)
        compared = models[1]
        if how == "loaded":
            zero.consolidate_state_dict()
            everyone = [None if rank else zero.state_dict()]
            dist.broadcast_object_list(everyone, src=0)  # the first rank's state, as if from a file
            models[2].load_state_dict(models[1].state_dict())
            other.load_state_dict(everyone[0])
            _trained(models[2], other, range(10, 20), other.optim)
            zero, compared = other, models[2]
        pairs = zip(models[0].parameters(), compared.parameters(), strict=True)
        metrics = [optimizer.metrics() for optimizer in (one, zero.optim)]
        assert metrics[1]["skipped_steps"] == 1
        assert metrics[1]["boost"] > 1
        assert metrics[1]["clip_coefficient"] < 1
        found[how] = [max((a - b).abs().max().item() for a, b in pairs)]
        same = ("signal", "alpha", "boost", "grad_norm", "clip_coefficient", "skipped_steps")
        found[how] += [abs(metrics[0][name] - metrics[1][name]) for name in same]
    return found


@pytest.mark.filterwarnings("ignore")
def test_zero_is_one_process(tmp_path: Path) -> None:
    for found in in_processes(_with_zero, tmp_path):
        for how, differences in found.items():
            assert max(differences) < 1e-9, how


AROUND_ZERO: dict[str, tuple[Any, Any]] = {  # the optimizer in ZeRO, and the wrapper around that
    "Grokfast": (torch.optim.AdamW, lambda inner: Grokfast(inner, alpha=0.8)),
    "Grokfast, SGD": (torch.optim.SGD, lambda inner: Grokfast(inner, alpha=0.8)),
    "GrokfastMA": (torch.optim.AdamW, lambda inner: GrokfastMA(inner, 3)),
    "Accumulate": (torch.optim.AdamW, lambda inner: Accumulate(inner, 2, 0.1)),
    "Accumulate, GrokAdamW": (GrokAdamW, lambda inner: Accumulate(inner, 2, 0.1)),
    "Accumulate, Grokfast": (torch.optim.AdamW, lambda inner: Accumulate(Grokfast(inner), 2)),
}


def _around_zero(rank: int) -> dict[str, Any]:
    """Return the weights after runs of wrappers around ZeRO, and check that what the first rank saved resumes them."""
    results = {}
    for name, (inside, around) in AROUND_ZERO.items():

        def start(inside: Any = inside, around: Any = around) -> tuple[torch.nn.Module, Any]:
            model = network()
            return model, around(ZeroRedundancyOptimizer(model.parameters(), inside, lr=0.01))

        def saved(optimizer: Any) -> dict[str, Any]:
            optimizer.consolidate_state_dict()
            everyone = [None if rank else copy.deepcopy(optimizer.state_dict())]
            dist.broadcast_object_list(everyone, src=0)
            return copy.deepcopy(everyone[0])  # type: ignore[return-value]

        model, optimizer = start()
        train(model, range(5), lambda step, loss, optimizer=optimizer: optimizer.step())
        twin, other = start()
        for _ in range(2):  # the second time the optimizer has state
            twin.load_state_dict(model.state_dict())
            other.load_state_dict(saved(optimizer))
        for trained, stepped in ((model, optimizer), (twin, other)):
            train(trained, range(5, 9), lambda step, loss, stepped=stepped: stepped.step())
        one, another = saved(optimizer), saved(other)
        torch.testing.assert_close(one["state"], another["state"], rtol=0, atol=0)
        assert one["param_groups"] == another["param_groups"]
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
        results[name] = [p.detach() for p in model.parameters()]
        zero: Any = other.optimizer if name != "Accumulate, Grokfast" else other.optimizer.optimizer
        zero.load_state_dict(another)
        with pytest.raises(RuntimeError, match=f"without the state of .* load_state_dict of {type(other).__name__} "):
            other.step()
    return results


@pytest.mark.filterwarnings("ignore")
def test_wrappers_around_zero_are_one_process_and_resume(tmp_path: Path) -> None:
    """ZeRO saves only the state of the optimizer inside it, and loads None for what other ranks have."""
    for found in in_processes(_around_zero, tmp_path):
        for name, (inside, around) in AROUND_ZERO.items():
            model = network()
            optimizer = around(inside(model.parameters(), lr=0.01))
            train(model, range(9), lambda step, loss, optimizer=optimizer: optimizer.step())
            for ours, expected in zip(found[name], model.parameters(), strict=True):
                torch.testing.assert_close(ours, expected.detach(), rtol=1e-5, atol=1e-6)


def _zero_that_loads(rank: int) -> list[Any]:
    """Return the weights after ZeRO has loaded a plain optimizer's state twice; layers, options and names must stay."""
    model = network()
    plain = GrokAdamW(model.named_parameters(), nonfinite="propagate")
    _trained(model, plain, range(2))
    zero = ZeroRedundancyOptimizer(model.parameters(), GrokAdamW, nonfinite="raise")
    layers = list(zero.optim.param_groups[0]["layers"])
    state = plain.state_dict()
    for _ in range(2):
        zero.load_state_dict(copy.deepcopy(state))
    _trained(model, zero, range(2), zero.optim)
    (group,) = zero.optim.param_groups
    assert group["layers"] == zero.param_groups[0]["layers"] == layers
    assert (group["nonfinite"], zero.param_groups[0]["nonfinite"]) == ("raise", "raise")
    assert "param_names" not in group
    zero.consolidate_state_dict(0)
    if rank == 0:
        whole = GrokAdamW(model.parameters())
        whole.set_layers(model)
        before = list(whole.param_groups[0]["layers"])
        whole.load_state_dict(zero.state_dict())
        assert whole.param_groups[0]["layers"] == before
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore")
def test_zero_loads_what_others_saved(tmp_path: Path) -> None:
    first, second = in_processes(_zero_that_loads, tmp_path)
    assert all(map(torch.equal, first, second))


def _groups_with_zero(rank: int) -> list[tuple[int, str]]:
    """Return the layers and names of a rank's part of the preset's groups, which a step must not change."""
    model = network()
    groups = GrokAdamW.for_grokking(model).param_groups
    zero = ZeroRedundancyOptimizer([dict(group) for group in groups], GrokAdamW, lr=0.01)
    tables = [zero.optim.layer_table()]
    train(model, range(2), lambda step, loss: zero.step())
    tables.append(zero.optim.layer_table())
    assert tables[0] == tables[1]
    assert zero.optim.metrics()["step"] == 2
    zero.consolidate_state_dict(0)
    if rank == 0:
        alone = GrokAdamW.for_grokking(model)
        before = alone.layer_table()
        alone.load_state_dict(zero.state_dict())
        assert alone.layer_table() == before
        assert len(alone.state) == 6
    return [(row.layer, name) for row in tables[0] for name in row.names]


@pytest.mark.filterwarnings("ignore")
def test_groups_in_zero_keep_their_names_and_layers(tmp_path: Path) -> None:
    """The table must not have too many names, and a step must not say that the group's parameters were changed."""
    first, second = in_processes(_groups_with_zero, tmp_path)
    rows = GrokAdamW.for_grokking(network()).layer_table()
    assert first
    assert second
    assert sorted(first + second) == sorted((row.layer, name) for row in rows for name in row.names)


def _smallest_with_zero(rank: int) -> str:
    """Return the smallest module with the parameters of all ranks, although an optimizer has only its rank's part."""
    part = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(2, 2))  # the first rank has one of its weights
    model = torch.nn.Sequential(network(), part)
    zero = ZeroRedundancyOptimizer(model[1].parameters(), GrokAdamW)
    smallest = trainers.smallest_with(zero.optim, model)
    return next(name for name, module in model.named_modules() if module is smallest)


def test_zeros_part_of_a_model_is_the_same_on_all_ranks(tmp_path: Path) -> None:
    assert in_processes(_smallest_with_zero, tmp_path) == ["1", "1"]


def _with_fsdp1(rank: int) -> dict[str, float]:
    found = {}
    for original in (True, False):
        options = {**OPTIONS, "shard_group": dist.group.WORLD, **({} if original else {"gamma": 0.0})}
        models = [network(torch.float64) for _ in range(2)]
        one = GrokAdamW(models[0].named_parameters(), **{**options, "shard_group": None})
        device = torch.device("cpu")
        sharded = FullyShardedDataParallel(models[1], use_orig_params=original, device_id=device)
        optimizer = GrokAdamW(sharded.named_parameters(), **options)
        _trained(models[0], one, range(20))
        _trained(sharded, optimizer, range(20))
        with FullyShardedDataParallel.summon_full_params(sharded):
            pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
            found[f"weights {original}"] = max((a - b).abs().max().item() for a, b in pairs)
        assert optimizer.metrics()["skipped_steps"] == one.metrics()["skipped_steps"] == 1
        found[f"norm {original}"] = abs(optimizer.metrics()["grad_norm"] - one.metrics()["grad_norm"])
    return found


@pytest.mark.filterwarnings("ignore")
def test_fsdp1_with_its_ranks_is_one_process(tmp_path: Path) -> None:
    for found in in_processes(_with_fsdp1, tmp_path):
        assert max(found.values()) < 1e-9, found


def _ranks_with_less(rank: int) -> list[dict[str, float]]:
    """Return metrics of steps in which the second rank has less than the first, which always has the same."""
    found = []
    for how in (
        "no parameters",
        "no gradients",
        "NaN",
        "micro-batches",
        "raise",
        "overflow",
        "all of it, and no clipping",
    ):
        p, q = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
        params = [] if how == "no parameters" and rank == 1 else [p, q]
        options: dict[str, Any] = {}
        if how == "micro-batches":
            options = {"accumulation_steps": 2, "second_moment": "raw"}
        if how == "raise":
            options = {"nonfinite": "raise"}
        if how == "all of it, and no clipping":
            options = {"nonfinite": "propagate", "gradient_clipping": 0.0}
        optimizer = GrokAdamW([{"params": params}], shard_group=dist.group.WORLD, **options)
        for step in range(4):
            for param in params:
                has_none = rank == 1 and how in ("no gradients", "micro-batches")
                param.grad = None if has_none else torch.full_like(param, 2.0)
            if rank == 1 and how in ("NaN", "raise") and step == 2:
                q.grad[1] = torch.nan
            if how == "raise" and step == 2:
                said = "group 0" if rank == 1 else "those of another rank"
                with pytest.raises(RuntimeError, match=f"the gradients are not finite: .*{said}"):
                    optimizer.step()
                continue
            if how == "overflow" and step == 2:  # a ShardedGradScaler has found it for all ranks
                optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]
                optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
            optimizer.step()
            if how == "overflow" and step == 2:
                del optimizer.grad_scale, optimizer.found_inf
        metrics = optimizer.metrics()
        found.append({name: metrics[name] for name in ("grad_norm", "clip_coefficient", "skipped_steps")})
        assert optimizer.state_dict().keys() == {"state", "param_groups"}
        if params and rank == 0:
            assert metrics["step"] == {"NaN": 3, "raise": 3, "overflow": 3, "micro-batches": 2}.get(how, 4)
    return found


@pytest.mark.filterwarnings("ignore")
def test_ranks_with_less_take_part(tmp_path: Path) -> None:
    first, second = in_processes(_ranks_with_less, tmp_path)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    norms = [math.sqrt(24), math.sqrt(24), math.sqrt(48), math.sqrt(24), *[math.sqrt(48)] * 2, math.nan]
    assert [metrics["grad_norm"] for metrics in first] == pytest.approx(norms, nan_ok=True)
    assert [metrics["skipped_steps"] for metrics in first] == [0, 0, 1, 0, 0, 0, 0]


ACCUMULATED = ("all", "no parameters", "no gradients", "stages", "a mesh", "flushed", "a checkpoint", "warm-up")


def _accumulated(how: str, rank: int) -> tuple[float, int]:
    """Return the norm that the optimizer inside Accumulate gets, and its steps. The second rank may have less.

    Without clipping the norm is 2 √24.
    """
    values = [torch.ones(6, 2), torch.ones(12)]
    if how in ("stages", "a mesh"):
        meshes = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("stage", "data"))
        mesh = meshes["data"] if how == "stages" else init_device_mesh("cpu", (RANKS,))
        values = [distribute_tensor(torch.ones(6 if how == "stages" else 12, 2), mesh, [Shard(0)])]
    if how == "all":
        values = values[:1]
    has_none = how in ("no parameters", "a checkpoint") and rank == 1
    params = [torch.nn.Parameter(x) for x in ([] if has_none else values)]
    inner = GrokAdamW([{"params": params}], shard_group=dist.group.WORLD, gradient_clipping=0.0)
    optimizer = Accumulate(inner, 1 if how == "a checkpoint" else 2, gradient_clipping=0.5)
    if how == "a checkpoint":  # it has the state built first
        torch.distributed.checkpoint.state_dict._init_optim_state(optimizer)  # type: ignore[attr-defined]
    lrs = [0.0, 1e-3] if how == "warm-up" else [1e-3] * 2
    for lr in lrs if how != "flushed" else lrs[1:]:
        inner.param_groups[0]["lr"] = lr
        for p in params:
            p.grad = None if how == "no gradients" and rank == 1 else torch.full_like(p, 2.0)
            if how == "warm-up" and rank == 1:
                p.grad = torch.zeros_like(p)
            if how == "flushed":
                p.grad = p.grad if (rank == 1) == (p is params[0]) else None
        optimizer.step()
    if how == "flushed":
        optimizer.flush()
    return inner.metrics()["grad_norm"], max((int(state["step"]) for state in inner.state.values()), default=0)


def _all_accumulated(rank: int) -> list[tuple[float, int]]:
    return [_accumulated(how, rank) for how in ACCUMULATED]


@pytest.mark.filterwarnings("ignore")
def test_accumulate_clips_by_the_norm_over_the_shard_group(tmp_path: Path) -> None:
    """A rank must not clip its own part alone, and one without gradients must not leave the others waiting."""
    for rank, found in enumerate(in_processes(_all_accumulated, tmp_path)):
        for how, (norm, steps) in zip(ACCUMULATED, found, strict=True):
            assert norm == pytest.approx(0.5), how
            has_none = rank == 1 and how in ("no parameters", "no gradients", "a checkpoint")
            assert steps == (0 if has_none else 2 if how == "a checkpoint" else 1), how


def _dtensors_and_shards(rank: int) -> list[float]:
    """Return the elements in the norm of a DTensor on a mesh of one rank and a plain shard, and of one on all ranks."""
    world, found = dist.group.WORLD, []
    stages = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("stage", "data"))
    for mesh, rows in ((stages["data"], 3), (init_device_mesh("cpu", (RANKS,)), 5)):
        for options in ({}, {"foreach": True}, {"nonfinite": "raise"}):
            divided = distribute_tensor(torch.ones(rows, 2), mesh, [Shard(0)])
            params = [torch.nn.Parameter(divided), torch.nn.Parameter(torch.ones(4))]
            optimizer = GrokAdamW(params[: 1 if rows == 5 else 2], shard_group=world, **options)
            for p in params:
                p.grad = torch.full_like(p, 2.0)
            for _ in range(2):
                optimizer.step()
            found.append(optimizer.metrics()["grad_norm"] ** 2 / 4)
    return found


@pytest.mark.filterwarnings("ignore")
def test_the_norm_of_dtensors_is_summed_over_the_shard_group(tmp_path: Path) -> None:
    for elements in in_processes(_dtensors_and_shards, tmp_path):
        assert elements == pytest.approx([RANKS * (3 * 2 + 4)] * 3 + [5 * 2] * 3)


def _spans(rank: int) -> list[bool]:
    """Return whether parameters are known to be on all ranks: plain, on a mesh of one rank, of both, and swapped."""
    small = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("stage", "data"))["data"]
    own, all_ranks = (
        torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
        for mesh in (small, init_device_mesh("cpu", (RANKS,)))
    )
    plain = torch.nn.Parameter(torch.ones(2))
    groups = [{"params": [plain, own]}, {"params": [own, plain]}]
    found = [span_all_ranks([{"params": params}]) for params in ([], [plain], [plain, own, own], [own, all_ranks])]
    found.append(span_all_ranks(groups))
    groups[1]["params"][1] = all_ranks
    return [*found, span_all_ranks(groups)]


@pytest.mark.filterwarnings("ignore")
def test_parameters_on_all_ranks_are_found_among_others(tmp_path: Path) -> None:
    assert in_processes(_spans, tmp_path) == [[False, False, False, True, False, True]] * 2


def _warm_up(rank: int) -> list[int]:
    """Return the steps after one at lr 0 with gradients of 0 on rank 0, and the states that rank 0 alone builds."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p], lr=0.0, shard_group=dist.group.WORLD)
    p.grad = torch.full_like(p, float(rank))
    optimizer.step()
    other = GrokAdamW([p], shard_group=dist.group.WORLD)
    p.grad = None
    if rank == 0:
        torch.distributed.checkpoint.state_dict._init_optim_state(other)  # type: ignore[attr-defined]
    return [int(optimizer.state[p]["step"]), len(other.state)]


def test_a_rank_whose_first_gradients_are_zero_takes_its_step(tmp_path: Path) -> None:
    assert in_processes(_warm_up, tmp_path) == [[1, 1], [1, 0]]


def _copies(rank: int) -> list[str]:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p], shard_group=dist.group.WORLD)
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert copy.deepcopy(optimizer)._run.shard_group is dist.group.WORLD
        assert caught == []
        unpickled = pickle.loads(pickle.dumps(optimizer))
        assert unpickled._run.shard_group is None
        assert pickle.loads(pickle.dumps(unpickled))._run.shard_group is None
        said += [str(warning.message).partition(":")[0] for warning in caught]
    for refused in ({"compat": "0.1.2"}, {"differentiable": True}, {"capturable": True}):
        with pytest.raises(
            ValueError, match="with shard_group, or ranks of ZeroRedundancyOptimizer: leave one of them out"
        ):
            GrokAdamW([p], shard_group=dist.group.WORLD, **refused)
    with pytest.raises(ValueError, match="step_in_backward with shard_group"):
        step_in_backward(optimizer, clip_by="last")
    assert ZeroRedundancyOptimizer([p], GrokAdamW, compat="0.1.2").optim._run.shard_group is None  # clips tensors
    with pytest.raises(ValueError, match="ranks of ZeroRedundancyOptimizer: leave one of them out"):
        ZeroRedundancyOptimizer([p], GrokAdamW, capturable=True)
    overlapped = ZeroRedundancyOptimizer([p], torch.optim.AdamW, overlap_with_ddp=True)
    with pytest.raises(ValueError, match="without the gradients that Accumulate makes: leave overlap_with_ddp out"):
        Accumulate(overlapped, 2)
    optimizer.param_groups[0]["capturable"] = True
    p.grad = torch.ones_like(p)
    with pytest.raises(
        ValueError, match="with shard_group, or ranks of ZeroRedundancyOptimizer: leave one of them out"
    ):
        optimizer.step()
    return said


def test_a_process_group_is_in_copies_and_in_no_pickle(tmp_path: Path) -> None:
    assert in_processes(_copies, tmp_path) == [["a pickle keeps no process group"]] * 2


@pytest.mark.usefixtures("one_rank")
def test_zero_on_one_rank_takes_all_options() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    zero = ZeroRedundancyOptimizer([p], GrokAdamW, differentiable=True)
    assert zero.optim._run.shard_group is None


@pytest.mark.usefixtures("one_rank")
def test_a_method_with_the_name_of_zeros_is_not_zeros() -> None:
    class Trainer:
        def _init_local_optimizer(self) -> GrokAdamW:
            return GrokAdamW([torch.nn.Parameter(torch.ones(3))])

    assert Trainer()._init_local_optimizer()._run.zero() is None


def test_what_is_no_process_group_is_refused() -> None:
    for wrong in (2, "world", [0, 1]):
        with pytest.raises(TypeError, match="is not a process group: give one that this rank is in"):
            GrokAdamW([torch.nn.Parameter(torch.ones(3))], shard_group=wrong)  # type: ignore[arg-type]


def _copies_that_differ(rank: int) -> list[str]:
    """Return what is said of a preset whose model is the same on all ranks when it is made, and of one that differs."""
    said = []
    for seed in (0, rank):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Embedding(9, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 9))
        optimizer = GrokAdamW.for_grokking(model)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)  # begins with lr 0
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        before = copy.deepcopy(model.state_dict())
        wrapped(torch.arange(9)).square().mean().backward()
        try:
            optimizer.step()
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
            assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    return said


def test_copies_of_a_model_with_other_learning_rates_are_refused(tmp_path: Path) -> None:
    """The preset measures embeddings before DDP makes them equal, so such copies would drift apart."""
    for said in in_processes(_copies_that_differ, tmp_path):
        assert said[0] == ""
        assert "give all ranks the same seed before the model is made" in said[1]


def _groups_that_differ(rank: int) -> dict[str, bool]:
    """Return if copies are refused whose groups differ in one number, in the order of the same ones, or only later."""
    found = {}
    for how in ("nothing", "lr", "weight_decay", "order", "later", "many"):
        model = network()
        numbers = [{"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.02, "weight_decay": 0.1}]
        if rank == 1 and how == "order":
            numbers.reverse()
        elif rank == 1 and how in numbers[0]:
            numbers[0][how] *= 1.001
        parts = zip((list(model[0].parameters()), list(model[1:].parameters())), numbers, strict=True)
        optimizer = GrokAdamW([{"params": params, **own} for params, own in parts], gamma=0.0)
        if how == "many":  # among them, one with a very low lr on one rank
            for i in range(200):
                optimizer.add_param_group({"params": [], "lr": 1e-6 if (rank, i) == (1, 0) else 1e-5})
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        found[how] = False
        try:
            for step in range(2):
                train(wrapped, range(step, step + 1), lambda _, loss, optimizer=optimizer: optimizer.step())
                if how == "later":
                    optimizer.param_groups[0]["lr"] *= 1 + rank
        except RuntimeError as error:
            found[how] = "the ranks' parameter groups differ" in str(error)
    return found


def test_every_number_of_every_group_is_compared_once(tmp_path: Path) -> None:
    for found in in_processes(_groups_that_differ, tmp_path):
        assert found == {
            "nothing": False,
            "lr": True,
            "weight_decay": True,
            "order": True,
            "later": False,
            "many": True,
        }


def _rows_of_other_layouts(rank: int) -> list[float]:
    """Return how far cut rows are from one process's rows if a gradient has another memory layout on one rank alone."""
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    weights, grads = ([scale * torch.randn(4, 3) for scale in (1, 3, 1)] for _ in range(2))
    whole = [torch.nn.Parameter(w.clone()) for w in weights]
    cut = [torch.nn.Parameter(distribute_tensor(w.clone(), mesh, [Shard(1)])) for w in weights]
    optimizers = [GrokAdamW(params, lr=0.5, gamma=0.0, max_row_change=0.01) for params in (whole, cut)]
    for _ in range(2):
        for i, (p, q, grad) in enumerate(zip(whole, cut, grads, strict=True)):
            p.grad, q.grad = grad.clone(), distribute_tensor(grad, mesh, [Shard(1)])
            if i == 1:  # by columns; rank 1 has a single column, so there the order is the same
                local = q.grad.to_local().t().contiguous().t()
                q.grad = DTensor.from_local(local, mesh, [Shard(1)], shape=grad.shape, stride=grad.stride())
        for optimizer in optimizers:
            optimizer.step()
    assert (optimizers[1].implementation().count("\n") > 0) == (rank == 0)  # the batches of the ranks differ
    return [(a - b.full_tensor()).abs().max().item() for a, b in zip(whole, cut, strict=True)]


def test_cut_rows_are_added_up_in_one_order(tmp_path: Path) -> None:
    """Ranks must add up rows of the same tensors, however their batches differ."""
    for differences in in_processes(_rows_of_other_layouts, tmp_path):
        assert max(differences) < 1e-6


def _ignored(rank: int) -> list[Any]:
    """Return what one optimizer for all parameters warns of, and how far apart two leave the shared weights."""
    torch.manual_seed(0)
    shared = torch.nn.Linear(6, 8)
    torch.manual_seed(rank)
    model = torch.nn.Sequential(shared, torch.nn.Linear(8, 3))  # the second layer is this rank's own
    wrapper = torch.nn.parallel.DistributedDataParallel
    wrapper._set_params_and_buffers_to_ignore_for_model(model, ["1.weight", "1.bias"])
    wrapped = wrapper(model)

    def step(*optimizers: GrokAdamW) -> None:
        model.zero_grad()
        (8 * wrapped(torch.randn(8, 6)) - 1).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(GrokAdamW(copied := list(model.parameters()), gamma=0.0))
    said = [str(warning.message) for warning in caught if "ignores" in str(warning.message)]
    dist.broadcast(shared.weight.detach(), 0)
    dist.broadcast(shared.bias.detach(), 0)
    group = dist.group.WORLD
    apart = [GrokAdamW(copied[:2], gamma=0.0), GrokAdamW(copied[2:], gamma=0.0, shard_group=group)]
    for _ in range(5):
        step(*apart)
    first = shared.weight.detach().clone()
    dist.broadcast(first, 0)
    return [said, (first - shared.weight).abs().max().item(), _told_of_ignored()]


def _told_of_ignored() -> dict[str, bool]:
    """Return if parameters that FSDP1 ignores are warned of beside others, alone, and if no norm is needed."""
    found = {}
    for how in ("beside others", "alone", "without a norm"):
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
        ignored = list(model[1].parameters())
        wrapped = FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), ignored_states=ignored, sharding_strategy=ShardingStrategy.NO_SHARD
        )
        options: dict[str, Any] = {"gamma": 0.0}
        if how == "without a norm":
            options |= {"gradient_clipping": 0.0, "nonfinite": "propagate"}
        optimizer = GrokAdamW(ignored if how == "alone" else wrapped.parameters(), **options)
        wrapped(torch.ones(2, 6)).sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        found[how] = any("ignores some of the parameters" in str(warning.message) for warning in caught)
    return found


def test_parameters_that_ddp_ignores_have_an_optimizer_of_their_own(tmp_path: Path) -> None:
    for said, difference, told in in_processes(_ignored, tmp_path):
        assert told == {"beside others": True, "alone": False, "without a norm": False}
        assert len(said) == 1
        assert "shard_group=torch.distributed.group.WORLD" in said[0]
        assert difference == 0


def _wrappers_of_others(rank: int) -> None:
    """Train in wrappers that have the names of torch's, and nothing else of theirs."""
    for name in ("DistributedDataParallel", "FullyShardedDataParallel"):
        model = type(name, (torch.nn.Sequential,), {})(network())
        optimizer = GrokAdamW.for_grokking(model)
        train(model, range(2), lambda step, loss, optimizer=optimizer: optimizer.step())


def test_wrappers_of_others_are_no_wrappers(tmp_path: Path) -> None:
    in_processes(_wrappers_of_others, tmp_path)


def _wrapped_after_a_pass(rank: int) -> str:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), gradient_clipping=0.0)
    step_in_backward(optimizer)
    train(model, range(1), lambda step, loss: optimizer.step())
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    try:
        train(wrapped, range(1), lambda step, loss: optimizer.step())
    except ValueError as error:
        return str(error)
    return ""


def test_a_wrapper_after_the_first_pass_is_refused(tmp_path: Path) -> None:
    for said in in_processes(_wrapped_after_a_pass, tmp_path):
        assert "in DistributedDataParallel, which averages their gradients later" in said
