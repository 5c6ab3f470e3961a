"""Runs each framework once on two ranks, on the CPU. test_launches.py starts it.

    python -m torch.distributed.run --nproc-per-node 2 tests/launch_run.py WAY FOLDER

Each rank writes FOLDER/RANK.pt, which holds the final weights and what each step did.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from grokadamw import GrokAdamW, decay_groups
from tests.models import batch, network

RANKS, STEPS, BATCH = 2, 10, 16  # models.batch returns this many examples, and each rank takes half of them
HALF = BATCH // RANKS
DECAY = 0.1
OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "lamb": 1.5,
    "gamma": 0.1,
    "gradient_clipping": 0.3,
    "signal_boost": 1.0,
    "decay_boost": 4.0,
    "grokking_signal_decay_rate": 0.5,
}


def gap(train_loss: float, eval_loss: float) -> float:
    """Return the difference of the losses. As it is linear, its mean over parts of a batch is that of the batch."""
    return eval_loss - train_loss


class Run(NamedTuple):
    """The weights at the end of a run, and the α, boost, norm and clip coefficient of each step."""

    weights: dict[str, Tensor]
    steps: list[list[float]]


class Judged(nn.Module):
    """The network of `models`, which returns its loss as the Trainer wants it."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.network = network(dtype)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        outputs = self.network(x)
        return {"loss": (outputs - y).square().mean(), "outputs": outputs}


def data(dtype: torch.dtype = torch.float64) -> TensorDataset:
    """Return the batches of `models`, one after the other."""
    return TensorDataset(*(torch.cat(parts) for parts in zip(*(batch(i, dtype) for i in range(STEPS)), strict=True)))


def held_out(dtype: torch.dtype = torch.float64) -> TensorDataset:
    """Return one batch with other answers, so that the signal is above 0."""
    x, y = batch(1000, dtype)
    return TensorDataset(x, y + 1)


def make(model: nn.Module, **options: Any) -> GrokAdamW:
    # biases are found by name, because FSDP1's parts of weights have one dimension, too
    groups = decay_groups(model, DECAY, lambda name, _: name.endswith("bias"))
    return GrokAdamW(groups, grokking_signal_fns=gap, **{**OPTIONS, **options})


def make_for_zero(model: nn.Module, **options: Any) -> GrokAdamW:
    """Return an optimizer for float32, of one group without layers: DeepSpeed flattens groups, and steps one by one."""
    options = {**OPTIONS, "gamma": 0.0, "weight_decay": DECAY, **options}
    return GrokAdamW(model.named_parameters(), grokking_signal_fns=gap, **options)


def watched(optimizer: GrokAdamW) -> list[list[float]]:
    """Return a list to which each step adds what it did."""
    steps: list[list[float]] = []

    def after(*_: Any) -> None:
        metrics = optimizer.metrics()
        steps.append([metrics[name] for name in ("alpha", "boost", "grad_norm", "clip_coefficient")])

    optimizer.register_step_post_hook(after)
    return steps


def run_of(model: nn.Module, steps: list[list[float]], by_fsdp2: bool = False) -> Run:
    assert all(isinstance(param, DTensor) == by_fsdp2 for param in model.parameters())
    weights = {}
    for name, param in model.named_parameters():
        value = param.detach()
        short = name.rpartition("network.")[2].replace("_fsdp_wrapped_module.", "")
        weights[short] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()
    return Run(weights, steps)


def by_hand(
    model: nn.Module,
    optimizer: GrokAdamW,
    part: Callable[[int], slice],
    dtype: torch.dtype = torch.float64,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    step: Callable[[], Any] | None = None,
    by_fsdp2: bool = False,
) -> Run:
    """Train in a loop on the examples that `part` gives for each step, and evaluate after each step."""
    steps, (x, y), (other_x, other_y) = watched(optimizer), data(dtype).tensors, held_out(dtype).tensors
    for i in range(STEPS):
        optimizer.zero_grad()
        loss = model(x[part(i)], y[part(i)])["loss"]
        backward(loss)
        (step or optimizer.step)()
        with torch.no_grad():
            eval_loss = model(other_x, other_y)["loss"]
        optimizer.record(train_loss=loss, eval_loss=eval_loss)
    return run_of(model, steps, by_fsdp2)


def alone(as_zero: bool = False) -> Run:
    """Train in one process, on whole batches."""
    dtype = torch.float32 if as_zero else torch.float64
    model = Judged(dtype)
    optimizer = make_for_zero(model) if as_zero else make(model)
    return by_hand(model, optimizer, lambda i: slice(BATCH * i, BATCH * (i + 1)), dtype)


def own(step: int) -> slice:
    """Return the slice of this rank's examples in a step."""
    start = BATCH * step + HALF * dist.get_rank()
    return slice(start, start + HALF)


def shard_by_accelerate() -> None:
    """Make Accelerate treat the CPU as a device that it uses FSDP on.

    On the CPU it would silently use DDP instead. Its own sharding code is the same for all devices.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU


def accelerate(folder: Path, sharded: bool) -> Run:
    from accelerate import Accelerator

    if sharded:
        shard_by_accelerate()
    accelerator, model = Accelerator(cpu=True), Judged()
    optimizer = make(model)
    layers = [group["layers"] for group in optimizer.param_groups]
    model, prepared = accelerator.prepare(model, optimizer)
    assert accelerator.is_fsdp2 == sharded
    assert prepared.optimizer is optimizer
    assert [group["layers"] for group in optimizer.param_groups] == layers
    return by_hand(model, optimizer, own, backward=accelerator.backward, step=prepared.step, by_fsdp2=sharded)


def transformers_trainer(folder: Path, how: str) -> Run:
    import transformers

    from grokadamw.huggingface import GrokAdamWCallback

    found: list[Any] = []

    class Watches(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"].optimizer
            found.extend([watched(optimizer), optimizer])

    in_arguments = {
        name: OPTIONS[name] for name in ("lamb", "gamma", "gradient_clipping", "grokking_signal_decay_rate")
    }
    arguments = transformers.TrainingArguments(
        str(folder),
        optim="grokadamw",
        optim_args=",".join(f"{name}={value}" for name, value in in_arguments.items()),
        learning_rate=OPTIONS["lr"],
        weight_decay=DECAY,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        max_steps=STEPS,
        per_device_train_batch_size=HALF,
        per_device_eval_batch_size=HALF,
        train_sampling_strategy="sequential",
        label_names=["y"],
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **({"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Linear"]}} if how == "fsdp" else {}),
    )
    assert arguments.world_size == RANKS  # reading it makes the ranks meet
    if how == "fsdp":
        shard_by_accelerate()
    model: Any = sharded_when_loaded(folder / "model") if how == "loaded" else Judged()
    sets = [[dict(zip("xy", pair, strict=True)) for pair in dataset] for dataset in (data(), held_out())]
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=sets[0],
        eval_dataset=sets[1],
        callbacks=[
            GrokAdamWCallback(signals=gap, **{name: OPTIONS[name] for name in ("signal_boost", "decay_boost")}),
            Watches(),
        ],
    )
    trainer.train()
    assert trainer.is_fsdp_enabled == (how == "fsdp")
    steps, optimizer = found
    assert len(optimizer.param_groups) == 2
    return run_of(trainer.model, steps, by_fsdp2=how != "ddp")


def sharded_when_loaded(folder: Path) -> Any:
    """Return a model of Transformers that is sharded by FSDP2 while it loads."""
    import transformers
    from transformers.distributed import DistributedConfig

    class Loaded(transformers.PreTrainedModel):  # type: ignore[misc]
        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.network = network(torch.float64)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            pass

        forward = Judged.forward

    if dist.get_rank() == 0:
        Loaded(transformers.PretrainedConfig()).save_pretrained(folder)
    dist.barrier()
    divided = DistributedConfig(fsdp_size=RANKS, fsdp_plan={"network.*": "free_full_weight"})
    return Loaded.from_pretrained(folder, distributed_config=divided, dtype=torch.float64)


def lightning(folder: Path, how: str) -> Run:
    import lightning as of_lightning
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    from grokadamw.lightning import GrokAdamWCallback

    class Module(of_lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.judged, self.steps = Judged(), list[list[float]]()

        def configure_model(self) -> None:
            if how == "fsdp2":
                for module in (self.judged.network[0], self.judged.network[2], self.judged):
                    # without resharding, the validation at the end would leave weights gathered
                    fully_shard(module, mesh=self.device_mesh["data_parallel"], reshard_after_forward=True)
            if how == "fsdp1":  # wrapped by hand, because torch must be told that the CPU is meant
                wrapped = functools.partial(
                    FullyShardedDataParallel, device_id=torch.device("cpu"), use_orig_params=True
                )
                self.judged.network[2] = wrapped(self.judged.network[2])
                self.judged = wrapped(self.judged)

        def training_step(self, examples: list[Tensor]) -> Tensor:
            loss: Tensor = self.judged(*examples)["loss"]
            self.log("of_epoch", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, examples: list[Tensor]) -> None:
            self.log("val_loss", self.judged(*examples)["loss"], sync_dist=True)

        def configure_optimizers(self) -> GrokAdamW:
            # FSDP1's parameters are flat parts of the weights, so the norm has to be summed over the ranks
            if how == "zero":
                return self.inside_zero()
            options = {"shard_group": dist.group.WORLD} if how == "fsdp1" else {}
            optimizer = make(self, **options)
            self.steps = watched(optimizer)
            return optimizer

        def inside_zero(self) -> ZeroRedundancyOptimizer:
            """Return an optimizer without names, whose layers the callback takes from the module."""
            params = decay_groups(self, DECAY, lambda name, _: name.endswith("bias"))
            groups = [{"params": [p for _, p in g["params"]], "weight_decay": g["weight_decay"]} for g in params]
            optimizer = ZeroRedundancyOptimizer(groups, GrokAdamW, grokking_signal_fns=gap, **OPTIONS)
            self.steps = watched(optimizer.optim)
            return optimizer

    class OnCPU(FSDPStrategy):  # type: ignore[misc]
        """Lightning's FSDP strategy as a subclass, because Lightning refuses the original without a GPU."""

    strategy = {
        "ddp": "ddp",
        "zero": "ddp",
        "fsdp2": ModelParallelStrategy(data_parallel_size=RANKS, tensor_parallel_size=1),
        "fsdp1": OnCPU(),
    }[how]
    module, by_epoch = Module(), GrokAdamWCallback(train_loss="of_epoch")
    trainer = of_lightning.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy=strategy,
        max_epochs=1,
        val_check_interval=1,
        num_sanity_val_steps=0,
        callbacks=[GrokAdamWCallback(), by_epoch],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # Lightning's sampler shuffles
    )
    loaders = []
    for dataset in (data(), held_out()):
        sampler = DistributedSampler(dataset, RANKS, int(os.environ["RANK"]), shuffle=False)
        loaders.append(DataLoader(dataset, batch_size=HALF, sampler=sampler))
    trainer.fit(module, *loaders)
    if how == "ddp":  # rank 0 writes the checkpoint, so every rank must hold the same losses
        own = [trainer.optimizers[0].param_groups[0][name] for name in ("train_loss", "eval_loss")]
        own += [by_epoch.state_dict()["train_loss"].item()]
        of_ranks: list[Any] = [None] * RANKS
        dist.all_gather_object(of_ranks, own)
        assert all(losses == own for losses in of_ranks)
    with FullyShardedDataParallel.summon_full_params(module):
        return run_of(module, module.steps, by_fsdp2=how == "fsdp2")


def deepspeed(folder: Path, stage: int) -> Run:
    """Train with GrokAdamW as DeepSpeed's client optimizer. In stages 1 and 2 each rank holds a part of the group."""
    import deepspeed as of_deepspeed

    of_deepspeed.init_distributed("gloo")
    model = Judged(torch.float32)
    optimizer = make_for_zero(model, shard_group=dist.group.WORLD if stage else None)
    config = {
        "train_micro_batch_size_per_gpu": HALF,
        "gradient_clipping": 0.0,  # otherwise DeepSpeed clips to 1
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = of_deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return by_hand(engine, optimizer, own, torch.float32, engine.backward, engine.step)


WAYS: dict[str, Callable[[Path], Run]] = {
    "Accelerate, DDP": functools.partial(accelerate, sharded=False),
    "Accelerate, FSDP2": functools.partial(accelerate, sharded=True),
    "Trainer, DDP": functools.partial(transformers_trainer, how="ddp"),
    "Trainer, FSDP2": functools.partial(transformers_trainer, how="fsdp"),
    "Trainer, FSDP2 when loaded": functools.partial(transformers_trainer, how="loaded"),
    "Lightning, DDP": functools.partial(lightning, how="ddp"),
    "Lightning, ZeRO": functools.partial(lightning, how="zero"),
    "Lightning, FSDP2": functools.partial(lightning, how="fsdp2"),
    "Lightning, FSDP1": functools.partial(lightning, how="fsdp1"),
    **{f"DeepSpeed, stage {stage}": functools.partial(deepspeed, stage=stage) for stage in range(3)},
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    way, to = sys.argv[1], Path(sys.argv[2])
    torch.save(tuple(WAYS[way](to)), to / f"{os.environ['RANK']}.pt")
    gc.collect()  # sharded models hold process groups, which must be freed before the interpreter exits
    if dist.is_initialized():
        dist.destroy_process_group()
