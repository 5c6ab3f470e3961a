"""Compute memory, time and collectives of a step on many GPUs by formulas, and measure memory on a few ranks.

    python -m benchmarks.scaling [--out benchmarks/results]

The tables are those of docs/scaling.md. Bytes come from `GrokAdamW.memory()`, with parameters on the meta device. The
time of a step comes from its bytes and the bandwidth that one GPU reached; the time of a collective from NCCL's own
model of latency. The formula for memory is compared with the bytes that 1, 2 and 4 gloo processes hold when they share
a model by FSDP2. Results go to scaling.json.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from grokadamw import GrokAdamW

from . import RESULTS

# a name, the dtype of weights and gradients, and the optimizer's options
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32, bfloat16 state": (torch.float32, {"state_dtype": "bfloat16"}),
    "bfloat16, 24 bits, int8 state": (torch.bfloat16, {"master_weight_bits": 24, "state_dtype": "int8"}),
}
MODELS = {"1 B": 1e9, "7 B": 7e9, "70 B": 70e9, "405 B": 405e9, "1 T": 1e12}
GPUS = (8, 64, 512, 4096, 16384)
BYTES_OF_GPU = 80e9
# 1 B float32 parameters, clipped, in 13.96 ms on an H100 80GB HBM3: gpu-2-times-h100.json, as docs/speed.md quotes it
BANDWIDTH = 40e9 / 13.96e-3
# NVIDIA/nccl, src/graph/tuning.cc at 01afd20a: a tree of small messages ("Tree", "LL"), in µs
BASE, NVLINK, NETWORK, ACROSS_NODES, GPUS_OF_NODE = 4.4, 0.52, 5.0, 1.8, 8


def memory(params: float, ranks: int, dtype: torch.dtype, options: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes on each rank, by kind, if all ranks share the parameters."""
    share = math.ceil(params / ranks)
    return GrokAdamW([nn.Parameter(torch.empty(share, dtype=dtype, device="meta"))], **options).memory()


def moved(found: Mapping[str, int]) -> int:
    """Return the bytes that a step moves. It reads gradients twice, for the norm, and reads and writes all else."""
    return 2 * (found["total"] - found["step"])


def latency(gpus: int) -> float:
    """Return the µs of an all-reduce of a few bytes, by NCCL's model of a tree over nodes of 8 GPUs."""
    nodes = max(gpus // GPUS_OF_NODE, 1)
    inside = (min(gpus, GPUS_OF_NODE) - 1) * NVLINK * (ACROSS_NODES if nodes > 1 else 1)
    return BASE + 2 * (inside + int(math.log2(nodes)) * NETWORK)


def of_memory() -> list[list[str]]:
    """Return the GB of weights, gradients and state per GPU, or a dash if they do not fit."""
    lines = [["parameters", "weights and state", *(f"{gpus:,} GPUs" for gpus in GPUS)]]
    for model, params in MODELS.items():
        for name, (dtype, options) in FORMATS.items():
            sizes = [memory(params, gpus, dtype, options)["total"] for gpus in GPUS]
            lines.append([model, name, *(f"{x / 1e9:.3g}" if x < BYTES_OF_GPU else "–" for x in sizes)])
    return lines


def of_time() -> list[list[str]]:
    """Return the ms of a step in float32, from its bytes, if these fit; each GPU updates only its share."""
    lines = [["parameters", "one GPU", *(f"{gpus:,} GPUs" for gpus in GPUS)]]
    for model, params in MODELS.items():
        found = [memory(params, gpus, *FORMATS["float32"]) for gpus in (1, *GPUS)]
        lines.append(
            [model, *(f"{moved(x) / BANDWIDTH * 1e3:.2g}" if x["total"] < BYTES_OF_GPU else "–" for x in found)]
        )
    return lines


def of_latency() -> list[list[str]]:
    """Return the µs of one small all-reduce."""
    return [["", *(f"{gpus:,} GPUs" for gpus in GPUS)], ["µs", *(f"{latency(gpus):.0f}" for gpus in GPUS)]]


def of_ranks(measured: Mapping[str, Mapping[str, Sequence[int]]]) -> list[list[str]]:
    """Return the bytes on the fullest rank, measured and by the formula."""
    lines = [["weights and state", "ranks", "measured", "by the formula"]]
    for name, by_ranks in measured.items():
        for ranks, (held, formula) in by_ranks.items():
            lines.append([name, ranks, f"{held:,}", f"{formula:,}"])
    return lines


def measure(ranks: int) -> dict[str, tuple[int, int]]:
    """Return, by format, the bytes that the fullest rank holds after a step, and those of the formula."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, args=(ranks, folder), nprocs=ranks, start_method="forkserver")
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
    return {name: (max(result[name][0] for result in found), found[0][name][1]) for name in FORMATS}


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    found = {}
    for name, (dtype, options) in FORMATS.items():
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False, dtype=dtype) for _ in range(4)))
        params = sum(p.numel() for p in model.parameters())
        for layer in model:
            fully_shard(layer, mesh=init_device_mesh("cpu", (ranks,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
        optimizer = GrokAdamW(model.named_parameters(), **options)
        model(torch.ones(1, 1024, dtype=dtype)).float().sum().backward()
        optimizer.step()
        held = 0
        for p in model.parameters():
            tensors = [p, p.grad, *optimizer.state[p].values()]
            held += sum(getattr(x, "_local_tensor", x).nbytes for x in tensors if isinstance(x, torch.Tensor))
        found[name] = (held, memory(params, ranks, dtype, options)["total"])
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    rule = [
        "---:" if any(x[:1].isdigit() and x[-1:].isdigit() for x in column) else "---"
        for column in zip(*rest, strict=True)
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *rest])


def tables(measured: Mapping[str, Mapping[str, Sequence[int]]]) -> dict[str, str]:
    """Return the page's tables, by their marks."""
    return {
        "memory on many GPUs": markdown(of_memory()),
        "time on many GPUs": markdown(of_time()),
        "latency": markdown(of_latency()),
        "memory by ranks": markdown(of_ranks(measured)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where scaling.json goes; default: %(default)s")
    given = parser.parse_args()
    found = {ranks: measure(ranks) for ranks in (1, 2, 4)}
    measured = {name: {str(ranks): found[ranks][name] for ranks in found} for name in FORMATS}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "scaling.json").write_text(json.dumps(measured, indent=1) + "\n")
    for table in tables(measured).values():
        print(table)


if __name__ == "__main__":
    main()
