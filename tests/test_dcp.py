"""torch.distributed.checkpoint builds the state by a step, which must do nothing else."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from grokadamw import GrokAdamW, Grokfast, _numbers
from grokadamw.options import STATES
from grokadamw.signals import AccuracyGap, SlowGradient

from . import test_precision as formats
from .models import KEEPERS, network, train
from .test_precision import FORMATS


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        warnings.filterwarnings("ignore", ".*(TypedStorage|_shard|deprecated).*")
        yield


class Counted:
    """A signal that counts its calls, and keeps the count in its state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        return 0.1 * self.calls

    def state_dict(self) -> dict[str, int]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


def split(model: nn.Module, **options: Any) -> GrokAdamW:
    params = list(model.named_parameters())
    return GrokAdamW([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}], lr=0.01, **options)


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_step_that_builds_state_does_nothing_else(tensor_lr: bool, nonfinite: str, compiled: bool) -> None:
    model, signal = network(), Counted()
    params = list(model.named_parameters())
    optimizer = GrokAdamW(
        [{"params": params[:3]}, {"params": params[3:], "lamb": 0.0}],
        lr=torch.tensor(0.01) if tensor_lr else 0.01,
        nonfinite=nonfinite,
        gradient_clipping=0.0,
        grokking_signal_fns=signal,
    )
    before = [p.detach().clone() for p in model.parameters()]
    if compiled:
        optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
    get_optimizer_state_dict(model, optimizer)
    assert signal.calls == 0
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    for i, (_, p) in enumerate(params):
        assert list(optimizer.state[p]) == ["step", "exp_avg", "exp_avg_sq"] + ["grok_ema"] * (i < 3)
        assert not any(value.any() for value in optimizer.state[p].values())
    assert optimizer.metrics()["step"] == 0
    for _, p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert signal.calls == 1
    assert optimizer.metrics()["step"] == 1


@pytest.mark.parametrize("wrap", [lambda inner: inner, lambda inner: Grokfast(inner, lamb=0.0)])
def test_a_first_step_with_lr_0_and_gradients_of_0_is_a_step(wrap: Callable[[Any], Any]) -> None:
    """A warm-up may begin at 0, and its first batch may be masked."""
    models = [network() for _ in range(2)]
    plain: dict[str, Any] = {"lamb": 0.0, "gamma": 0.0, "gradient_clipping": 0.0, "weight_decay": 0.01}
    ours = wrap(GrokAdamW(models[0].parameters(), lr=0.0, **plain))
    for model, optimizer in zip(models, (ours, torch.optim.AdamW(models[1].parameters(), lr=0.0)), strict=True):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        train(model, range(3), lambda step, loss, optimizer=optimizer: optimizer.step())
        assert {int(state["step"]) for state in optimizer.state.values()} == {4}
    for p, expected in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, expected)


def test_a_function_of_the_users_own_with_the_name_of_torchs_takes_a_step() -> None:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), lr=0.0)

    def _init_optim_state() -> None:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()

    _init_optim_state()
    assert optimizer.metrics()["step"] == 1


@pytest.mark.parametrize("make", [GrokAdamW, lambda params: Grokfast(torch.optim.AdamW(params))])
def test_on_meta(make: Callable[[Any], Any]) -> None:
    """Numbers on the meta device cannot be read."""
    model = network()
    optimizer = make(model.parameters())
    train(model, range(3), lambda step, loss: optimizer.step())
    saved = get_optimizer_state_dict(model, optimizer)
    with torch.device("meta"):
        shapes = network()
    optimizer = make(shapes.parameters())
    assert set(get_optimizer_state_dict(shapes, optimizer)["state"]) == set(saved["state"])
    set_optimizer_state_dict(shapes, make(shapes.parameters()), saved)
    for p in shapes.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    assert all(x["exp_avg"].is_meta for x in optimizer.state_dict()["state"].values())


def test_without_gradients_there_is_nothing_to_build() -> None:
    signal = Counted()
    optimizer = GrokAdamW(network().parameters(), lr=0.0, grokking_signal_fns=signal)
    optimizer.step()
    assert not optimizer.state
    assert signal.calls == 1


@pytest.mark.parametrize("flatten", [False, True])
def test_a_run_that_dcp_saved_goes_on(tmp_path: Path, flatten: bool) -> None:
    """The run resumes bit for bit, with a new optimizer and through real files."""
    settings = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def start() -> tuple[nn.Module, GrokAdamW, AccuracyGap]:
        model, gap = network(), AccuracyGap()
        signals = [
            gap,
            AccuracyGap(),
            SlowGradient(every=2),
            Counted(),
            lambda train_loss, eval_loss: eval_loss - train_loss,
        ]
        return model, split(model, grokking_signal_fns=signals), gap

    model, optimizer, gap = start()

    def take_step(step: int, loss: torch.Tensor) -> None:
        if step == 2:
            gap.record(train=0.9, eval=0.2)
            optimizer.record(train_loss=loss, eval_loss=2 * loss, train_acc=0.75, eval_acc=0.25)
        optimizer.step()

    train(model, range(5), take_step)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=settings)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=tmp_path, no_dist=True)
    train(model, range(5, 10), take_step)

    twin, other, _ = start()
    of_model, of_optimizer = get_state_dict(twin, other, options=settings)
    assert other.metrics()["step"] == 0
    loaded = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        twin, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=settings
    )
    train(twin, range(5, 10), lambda step, loss: other.step())
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[b].items():
            assert torch.equal(other.state[a][name], value)
    assert other.metrics() == optimizer.metrics()


def test_a_run_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """The saved groups lack keys that came later. torch refuses that unless it is told to load a part."""
    model, twin = network(), network(seed=1)
    optimizer, other = split(model), split(twin)
    train(model, range(3), lambda step, loss: optimizer.step())
    of_model, of_optimizer = get_state_dict(model, optimizer)
    for group in of_optimizer["param_groups"]:
        del group["train_acc"], group["eval_acc"]
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=tmp_path, no_dist=True)

    of_model, of_optimizer = get_state_dict(twin, other)
    loaded = {"model": of_model, "optimizer": of_optimizer}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True, planner=planner)
    set_state_dict(twin, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for trained, stepped in ((model, optimizer), (twin, other)):
        train(trained, range(3, 6), lambda step, loss, stepped=stepped: stepped.step())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert other.param_groups[0]["eval_acc"] is None


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("keeper", KEEPERS)
def test_so_does_what_keeps_more(keeper: str, flatten: bool, tmp_path: Path) -> None:
    """Optimizers that keep more resume within a cycle, too, and the step that builds their state does nothing else."""
    settings = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, twin = network(), network()
    optimizer, other = KEEPERS[keeper](model), KEEPERS[keeper](twin)
    train(model, range(5), lambda step, loss: optimizer.step())
    model.zero_grad()  # SGD by itself has no state, so torch would build it now
    of_model, of_optimizer = get_state_dict(model, optimizer, options=settings)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=tmp_path, no_dist=True)
    train(model, range(5, 10), lambda step, loss: optimizer.step())
    before = [p.detach().clone() for p in twin.parameters()]
    of_model, of_optimizer = get_state_dict(twin, other, options=settings)
    assert all(torch.equal(p, old) for p, old in zip(twin.parameters(), before, strict=True))
    loaded = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        twin, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=settings
    )
    train(twin, range(5, 10), lambda step, loss: other.step())
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state.get(b, {}).items():
            assert torch.equal(torch.as_tensor(other.state[a][name]), torch.as_tensor(value)), name


@pytest.mark.parametrize("keeper", [name for name in KEEPERS if "SGD" not in name])
def test_an_optimizer_may_be_saved_as_it_is(keeper: str, tmp_path: Path) -> None:
    """The run is in the middle of a cycle. DCP loads entries that are not tensors under keys that are strings."""
    model, twin = network(), network()
    optimizer, other = KEEPERS[keeper](model), KEEPERS[keeper](twin)
    train(model, range(5), lambda step, loss: optimizer.step())
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=tmp_path, no_dist=True)
    train(twin, range(3, 6), lambda step, loss: other.step())  # so that there is state to load into
    dcp.load({"model": twin, "optimizer": other}, checkpoint_id=tmp_path, no_dist=True)
    for trained, stepped in ((model, optimizer), (twin, other)):
        train(trained, range(5, 9), lambda step, loss, stepped=stepped: stepped.step())
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert not any(isinstance(key, str) for key in other.state)


def test_values_that_were_recorded_on_a_gpu_load_into_a_new_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There they are tensors, but DCP loads a tensor only in place of another tensor."""
    model, twin = network(), network()
    optimizer, other = split(model), split(twin)
    train(model, range(2), lambda step, loss: optimizer.step())
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(_numbers, "reads_are_free", lambda device: False)
        optimizer.record(train_loss=torch.tensor(0.25), eval_loss=torch.tensor(0.5))
        assert torch.is_tensor(optimizer.param_groups[0]["train_loss"])
        _, saved = get_state_dict(model, optimizer)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path, no_dist=True)
    loaded = {"optimizer": get_state_dict(twin, other)[1]}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(twin, other, loaded["optimizer"])
    for trained, stepped in ((model, optimizer), (twin, other)):
        assert [group["eval_loss"] for group in stepped.param_groups] == [0.5, 0.5]
        train(trained, range(2, 4), lambda step, loss, stepped=stepped: stepped.step())
    assert other.metrics()["alpha"] == optimizer.metrics()["alpha"] < 0.98


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("order", ["groups reversed", "parameters reversed", "one group reversed"])
def test_parameters_are_found_by_name(order: str, flatten: bool) -> None:
    settings = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, twin = network(), network()

    def optimizer_of(model: nn.Module, how: str) -> GrokAdamW:
        params = list(model.named_parameters())
        groups = [[p for p in params if p[1].ndim == 2], [p for p in params if p[1].ndim == 1]]
        if how == "groups reversed":
            groups = groups[::-1]
        if how == "parameters reversed":
            groups = [group[::-1] for group in groups]
        if how == "one group reversed":
            return GrokAdamW(params[::-1])
        return GrokAdamW([{"params": group} for group in groups])

    optimizer = (
        optimizer_of(model, "as saved") if order != "one group reversed" else GrokAdamW(model.named_parameters())
    )
    train(model, range(3), lambda step, loss: optimizer.step())
    other = optimizer_of(twin, order)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=settings))
    set_optimizer_state_dict(twin, other, saved, options=settings)
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        for key, value in optimizer.state[a].items():
            assert torch.equal(other.state[b][key], value), name
    assert [row.beta1 for row in other.layer_table()] == [row.beta1 for row in optimizer.layer_table()]
    assert [set(row.names) for row in other.layer_table()] == [set(row.names) for row in optimizer.layer_table()]


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("change", ["1 to 2", "2 to 1", "other members"])
def test_parameters_may_be_regrouped(change: str, flatten: bool) -> None:
    """torch gives each group the saved options of one of its parameters, so names and layers may be those of others."""
    settings = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, twin = network(), network()

    def optimizer_of(model: nn.Module, groups: str) -> GrokAdamW:
        params = list(model.named_parameters())
        half = len(params) // 2
        parts = {
            "1": [params],
            "2": [params[:2], params[2:]],
            "halves": [params[:half], params[half:]],
            "odd and even": [params[::2], params[1::2]],
        }
        return GrokAdamW([{"params": part} for part in parts[groups]])

    old, new = {"1 to 2": "12", "2 to 1": "21"}.get(change, ("halves", "odd and even"))
    optimizer, other, fresh = optimizer_of(model, old), optimizer_of(twin, new), optimizer_of(twin, new)
    train(model, range(3), lambda step, loss: optimizer.step())
    set_optimizer_state_dict(
        twin, other, copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=settings)), options=settings
    )
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(other.state[b]["exp_avg"], optimizer.state[a]["exp_avg"])
    assert other.layer_table() == fresh.layer_table()
    train(twin, range(1), lambda step, loss: other.step())


@pytest.mark.parametrize("lamb", [0.0, 2.0])
def test_what_was_never_trained_is_saved_and_loaded(lamb: float) -> None:
    model = network()
    optimizer = split(model, lamb=lamb)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    fresh = split(model, lamb=lamb)
    set_optimizer_state_dict(model, fresh, saved)
    assert all(("grok_ema" in state) == (lamb > 0) for state in fresh.state.values())
    train(model, range(1), lambda step, loss: fresh.step())
    assert fresh.metrics()["step"] == 1


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_goes_on(name: str, flatten: bool, tmp_path: Path) -> None:
    """Runs resume bit for bit; building the state to load into evaluates no signal and moves no weight."""
    settings = StateDictOptions(flatten_optimizer_state_dict=flatten)
    signal, options = Counted(), {**FORMATS[name], "grokking_signal_fns": lambda: 0.5}
    model, optimizer = formats.started(options)
    formats.train(model, optimizer, 0, 3)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=settings)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=tmp_path, no_dist=True)
    formats.train(model, optimizer, 3, 6)

    twin, other = formats.started({**options, "grokking_signal_fns": signal})
    before = [param.detach().clone() for param in twin.parameters()]
    of_model, of_optimizer = get_state_dict(twin, other, options=settings)
    assert signal.calls == 0
    assert all(map(torch.equal, twin.parameters(), before))
    assert not any(x.any() for state in other.state.values() for x in state.values())
    loaded = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        twin, other, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"], options=settings
    )
    other.set_signals(lambda: 0.5)
    formats.train(twin, other, 3, 6)
    expected, found = formats.tensors(model, optimizer), formats.tensors(twin, other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], x) for key, x in expected.items())


@pytest.mark.parametrize("loaded_as", ["float32", "bfloat16"])
def test_codes_that_were_loaded_into_numbers_are_refused(loaded_as: str, tmp_path: Path) -> None:
    """torch.distributed.checkpoint copies codes into whatever tensor is there, and does not know of their scales."""
    model, optimizer = formats.started({"state_dtype": "int8"})
    formats.train(model, optimizer, 0, 3)
    _, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"optimizer": of_optimizer}, checkpoint_id=tmp_path, no_dist=True)
    twin, other = formats.started({"state_dtype": loaded_as})
    _, of_optimizer = get_state_dict(twin, other)
    loaded = {"optimizer": of_optimizer}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(ValueError, match="codes without their scales.*state_dtype='int8'"):
        set_optimizer_state_dict(twin, other, loaded["optimizer"])


@pytest.mark.parametrize(("saved", "loaded_as"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_numbers_are_loaded_into_numbers(saved: str, loaded_as: str, tmp_path: Path) -> None:
    model, optimizer = formats.started({"state_dtype": saved})
    formats.train(model, optimizer, 0, 3)
    _, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"optimizer": of_optimizer}, checkpoint_id=tmp_path, no_dist=True)
    twin, other = formats.started({"state_dtype": loaded_as})
    _, of_optimizer = get_state_dict(twin, other)
    loaded = {"optimizer": of_optimizer}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(twin, other, loaded["optimizer"])
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        for name in STATES:
            found, expected = optimizer.state[a][name].float(), other.state[b][name].float()
            assert (found - expected).norm() <= 0.003 * found.norm()
