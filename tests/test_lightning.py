"""Tests with the real Lightning, which runs the backward pass in a closure of the step."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from grokadamw import Accumulate, GrokAdamW, Monitor, decay_groups, step_in_backward
from grokadamw.signals import AccuracyGap, SlowGradient, loss_gap

from .models import KEEPERS, batch, network, train

lightning = pytest.importorskip("lightning")

from grokadamw.lightning import GrokAdamWCallback  # noqa: E402

BATCHES = 9  # in an epoch, which ends within a cycle of two micro-batches


class Module(lightning.LightningModule):
    """A module with the network of `models` and the optimizer that `make` returns."""

    def __init__(self, make: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.network, self.make = network(), make

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (self.network(x) - y).square().mean()

    def configure_optimizers(self) -> Any:
        return self.make(self.network)


def data() -> DataLoader:
    """Return the batches of `models`, in order."""
    x, y = (torch.cat(parts) for parts in zip(*map(batch, range(BATCHES)), strict=True))
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


def boosted(model: nn.Module) -> GrokAdamW:
    return GrokAdamW(model.named_parameters(), lr=0.01, signal_boost=2.0)


@pytest.mark.parametrize("make", [boosted, KEEPERS["Accumulate, GrokAdamW"], KEEPERS["a window"]])
def test_fabric_trains_as_a_loop_does_and_resumes(make: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    """Fabric's optimizer records losses and shows metrics, as the optimizer inside does."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1)

    def started() -> dict[str, Any]:
        model = network()
        return dict(zip(("model", "optimizer"), fabric.setup(model, make(model)), strict=True))

    def trained(model: nn.Module, optimizer: Any, steps: range, backward: Callable[[Tensor], object]) -> None:
        for step in steps:
            x, y = batch(step)
            optimizer.zero_grad()
            backward((model(x) - y).square().mean())
            optimizer.record(train_loss=1 / (step + 1), eval_loss=2.0)
            optimizer.step()

    plain = network()
    whole = make(plain)
    trained(plain, whole, range(6), Tensor.backward)
    first, then = started(), started()
    trained(**first, steps=range(3), backward=fabric.backward)
    fabric.save(tmp_path / "half.ckpt", first)
    fabric.load(tmp_path / "half.ckpt", then)
    trained(**then, steps=range(3, 6), backward=fabric.backward)
    assert all(map(torch.equal, then["model"].parameters(), plain.parameters()))
    assert then["optimizer"].metrics() == pytest.approx(whole.metrics(), rel=1e-12, nan_ok=True)
    assert whole.metrics()["signal"] > 0


class Manual(Module):
    """A module that steps by hand, and flushes after an epoch, with the optimizers that Lightning returns."""

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
    """With float16 Lightning steps through a GradScaler, and gives it the closure."""
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


class Measured(Module):
    """A module that logs its validation loss."""

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        self.log("val_loss", 1 + (self.network(x) - y).square().mean())


def grokadamw(model: nn.Module, **options: Any) -> GrokAdamW:
    return GrokAdamW(model.parameters(), lr=0.01, grokking_signal_fns=[loss_gap, SlowGradient(every=4)], **options)


def run(folder: Path, *, killed: bool = False, resume: bool = False) -> tuple[Measured, GrokAdamW]:
    """Train, and save after each epoch, as Lightning resumes with whole epochs. `killed` ends it in the second."""

    class Killed(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if killed and trainer.global_step == BATCHES + 4:
                os.kill(os.getpid(), signal.SIGKILL)

    saves = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_on_train_epoch_end=True, save_top_k=-1)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    it = lightning.Trainer(
        accelerator="cpu", max_epochs=2, val_check_interval=3, callbacks=[GrokAdamWCallback(), saves, Killed()], **quiet
    )
    module = Measured(grokadamw)
    last = {"ckpt_path": folder / "epoch=0.ckpt", "weights_only": True} if resume else {}
    it.fit(module, data(), data(), **last)
    return module, it.optimizers[0]


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process")
def test_a_killed_run_resumes_as_if_nothing_had_been(tmp_path: Path) -> None:
    process = multiprocessing.get_context("forkserver").Process(target=run, args=(tmp_path,), kwargs={"killed": True})
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    whole, other = run(tmp_path / "whole")
    resumed, optimizer = run(tmp_path, resume=True)
    for (name, a), b in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert optimizer.metrics() == pytest.approx(other.metrics(), rel=0, abs=0, nan_ok=True)
    assert optimizer.metrics()["alpha"] < 0.98
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Return the curves that a TensorBoardLogger wrote."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def logging_trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    pytest.importorskip("tensorboard")
    logger = lightning.pytorch.loggers.TensorBoardLogger(folder, name="", version="")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=logger,
        callbacks=list(callbacks),
        log_every_n_steps=2,
        **quiet,
        **options,
    )


@pytest.mark.parametrize("accumulated", [1, 2])
def test_evaluation_reaches_alpha(accumulated: int, tmp_path: Path) -> None:
    it = logging_trainer(
        tmp_path, GrokAdamWCallback(), val_check_interval=4 * accumulated, accumulate_grad_batches=accumulated
    )
    it.fit(Measured(grokadamw), data(), data())
    found = curves(tmp_path)
    alphas = found["grok_alpha"]
    assert list(alphas) == list(range(1, 2 * -(-BATCHES // accumulated), 2))  # Lightning counts from 0
    assert alphas[1] == alphas[3] == pytest.approx(0.98)  # nothing was evaluated before these steps
    assert all(alpha < 0.98 - 1e-4 for step, alpha in alphas.items() if step > 3)
    assert {"grok_decay_boost", "grok_signal", "grok_grad_norm", "grok_clip_coefficient", "grok_skipped_steps"} < set(
        found
    )


class Told(Measured):
    """A module that remembers the losses of its batches, and may leave one out."""

    def __init__(self, make: Callable[[nn.Module], Any], without: int = -1) -> None:
        super().__init__(make)
        self.losses: list[float] = []
        self.without = without

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch)
        self.log("mse", loss)
        if batch_idx == self.without:
            return None
        self.losses.append(loss.item())
        return {"loss": loss, "other": 3.0}


class Hears(lightning.Callback):
    """A callback that checks the recorded loss: only validations change it, to that of the last batch with one."""

    def __init__(self) -> None:
        self.heard: list[float | None] = [None]

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        assert trainer.optimizers[0].param_groups[0]["train_loss"] == self.heard[-1]

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            self.heard.append(trainer.optimizers[0].param_groups[0]["train_loss"])
            assert self.heard[-1] == pytest.approx(module.losses[-1], rel=1e-6)


@pytest.mark.parametrize(("accumulated", "without"), [(1, -1), (4, -1), (1, 0), (1, 5)])
def test_the_loss_that_is_recorded(accumulated: int, without: int, tmp_path: Path) -> None:
    """The recorded loss is training_step's own, before Lightning divides it, and from the time of the evaluation."""
    module, hears = Told(grokadamw, without), Hears()
    options = {"accumulate_grad_batches": accumulated, "val_check_interval": 2}
    it = logging_trainer(tmp_path, GrokAdamWCallback(), hears, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="GrokAdamWCallback")
        it.fit(module, data(), data())
    assert len(set(hears.heard)) == 1 + 2 * (BATCHES // 2)


class TwoOptimizers(Measured):
    """A module of two parts with an optimizer each, stepped by hand. The second begins with the batch `late`."""

    automatic_optimization = False

    def __init__(self, late: int = 0) -> None:
        super().__init__(grokadamw)
        self.other = nn.Sequential(network(), network())
        self.late = late
        self.norms: dict[int, float] = {}

    def configure_optimizers(self) -> Any:
        return [grokadamw(self.network), grokadamw(self.other, lamb=1.0)]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        for i, (optimizer, part) in enumerate(zip(self.optimizers(), (self.network, self.other[0]), strict=True)):
            optimizer.zero_grad()
            loss = (part(x) - y).square().mean()
            self.manual_backward(loss)
            if i == 0 or batch_idx >= self.late:
                optimizer.step()
        self.norms[batch_idx] = self.optimizers()[1].optimizer.metrics()["grad_norm"]
        self.log("mse", loss)


@pytest.mark.parametrize("late", [0, 2])
def test_several_optimizers_by_hand(late: int, tmp_path: Path) -> None:
    callback, module = GrokAdamWCallback(train_loss="mse"), TwoOptimizers(late)
    it = logging_trainer(tmp_path, callback)
    it.fit_loop.max_epochs = 1
    it.fit(module, data(), data())
    found = curves(tmp_path)
    logged = list(range(1, BATCHES, 2))
    assert list(found["grok_grad_norm"]) == logged
    assert found["grok_grad_norm_1"] == {i: pytest.approx(module.norms[i], rel=1e-6) for i in logged if i >= late}
    one, other = it.optimizers
    assert one.param_groups[0]["train_loss"] == other.param_groups[0]["train_loss"] > 0
    assert one.layer_table()[0].names[0].startswith("0.")
    own = dict(module.other.named_parameters())
    assert [name for row in other.layer_table() for name in row.names] == list(own)
    assert other.layer_table()[0].layer == 0


def test_a_callback_that_is_used_again_logs_again(tmp_path: Path) -> None:
    callback = GrokAdamWCallback()
    for folder in ("one", "other"):
        it = logging_trainer(tmp_path / folder, callback, max_steps=2)
        it.fit(Measured(grokadamw), data(), data())
        assert list(curves(tmp_path / folder)["grok_grad_norm"]) == [1]


def test_a_used_callback_can_be_pickled(trainer: Callable[..., Any]) -> None:
    found, callback = [], GrokAdamWCallback()
    for _ in range(2):
        it = trainer(max_epochs=2, callbacks=[callback])
        it.fit(Measured(grokadamw), data(), data())
        found.append(it.optimizers[0].metrics())
        callback = pickle.loads(pickle.dumps(callback))
    assert found[0] == found[1]


def test_the_preset_and_a_schedule(trainer: Callable[..., Any]) -> None:
    """The preset takes layers and groups from the module. A schedule multiplies each group's learning rate."""

    class Preset(Measured):
        def __init__(self) -> None:
            super().__init__(grokadamw)
            self.network = nn.Sequential(*self.network, nn.LayerNorm(3))
            self.embedding = nn.Embedding(3, 16)  # with long rows, and without a gradient

        def configure_optimizers(self) -> Any:
            optimizer = GrokAdamW.for_grokking(self, lr=0.01, weight_decay=1.0)
            self.before = [group["lr"] for group in optimizer.param_groups]
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)]

    module, it = Preset(), trainer(max_epochs=2, callbacks=[GrokAdamWCallback()], gradient_clip_val=1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=__name__)
        warnings.filterwarnings("error", message=".*(layer|clipped)")
        it.fit(module, data(), data())
    optimizer = it.optimizers[0]
    assert [group["weight_decay"] for group in optimizer.param_groups[:3]] == pytest.approx([1, 1 / 3, 0])
    assert len(set(module.before)) == 2
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([lr / 4 for lr in module.before])
    names = [name for row in optimizer.layer_table() for name in row.names]
    assert names == [name for name, _ in module.named_parameters()]


def test_a_frozen_part_shifts_nobody(tmp_path: Path) -> None:
    class Probe(Measured):
        def __init__(self) -> None:
            super().__init__(lambda _: GrokAdamW(decay_groups(self), lr=0.01))
            self.network[0].requires_grad_(False)

    module = Probe()
    layers = [group["layers"] for group in decay_groups(module)]
    it = logging_trainer(tmp_path, GrokAdamWCallback())
    it.fit(module, data(), data())
    assert [group["layers"] for group in it.optimizers[0].param_groups] == layers == [[1, 2], [1, 2]]


@pytest.mark.parametrize("make", [GrokAdamW.for_grokking, lambda model: GrokAdamW(model.named_parameters())])
def test_a_frozen_teacher_does_not_count(make: Callable[[nn.Module], GrokAdamW], trainer: Callable[..., Any]) -> None:
    """An optimizer that got the names of one part keeps the layers of that part."""

    class Distils(Measured):
        def __init__(self) -> None:
            super().__init__(lambda _: make(self.network))
            student = self.network
            del self.network
            self.teacher, self.network = network().requires_grad_(False), student

    module = Distils()
    it = trainer(max_epochs=1, callbacks=[GrokAdamWCallback()])
    it.fit(module, data(), data())
    names = [[name.rpartition(".")[0] for name in row.names] for row in it.optimizers[0].layer_table()]
    assert names == [["0", "0"], ["2", "2"], ["4", "4"]]


def test_layers_are_the_modules(tmp_path: Path) -> None:
    """Layers are the modules' across groups, also if the parameters came without names."""

    def in_groups(model: nn.Module) -> GrokAdamW:
        *others, last = model.parameters()
        return GrokAdamW([{"params": [last], "weight_decay": 0.0}, {"params": others}], gamma=0.2)

    module = Measured(in_groups)
    it = logging_trainer(tmp_path, GrokAdamWCallback())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("default", module="lightning")
        it.fit(module, data(), data())
    assert [group["layers"] for group in it.optimizers[0].param_groups] == [[2], [0, 0, 1, 1, 2]]


class Unfreezes(Measured):
    """A module that trains its head, and from the second epoch on also the rest, in a group that is added."""

    def __init__(self, several: bool, at: str) -> None:
        super().__init__(lambda _: None)
        self.several, self.at = several, at
        self.other = network()
        self.automatic_optimization = not several
        self.network[:4].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        head = GrokAdamW(self.network[4].parameters(), gamma=0.2)
        return [head, GrokAdamW(self.other.parameters(), gamma=0.0)] if self.several else head

    def unfreeze(self, hook: str) -> None:
        head = self.optimizers()[0] if self.several else self.optimizers()
        if hook == self.at and self.current_epoch == 1 and len(head.param_groups) == 1:
            self.network[:4].requires_grad_(True)
            head.add_param_group({"params": list(self.network[:4].parameters()), "lr": 1e-4})

    def on_train_epoch_start(self) -> None:
        self.unfreeze("epoch")

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.unfreeze("step")
        loss = super().training_step(batch)
        if self.several:
            self.manual_backward(loss)
            self.optimizers()[0].step()
        return loss


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("at", ["epoch", "step"])
def test_groups_that_are_added_get_the_modules_layers(several: bool, at: str, trainer: Callable[..., Any]) -> None:
    seen = []

    class Looks(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append([group["layers"] for group in trainer.optimizers[0].param_groups])

    it = trainer(max_epochs=2, callbacks=[GrokAdamWCallback(), Looks()])
    it.fit(Unfreezes(several, at), data(), data())
    before = [[0, 0]] if several else [[2, 2]]  # layers in the smallest module with all of its parameters
    assert seen == [before] * BATCHES + [[[2, 2], [0, 0, 1, 1]]] * BATCHES
    assert sum(len(row.names) for row in it.optimizers[0].layer_table()) == 6


@pytest.mark.usefixtures("one_rank")
def test_inside_of_zero(trainer: Callable[..., Any]) -> None:
    """The GrokAdamW in torch's ZeroRedundancyOptimizer gets layers and losses, and keeps them."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def inside(model: nn.Module) -> ZeroRedundancyOptimizer:
        return ZeroRedundancyOptimizer(model.parameters(), GrokAdamW, lr=0.01)

    it = trainer(max_epochs=2, callbacks=[GrokAdamWCallback()])
    it.fit(Measured(inside), data(), data())
    (zero,) = it.optimizers
    assert zero.param_groups[0]["layers"] == zero.optim.param_groups[0]["layers"]
    assert zero.param_groups[0]["eval_loss"] == zero.optim.param_groups[0]["eval_loss"] > 1
    names = [{name.rpartition(".")[0] for name in row.names} for row in zero.optim.layer_table()]
    assert names == [{"network.0"}, {"network.2"}, {"network.4"}]
    assert zero.optim.metrics()["alpha"] < 0.98


def test_what_it_warns_of_and_refuses(trainer: Callable[..., Any]) -> None:
    def fit(callback: Any, make: Any, **options: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(max_epochs=1, callbacks=[callback], **options).fit(Measured(make), data(), data())
        return [str(warning.message) for warning in caught if warning.filename == __file__]

    assert not fit(GrokAdamWCallback(), grokadamw)
    (said,) = fit(GrokAdamWCallback("loss"), grokadamw)
    assert "eval_loss='loss'" in said
    assert "val_loss" in said
    (said,) = fit(GrokAdamWCallback(train_loss="mse"), grokadamw)
    assert "waited for train_loss='mse', but what was logged is val_loss: " in said
    (said,) = fit(GrokAdamWCallback(), grokadamw, gradient_clip_val=0.5)
    assert "Only gradient_clip_val takes effect," in said
    with pytest.raises(TypeError, match="found AdamW, and no GrokAdamW"):
        fit(GrokAdamWCallback(), lambda model: torch.optim.AdamW(model.parameters()))
    with pytest.raises(TypeError, match="eval_loss=None"):
        GrokAdamWCallback(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^eval_loss=<GrokAdamW> is not the name of a loss"):
        GrokAdamWCallback(GrokAdamW([torch.zeros(1)]))  # type: ignore[arg-type]
    for name in ("train_loss", "eval_acc", "train_acc"):
        with pytest.raises(TypeError, match=f"{name}=0.5 is not a name"):
            GrokAdamWCallback(**{name: 0.5})  # type: ignore[arg-type]
    (said, other) = fit(GrokAdamWCallback(eval_acc="val_acc", train_acc="acc"), grokadamw)
    assert "eval_acc='val_acc', but what was logged is val_loss: AccuracyGap and Monitor.grokked_at stay silent" in said
    assert "train_acc='acc'" in other
    with pytest.raises(ValueError, match="eval_acc=.* is not an accuracy"):
        fit(GrokAdamWCallback(eval_acc="val_loss"), grokadamw)


def test_each_run_is_told_what_it_does_not_log(tmp_path: Path) -> None:
    """An earlier run of the callback may have logged it. What was logged by the callback itself is no candidate."""

    class Another(Measured):
        def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
            self.log("another", 1.0)

    callback, said = GrokAdamWCallback(), []
    for i, kind in enumerate((Measured, Another, Another)):
        it = logging_trainer(tmp_path / str(i), callback, limit_train_batches=2, gradient_clip_val=0.5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            it.fit(kind(grokadamw), data(), data())
        said.append([str(warning.message) for warning in caught if warning.filename == __file__])
        assert "grok_alpha" in it.callback_metrics
    (clips,), (value,), nothing = said
    assert "Only gradient_clip_val takes effect," in clips
    assert "waited for eval_loss='val_loss', but what was logged is another: signals of losses" in value
    assert not nothing


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_clipping_that_does_something_else(own: float, trainer: Callable[..., Any]) -> None:
    """At any limit, clipping has no effect with step_in_backward, and clips micro-batches with Accumulate."""

    def early(model: nn.Module) -> GrokAdamW:
        optimizer = GrokAdamW(model.parameters(), gradient_clipping=own)
        step_in_backward(optimizer, clip_by="last" if own else None)
        return optimizer

    def accumulating(model: nn.Module) -> Accumulate:
        return Accumulate(GrokAdamW(model.parameters(), gradient_clipping=own), 3)

    for make, limit, by, says in (
        (early, 0.5, "norm", "gradient_clip_val=0.5 has no effect: step_in_backward has used the gradients before"),
        (
            accumulating,
            0.5,
            "value",
            "gradient_clip_val=0.5 clips the gradients of each micro-batch, before Accumulate",
        ),
        (accumulating, 1.0, "norm", "gradient_clip_val=1 clips the gradients of each micro-batch, before Accumulate"),
        (accumulating, None, "norm", None),
    ):
        clips = {"gradient_clip_val": limit, "gradient_clip_algorithm": by}
        it = trainer(max_epochs=1, callbacks=[GrokAdamWCallback()], **clips)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            it.fit(Measured(make), data(), data())
        said = [str(warning.message) for warning in caught if "gradient_clip" in str(warning.message)]
        assert len(said) == (says is not None)
        assert not says or says in said[0]


class Counts(Measured):
    """A module that logs accuracies, which rise by 0.125 with each batch and each validation."""

    def __init__(self, make: Callable[[nn.Module], Any], **how: Any) -> None:
        super().__init__(make)
        self.batches, self.validations, self.how = 0, 0, how
        self.monitor: Any = None

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.batches += 1
        self.log("acc", min(self.batches / 8, 1.0), **self.how)
        return super().training_step(batch)

    def on_validation_epoch_start(self) -> None:
        self.validations += not self.trainer.sanity_checking

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        super().validation_step(batch)
        self.log("val_acc", torch.tensor(min(self.validations / 8, 1.0)))

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.network)
        self.monitor = Monitor(optimizer, every=1, solved=0.5)
        return optimizer


def test_accuracies_are_recorded(trainer: Callable[..., Any]) -> None:
    """The accuracies also reach the signal and the monitor."""
    module = Counts(lambda model: GrokAdamW(model.parameters(), grokking_signal_fns=AccuracyGap()))
    it = trainer(max_epochs=4, val_check_interval=3, callbacks=[GrokAdamWCallback(eval_acc="val_acc", train_acc="acc")])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="GrokAdamWCallback")
        it.fit(module, data(), data())
    rows = module.monitor.rows
    assert len(rows) == 4 * BATCHES
    for i, row in enumerate(rows):  # a row has what was recorded before its step: both, after every third
        assert row["train_acc"] == pytest.approx(min(i // 3 * 3 / 8, 1.0) if i >= 3 else math.nan, nan_ok=True)
        assert row["eval_acc"] == pytest.approx(min((i // 3) / 8, 1.0) if i >= 3 else math.nan, nan_ok=True)
        if i >= 3:
            assert row["signal"] == pytest.approx(row["train_acc"] - row["eval_acc"])
    assert module.monitor.grokked_at == 12  # the fourth validation is the first good one


def test_accuracies_that_are_nan_are_warned_of_once(trainer: Callable[..., Any]) -> None:
    """A NaN accuracy is not recorded, and the run goes on."""

    class Nan(Measured):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            self.log("acc", math.nan if batch_idx else 0.75)
            return super().training_step(batch)

        def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
            super().validation_step(batch)
            self.log("val_acc", math.nan if self.current_epoch else 0.5)

    it = trainer(max_epochs=3, callbacks=[GrokAdamWCallback(eval_acc="val_acc", train_acc="acc")])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        it.fit(Nan(grokadamw), data(), data())
    said = [str(warning.message) for warning in caught if "nan" in str(warning.message)]
    assert sorted(sentence.partition(":")[0] for sentence in said) == [
        "eval_acc=nan is not recorded",
        "train_acc=nan is not recorded",
    ]
    group = it.optimizers[0].param_groups[0]
    assert (group["train_acc"], group["eval_acc"]) == (0.75, 0.5)


def test_who_records_by_hand_is_not_told_that_nothing_came(trainer: Callable[..., Any]) -> None:
    class ByHand(Measured):
        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.optimizers[0].record(train_loss=0.1, eval_loss=2.0)

        def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
            self.log("another", 1.0)

    it = trainer(max_epochs=1, callbacks=[GrokAdamWCallback(eval_loss="missing")], check_val_every_n_epoch=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="GrokAdamWCallback")
        it.fit(ByHand(grokadamw), data(), data())


def test_an_accuracy_that_is_logged_for_the_epoch(trainer: Callable[..., Any]) -> None:
    module = Counts(grokadamw, on_step=False, on_epoch=True)
    it = trainer(max_epochs=1, callbacks=[GrokAdamWCallback(eval_acc="val_acc", train_acc="acc")])
    recorded = []

    class Hears(lightning.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            recorded.append(trainer.optimizers[0].param_groups[0]["train_acc"])

    it.callbacks.append(Hears())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="GrokAdamWCallback")
        it.fit(module, data(), data())
    assert recorded == [pytest.approx(sum(min(i / 8, 1.0) for i in range(1, BATCHES + 1)) / BATCHES)]


def test_a_validation_after_a_failed_fit_is_not_recorded(trainer: Callable[..., Any]) -> None:
    module = Measured(grokadamw)

    class Fails(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                raise RuntimeError("no more")

    it = trainer(max_epochs=1, callbacks=[GrokAdamWCallback(), Fails()])
    with pytest.raises(RuntimeError, match="no more"):
        it.fit(module, data(), data())
    (optimizer,) = it.optimizers
    it.validate(module, data(), verbose=False)
    assert optimizer.param_groups[0]["eval_loss"] is None


class Rarely(Measured):
    """A module that logs its training loss for the epoch, and validation metrics only in some epochs."""

    def __init__(self, epochs: tuple[int, ...] = (0,)) -> None:
        super().__init__(grokadamw)
        self.epochs, self.losses = epochs, list[float]()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = super().training_step(batch)
        self.losses.append(loss.item())
        self.log("mse", loss, on_step=False, on_epoch=True)
        self.log("both", 0.25)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        if self.current_epoch in self.epochs:
            super().validation_step(batch)
            self.log("val_acc", 1.0)
            self.log("both", 0.75)

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.network)
        self.monitor = Monitor(optimizer, solved=0.5)
        return optimizer


class Epochs(lightning.Callback):
    """A callback that keeps what is recorded when an epoch ends."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.found.append(dict(trainer.optimizers[0].param_groups[0]))


@pytest.mark.parametrize("key", ["val_acc", "both"])  # the second is logged in training, too
def test_a_value_of_an_older_validation_is_not_recorded_again(key: str, trainer: Callable[..., Any]) -> None:
    module, epochs = Rarely((0, 1)), Epochs()
    it = trainer(max_epochs=9, callbacks=[GrokAdamWCallback(eval_acc=key), epochs])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="GrokAdamWCallback")
        it.fit(module, data(), data())
    assert module.monitor.grokked_at is None
    for name in ("train_loss", "eval_loss", "eval_acc"):
        first, *others = (found[name] for found in epochs.found)
        assert set(others) == {others[0]}
        assert name == "eval_acc" or first != others[0]
    assert others[0] == (0.75 if key == "both" else 1.0)


@pytest.mark.parametrize(
    ("options", "validated"), [({}, 1), ({"val_check_interval": 2}, 1), ({"check_val_every_n_epoch": 2}, 2)]
)
def test_a_loss_that_is_logged_for_the_epoch(
    options: dict[str, int], validated: int, trainer: Callable[..., Any]
) -> None:
    """The loss is recorded if its epoch had a validation."""
    module, epochs = Rarely(tuple(range(4))), Epochs()
    it = trainer(max_epochs=4, callbacks=[GrokAdamWCallback(train_loss="mse"), epochs], **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="GrokAdamWCallback")
        it.fit(module, data(), data())
    means = [sum(module.losses[i : i + BATCHES]) / BATCHES for i in range(0, 4 * BATCHES, BATCHES)]
    last = None
    for i, found in enumerate(epochs.found):
        if i % validated == validated - 1:
            last = pytest.approx(means[i], rel=1e-6)
        assert found["train_loss"] == last


class Saves(lightning.Callback):
    """A callback that saves a checkpoint when the first epoch ends."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


class ByEpoch(Measured):
    """A module that logs loss and accuracy for the epoch, and the alphas of its steps."""

    def __init__(self, signal: Any) -> None:
        super().__init__(lambda model: GrokAdamW(model.parameters(), lr=0.01, grokking_signal_fns=signal))
        self.alphas: dict[int, float] = {}

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = super().training_step(batch)
        self.log_dict({"mse": loss, "acc": 1 / (1 + loss.detach())}, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        super().validation_step(batch)
        self.log("val_acc", 0.1)

    def on_train_batch_end(self, *_: Any) -> None:
        self.alphas[self.trainer.global_step] = self.trainer.optimizers[0].metrics()["alpha"]


@pytest.mark.parametrize(
    ("names", "hears"),
    [({"train_loss": "mse"}, loss_gap), ({"train_acc": "acc", "eval_acc": "val_acc"}, AccuracyGap)],
)
def test_a_value_of_the_epoch_resumes_with_the_run(
    names: dict[str, str], hears: Any, trainer: Callable[..., Any], tmp_path: Path
) -> None:
    """An epoch's value waits for a validation in the next epoch, and the run may be resumed in between."""
    modules = []
    for resume in (None, tmp_path / "epoch.ckpt"):
        modules.append(ByEpoch(hears() if isinstance(hears, type) else hears))
        callbacks = [GrokAdamWCallback(**names), Saves(tmp_path / "epoch.ckpt")]
        it = trainer(max_epochs=3, val_check_interval=BATCHES + 4, check_val_every_n_epoch=None, callbacks=callbacks)
        it.fit(modules[-1], data(), data(), ckpt_path=resume, weights_only=resume and True)
    whole, resumed = modules
    assert resumed.alphas == {step: alpha for step, alpha in whole.alphas.items() if step > BATCHES}
    assert len(set(resumed.alphas.values())) > 2
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_values_of_another_runs_checkpoint_are_forgotten(trainer: Callable[..., Any], tmp_path: Path) -> None:
    """A checkpoint that is only tested fills the callback, too, and the next run must not begin with its loss."""
    path, options = tmp_path / "epoch.ckpt", {"val_check_interval": BATCHES - 4, "max_epochs": 1}
    alphas = []
    for callback in (GrokAdamWCallback(train_loss="mse"), tested := GrokAdamWCallback(train_loss="mse")):
        if callback is tested:
            trainer(callbacks=[tested]).validate(ByEpoch(loss_gap), data(), ckpt_path=path, weights_only=True)
        module = ByEpoch(loss_gap)
        trainer(callbacks=[callback, Saves(path)], **options).fit(module, data(), data())
        alphas.append(module.alphas)
    assert alphas[0] == alphas[1]


def test_two_callbacks_may_listen(trainer: Callable[..., Any]) -> None:
    """Lightning wants another key in the checkpoint for each callback that has a state."""
    callbacks = [GrokAdamWCallback(train_loss="mse"), GrokAdamWCallback(train_acc="acc", eval_acc="val_acc")]
    trainer(max_epochs=1, callbacks=callbacks).fit(ByEpoch(AccuracyGap()), data(), data())


def test_callbacks_with_other_arguments_have_other_keys_in_checkpoints() -> None:
    arguments = [{}, *({name: "x"} for name in ("eval_loss", "train_loss", "eval_acc", "train_acc"))]
    assert len({GrokAdamWCallback(**given).state_key for given in arguments}) == len(arguments)


class Both(Rarely):
    """A module that logs the training loss both for each step and for the epoch."""

    def log(self, name: str, *values: Any, **how: Any) -> None:
        super().log(name, *values, **how | ({"on_step": True} if name == "mse" else {}))


def test_a_loss_that_is_logged_for_the_step_and_the_epoch(trainer: Callable[..., Any]) -> None:
    module, epochs = Both(tuple(range(3))), Epochs()
    trainer(max_epochs=3, callbacks=[GrokAdamWCallback(train_loss="mse"), epochs]).fit(module, data(), data())
    assert [found["train_loss"] for found in epochs.found] == pytest.approx(module.losses[BATCHES - 1 :: BATCHES])


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        ({}, {}, "no validation is planned"),
        ({}, {"limit_val_batches": 0}, "no validation is planned"),
        ({"eval_acc": "val_acc"}, {"lamb": 0.0}, "no validation is planned"),
        ({}, {"grokking_signal_fns": []}, None),
        ({}, {"grokking_signal_fns": SlowGradient(every=2)}, None),
        ({}, {"check_val_every_n_epoch": 3}, "waited for eval_loss='val_loss', but no validation took place: "),
        ({}, {"check_val_every_n_epoch": 3, "grokking_signal_fns": []}, None),
        ({"eval_acc": "a"}, {"check_val_every_n_epoch": 3, "lamb": 0.0}, "waited for eval_acc='a', but no validation "),
    ],
)
def test_a_run_without_validation(
    given: dict[str, Any], options: dict[str, Any], says: str | None, trainer: Callable[..., Any]
) -> None:
    options = dict(options)
    of_trainer = {
        name: options.pop(name) for name in ("limit_val_batches", "check_val_every_n_epoch") if name in options
    }
    callback, said = GrokAdamWCallback(**given), []
    for _ in range(2):
        it = trainer(max_epochs=2, callbacks=[callback], **of_trainer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            it.fit(
                Measured(lambda model: GrokAdamW(model.parameters(), **options)), data(), data() if of_trainer else None
            )
            for _ in range(1100):
                it.optimizers[0].update_signals()
        said += [str(warning.message) for warning in caught if warning.filename == __file__]
    assert len(said) == (says is not None)
    assert not says or says in said[0]


def test_without_a_training_loss_it_says_how_to_give_one(trainer: Callable[..., Any]) -> None:
    class Silent(Measured):
        def __init__(self) -> None:
            super().__init__(grokadamw)
            self.automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor]) -> None:  # type: ignore[override]
            self.manual_backward(super().training_step(batch))
            self.optimizers().step()

    says = r"training_step's loss, but it returned no number, and what was logged is val_loss: .*; return it, or log it"
    with pytest.warns(UserWarning, match=says):
        trainer(max_epochs=1, callbacks=[GrokAdamWCallback()]).fit(Silent(), data(), data())


class ByHand(Measured):
    """A module that steps by hand, and returns what it is told to."""

    def __init__(self, signals: Any, returned: Callable[[Tensor], Any]) -> None:
        super().__init__(lambda model: GrokAdamW(model.named_parameters(), grokking_signal_fns=signals))
        self.automatic_optimization, self.returned = False, returned

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:  # type: ignore[override]
        loss = super().training_step(batch)
        self.manual_backward(loss)
        self.optimizers().step()
        return self.returned(loss)


@pytest.mark.parametrize("returned", [lambda loss: None, lambda loss: {"loss": loss.expand(3)}])
@pytest.mark.parametrize("signals", [None, []])
def test_manual_optimization_need_not_return_a_loss(
    signals: Any, returned: Callable[[Tensor], Any], trainer: Callable[..., Any]
) -> None:
    """Losses of samples are no loss, and nobody is told of that if no signal takes losses."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(max_epochs=1, callbacks=[GrokAdamWCallback()]).fit(ByHand(signals, returned), data(), data())
    said = [str(warning.message) for warning in caught if "GrokAdamWCallback" in str(warning.message)]
    assert len(said) == (signals is None)
    assert all("it returned no number" in text for text in said)


def test_without_an_optimizer(trainer: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="found no optimizer, and no GrokAdamW"):
        trainer(max_epochs=1, callbacks=[GrokAdamWCallback()]).fit(Measured(lambda model: None), data(), data())


@pytest.mark.parametrize("boost", [4.0, 0.0])
def test_averaged_weights_look_like_memorising(boost: float, trainer: Callable[..., Any]) -> None:
    callback = GrokAdamWCallback()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            it = trainer(max_steps=1, callbacks=[lightning.pytorch.callbacks.EMAWeightAveraging(), callback])
            it.fit(Measured(lambda model: GrokAdamW(model.parameters(), signal_boost=boost)), data(), data())
    said = [warning for warning in caught if "validation measures averaged weights" in str(warning.message)]
    assert len(said) == (boost > 0)  # in the first run


def test_half_precision(tmp_path: Path) -> None:
    """The model's own weights are in bfloat16."""
    it = logging_trainer(tmp_path, GrokAdamWCallback(), precision="bf16-true")
    module = Measured(grokadamw)
    it.fit(module, data(), data())
    assert next(module.parameters()).dtype == torch.bfloat16
    assert it.optimizers[0].metrics()["alpha"] < 0.98
    assert all(state["exp_avg"].dtype == torch.float32 for state in it.optimizers[0].state.values())
