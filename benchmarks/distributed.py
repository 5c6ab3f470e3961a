"""Time a step on FSDP2's shards, beside a step on plain copies of them, and count the collectives of a step.

    python -m benchmarks.distributed [--out benchmarks/results]

One and two gloo processes share a stack of linear layers by `fully_shard`. Each takes steps on its shards and, in turn,
on plain copies of them. Times are lower quartiles, as the machine may be busy. The ratio leaves out the time in
`all_reduce`, where a rank waits for the other; that time is printed separately. Collectives are those that torch's
profiler sees in a step. Results go to distributed.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

from grokadamw import GrokAdamW

from . import RESULTS

FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"state_dtype": "bfloat16"},
    "int8": {"state_dtype": "int8"},
}
LAYERS, WIDTHS = 50, (128, 512)  # 100 tensors
STEPS, WARM = 60, 5


class Timed:
    """A wrapper of `torch.distributed.all_reduce` that counts the seconds spent in it."""

    def __init__(self) -> None:
        self._all_reduce, self.seconds = dist.all_reduce, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._all_reduce(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - began


def collectives(step: Callable[[], object]) -> int:
    """Return how many collectives a step takes part in."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    return sum(event.name.startswith(("gloo:", "nccl:")) for event in profiled.events())


def compared(width: int, options: dict[str, Any]) -> dict[str, float]:
    """Return milliseconds of a step on shards, on plain copies, and in all_reduce; and the collectives of a step."""
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(LAYERS)))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    model(torch.randn(4, width)).square().mean().backward()
    copies = [nn.Parameter(p.to_local().detach().clone()) for p in model.parameters()]  # type: ignore[attr-defined]
    for copy, p in zip(copies, model.parameters(), strict=True):
        copy.grad = p.grad.to_local().clone()  # type: ignore[union-attr]
    # γ and layers cost nothing; the signal's mean is one of the two collectives
    sharded = GrokAdamW(model.parameters(), grokking_signal_fns=lambda: 0.5, **options)
    plain = GrokAdamW(copies, grokking_signal_fns=[], **options)
    times: dict[str, list[float]] = {"shards": [], "plain": [], "all_reduce": []}
    for step in range(WARM + STEPS):
        timed = Timed()
        with patch.object(dist, "all_reduce", timed):
            seconds = {}
            for name in ("shards", "plain") if step % 2 else ("plain", "shards"):  # the first one waits for memory
                dist.barrier()
                began = time.perf_counter()
                (sharded if name == "shards" else plain).step()
                seconds[name] = time.perf_counter() - began
        if step >= WARM:
            times["shards"].append(seconds["shards"] - timed.seconds)
            times["plain"].append(seconds["plain"])
            times["all_reduce"].append(timed.seconds)
    found = {name: 1000 * statistics.quantiles(seconds, n=4)[0] for name, seconds in times.items()}
    return {**found, "ratio": found["shards"] / found["plain"], "collectives": collectives(sharded.step)}


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    found = [
        {"ranks": ranks, "width": width, "state": name, **compared(width, options)}
        for width in WIDTHS
        for name, options in FORMATS.items()
    ]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(ranks: int) -> list[dict[str, Any]]:
    """Measure on that many ranks, and return the first one's results."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, args=(ranks, folder), nprocs=ranks, start_method="spawn")
        return json.loads((Path(folder) / "0.json").read_text())  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where distributed.json goes; default: %(default)s")
    given = parser.parse_args()
    found = [row for ranks in (1, 2) for row in measure(ranks)]
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "distributed.json").write_text(json.dumps(found, indent=1) + "\n")
    print("ranks  width  state     shards  plain   ratio  all_reduce  collectives")
    for row in found:
        print(
            "{ranks:5}  {width:5}  {state:8}  {shards:5.2f}  {plain:5.2f}  {ratio:6.2f}  {all_reduce:8.2f}  "
            "{collectives:11}".format(**row)
        )


if __name__ == "__main__":
    main()
