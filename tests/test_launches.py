"""Tests of launches as users make them: Accelerate, the Trainer, Lightning and DeepSpeed on two ranks, on the CPU.

Each must end like one process that takes whole batches. Gradients are clipped, and losses change α and the boost.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.peers import PEERS
from grokadamw import GrokAdamW

from .launch_run import RANKS, STEPS, WAYS, Run, alone
from .models import batch, network
from .pages import ROOT
from .test_distributed import in_processes

SECONDS = 600  # time limit of a launch; DeepSpeed compiles first
DEEPSPEED = PEERS / "deepspeed"  # kept apart, as Accelerate and Lightning behave differently if they find it
# the Trainer adds losses up in float32, Lightning gives FSDP1 inputs in float32, and DeepSpeed's run is in float32
FLOAT32 = ("Trainer", "Lightning, FSDP1", "DeepSpeed")

# the file that `accelerate launch` reads, in the form in which `accelerate config` writes it
ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
use_cpu: true
num_machines: 1
num_processes: 2
main_process_port: 0
mixed_precision: 'no'
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: SIZE_BASED_WRAP
  fsdp_min_num_params: 40
  fsdp_state_dict_type: FULL_STATE_DICT
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: false
"""


def skip_without(framework: str) -> None:
    if framework == "DeepSpeed":
        if not DEEPSPEED.exists():
            pytest.skip("DeepSpeed is not installed: make peers")
        if shutil.which("c++") is None:
            pytest.skip("DeepSpeed needs a C++ compiler")
    else:
        pytest.importorskip({"Trainer": "transformers"}.get(framework, framework.lower()))


def for_deepspeed(folder: Path) -> dict[str, str]:
    """Return an environment in which DeepSpeed finds ninja, and compiles in a folder that nobody has used.

    In a used folder it could wait forever for the lock of a run that was killed.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "TORCH_EXTENSIONS_DIR": str(folder), "DS_ACCELERATOR": "cpu"}


def launched(way: str, folder: Path) -> list[Run]:
    """Launch a run, and return the result of each rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    if way == "Accelerate, FSDP2":
        (folder / "config.yaml").write_text(ACCELERATE)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "config.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if way.startswith("DeepSpeed"):
        environment |= for_deepspeed(folder.parent / "extensions")  # the first launch compiles them
        environment["PYTHONPATH"] += os.pathsep + str(DEEPSPEED)
    with (folder / "log").open("wb") as log:
        run = subprocess.Popen(
            [*command, "tests/launch_run.py", way, str(folder)], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        try:
            code = run.wait(timeout=SECONDS)
        finally:
            run.terminate()  # torchrun ends its ranks, too
    assert code == 0, (folder / "log").read_text()[-5000:]
    return [Run(*torch.load(folder / f"{rank}.pt")) for rank in range(RANKS)]


QUICKEST = ("Accelerate, FSDP2",)


@pytest.mark.parametrize("way", [way if way in QUICKEST else pytest.param(way, marks=pytest.mark.long) for way in WAYS])
def test_a_launch_trains_as_one_process(way: str, tmp_path: Path) -> None:
    skip_without(way.partition(",")[0])
    runs = launched(way, tmp_path)
    expected = alone(as_zero=way.startswith("DeepSpeed"))
    assert len(expected.steps) == STEPS
    assert min(clip for *_, clip in expected.steps) < 1
    assert len({alpha for alpha, *_ in expected.steps}) > 5
    difference, most = 0.0, 1e-6 if way.startswith(FLOAT32) else 1e-9
    for run in runs:
        assert run.steps == [pytest.approx(step, abs=most) for step in expected.steps]
        assert run.weights.keys() == expected.weights.keys()
        for name, weight in expected.weights.items():
            difference = max(difference, (run.weights[name] - weight).abs().max().item())
    print(f"{way}: weights differ by {difference:.1e} at most")
    assert difference < most


def _with_deepspeed(folder: Path, rank: int) -> list[tuple[float, list[str]]]:
    """Return how far DeepSpeed, with float32 copies of bfloat16 weights, is from training by hand, and its warnings."""
    os.environ.update(for_deepspeed(folder), LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(RANKS))
    sys.path.append(str(DEEPSPEED))
    import deepspeed

    found = []
    for stage, gamma, named in ((1, 0.0, True), (2, 0.0, False), (2, 0.2, True)):
        options = {"lr": 0.01, "gradient_clipping": 0.1, "gamma": gamma}
        models = [network(torch.bfloat16) for _ in range(2)]
        whole_ones = [p.detach().float().requires_grad_() for p in models[0].parameters()]
        by_hand = GrokAdamW([{"params": whole_ones, "layer": 0}], **options)
        params = models[1].named_parameters() if named else models[1].parameters()
        optimizer = GrokAdamW(params, shard_group=dist.group.WORLD, **options)
        config = {
            "train_batch_size": RANKS,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            engine, *_ = deepspeed.initialize(
                model=models[1], optimizer=optimizer, config=config, dist_init_required=False
            )
            for step in range(5):
                x, y = batch(step, torch.bfloat16)
                models[0].zero_grad()
                (models[0](x) - y).square().mean().backward()
                for p, q in zip(whole_ones, models[0].parameters(), strict=True):
                    p.grad = q.grad.float()
                by_hand.step()
                for p, q in zip(whole_ones, models[0].parameters(), strict=True):
                    q.data.copy_(p)
                engine.backward((engine(x) - y).square().mean())
                engine.step()
        pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
        flat = [str(warning.message) for warning in said if "one flat tensor" in str(warning.message)]
        found.append((max((a - b).abs().max().item() for a, b in pairs), flat))
    return found


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_deepspeed_trains_its_flat_parts(tmp_path: Path) -> None:
    skip_without("DeepSpeed")
    for ranks in in_processes(functools.partial(_with_deepspeed, tmp_path), tmp_path):
        assert max(difference for difference, _ in ranks) < 1e-6
        assert [len(said) for _, said in ranks] == [0, 0, 1]
        assert "gamma=0.2 finds no layers in it, and treats all of it as layer 0. Give gamma=0" in ranks[-1][1][0]
