"""Tests of `optimizer.memory()` and `grokadamw memory`, whose forecasts must match the tensors that are made."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from grokadamw import GrokAdamW
from grokadamw.__main__ import main
from grokadamw.shards import part

from . import test_precision as formats
from . import test_sharded_formats as sharded
from .pages import ROOT
from .test_distributed import RANKS, in_processes

OPTIONS: dict[str, dict[str, Any]] = {
    **formats.FORMATS,
    "no filter": {"lamb": 0.0, "state_dtype": "int8"},
    "a window": {"window_size": 3},
    "micro-batches": {"accumulation_steps": 2, "second_moment": "raw", "state_dtype": "bfloat16"},
}


def measured(optimizer: GrokAdamW) -> int:
    """Return the bytes of weights, gradients and all tensors of the state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = [x for param in params for x in optimizer.state[param].values() if isinstance(x, torch.Tensor)]
    return sum(part(x).nbytes for x in [*params, *(param.grad for param in params), *state])


@pytest.mark.parametrize("name", OPTIONS)
def test_what_it_says_before_is_what_there_is_after(name: str) -> None:
    model, optimizer = formats.started(OPTIONS[name])
    before = optimizer.memory()
    assert not optimizer.state
    formats.train(model, optimizer, 0, 2)
    assert optimizer.memory() == before
    assert before["total"] == measured(optimizer)
    weights = sum(param.nbytes for param in {*model.parameters()})
    assert before["parameters"] == before["gradients"] == weights
    assert before["adamw"] == 4 * weights + before["step"]


@pytest.mark.parametrize("name", OPTIONS)
def test_so_it_is_of_parameters_with_gaps_in_memory(name: str) -> None:
    param = nn.Parameter(torch.ones(96, 128)[:, :100])
    optimizer = GrokAdamW([param], **OPTIONS[name])
    before = optimizer.memory()
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.memory() == before
    assert before["total"] == measured(optimizer)


def test_its_parts_are_what_the_docs_say() -> None:
    param = nn.Parameter(torch.zeros(1024, 1024, dtype=torch.bfloat16))
    found = GrokAdamW([param], state_dtype="int8", master_weight_bits=24).memory()
    per_parameter = {name: size / param.numel() for name, size in found.items()}
    expected = {"parameters": 2.0, "gradients": 2.0, "param_low": 1.0, "window": 0.0, "adamw": 8.0}
    expected |= dict.fromkeys(("exp_avg", "exp_avg_sq", "grok_ema"), 1 + 4 / 64)
    assert per_parameter == pytest.approx(expected | {"step": 0.0, "total": 8 + 3 / 16}, abs=1e-5)


def test_frozen_parameters_have_neither_gradients_nor_state() -> None:
    """As with LoRA, where all of the model's parameters may be given. Some are in a dtype that no step could take."""
    frozen = [nn.Parameter(torch.ones(64, 64)), nn.Parameter(torch.ones(64, 64).to(torch.float8_e4m3fn), False)]
    trained = nn.Parameter(torch.ones(64, 64))
    optimizer = GrokAdamW([trained, *(param.requires_grad_(False) for param in frozen)])
    for _ in range(2):
        found = optimizer.memory()
        assert found["parameters"] == (4 + 4 + 1) * 4096
        assert found["gradients"] == found["exp_avg"] == found["grok_ema"] == 4 * 4096
        assert found["adamw"] == found["parameters"] + found["step"] + 3 * 4 * 4096
        assert optimizer.implementation()
        trained.grad = torch.ones_like(trained)
        optimizer.step()


def test_what_has_gone_is_not_counted() -> None:
    model, optimizer = formats.started({"state_dtype": "int8"})
    formats.train(model, optimizer, 0, 1)
    optimizer.free_slow_gradient()
    for group in optimizer.param_groups:
        group["lamb"] = 0.0
    assert optimizer.memory()["grok_ema"] == 0
    assert optimizer.memory()["total"] == measured(optimizer)


def _of_shards(options: Mapping[str, Any], rank: int) -> Any:
    model, optimizer = sharded.started(dict(options), init_device_mesh("cpu", (RANKS,)))
    before = optimizer.memory()
    sharded.train(model, optimizer, 0, 1)
    return before, optimizer.memory(), measured(optimizer)


@pytest.mark.filterwarnings("ignore")
def test_a_rank_counts_its_shards(tmp_path: Path) -> None:
    totals = []
    for before, after, found in in_processes(functools.partial(_of_shards, formats.FORMATS["24 bits"]), tmp_path):
        assert before == after
        assert after["total"] == found
        totals.append(found)
    assert totals[0] > totals[1]  # rank 1 has no part of some parameters


def columns(text: str) -> dict[str, list[float]]:
    return {line[:20].strip(): list(map(float, line[20:].split())) for line in text.splitlines()[2:] if line[:1] != " "}


def test_the_command_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "memory --params 7e9 --param-dtype bfloat16 --state int8 --master-weight-bits 24 --ranks 8"
    assert main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("7,000,000,000 parameters, GB on each of 8 ranks\n")
    found = columns(printed.partition("\n\n")[0])
    assert found["parameters"] == found["gradients"] == [1.75, 1.75, 3.5]
    assert found["exp_avg_sq"] == [0.93, 1.75, 3.5]
    assert found["grok_ema"] == [0.93, 0, 0]
    assert found["param_low"] == [0.88, 0, 0]
    assert found["total"] == [7.16, 7.0, 14.0]
    assert found["bytes per parameter"] == [8.19, 8.0, 16.0]
    assert main(["memory", "--params", "1e6", "--no-filter"]) == 0
    found = columns(capsys.readouterr().out.partition("\n\n")[0])
    assert "grok_ema" not in found
    assert found["bytes per parameter"] == [16.0, 8.0, 16.0]


@pytest.mark.parametrize(
    ("count", "unit", "total"), [("2e5", "MB", 4.0), ("1e7", "MB", 200.0), ("1e8", "GB", 2.0), ("1e9", "GB", 20.0)]
)
def test_small_models_are_counted_in_mb(
    count: str, unit: str, total: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["memory", "--params", count]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{int(float(count)):,} parameters, {unit}\n")
    assert columns(printed.partition("\n\n")[0])["total"] == [total, total * 0.4, total * 0.8]


@pytest.mark.parametrize("bits", ["24", "32"])
def test_low_bits_of_float32_are_refused(bits: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["memory", "--params=7e9", "--master-weight-bits", bits])
    assert f"--master-weight-bits {bits} is for parameters of 16 bits: give --param-dtype" in capsys.readouterr().err
    assert main(["memory", "--params=7e9", "--master-weight-bits", bits, "--param-dtype", "float16"]) == 0


def test_the_docs_show_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    command, _, shown = (ROOT / "docs/memory.md").read_text().partition("$ python -m grokadamw ")[2].partition("\n7,")
    main(command.replace("\\", "").split())
    assert shown.partition("```")[0] == capsys.readouterr().out.removeprefix("7,")


@pytest.mark.parametrize("wrong", ["0", "1.5", "-7e9", "many", "7B", "1e40", "nan"])
def test_no_count_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["memory", f"--params={wrong}"])
    assert f"--params: {wrong} is not a whole number of at least 1, such as 7e9" in capsys.readouterr().err


def test_a_sparse_gradient_counts_as_its_parameter() -> None:
    """A step refuses a sparse gradient and names a way out, but a table of bytes need not."""
    model = nn.Embedding(10, 4, sparse=True)
    model(torch.tensor([1, 2])).sum().backward()
    assert GrokAdamW(model.parameters()).memory()["gradients"] == model.weight.nbytes
