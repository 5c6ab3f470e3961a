"""Trains with FSDP2, saves a checkpoint every few steps, and resumes from the last one. test_elastic.py starts it.

    torchrun --nproc-per-node 2 --max-restarts 3 tests/elastic_run.py FOLDER

Each rank writes its process id to FOLDER/pid-RANK before it looks for a checkpoint. At the end rank 0 writes
FOLDER/end.pt.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from grokadamw import GrokAdamW
from grokadamw.signals import SlowGradient, loss_gap

STEPS, EVERY = 60, 3  # EVERY is the number of steps between two checkpoints


def write(text: str, path: Path) -> None:
    """Write the file whole or not at all."""
    beside = path.with_suffix(".new")
    beside.write_text(text)
    os.replace(beside, path)


def train(folder: Path, rank: int) -> None:
    """Train from the last checkpoint to the last step, then save all tensors, the groups and the seconds it took."""
    ranks, began = dist.get_world_size(), time.perf_counter()
    write(str(os.getpid()), folder / f"pid-{rank}")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 65), nn.Tanh(), nn.Linear(65, 1))
    for module in (model[2], model):
        fully_shard(module, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = GrokAdamW(
        model.named_parameters(),
        lr=0.01,
        gradient_clipping=0.1,
        signal_boost=1.0,
        grokking_signal_fns=[loss_gap, SlowGradient(every=4)],
        state_dtype="int8",
    )
    start = 0
    if (folder / "last").exists():
        start = int((folder / "last").read_text())
        of_model, of_optimizer = get_state_dict(model, optimizer)
        both = {"model": of_model, "optimizer": of_optimizer}
        dcp.load(both, checkpoint_id=folder / f"step-{start}")
        set_state_dict(model, optimizer, model_state_dict=both["model"], optim_state_dict=both["optimizer"])
    for step in range(start, STEPS):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(ranks * step + rank))
        optimizer.zero_grad()
        loss = (model(x).squeeze(1) - x[:, 0] * x[:, 1]).square().mean()
        loss.backward()
        optimizer.record(train_loss=loss, eval_loss=loss * (1 + 0.1 * (step % 7)))
        optimizer.step()
        if (step + 1) % EVERY == 0:
            of_model, of_optimizer = get_state_dict(model, optimizer)
            dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder / f"step-{step + 1}")
            if rank == 0:
                write(str(step + 1), folder / "last")
    tensors = [p for param, state in optimizer.state.items() for p in (param.detach(), *state.values())]
    end = [x.full_tensor() if isinstance(x, DTensor) else x for x in tensors]
    groups = optimizer.state_dict()["param_groups"]
    if rank == 0:
        torch.save((end, groups, time.perf_counter() - began), folder / "end.new")
        os.replace(folder / "end.new", folder / "end.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    train(Path(sys.argv[1]), dist.get_rank())
    dist.barrier()
    os._exit(0)  # gloo may abort while its threads end ("terminate called without an active exception")
