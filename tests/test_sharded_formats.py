"""State and weights in fewer bits, sharded over two real processes: the bits of one process, and checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from grokadamw import GrokAdamW

from .test_distributed import RANKS, in_processes, whole
from .test_precision import FORMATS

# name: shape, how it is divided, and whether blocks of int8 are whole then
PARAMETERS: dict[str, tuple[tuple[int, ...], Any, bool]] = {
    "even": ((64, 128), Shard(0), True),
    "uneven": ((77, 97), Shard(0), True),
    "one row": ((1, 5000), Shard(0), True),  # the second rank has nothing
    "cube": ((31, 8, 20), Shard(0), True),
    "vector": ((8192,), Shard(0), True),
    "uneven vector": ((5000,), Shard(0), False),
    "columns": ((64, 256), Shard(1), True),
    "uneven columns": ((64, 100), Shard(1), False),
    "replicated": ((64, 97), Replicate(), True),
    "small": ((8, 8), Shard(0), False),
}
ROWS = ["even", "uneven", "one row", "cube", "vector"]  # whose blocks keep their numbers


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype, mesh: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, (shape, placement, _) in PARAMETERS.items():
            x = (0.1 * torch.randn(shape)).to(dtype)
            self.register_parameter(name, nn.Parameter(x if mesh is None else distribute_tensor(x, mesh, [placement])))


def started(options: dict[str, Any], mesh: Any = None) -> tuple[Model, GrokAdamW]:
    model = Model(torch.bfloat16 if options.keys() & {"master_weight_bits", "rounding"} else torch.float32, mesh)
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
    """Return each parameter and its state, all of it on every rank."""
    found = {}
    for name, param in model.named_parameters():
        kept = {"param": param.detach(), **optimizer.state[param]}
        found[name] = {key: whole(x.int() if x.dtype == torch.int16 else x).clone() for key, x in kept.items()}
    return found


def same(ours: dict[str, dict[str, Tensor]], theirs: dict[str, dict[str, Tensor]]) -> bool:
    pairs = [(kept, theirs[name]) for name, kept in ours.items()]
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bfloat16", "int8", "24 bits", "32 bits", "stochastic"])
def test_two_ranks_have_the_bits_of_one_process(name: str, tmp_path: Path) -> None:
    """Given equal gradients, wherever rows or blocks are whole; else what decodes to nearly the same."""
    options = {**FORMATS[name], "foreach": True}
    model, optimizer = started(options)
    train(model, optimizer, 0, 4)
    expected = values(model, optimizer)
    for found, placements, coded in in_processes(functools.partial(_trained, options), tmp_path):
        assert placements
        if "int8" in FORMATS[name].values():
            assert coded == [name for name, (_, _, is_coded) in PARAMETERS.items() if is_coded]
        for each in ROWS + ["replicated"]:
            assert same({each: found[each]}, {each: expected[each]}), each
        for each, kept in expected.items():
            torch.testing.assert_close(found[each]["param"], kept["param"], atol=0.01, rtol=0.02)
