"""Small runs of the command that times the step, and tests of its measuring code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grokadamw import GrokAdamW
from grokadamw.backends import native

pytest.importorskip("rich", reason="the benchmarks print with rich, and draw with matplotlib")
pytest.importorskip("matplotlib", reason="the benchmarks print with rich, and draw with matplotlib")

from benchmarks import peers, step_time  # noqa: E402
from benchmarks.peers import ARMS, CLIPPED, FUSED  # noqa: E402

TINY = {
    "a": step_time.Model("tiny", lambda: [(4, 5), (5,)], 1.0, True),
    "b": step_time.Model("smaller", lambda: [(3,)], 1.0, False),
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the command little to do, and hide the peers that `make peers` installs."""
    monkeypatch.setattr(step_time, "MODELS", TINY)
    monkeypatch.setattr(step_time, "TURN", 0.0)
    monkeypatch.setattr(step_time, "COPIED", 1000)
    monkeypatch.setattr(step_time, "peak_alone", lambda arm, device: 1.5)
    monkeypatch.setattr(peers, "PEERS", tmp_path / "none")


@pytest.mark.usefixtures("small")
def test_the_command_times_every_arm_and_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step_time.main(["--rounds", "3", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert (tmp_path / "out/step_time-cpu.png").read_bytes().startswith(b"\x89PNG")
    written = tmp_path / "out/step_time-cpu.json"
    results = json.loads(written.read_text())
    assert [arm["name"] for arm in results["arms"]] == [arm.name for arm in ARMS]
    assert results["machine"]["implementation"]
    for model in results["models"].values():
        arms = model["arms"]
        assert set(arms) == {arm.name for arm in ARMS}
        assert all("ms" in arms[arm.name] for arm in ARMS if arm.package is None)
        assert all(x["reason"] if "reason" in x else x["rounds"] == 3 for x in arms.values())
        assert "deepspeed" in arms["DeepSpeed CPUAdam"]["reason"]
        assert arms[FUSED.name]["ratio"] == arms[CLIPPED.name]["ratio_to_clipped"] == [1, 1, 1]
    assert all(results["models"]["a"]["arms"][FUSED.name]["share_of_copy"])
    assert results["models"]["b"]["arms"][FUSED.name]["share_of_copy"] is None
    table = step_time.table(results)
    assert table in printed
    assert f"| {FUSED.name} | 1.00 | 1.00 | 28 | 2 |\n" in table
    assert "| DeepSpeed CPUAdam | does not run here: No module named 'deepspeed' | – | 28 | – |\n" in table
    step_time.main(["--table", str(written)])
    assert capsys.readouterr().out == table


@pytest.mark.usefixtures("small")
def test_one_model_alone(tmp_path: Path) -> None:
    step_time.main(["--rounds", "2", "--model", "b", "--out", str(tmp_path)])
    assert list(json.loads((tmp_path / "step_time-cpu.json").read_text())["models"]) == ["b"]


@pytest.mark.usefixtures("small")
def test_what_was_measured_is_there_when_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file has the results of all models that were done when the command is stopped."""
    measured = step_time.measured

    def stopped(model: step_time.Model, *rest: Any) -> Any:
        if model.is_large:
            raise KeyboardInterrupt
        return measured(model, *rest)

    monkeypatch.setattr(step_time, "measured", stopped)
    with pytest.raises(KeyboardInterrupt):
        step_time.main(["--rounds", "2", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "step_time-cpu.json").read_text())
    assert list(written["models"]) == ["b"]
    assert "ms" in written["models"]["b"]["arms"][FUSED.name]
    assert step_time.table(written)


@pytest.mark.parametrize(("arguments", "message"), [(["--rounds", "1"], "--rounds 1"), (["--out", "{file}"], "name")])
def test_what_cannot_be_done_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        step_time.main([argument.format(file=tmp_path / "file") for argument in arguments])
    assert message in capsys.readouterr().err


def test_all_arms_have_their_turn_beside_the_two_they_are_compared_with() -> None:
    size = 1000
    for states in (40, 100, 10**6):
        heats = peers.heats(ARMS, size, (peers.SHARED + peers.SCRATCH + states) * size)
        assert all(heat[:2] == [FUSED, CLIPPED] for heat in heats)
        assert [arm for heat in heats for arm in heat[2:]] == [arm for arm in ARMS if arm not in (FUSED, CLIPPED)]
        assert all(sum(arm.kept for arm in heat) <= states for heat in heats)
    assert len(heats) == 1


def test_few_rounds_are_spread_over_all() -> None:
    runner = step_time.Runner("", lambda: None, rounds=5)
    assert [nth for nth in range(15) if runner.takes_part(nth, 15)] == [2, 5, 8, 11, 14]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process's peak")
def test_the_peak_is_that_of_one_step(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "PEAK_ELEMENTS", 1 << 24)  # a copy is 64 MiB
    step_time.main(["--peak", FUSED.name])
    step_time.main(["--peak", "torch AdamW, foreach"])
    fused, foreach = map(float, capsys.readouterr().out.split())
    assert fused < 8
    assert 56 < foreach < 72


def test_without_a_compiler_is_another_implementation() -> None:
    kernel = native.kernel
    (arm,) = [arm for arm in ARMS if arm.name == "GrokAdamW, without a C compiler"]
    tensors = peers.Tensors([(1 << 16,)], "cpu")
    arm.make(tensors.params(arm))()
    assert native.kernel is kernel
    with peers.no_kernel():
        assert GrokAdamW(tensors.params(arm)).implementation().startswith("blocks")


def test_arms_share_parameters_and_gradients_that_are_not_written_to() -> None:
    tensors = peers.Tensors([(4, 5), (5,)], "cpu")
    before = [grad.clone() for grad in tensors.grads]
    start = tensors.values[0].clone()
    filtered = next(arm for arm in ARMS if arm.make is peers.filtered)
    for arm in (FUSED, CLIPPED, filtered, ARMS[0]):
        params = tensors.params(arm)
        assert params[0].data_ptr() == tensors.values[0].data_ptr()
        arm.make(params)()
        assert all(torch.equal(grad, old) for grad, old in zip(tensors.grads, before, strict=True))
    assert not torch.equal(tensors.values[0], start)


def test_the_loop_is_the_papers_formula() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, -2.0, 0.5])
    expected, ema = p.grad.clone(), p.grad.clone()
    step = peers.filtered([p])
    for _ in range(3):
        ema = 0.98 * ema + 0.02 * expected
        expected = expected + peers.LAMB * ema
        step()
    torch.testing.assert_close(p.grad, expected)
