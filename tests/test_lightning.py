"""Lightning runs the backward pass in a closure of the step; here it is the real one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from grokadamw import Accumulate

from .models import KEEPERS, network, train

lightning = pytest.importorskip("lightning")
BATCHES = 9  # of an epoch, at whose end cycles of two micro-batches are under way


class Module(lightning.LightningModule):
    """The network of `models`, an optimizer, and its data."""

    def __init__(self, make: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.network, self.make = network(), make

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (self.network(x) - y).square().mean()

    def configure_optimizers(self) -> Any:
        return self.make(self.network)


def data() -> DataLoader:
    """The batches of `models`, in order."""
    from .models import batch

    x, y = (torch.cat(each) for each in zip(*map(batch, range(BATCHES)), strict=True))
    return DataLoader(TensorDataset(x, y), batch_size=16)


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Any]:
    def make(**options: Any) -> Any:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        quiet["enable_checkpointing"] = False
        return lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet, **options)

    return make


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("keeper", KEEPERS)
def test_it_trains_as_a_loop_does_and_resumes(keeper: str, trainer: Callable[..., Any], tmp_path: Path) -> None:
    make = KEEPERS[keeper]
    plain = network()
    optimizer = make(plain)
    train(plain, range(BATCHES), lambda step, loss: optimizer.step())

    module = Module(make)
    stopped = trainer(max_epochs=1)
    stopped.fit(module, data())
    for a, b in zip(module.network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    stopped.save_checkpoint(tmp_path / "half.ckpt")

    train(plain, range(BATCHES), lambda step, loss: optimizer.step())
    resumed = Module(make)
    goes_on = trainer(max_epochs=2)
    goes_on.fit(resumed, data(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    states = goes_on.optimizers[0].state
    for a, b in zip(resumed.network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state.get(b, {}).items():
            assert torch.equal(torch.as_tensor(states[a][name]), torch.as_tensor(value)), name


class Manual(Module):
    """Steps by hand, and flushes at the end of an epoch, by what Lightning gives for an optimizer."""

    automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor]) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch))
        optimizer.step()
        self.stepped.append(optimizer.stepped)

    def on_train_epoch_start(self) -> None:
        self.stepped: list[bool] = []

    def on_train_epoch_end(self) -> None:
        self.optimizers().flush()
        self.stepped.append(self.optimizers().stepped)


def test_flushing_what_lightning_gives(trainer: Callable[..., Any]) -> None:
    def make(model: nn.Module) -> Accumulate:
        return Accumulate(torch.optim.AdamW(model.parameters(), lr=0.01), 4)

    module, plain = Manual(make), network()
    trainer(max_epochs=2).fit(module, data())
    assert module.stepped == [i % 4 == 3 for i in range(BATCHES)] + [True]
    optimizer = make(plain)
    for _ in range(2):
        train(plain, range(BATCHES), lambda step, loss: optimizer.step())
        optimizer.flush()
    for a, b in zip(module.network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("keeper", ["Grokfast", "GrokfastMA", "Accumulate, GrokAdamW", "micro-batches"])
def test_in_mixed_precision(keeper: str, trainer: Callable[..., Any]) -> None:
    """With float16 a GradScaler comes in, which Lightning steps with its closure."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    precision.autocast_context_manager = warnings.catch_warnings  # type: ignore[method-assign]
    module = Module(KEEPERS[keeper])
    trainer(max_epochs=1, plugins=[precision]).fit(module, data())
    plain = network()
    optimizer = KEEPERS[keeper](plain)
    train(plain, range(BATCHES), lambda step, loss: optimizer.step())
    for a, b in zip(module.network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
