"""Tests that a transformer trains on two and four real processes, in each kind of parallelism, as it does on one."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from benchmarks.distributed import collectives
from grokadamw import Accumulate, GrokAdamW, Grokfast
from grokadamw.signals import SlowGradient, loss_gap, memorisation

from .models import IMPLEMENTATIONS, network, running
from .test_distributed import in_processes, whole

STEPS, BATCH, LENGTH, WORDS, CLASSES = 50, 8, 5, 11, 3
OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "weight_decay": 0.1,
    "gamma": 0.1,
    "gradient_clipping": 0.5,
    "signal_boost": 1.0,
    "decay_boost": 4.0,
    "max_row_change": 0.1,
    "max_row_norm": 1.5,
}


class Block(nn.Module):
    """An attention and feed-forward block whose linear layers tensor parallelism can divide."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape. With tensor parallelism each rank computes some heads."""
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (-1, x.shape[-1] // self.heads)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + self.o((weights @ v).transpose(1, 2).flatten(2))
        return x + self.down(torch.tanh(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A transformer whose sizes four ranks do not divide; its head has three rows, so the fourth rank has none."""

    def __init__(self, width: int = 6, heads: int = 2, hidden: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, width)
        self.layers = nn.ModuleList(Block(width, heads, hidden) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.double()

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))  # type: ignore[no-any-return]


def batch(step: int, part: int, parts: int) -> tuple[Tensor, Tensor]:
    """Return one of the equal parts of a step's batch."""
    words = torch.randint(WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(step))
    return words.chunk(parts)[part], (words.sum(1) % CLASSES).chunk(parts)[part]


def loss_of(model: nn.Module, step: int, part: int, parts: int) -> Tensor:
    words, classes = batch(step, part, parts)
    return nn.functional.cross_entropy(model(words), classes)


class Run(NamedTuple):
    """A run's final weights, and each step's α, boost, gradient norm and clip coefficient."""

    weights: dict[str, Tensor]
    steps: list[list[float]]


def trained(model: nn.Module, optimizer: Any, losses: Callable[[int], Sequence[float]], inner: Any = None) -> Run:
    """Train. `losses(step)` runs backward and returns the losses to record; `inner` is the optimizer inside ZeRO's."""
    inner, steps = inner or optimizer, []
    for step in range(STEPS):
        optimizer.zero_grad()
        train_loss, eval_loss = losses(step)
        inner.record(train_loss=train_loss, eval_loss=eval_loss)
        optimizer.step()
        metrics = inner.metrics()
        steps.append([metrics[name] for name in ("alpha", "boost", "grad_norm", "clip_coefficient")])
    assert len(inner._run.cache.plans) == 1  # the batches were planned once, also those of DTensors
    weights = {name.removeprefix("module."): whole(p.detach()).clone() for name, p in model.named_parameters()}
    return Run(weights, steps)


def on_part(model: nn.Module, part: int, parts: int) -> Callable[[int], Sequence[float]]:
    """Return a function that runs backward on one part of a step's batch, and returns both losses."""

    def losses(step: int) -> Sequence[float]:
        with torch.no_grad():  # comes first: it leaves FSDP2's weights gathered until a backward pass
            eval_loss = loss_of(model, 1000 + step, part, parts)
        train_loss = loss_of(model, step, part, parts)
        train_loss.backward()
        return train_loss.item(), eval_loss.item()

    return losses


@functools.cache
def alone(parts: int) -> Run:
    """Train in one process on whole batches. The signal is the mean of the signals of the batches' parts."""
    model = Transformer()
    seen: list[list[float]] = []

    def losses(step: int) -> Sequence[float]:
        with torch.no_grad():
            seen[:] = [[loss_of(model, at, part, parts).item() for at in (step, 1000 + step)] for part in range(parts)]
        loss_of(model, step, 0, 1).backward()
        return 0.0, 0.0

    def signal() -> float:
        return sum((memorisation(*losses) + loss_gap(*losses)) / 2 for losses in seen) / parts

    return trained(model, GrokAdamW(model.named_parameters(), grokking_signal_fns=signal, **OPTIONS), losses)


def _grok(model: nn.Module) -> GrokAdamW:
    return GrokAdamW(model.named_parameters(), grokking_signal_fns=[memorisation, loss_gap], **OPTIONS)


def _shard(model: Transformer, mesh: Any) -> None:
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)


def ddp(rank: int, ranks: int) -> Run:
    model = DistributedDataParallel(Transformer(), static_graph=True, gradient_as_bucket_view=True)
    return trained(model, _grok(model), on_part(model, rank, ranks))


def zero(rank: int, ranks: int) -> Run:
    model = DistributedDataParallel(Transformer())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), GrokAdamW, grokking_signal_fns=[memorisation, loss_gap], **OPTIONS
    )
    optimizer.optim.set_layers(model.module)
    return trained(model, optimizer, on_part(model, rank, ranks), optimizer.optim)


def fsdp2(rank: int, ranks: int) -> Run:
    model = Transformer()
    _shard(model, init_device_mesh("cpu", (ranks,)))
    rows = cast(DTensor, model.head.weight).to_local().shape[0]
    assert rows == ([1, 1, 1, 0] if ranks == 4 else [2, 1])[rank]
    return trained(model, _grok(model), on_part(model, rank, ranks))


def hsdp(rank: int, ranks: int) -> Run:
    model = Transformer()
    _shard(model, init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("copies", "shards")))
    return trained(model, _grok(model), on_part(model, rank, ranks))


def _divide(model: Transformer, mesh: Any) -> None:
    """Divide the blocks by columns and rows, as Megatron does. Every rank holds all other parameters whole."""
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in ("q", "k", "v", "up")}
    plan |= {name: RowwiseParallel() for name in ("o", "down")}
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)


def tp(rank: int, ranks: int) -> Run:
    model = Transformer()
    _divide(model, init_device_mesh("cpu", (ranks,)))
    return trained(model, _grok(model), on_part(model, 0, 1))


def fsdp_tp(rank: int, ranks: int) -> Run:
    model = Transformer()
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
    _divide(model, mesh["tensor"])
    _shard(model, mesh["data"])
    return trained(model, _grok(model), on_part(model, rank // 2, ranks // 2))


WAYS = {"DDP": ddp, "FSDP2": fsdp2, "HSDP": hsdp, "ZeRO-1": zero, "TP": tp, "FSDP2 and TP": fsdp_tp}


def _trained_by(ways: Sequence[str], ranks: int, rank: int) -> list[Run]:
    return [WAYS[way](rank, ranks) for way in ways]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("ranks", "ways"),
    [
        (2, ["DDP", "FSDP2", "ZeRO-1", "TP"]),
        pytest.param(4, ["DDP", "FSDP2", "HSDP", "ZeRO-1", "FSDP2 and TP"], marks=pytest.mark.long),
    ],
)
def test_ranks_train_as_one_process(ranks: int, ways: list[str], tmp_path: Path) -> None:
    found = in_processes(functools.partial(_trained_by, ways, ranks), tmp_path, ranks)
    for way, *runs in zip(ways, *found, strict=True):
        expected = alone({"TP": 1, "FSDP2 and TP": ranks // 2}.get(way, ranks))
        alphas = [[alpha for alpha, *_ in run.steps] for run in runs]
        assert all(alpha == alphas[0] for alpha in alphas), way  # bit for bit
        assert len(set(alphas[0])) > 10
        assert min(clip for *_, clip in expected.steps) < 1
        differences = {
            name: max((run.weights[name] - weight).abs().max().item() for run in runs)
            for name, weight in expected.weights.items()
        }
        for run in runs:
            assert run.steps == [pytest.approx(step, abs=1e-9) for step in expected.steps], way
        print(f"{way} on {ranks} ranks: weights differ by {max(differences.values()):.1e} at most")
        assert max(differences.values()) < 1e-9, (way, differences)


SITUATIONS = ["a signal raises", "one rank records", "NaN", "no parameters", "no gradients"]


def _with_less(way: str, situation: str, rank: int) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Train with the second rank in this situation. Return the final weights, and the metrics of each step."""
    model: nn.Module = network(torch.float64)
    if way == "FSDP2" and situation == "no parameters":
        model = nn.Linear(5, 1, dtype=torch.float64)  # its one row is on the first rank
    if way == "FSDP2":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        has_none = all(not cast(DTensor, p).to_local().numel() for p in model.parameters())
        assert has_none == (situation == "no parameters" and rank == 1)
    else:
        model = DistributedDataParallel(model)
    params = [] if situation == "no parameters" and way == "DDP" and rank == 1 else list(model.parameters())

    def signal(train_loss: float, eval_loss: float) -> float:
        if situation == "a signal raises" and rank == 1:
            raise RuntimeError("no signal here")
        return eval_loss - train_loss

    options = {"signal_boost": 1.0, "grokking_signal_fns": signal}
    optimizer = GrokAdamW([{"params": params}], lr=0.01, **({} if situation == "one records, by default" else options))
    steps = []
    for step in range(6):
        optimizer.zero_grad()
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(2 * step + rank), dtype=torch.float64)
        loss = model(x).square().mean()
        (loss * torch.nan if situation == "NaN" and rank == 1 and step == 2 else loss).backward()
        if situation == "no gradients" and rank == 1 and step % 2:
            optimizer.zero_grad()
        if rank == 0 or not situation.startswith("one"):
            optimizer.record(train_loss=0.5, eval_loss=0.6 + 0.1 * step)
        optimizer.step()
        metrics = optimizer.metrics()
        steps.append({name: metrics[name] for name in ("alpha", "boost", "grad_norm", "skipped_steps")})
    assert metrics["signal_failures"] == (6 if situation == "a signal raises" and rank == 1 else 0)
    return [whole(p.detach()) for p in model.parameters()], steps


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("way", "situation"),
    [
        *itertools.product(["DDP", "FSDP2"], SITUATIONS),
        *itertools.product(["DDP", "FSDP2"], ["one records, by default"]),
    ],
)
def test_no_rank_waits_for_one_that_has_less(way: str, situation: str, tmp_path: Path) -> None:
    """A rank that waits for the other fails after 30 seconds."""
    (weights, steps), (others, all_steps) = in_processes(functools.partial(_with_less, way, situation), tmp_path)
    moves_alone = way == "DDP" and situation in ("no parameters", "no gradients")
    assert moves_alone or all(map(torch.equal, weights, others))
    assert all(weight.isfinite().all() for weight in weights)
    for ours, expected in zip(steps, all_steps, strict=True):
        if moves_alone:  # under DDP each rank has whole parameters and its own norm
            ours["grad_norm"] = expected["grad_norm"] = 0
        assert ours == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert steps[-1]["skipped_steps"] == (1 if situation == "NaN" else 0)
    assert steps[-1]["alpha"] < steps[0]["alpha"]
    assert steps[-1]["boost"] > steps[0]["boost"] > 1 or situation == "one records, by default"


def _lack_gradients(rank: int) -> list[tuple[float, float, float]]:
    """Train DTensors that are sharded along either dimension; the second rank lacks gradients from the start."""
    mesh = init_device_mesh("cpu", (2,))
    found = []
    for how in ("all", "of the first group", "a warm-up", "a signal that sums", "raise", "accumulated", "filtered"):
        values = [torch.ones(4, 3), torch.ones(3, 4), torch.ones(5)]
        divided = [
            distribute_tensor(x, mesh, [place]) for x, place in zip(values, [Shard(0), Shard(1), Shard(0)], strict=True)
        ]
        params = [nn.Parameter(x) for x in divided]
        groups = [{"params": params[:1], "gradient_clipping": 0.5}, {"params": params[1:], "gradient_clipping": 0.0}]
        options: dict[str, Any] = {
            "of the first group": {"nonfinite": "propagate"},
            "a warm-up": {"lr": 0.0},
            "a signal that sums": {"grokking_signal_fns": SlowGradient(every=1)},
            "raise": {"nonfinite": "raise"},
            "filtered": {"lr": 0.0, "lamb": 0.0},
        }.get(how, {})
        inner = GrokAdamW(groups, **options)
        optimizer = Accumulate(inner, 2, gradient_clipping=0.5) if how == "accumulated" else inner
        optimizer = Grokfast(inner) if how == "filtered" else optimizer
        for step in range(4):
            lacks = [3, 1, 0, 3][step] if rank == 1 else 0
            if how == "of the first group" and rank == 1:
                lacks = 1
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 2.0) if i >= lacks else None
            if how == "raise" and step == 3:
                if rank == 0:
                    params[0].grad = torch.full_like(params[0], torch.nan)
                with pytest.raises(RuntimeError, match="group 0" if rank == 0 else "those of another rank"):
                    optimizer.step()
            else:
                optimizer.step()
        metrics = inner.metrics()
        found.append((metrics["grad_norm"], metrics["alpha"], metrics["clip_coefficient"]))
    return found


@pytest.mark.filterwarnings("ignore")
def test_ranks_that_lack_gradients_meet_where_others_do(tmp_path: Path) -> None:
    first, second = in_processes(_lack_gradients, tmp_path)
    assert first == second
    elements = [15, 23, 15, 15, 29]  # with a gradient at the last step that was taken
    assert [norm for norm, *_ in first[:5]] == pytest.approx([2 * math.sqrt(n) for n in elements])
    assert first[3][1] < 0.98  # the signal is not 0


def _small(mesh: Any, options: dict[str, Any]) -> tuple[list[Tensor], GrokAdamW]:
    """Take five steps, on a mesh or without: one lacks a gradient, and one follows the loading of a checkpoint."""
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(9, 5), (9, 4, 3), (40,), (), (1, 6)]
    if "int8" in options.values():
        shapes += [(70, 65), (5000,)]  # large enough to be stored as codes
    values = [torch.randn(shape) for shape in shapes]

    def placed(x: Tensor) -> Tensor:
        return x if mesh is None else distribute_tensor(x, mesh, [Shard(0) if x.dim() else Replicate()])

    params = [nn.Parameter(placed(x)) for x in values]
    optimizer = GrokAdamW(params, lr=0.01, max_row_norm=3.0, max_row_change=0.1, **options)
    for step in range(5):
        for i, p in enumerate(params):
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            p.grad = None if (step, i) == (2, 1) else placed(grad)
        if step == 3:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.step()
    return [whole(p.detach()).clone() for p in params], optimizer


@pytest.mark.parametrize(
    ("implementation", "state_dtype"),
    [*((name, "float32") for name in IMPLEMENTATIONS), ("cpu", "int8"), ("foreach", "int8")],
)
def test_a_mesh_of_one_rank_changes_no_bit(implementation: str, state_dtype: str, tmp_path: Path) -> None:
    with running(implementation) as options:
        options = {**options, "state_dtype": state_dtype}
        expected, plain = _small(None, options)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
        try:
            found, optimizer = _small(init_device_mesh("cpu", (1,)), options)
            assert collectives(optimizer.step) == 0
        finally:
            dist.destroy_process_group()
    assert all(map(torch.equal, found, expected))
    assert optimizer.implementation() == plain.implementation()
    assert len(optimizer._run.cache.plans) == len(plain._run.cache.plans)


def _collectives(rank: int) -> list[int]:
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model(torch.randn(4, 5)).square().mean().backward()
    return [
        collectives(GrokAdamW(model.named_parameters(), **options).step)
        for options in (
            {"grokking_signal_fns": []},
            {"signal_boost": 1.0},
            {"nonfinite": "propagate", "gradient_clipping": 0.0, "grokking_signal_fns": []},
        )
    ]


@pytest.mark.filterwarnings("ignore")
def test_a_step_takes_two_collectives_at_most(tmp_path: Path) -> None:
    assert in_processes(_collectives, tmp_path) == [[1, 2, 0]] * 2


OVERFLOWS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "accumulation_steps": {"accumulation_steps": 2, "second_moment": "raw"},
    "Accumulate": {},
}


def _overflow_on_one_rank(rank: int) -> list[list[Any]]:
    """Return, by way and with or without `unscale_`, the loss scales, any error and whether it left the weights."""
    found = []
    for way, unscale in itertools.product(OVERFLOWS, (True, False)):
        torch.manual_seed(0)
        model = FullyShardedDataParallel(nn.Linear(6, 4), device_id=torch.device("cpu"), use_orig_params=True)
        inner = GrokAdamW(model.parameters(), gamma=0, shard_group=dist.group.WORLD, **OVERFLOWS[way])
        optimizer: Any = Accumulate(inner, 2) if way == "Accumulate" else inner
        scaler, said = ShardedGradScaler(device="cpu", init_scale=8.0), []
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(2, 6)).square().mean()).backward()
            if step == 1 and rank == 0:
                next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = torch.inf
            if unscale:
                scaler.unscale_(optimizer)
            before = [x.detach().clone() for x in model.parameters()]
            try:
                scaler.step(optimizer)
            except RuntimeError as error:
                said += [str(error), all(map(torch.equal, before, model.parameters()))]
                break
            scaler.update()
            said.append(scaler.get_scale())
        found.append(said)
    return found


@pytest.mark.filterwarnings("ignore")
def test_ranks_agree_on_what_overflows(tmp_path: Path) -> None:
    """All ranks halve the loss scale. Before, only one did, and with Accumulate the ranks waited for each other."""
    first, second = in_processes(_overflow_on_one_rank, tmp_path)
    assert first == second
    for agreed, refused in zip(first[::2], first[1::2], strict=True):
        assert agreed == [8.0, 4.0, 4.0]
        assert refused[0] == 8.0
        assert refused[1].startswith("1 of the shard_group's 2 ranks found infinity")
        assert "scaler.unscale_(optimizer)" in refused[1]
        assert refused[2]


def _built_before_fsdp1(rank: int) -> list[list[str]]:
    """Return the warnings of two steps after FSDP1 replaced the parameters, and where only one rank has no gradient."""
    said = []
    for replaced in (True, False):
        model = nn.Linear(6, 4)
        optimizer = GrokAdamW(model.parameters(), gamma=0, shard_group=dist.group.WORLD)
        wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu")) if replaced else model
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                if replaced or rank == 0:
                    wrapped(torch.ones(2, 6)).square().mean().backward()
                optimizer.step()
        said.append([str(warning.message) for warning in caught if "found no gradient" in str(warning.message)])
    return said


def test_an_optimizer_whose_parameters_fsdp1_replaced_says_so(tmp_path: Path) -> None:
    for replaced, less in in_processes(_built_before_fsdp1, tmp_path):
        assert len(replaced) == 1
        assert less == []
