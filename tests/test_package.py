"""Tests of the package's imports, requirements and command line."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
import torch

import grokadamw
import grokadamw.grokadamw
from grokadamw.__main__ import main


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True
    ).stdout


def test_both_imports_in_use_are_the_same_class() -> None:
    assert grokadamw.GrokAdamW is grokadamw.grokadamw.GrokAdamW
    assert issubclass(grokadamw.GrokAdamW, torch.optim.Optimizer)
    assert grokadamw.__version__ == version("grokadamw")


def test_torch_is_the_only_requirement() -> None:
    assert [r for r in requires("grokadamw") or [] if "extra ==" not in r] == ["torch>=2.6"]


def test_importing_pulls_in_torch_alone_and_a_step_on_the_cpu_no_kernels_of_triton() -> None:
    code = """
import sys, logging
import torch, torch.optim, torch.distributed
before = {name.partition(".")[0] for name in sys.modules}
import grokadamw
after = {name.partition(".")[0] for name in sys.modules}
assert not logging.getLogger().handlers
print(sorted(name for name in after - before if name not in sys.stdlib_module_names))
p = torch.nn.Parameter(torch.ones(2))
optimizer = grokadamw.GrokAdamW([p])
p.grad = torch.ones(2)
optimizer.step()
print("grokadamw.backends.gpu_kernels" in sys.modules)
"""
    assert run(code).splitlines() == ["['grokadamw']", "False"]


@pytest.mark.parametrize(
    ("code", "missing", "extra"),
    [
        ("import grokadamw.huggingface", "transformers", "huggingface"),
        ("import grokadamw.lightning", "lightning", "lightning"),
        ("monitor.plot()", "matplotlib", "monitor"),
        ("monitor.to_pandas()", "pandas", "monitor"),
    ],
)
def test_front_doors_say_which_extra_to_install(
    code: str, missing: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = grokadamw.Monitor(grokadamw.GrokAdamW([torch.zeros(1)]))
    for name in ("grokadamw.huggingface", "grokadamw.lightning"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("transformers", "lightning.pytorch", "pytorch_lightning", "matplotlib.figure", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf" needs {missing}( \(.+\))?: pip install 'grokadamw\[{extra}\]'$"):
        exec(code, {"monitor": monitor})
    assert any(f'extra == "{extra}"' in requirement for requirement in requires("grokadamw") or [])


def test_there_are_no_public_instance_attributes_beyond_torchs() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    assert {name for name in vars(grokadamw.GrokAdamW([p])) if not name.startswith("_")} == {
        "defaults",
        "state",
        "param_groups",
    }


def test_trainers_train_and_eval_are_not_there() -> None:
    assert not hasattr(grokadamw.GrokAdamW, "train")
    assert not hasattr(grokadamw.GrokAdamW, "eval")


def test_the_command_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"grokadamw {grokadamw.__version__}\n"


def test_env_tells_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["grokadamw"] == grokadamw.__version__
    assert lines["torch"] == torch.__version__
    try:
        assert lines["triton"] == version("triton")
    except PackageNotFoundError:
        assert lines["triton"] == "not installed"
    assert lines["cpu"] == grokadamw.GrokAdamW([torch.zeros(1)]).implementation()
    assert len(lines) == 5 + torch.accelerator.device_count()


def test_env_where_triton_is_not(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])  # importlib.metadata searches it for packages
    assert main(["env"]) == 0
    assert "triton     not installed\n" in capsys.readouterr().out
