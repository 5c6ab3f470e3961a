"""Tests of `GrokAdamW.for_grokking`."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from functools import partial, partialmethod
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import layer_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import SWALR

from grokadamw import GrokAdamW, decay_groups
from grokadamw.signals import AccuracyGap

from .models import network, set_gradients


@pytest.mark.filterwarnings("error")
def test_the_preset_takes_a_model_and_what_is_given_wins() -> None:
    model = nn.Sequential(nn.Embedding(9, 16), *(nn.Linear(16, 16) for _ in range(5)), nn.LayerNorm(16, bias=False))
    model[1].weight.requires_grad_(False)
    length = model[0].weight.norm(dim=1).mean().item()
    optimizer = GrokAdamW.for_grokking(model, lr=0.01, lamb=0.5)
    weights, norms, biases, embedding = optimizer.param_groups
    assert weights["param_names"] == [f"{i}.weight" for i in (2, 3, 4, 5)]
    assert norms["param_names"] == ["6.weight"]
    assert biases["param_names"] == [f"{i}.bias" for i in (1, 2, 3, 4, 5)]
    assert embedding["param_names"] == ["0.weight"]
    for group in optimizer.param_groups:
        assert (group["lamb"], group["max_row_norm"]) == (0.5, 0)
        assert group["max_row_change"] == (0 if group is biases else 0.035)
        assert (group["betas"], group["alpha_init"], group["gamma"]) == ((0.9, 0.98), 0.9, 0.6)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([1, 1 / 3, 0, 1 / length])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.01, 0.01, 0.01 * length])
    set_gradients(list(model.parameters()))
    optimizer.step()  # its low β1 is intended, and causes no warning
    assert optimizer.layer_table()[-1].beta1 == pytest.approx(0.9 * 0.4**6)
    given = GrokAdamW.for_grokking(model, max_row_norm=0.25)
    assert {group["max_row_norm"] for group in given.param_groups} == {0.25}


@pytest.mark.parametrize(
    ("shape", "decays"),
    [((), False), ((4,), False), ((1, 1, 4), False), ((4, 1, 1), False), ((1, 4, 1, 1), False), ((1, 4), True)],
)
def test_vectors_may_have_dimensions_of_1(shape: tuple[int, ...], decays: bool) -> None:
    """Class tokens, channel gains and head scales count as vectors; the weight of a layer with one output does not."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), Vector(shape), nn.Conv2d(4, 1, 1), nn.Linear(4, 1))
    groups = {name: group for group in GrokAdamW.for_grokking(model).param_groups for name in group["param_names"]}
    assert groups["2.gain"]["weight_decay"] == (1 if decays else 0)
    assert groups["2.gain"]["max_row_change"] == (0.035 if decays else 0)
    assert groups["3.weight"]["weight_decay"] == groups["4.weight"]["weight_decay"] == 1


def test_a_gain_in_a_convolution_is_a_vector() -> None:
    """A convolution with standardised weights has a gain of shape (channels, 1, 1, 1) beside its kernel."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(1, 4), spectral_norm(nn.Conv2d(4, 1, 1)))
    model[0].gain = nn.Parameter(torch.ones(4, 1, 1, 1))
    groups = {name: group for group in GrokAdamW.for_grokking(model).param_groups for name in group["param_names"]}
    assert (groups["0.gain"]["weight_decay"], groups["0.gain"]["max_row_change"]) == (0, 0)
    for kernel in ("0.weight", "2.parametrizations.weight.original"):
        assert (groups[kernel]["weight_decay"], groups[kernel]["max_row_change"]) == (1, 0.035)


def test_parametrized_modules_are_of_their_kind() -> None:
    model = nn.Sequential(spectral_norm(nn.Embedding(9, 16)), nn.LayerNorm(16), weight_norm(nn.Linear(16, 4)))
    register_parametrization(model[1], "weight", nn.ReLU())
    groups = {name: group for group in GrokAdamW.for_grokking(model).param_groups for name in group["param_names"]}
    length = model[0].parametrizations.weight.original.norm(dim=1).mean().item()
    assert groups["0.parametrizations.weight.original"]["lr"] == pytest.approx(3e-3 * length)
    assert groups["1.parametrizations.weight.original"]["weight_decay"] == pytest.approx(1 / 3)
    assert groups["2.parametrizations.weight.original1"]["weight_decay"] == 1
    named = {name for group in decay_groups(model) for name, _ in group["params"] if group["weight_decay"]}
    assert named == {"2.parametrizations.weight.original0", "2.parametrizations.weight.original1"}


def test_an_embedding_moves_and_shrinks_as_far_for_its_length_as_if_it_were_short() -> None:
    """Adam's step ignores the gradient's size, so the lr is scaled by the rows' length: all rows turn equally far."""
    moved = []
    for length in (1.0, 4.0, 50.0):
        torch.manual_seed(0)
        model = nn.Embedding(7, 32)
        with torch.no_grad():
            model.weight.mul_(length / model.weight.norm(dim=1, keepdim=True))
        before = model.weight.detach().clone()
        optimizer = GrokAdamW.for_grokking(model, lr=0.01)
        set_gradients([model.weight])
        optimizer.step()
        moved.append((model.weight.detach() - before) / length)
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moved[2], moved[0], rtol=1e-4, atol=1e-6)


def test_the_rows_of_a_complex_embedding_are_as_long_as_both_parts_make_them() -> None:
    model = nn.Embedding(5, 16, dtype=torch.complex64)
    with torch.no_grad():
        model.weight.fill_(1j)
    (group,) = GrokAdamW.for_grokking(model, lr=0.01, weight_decay=1.0).param_groups
    assert (group["lr"], group["weight_decay"]) == pytest.approx((0.04, 0.25))


def test_each_embedding_has_a_group_and_long_ones_a_higher_lr() -> None:
    long, longer, short = nn.Embedding(5, 16), nn.EmbeddingBag(5, 64), nn.Embedding(5, 16)
    with torch.no_grad():
        short.weight.div_(16)
    optimizer = GrokAdamW.for_grokking(nn.Sequential(long, longer, short, nn.Embedding(0, 4), nn.Linear(4, 4)))
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["4.weight", "4.bias"],
        ["0.weight"],
        ["1.weight"],
        ["2.weight"],
        ["3.weight"],
    ]
    lengths = [1, *(embedding.weight.norm(dim=1).mean().item() for embedding in (long, longer)), 1, 1]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2e-2 * x for x in lengths])


def test_a_run_resumes_whose_embedding_has_become_short() -> None:
    """The shrunken embedding would give a new optimizer a lower lr; loading the checkpoint restores the old one."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Embedding(9, 16), nn.LayerNorm(16), nn.Linear(16, 3))

    first, second = model(), model()
    optimizer = GrokAdamW.for_grokking(first)
    with torch.no_grad():
        first[0].weight.div_(100)
    set_gradients(list(first.parameters()))
    optimizer.step()
    second.load_state_dict(first.state_dict())
    resumed = GrokAdamW.for_grokking(second)
    assert resumed.param_groups[3]["lr"] == 3e-3
    resumed.load_state_dict(optimizer.state_dict())
    for trained, other in ((first, optimizer), (second, resumed)):
        set_gradients(list(trained.parameters()))
        other.step()
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert resumed.param_groups[3]["lr"] == optimizer.param_groups[3]["lr"] > 3e-3


def test_what_does_not_show_its_parameters_is_refused() -> None:
    with torch.device("meta"):
        model = nn.Embedding(5, 16)
    with pytest.raises(
        ValueError, match="the embedding weight is on the meta device.*initialise or load the weights first"
    ):
        GrokAdamW.for_grokking(model)
    model = nn.Sequential(nn.Embedding(5, 16), nn.LayerNorm(16))
    with torch.no_grad():
        model[0].weight[0] = math.inf
    with pytest.raises(ValueError, match="the embedding 0.weight holds numbers that are not finite"):
        GrokAdamW.for_grokking(model)
    GrokAdamW.for_grokking(nn.Sequential(model[0].requires_grad_(False), nn.Linear(16, 16)))  # frozen: not checked
    for make in (GrokAdamW.for_grokking, decay_groups):
        with pytest.raises(TypeError, match="model is TorchScript.*give the model that it was made from"):
            make(torch.jit.script(nn.Linear(2, 2)))
        with pytest.raises(TypeError, match=r"model\.1 is TorchScript"):
            make(nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.LayerNorm(2))))
        make(nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.ReLU())))
        with pytest.raises(TypeError, match=r"model comes from torch.export.*from the model that was exported"):
            make(torch.export.export(nn.Linear(2, 2), (torch.ones(2),)).module())
        with pytest.raises(ValueError, match="weight has no shape yet: run the model once"):
            make(nn.LazyLinear(2))
    with pytest.raises(TypeError, match="norms='yes' is neither True, False nor None"):
        GrokAdamW.for_grokking(nn.Linear(2, 2), norms="yes")


class Vector(nn.Module):
    def __init__(self, shape: tuple[int, ...] = (4,)) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(shape))


def called(name: str, base: type[nn.Module], *arguments: Any) -> nn.Module:
    """Return an instance of a new subclass of `base` that has this name."""
    made: nn.Module = type(name, (base,), {})(*arguments)
    return made


def rms(x: Tensor) -> Tensor:
    return functional.rms_norm(x, (4,))


class ByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rms = None

    def forward(self, x: Tensor) -> Tensor:
        return rms(x)


class ByMethod(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x)

    @staticmethod
    def normed(x: Tensor) -> Tensor:
        return (lambda y: layer_norm(y, (4,)))(x)


class ByName(nn.Module):
    def layer_norm(self, x: Tensor) -> Tensor:
        return x - x.mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_norm(x)


class BySuper(ByFunction):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class ByAttribute(nn.Module):
    def __init__(self, attribute: Any) -> None:
        super().__init__()
        self.normed = attribute

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x)


def by_closure() -> list[nn.Module]:
    f = functional

    def normed(x: Tensor) -> Tensor:
        return torch.native_layer_norm(x, (4,), None, None, 1e-5)[0]

    class ByClosure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return normed(x)

    class ByModuleInClosure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f.group_norm(x, 1)

    return [ByClosure(), ByModuleInClosure()]


helpers = ModuleType("helpers")
helpers.normed = rms  # type: ignore[attr-defined]


class ByTrainingStep(nn.Module):
    """A module that normalises in `training_step`, as Lightning's modules do."""

    def training_step(self, batch: Tensor) -> Tensor:
        return helpers.normed(batch)


class ByImport(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        import torch.nn.functional as F

        return F.batch_norm(x, None, None, training=True)


class BesideAFlag(nn.Module):
    """A module that calls layer_norm, and has a flag of the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, (4,)) if self.layer_norm else x


class Functions:
    group_norm = staticmethod(functional.group_norm)


class ByNamespace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Functions.group_norm(x, 1)


class ByPartialMethod(nn.Module):
    def normed(self, x: Tensor, is_normed: bool) -> Tensor:
        return rms(x) if is_normed else x

    forward = partialmethod(normed, is_normed=True)


class ByProperty(nn.Module):
    @property
    def normed(self) -> Any:
        return partial(layer_norm, normalized_shape=(4,))

    def forward(self, x: Tensor) -> Tensor:
        return self.normed(x)


class BySubmodule(nn.Module):
    """A module that calls a method of its submodules, and not their ``forward``."""

    class Block(nn.Module):
        def attend(self, x: Tensor) -> Tensor:
            return rms(x)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block.attend(x)
        return x


def by_wrapped_methods() -> list[nn.Module]:
    """Return modules whose bound methods are wrapped, as people compile them or run them under autocast."""
    compiled, cast, helped = ByFunction(), ByFunction(), ByAttribute(None)
    compiled.forward = torch.compile(compiled.forward, backend="eager")  # type: ignore[method-assign]
    cast.forward = torch.autocast("cpu")(cast.forward)  # type: ignore[method-assign]
    helped.normed = torch.no_grad()(ByFunction().forward)
    return [compiled, cast, helped]


class WithoutByConfig(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(batch_norm=False, layer_norm=False)

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        if self.config.batch_norm or config.layer_norm or options.group_norm or settings.rms_norm:
            x = self.normed(x)
        return functional.relu(x)


options = SimpleNamespace(group_norm=False)
settings = ModuleType("settings")
settings.rms_norm = False  # type: ignore[attr-defined]


class Without(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm, self.batch_norm = nn.Identity(), False

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(self.layer_norm(x)) if self.batch_norm else x


class WithoutBesideAnImport(nn.Module):
    """A module with a flag of a norm's name, whose code imports something."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = False

    def forward(self, x: Tensor) -> Tensor:
        import math

        return x if self.layer_norm else x * math.pi


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        *[(layer, "layer") for layer in (nn.LayerNorm(4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.RMSNorm(4))],
        *[
            (called(name, Vector), "layer")
            for name in ("LlamaRMSNorm", "RMSnorm", "Layernorm", "LayerNormalization", "layer_norm", "LN", "ScaleNorm")
        ],
        (called("FilterResponseNorm2d", Vector, (1, 4, 1, 1)), "layer"),
        *[(layer, "inside") for layer in (nn.LayerNorm(4, elementwise_affine=False), called("MyRMSNorm", nn.Module))],
        *[
            (layer, "inside")
            for layer in (ByFunction(), ByMethod(), ByName(), called("LayerNormLinear", nn.Linear, 4, 4))
        ],
        *[(layer, "inside") for layer in (BySuper(), *by_closure(), ByTrainingStep(), ByImport(), BesideAFlag())],
        *[(layer, "inside") for layer in (ByNamespace(), ByPartialMethod(), ByProperty(), BySubmodule())],
        *[(layer, "inside") for layer in by_wrapped_methods()],
        *[(ByAttribute(norm), "inside") for norm in (layer_norm, partial(layer_norm, normalized_shape=(4,)))],
        *[(called(name, Vector), "none") for name in ("NoNorm", "Normal", "NormFreeGain", "Vector")],
        *[
            (called(name, nn.Module), "none")
            for name in ("L2Norm", "RunningNorm", "WithoutBatchNorm", "BatchNormFreeBlock")
        ],
        (called("NormLinear", nn.Linear, 4, 4), "none"),
        (called("PreNormBlock", nn.Sequential, nn.Linear(4, 4)), "none"),
        *[(parametrize(nn.Linear(4, 4)), "none") for parametrize in (weight_norm, spectral_norm)],
        (nn.Embedding(4, 4, max_norm=1.0), "none"),
        *[(layer, "none") for layer in (nn.ReLU(), Without(), WithoutByConfig(), ByAttribute(functional.relu))],
        (WithoutBesideAnImport(), "none"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_norms_are_found_by_class_and_by_call(other: nn.Module, kind: str) -> None:
    optimizer = GrokAdamW.for_grokking(nn.Sequential(nn.Linear(4, 4), other), weight_decay=1.0)
    groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    for group in groups.values():
        assert (group["lamb"], group["gamma"]) == ((2, 0.6) if kind != "none" else (0, 0))
    assert groups["0.weight"]["max_row_change"] == (0.035 if kind != "none" else 0)
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    for name, _ in other.named_parameters("1"):
        if kind == "layer":
            assert decays[name] == pytest.approx(1 / 3)
    assert decays["0.weight"] == 1
    assert decays["0.bias"] == (1 if kind == "none" else 0)


def test_who_knows_better_says_whether_there_are_norms() -> None:
    for norms, gamma in ((True, 0.6), (False, 0.0)):
        for model in (nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))):
            assert {g["gamma"] for g in GrokAdamW.for_grokking(model, norms=norms).param_groups} == {gamma}


def test_without_norms_the_preset_is_adamw() -> None:
    given = GrokAdamW.for_grokking(nn.Linear(4, 4), lamb=1.0, gamma=0.5, max_row_change=0.5).param_groups[0]
    assert (given["lamb"], given["gamma"], given["max_row_change"]) == (1, 0.5, 0.5)

    ours, expected = network(), network()
    optimizers = (
        GrokAdamW.for_grokking(ours, gradient_clipping=0.0),
        torch.optim.AdamW(expected.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=1.0),
    )
    for _ in range(5):
        for model, optimizer in zip((ours, expected), optimizers, strict=True):
            set_gradients(list(model.parameters()))
            optimizer.step()
    for p, q in zip(ours.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q)


SHALLOW = nn.Sequential(nn.Embedding(9, 4, _weight=torch.zeros(9, 4)), *(nn.Linear(4, 4) for _ in range(3)))
DEEP = nn.Sequential(SHALLOW, nn.Linear(4, 4))
NORMS_OF_WEIGHTS = (weight_norm, old_weight_norm, spectral_norm)


def both_ways(norm: Any) -> nn.Module:
    """Return an LSTM of two directions whose recurrent matrices are parametrized."""
    lstm = nn.LSTM(4, 4, bidirectional=True)
    for name in ("weight_hh_l0", "weight_hh_l0_reverse"):
        norm(lstm, name)
    return lstm


class Matrices(nn.Module):
    """A module with matrices of these names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.ones(4, 4)))


SCHEDULES: dict[str, tuple[Any, bool]] = {
    "one cycle": (lambda o: OneCycleLR(o, 0.01, total_steps=9, cycle_momentum=False), True),
    "one cycle, a list": (
        lambda o: OneCycleLR(o, [g["lr"] for g in o.param_groups], total_steps=9, cycle_momentum=False),
        False,
    ),
    "a factor": (lambda o: LambdaLR(o, lambda step: min(1.0, (step + 1) / 10)), False),
    "from 0": (lambda o: LambdaLR(o, lambda step: step / 10), False),
    "cosine": (lambda o: CosineAnnealingLR(o, 9), False),
    "a loop": (lambda o: [group.update(lr=0.01) for group in o.param_groups], True),
    "by hand": (lambda o: o.param_groups[0].update(lr=0.01), False),
    "none": (lambda o: None, False),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_that_loses_the_embeddings_lr_is_warned_of_once(schedule: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 64), nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 5))
    optimizer = GrokAdamW.for_grokking(model)
    make, is_warned_of = SCHEDULES[schedule]
    make(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(torch.arange(5)).square().sum().backward()
            optimizer.step()
    assert sum("the preset gave each embedding its own" in str(w.message) for w in caught) == is_warned_of


LATER: dict[str, Callable[[GrokAdamW], Any]] = {
    "a loop": lambda o: [group.update(lr=0.01) for group in o.param_groups],
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=1),
    "one cycle": lambda o: OneCycleLR(o, 0.01, total_steps=9, cycle_momentum=False),
}


@pytest.mark.parametrize("name", LATER)
def test_a_schedule_that_begins_later_is_warned_of_once(name: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 64), nn.LayerNorm(64), nn.Linear(64, 5))
    optimizer = GrokAdamW.for_grokking(model)
    warm_up = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))
    schedule: Any = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(8):
            model(torch.arange(5)).square().sum().backward()
            optimizer.step()
            if i < 4:
                warm_up.step()
            elif schedule is None:
                assert not caught
                schedule = LATER[name](optimizer)
            elif isinstance(schedule, LRScheduler):
                schedule.step()
    assert sum("the preset gave each embedding its own" in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles_warn_of_lost_lrs(copied: Callable[[Any], Any]) -> None:
    model = nn.Sequential(nn.Embedding(5, 64), nn.LayerNorm(64), nn.Linear(64, 5))
    model, optimizer = copied((model, GrokAdamW.for_grokking(model)))
    SCHEDULES["a loop"][0](optimizer)
    model(torch.arange(5)).square().sum().backward()
    with pytest.warns(UserWarning, match="the preset gave each embedding its own"):
        optimizer.step()


@pytest.mark.parametrize(
    ("model", "numbers"),
    [
        (SHALLOW, (1e-2, 1, 4, 3)),
        (DEEP, (3e-3, 0.1, 10, 30)),
        (SHALLOW[:3], (2e-2, 0.5, 2, 1)),
        (nn.Linear(4, 4), (2e-2, 0.5, 2, 1)),
        (nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4)), (1e-2, 1, 4, 3)),
        (nn.Sequential(nn.LSTM(4, 4, num_layers=2), nn.Linear(4, 4)), (3e-3, 0.1, 10, 30)),
        (nn.Sequential(nn.LSTM(4, 4, bidirectional=True), nn.Linear(8, 4)), (1e-2, 1, 4, 3)),
        *((nn.Sequential(both_ways(norm), nn.Linear(8, 4)), (1e-2, 1, 4, 3)) for norm in NORMS_OF_WEIGHTS),
        (Matrices("weight_u", "weight_g", "weight_d"), (1e-2, 1, 4, 3)),  # a gate, and not the lengths of weight_norm
        (nn.Sequential(*(weight_norm(nn.Linear(4, 4)) for _ in range(3))), (1e-2, 1, 4, 3)),
        (nn.Sequential(*(old_weight_norm(nn.Linear(4, 4)) for _ in range(3))), (1e-2, 1, 4, 3)),
        (nn.Sequential(*(nn.Conv1d(1, 1, 1) for _ in range(4))), (3e-3, 0.1, 10, 30)),
        (Vector((4,)), (3e-3, 0.1, 10, 30)),  # may be a whole model, flattened
        (SHALLOW[:1], (3e-3, 0.1, 10, 30)),
    ],
    ids=[
        *("shallow", "deep", "two", "one", "LSTM", "two LSTMs", "both ways"),
        *("both ways, weight_norm", "both ways, old weight_norm", "both ways, spectral_norm", "a gate"),
        *("weight_norm", "old weight_norm", "convolutions", "vector", "embedding"),
    ],
)
def test_without_norms_the_numbers_depend_on_how_many_weights_there_are(
    model: nn.Module, numbers: tuple[float, ...]
) -> None:
    for group in GrokAdamW.for_grokking(model).param_groups:
        found = tuple(group[name] for name in ("lr", "weight_decay", "signal_boost", "decay_boost"))
        assert (found, group["lamb"], group["gamma"], group["max_row_change"]) == (numbers, 0, 0, 0)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(2, 3, 1440))


EMPTY = nn.ParameterList([nn.Parameter(torch.empty(4, 0))])


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(1440, 2)],
        [nn.Linear(2700, 1), nn.Linear(180, 1)],  # a mean
        [nn.Conv1d(160, 2, 9)],
        [nn.ConvTranspose1d(2, 160, 9)],
        [Experts()],
        [nn.Linear(1440, 2), nn.Embedding(2, 9), EMPTY, nn.LayerNorm((9, 9))],  # the rest does not count
        [weight_norm(nn.Linear(1440, 2))],
        [nn.LSTM(1440, 1440, bidirectional=True)],
    ],
    ids=["linear", "mean", "convolution", "transposed", "experts", "other layers", "weight_norm", "LSTM"],
)
def test_with_norms_wide_models_get_less_lr_and_more_decay(layers: list[nn.Module]) -> None:
    """1440 inputs are eight times 180, above which lr falls and weight decay rises; 8 ** (2 / 3) is 4."""
    model = nn.Sequential(*layers, nn.LayerNorm(4))
    for given, expected in (
        ({}, (7.5e-4, 4.0)),
        ({"lr": 3e-3}, (3e-3, 1.0)),
        ({"weight_decay": 0.5}, (7.5e-4, 0.5)),
        ({"norms": False}, (2e-2, 0.5)),
    ):
        optimizer = GrokAdamW.for_grokking(model, **given)
        for settings in (optimizer.defaults, optimizer.param_groups[0]):
            assert (settings["lr"], settings["weight_decay"]) == pytest.approx(expected)


def test_narrow_models_have_one_lr_and_one_decay() -> None:
    for width in (1, 128, 180):
        preset = GrokAdamW.for_grokking(nn.Sequential(nn.Linear(width, 4), nn.LayerNorm(4))).defaults
        assert (preset["lr"], preset["weight_decay"]) == (3e-3, 1.0)


def test_a_weight_decay_that_is_given_stays_as_it_is() -> None:
    """Only a weight decay that the preset chooses grows with the signal."""
    for options, boost in (
        ({}, 30.0),
        ({"lr": 1e-3}, 30.0),
        ({"weight_decay": 0.1}, 0.0),
        ({"weight_decay": 1.0, "decay_boost": 2.0}, 2.0),
        ({"norms": True}, 3.0),
        ({"norms": True, "weight_decay": 1.0}, 0.0),
    ):
        group = GrokAdamW.for_grokking(DEEP, **options).param_groups[0]
        assert group["decay_boost"] == boost


@pytest.mark.filterwarnings("ignore:a step found no gradient")  # copies have no gradients
@pytest.mark.parametrize("options", [{}, {"grokking_signal_fns": None}])
def test_the_preset_steps_further_while_a_model_has_memorised(options: dict[str, None]) -> None:
    """Copies of the optimizer, and unpickled ones, boost their steps as the original does."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = GrokAdamW.for_grokking(model, **options)
    set_gradients(list(model.parameters()))
    optimizer.step()
    assert optimizer.metrics()["boost"] == 1
    for train_loss, eval_loss, boost in ((4.5, 4.6, 1.0), (0.01, 5.0, 5.0), (0.001, 0.02, 1.0)):
        optimizer.record(train_loss=train_loss, eval_loss=eval_loss)
        for stepped in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            stepped.step()
            assert stepped.metrics()["boost"] == pytest.approx(boost, abs=0.05)
    accuracies = GrokAdamW.for_grokking(model, grokking_signal_fn=AccuracyGap())
    accuracies.record(train_acc=1.0, eval_acc=0.5)
    accuracies.step()
    assert accuracies.metrics()["boost"] == 3.0


def test_the_preset_has_layers_in_the_models_order() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
    optimizer = GrokAdamW.for_grokking(model)
    assert [row.names for row in optimizer.layer_table()] == [
        ["0.weight"],
        ["1.weight", "1.bias"],
        ["2.weight"],
    ]


def test_the_presets_groups() -> None:
    only_matrices, only_vectors = nn.Linear(4, 4, bias=False), nn.LayerNorm(4)
    for model in (only_matrices, only_vectors):  # parameters that FSDP1 flattened are vectors, too
        (group,) = GrokAdamW.for_grokking(model, weight_decay=2.0).param_groups
        assert group["weight_decay"] == 2
    model = nn.Sequential(nn.Embedding(4, 16), nn.Linear(16, 4), nn.ReLU())  # biases decay without norms
    length = model[0].weight.norm(dim=1).mean().item()
    optimizer = GrokAdamW.for_grokking(model, lr=torch.tensor(0.1))
    assert [group["param_names"] for group in optimizer.param_groups] == [["1.weight", "1.bias"], ["0.weight"]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.5 / length])
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 2.0):
        scheduler.step(loss)
    # torch 2.6's scheduler replaces tensors by numbers
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.1 / 2, 0.1 / 2 * length])
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(4)))]})
    assert optimizer.param_groups[-1]["weight_decay"] == 0.5


def test_the_preset_warns_of_a_gamma_that_was_given() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    optimizer = GrokAdamW.for_grokking(model, gamma=0.4)
    set_gradients(list(model.parameters()))
    with pytest.warns(UserWarning, match="layer"):
        optimizer.step()


HOW = ["set_layers", "load_state_dict", "add_param_group", "deepcopy", "pickle"]


def changed(model: nn.Module, optimizer: GrokAdamW, how: str) -> tuple[nn.Module, GrokAdamW]:
    """Return both, or copies of both, after an action that may make the next step check the layers again."""
    if how == "set_layers":
        optimizer.set_layers(model)
    elif how == "load_state_dict":
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif how == "add_param_group":
        model.add_module("new", nn.Linear(2, 2))
        optimizer.add_param_group({"params": [(f"new.{name}", p) for name, p in model.new.named_parameters()]})
    elif how == "deepcopy":
        return copy.deepcopy((model, optimizer))
    elif how == "pickle":
        return pickle.loads(pickle.dumps((model, optimizer)))
    return model, optimizer


def take_step(optimizer: GrokAdamW) -> None:
    set_gradients([param for group in optimizer.param_groups for param in group["params"]])
    optimizer.step()


def deep() -> nn.Module:
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)), nn.LayerNorm(2))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("then", [None, "deepcopy", "pickle", "set_layers"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("at_first", [True, False])
def test_the_presets_own_gamma_is_never_warned_of(how: str, then: str | None, at_first: bool) -> None:
    model = deep()
    optimizer = GrokAdamW.for_grokking(model)
    if not at_first:
        take_step(optimizer)
    model, optimizer = changed(model, optimizer, how)
    if then:
        model, optimizer = changed(model, optimizer, then)
    take_step(optimizer)


@pytest.mark.parametrize("whose", ["the constructor's", "the caller's", "set by hand"])
@pytest.mark.parametrize("how", [None, *HOW])
@pytest.mark.parametrize("at_first", [True, False])
def test_any_other_gamma_is_warned_of_once_the_layers_are_looked_at(
    how: str | None, whose: str, at_first: bool
) -> None:
    model = deep()
    if whose == "the constructor's":
        optimizer = GrokAdamW(model.named_parameters(), gamma=0.6)
    else:
        optimizer = GrokAdamW.for_grokking(model, **{"gamma": 0.6} if whose == "the caller's" else {})
        for group in optimizer.param_groups if whose == "set by hand" else ():
            group["gamma"] = 0.5
    if not at_first:
        with pytest.warns(UserWarning, match="less than half of betas"):
            take_step(optimizer)
    if how:
        model, optimizer = changed(model, optimizer, how)
    if how in (None, "deepcopy") and not at_first:  # the first step has warned already
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            take_step(optimizer)
    else:
        with pytest.warns(UserWarning, match="less than half of betas"):
            take_step(optimizer)


def test_without_a_model_it_says_what_it_needs() -> None:
    with pytest.raises(TypeError, match=r"GrokAdamW.for_grokking\(model\).*huggingface.for_grokking\(arguments, "):
        GrokAdamW.for_grokking()


def test_a_model_that_is_mostly_frozen_is_for_fine_tuning() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="68% of the model is frozen.*made for training from scratch") as said:
        optimizer = GrokAdamW.for_grokking(model)
    assert [name for group in optimizer.param_groups for name in group["param_names"]] == [
        *("2.weight", "1.weight", "1.bias", "2.bias")
    ]
    assert said[0].filename == __file__
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="all parameters of the model are frozen: set requires_grad"):
        decay_groups(model)
    with pytest.raises(ValueError, match="all parameters of the model are frozen: set requires_grad"):
        GrokAdamW.for_grokking(model)


@pytest.mark.filterwarnings("error")
def test_a_model_that_is_frozen_in_part_is_none() -> None:
    model = nn.Sequential(nn.Embedding(3, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    model[0].requires_grad_(False)
    names = [group["param_names"] for group in GrokAdamW.for_grokking(model).param_groups]
    assert names == [["1.weight"], ["2.weight", "2.bias"], ["1.bias"]]


def test_the_preset_needs_a_model_and_numbers() -> None:
    with pytest.raises(TypeError, match="weight_decay='3' is not a number"):
        GrokAdamW.for_grokking(network(), weight_decay="3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="lr='1e-3' is not a number"):
        GrokAdamW.for_grokking(network(), lr="1e-3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is a generator, and not a torch.nn.Module: give the model itself"):
        GrokAdamW.for_grokking(network().parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"gamma": 0.1}])
def test_the_state_dict_of_an_adamw_is_doubted(options: dict[str, float]) -> None:
    """Models without norms have one group, so it fits."""
    model = nn.Linear(3, 3)
    optimizer = GrokAdamW.for_grokking(model, **options)
    with pytest.warns(UserWarning, match="AdamW or Adam was loaded into the preset"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())


def test_norms_are_found_in_code_with_many_names() -> None:
    """Such code has one more instruction between a name and its attribute."""
    lines = "".join(f"    x = x.a{i}\n" for i in range(300))
    namespace: dict[str, Any] = {"functional": functional}
    exec(f"def forward(self, x):\n{lines}    return functional.layer_norm(x, (4,))\n", namespace)
    long = type("Long", (nn.Module,), {"forward": namespace["forward"], "__module__": __name__})
    assert GrokAdamW.for_grokking(nn.Sequential(nn.Linear(4, 4), long())).param_groups[0]["gamma"] == 0.6


@pytest.mark.filterwarnings("error")
def test_rates_that_were_alike_or_of_other_groups_are_not_missed() -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    of_tensors = GrokAdamW.for_grokking(plain, lr=torch.tensor(0.01))
    for group in of_tensors.param_groups:
        group["lr"] = 0.01
    model = nn.Sequential(nn.Embedding(5, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    without_embedding = GrokAdamW.for_grokking(model)
    del without_embedding.param_groups[-1]
    for optimizer in (of_tensors, without_embedding):
        for group in optimizer.param_groups:
            set_gradients(group["params"])
        optimizer.step()


def test_a_vector_of_an_embedding_has_no_rows() -> None:
    class Biased(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(5, 4)
            self.bias = nn.Parameter(torch.full((4,), 9.0))

    optimizer = GrokAdamW.for_grokking(nn.Sequential(Biased(), nn.Linear(4, 4), nn.LayerNorm(4)))
    group = next(group for group in optimizer.param_groups if "0.bias" in group["param_names"])
    assert (group["lr"], group["weight_decay"], group["param_names"]) == (3e-3, 0, ["0.bias", "1.bias"])


def test_every_group_has_a_tensor_lr_of_its_own() -> None:
    lr = torch.tensor(0.1)
    optimizer = GrokAdamW.for_grokking(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), lr=lr)
    for group in optimizer.param_groups:
        group["lr"] *= 0.5  # in place, as schedulers do
    assert [group["lr"].item() for group in optimizer.param_groups] == pytest.approx([0.05] * 3)
    assert lr == torch.tensor(0.1)
