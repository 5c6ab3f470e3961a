"""Tests of low-bit state and weights in checkpoints: each format loads into every other, and resuming is exact."""

from __future__ import annotations

import copy
import warnings
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from grokadamw import Accumulate, GrokAdamW, full_precision_state_dict, load_full_precision_state_dict
from grokadamw.checkpoints import to_adamw, to_float32
from grokadamw.options import STATES
from grokadamw.state import formats

from .models import running, same, saved_and_loaded

FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"state_dtype": "bfloat16"},
    "int8": {"state_dtype": "int8"},
    "mixed": {"state_dtype": {"grok_ema": "int8", "exp_avg_sq": "bfloat16"}},
    "24 bits": {"state_dtype": "int8", "master_weight_bits": 24},
    "32 bits": {"state_dtype": "bfloat16", "master_weight_bits": 32},
    "stochastic": {"rounding": "stochastic"},
}
# the largest error of a loaded state, relative to the norm of the saved one
LOSSES = {"float32": 0.0, "bfloat16": 0.004, "int8": 0.015, "mixed": 0.015, "24 bits": 0.015, "32 bits": 0.004}
LOSSES["stochastic"] = 0.0


class Model(nn.Module):
    """A model of different parameters: rows that blocks do not divide, channels-last, few elements, short rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"even": (64, 128), "odd": (100, 97), "vector": (5000,), "small": (7,), "short": (500, 10)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter((0.1 * torch.randn(shape)).to(dtype)))
        last = torch.randn(8, 32, 5, 5).to(dtype, memory_format=torch.channels_last)
        self.conv = nn.Parameter(last)
        self.tied = self.even


def started(options: dict[str, Any], foreach: bool | None = None) -> tuple[Model, GrokAdamW]:
    is_half = options.keys() & {"master_weight_bits", "rounding"}
    model = Model(torch.bfloat16 if is_half else torch.float32)
    return model, GrokAdamW(model.named_parameters(), lr=0.01, foreach=foreach, **options)


def train(model: Model, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape).to(param.dtype)
        optimizer.step()


def tensors(model: Model, optimizer: GrokAdamW) -> dict[str, Tensor]:
    found = dict(model.state_dict())
    for name, param in model.named_parameters():
        found |= {f"{name}.{key}": x for key, x in optimizer.state[param].items() if isinstance(x, Tensor)}
    return found


@pytest.mark.parametrize("foreach", [None, True], ids=["the kernel", "decoded"])
@pytest.mark.parametrize("more", [{}, {"accumulation_steps": 3, "second_moment": "raw"}], ids=["", "in a cycle"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_resumed_run_is_the_run(name: str, more: dict[str, Any], foreach: bool | None) -> None:
    model, optimizer = started(FORMATS[name] | more, foreach)
    train(model, optimizer, 0, 5)
    saved = saved_and_loaded([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, 5, 9)
    other, resumed = started(FORMATS[name] | more, foreach)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, 5, 9)
    expected, found = tensors(model, optimizer), tensors(other, resumed)
    assert list(expected) == list(found)
    for key in expected:
        assert torch.equal(expected[key], found[key]), key


@pytest.mark.parametrize(("saved", "loaded"), list(product(FORMATS, FORMATS)))
def test_any_format_loads_into_any(saved: str, loaded: str) -> None:
    model, optimizer = started(FORMATS[saved])
    train(model, optimizer, 0, 3)
    state_dict = optimizer.state_dict()
    _, other = started(FORMATS[loaded])
    drops = "master_weight_bits" in FORMATS[saved] and "master_weight_bits" not in FORMATS[loaded]
    other.load_state_dict(state_dict)
    before, after = (to_float32(saved)["state"] for saved in (state_dict, other.state_dict()))
    for i, state in before.items():
        assert ("param_low" in after[i]) == ("param_low" in state and not drops)
        for name in STATES:
            assert after[i][name].dtype == torch.float32
            assert (after[i][name] - state[name]).norm() <= LOSSES[loaded] * state[name].norm(), name


def test_low_bits_that_are_dropped_are_missed() -> None:
    model, optimizer = started(FORMATS["24 bits"])
    train(model, optimizer, 0, 3)
    with pytest.warns(UserWarning, match="low bits of its parameters.* they are dropped"):
        GrokAdamW(copy.deepcopy(model).parameters()).load_state_dict(optimizer.state_dict())


def test_float32_weights_miss_no_low_bits() -> None:
    """Weights from `full_precision_state_dict` contain the low bits, so loading does not warn that they are dropped."""
    model, optimizer = started(FORMATS["24 bits"])
    train(model, optimizer, 0, 3)
    other = copy.deepcopy(model).float()
    other.load_state_dict(full_precision_state_dict(model, optimizer))
    resumed = GrokAdamW(other.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(optimizer.state_dict())
    assert "param_low" not in resumed.state[next(other.parameters())]


def test_saving_again_loses_nothing() -> None:
    for options in FORMATS.values():
        model, optimizer = started(options)
        train(model, optimizer, 0, 3)
        _, other = started(options)
        other.load_state_dict(optimizer.state_dict())
        for found, expected in zip(optimizer.state.values(), other.state.values(), strict=True):
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in found)


def test_torchs_adamw_goes_on_from_every_format() -> None:
    for options in FORMATS.values():
        model, optimizer = started(options)
        train(model, optimizer, 0, 3)
        adamw = torch.optim.AdamW(model.parameters(), lr=0.01)
        adamw.load_state_dict(to_adamw(optimizer.state_dict()))
        train(model, adamw, 3, 4)  # type: ignore[arg-type]
        assert all(param.isfinite().all() for param in model.parameters())
        assert {*adamw.state[model.even]} == {"step", "exp_avg", "exp_avg_sq"}


def test_a_file_whose_strides_are_others_means_the_same_numbers() -> None:
    model, optimizer = started(FORMATS["int8"])
    train(model, optimizer, 0, 3)
    _, other = started(FORMATS["int8"])
    with torch.no_grad():
        other.param_groups[0]["params"][-1].data = model.conv.detach().contiguous()
    other.load_state_dict(optimizer.state_dict())
    before, after = (to_float32(saved)["state"][5]["exp_avg"] for saved in (optimizer.state_dict(), other.state_dict()))
    assert after.is_contiguous()
    assert (after - before).norm() <= 0.015 * before.norm()


def test_what_no_longer_fits_is_named() -> None:
    model, optimizer = started(FORMATS["24 bits"])
    train(model, optimizer, 0, 2)
    state_dict = copy.deepcopy(optimizer.state_dict())
    del state_dict["state"][0]["exp_avg_scale"]
    with pytest.raises(ValueError, match="exp_avg of parameter 0 holds codes without their scales"):
        started(FORMATS["24 bits"])[1].load_state_dict(state_dict)
    for name, wrong in (("exp_avg_scale", torch.zeros(3)), ("param_low", torch.zeros(3, dtype=torch.int8))):
        state_dict = copy.deepcopy(optimizer.state_dict())
        state_dict["state"][0][name] = wrong
        with pytest.raises(ValueError, match=f"{name} of parameter 0 has shape"):
            started(FORMATS["24 bits"])[1].load_state_dict(state_dict)
    optimizer.state[model.even]["exp_avg_scale"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"state\['exp_avg_scale'\]"):
        train(model, optimizer, 2, 3)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "24 bits"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("shape", [(3,), (64, 70)])
def test_complex_state_is_no_codes(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def begun() -> tuple[nn.Parameter, GrokAdamW]:
        torch.manual_seed(0)
        param = nn.Parameter(torch.randn(shape, dtype=dtype))
        return param, GrokAdamW([param], **FORMATS[name])

    def step(param: nn.Parameter, optimizer: GrokAdamW) -> None:
        param.grad = torch.ones_like(param) * 2j
        optimizer.step()

    param, optimizer = begun()
    step(param, optimizer)
    other, resumed = begun()
    other.data = param.detach().clone()
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for pair in ((param, optimizer), (other, resumed)):
        step(*pair)
    assert torch.equal(param, other)
    assert same(optimizer.state[param], resumed.state[other])


def test_small_state_of_integers_is_no_codes() -> None:
    """State that is too small to be coded loads unchanged when its values are integers, also if it is a scalar."""
    for shape in ((), (1,), (7,), (64, 31)):
        param = nn.Parameter(torch.ones(shape))
        optimizer = GrokAdamW([param], state_dtype="int8", gradient_clipping=0.0)
        param.grad = torch.ones(shape)
        optimizer.step()
        for name in STATES:
            optimizer.state[param][name].fill_(3.0)
        resumed = GrokAdamW([nn.Parameter(torch.ones(shape))], state_dtype="int8", gradient_clipping=0.0)
        resumed.load_state_dict(optimizer.state_dict())
        assert same(resumed.state_dict()["state"], optimizer.state_dict()["state"])


def test_the_slow_gradient_is_dropped_with_its_scale() -> None:
    model, optimizer = started(FORMATS["int8"])
    train(model, optimizer, 0, 2)
    optimizer.free_slow_gradient()
    assert not any(key.startswith("grok_ema") for state in optimizer.state.values() for key in state)
    train(model, optimizer, 2, 3)
    assert optimizer.state[model.even]["grok_ema_scale"].shape == (64, 2)


@pytest.mark.parametrize("state_dtype", ["float32", "int8"])
def test_32_bits_are_the_float32_weights(state_dtype: str) -> None:
    """With the same gradients they equal the weights of a float32 model; exporting and loading them is exact."""
    model, optimizer = started({"master_weight_bits": 32, "state_dtype": state_dtype})
    wide = Model(torch.float32)
    wide.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    plain = GrokAdamW(wide.named_parameters(), lr=0.01, state_dtype=state_dtype)
    for step in range(5):
        torch.manual_seed(step)
        for narrow, param in zip(model.parameters(), wide.parameters(), strict=True):
            narrow.grad = torch.randn(param.shape).to(torch.bfloat16)
            param.grad = narrow.grad.float()
        optimizer.step()
        plain.step()
    found = full_precision_state_dict(model, optimizer)
    assert found.keys() == wide.state_dict().keys()
    for name, expected in wide.state_dict().items():
        assert torch.equal(found[name], expected), name
    other, resumed = started({"master_weight_bits": 32})
    load_full_precision_state_dict(other, resumed, found)
    assert all(torch.equal(x, found[name]) for name, x in full_precision_state_dict(other, resumed).items())
    assert all(torch.equal(x, y) for x, y in zip(other.parameters(), model.parameters(), strict=True))


def test_an_optimizer_without_the_models_low_bits_is_refused() -> None:
    """An AdamW that loaded a GrokAdamW's state holds stale low bits, so it is refused, too. A refusal loads nothing."""
    model, optimizer = started({"master_weight_bits": 32})
    train(model, optimizer, 0, 1)
    weights, before = Model(torch.float32).state_dict(), copy.deepcopy(model.state_dict())
    adamw = torch.optim.AdamW(model.named_parameters())
    adamw.load_state_dict(optimizer.state_dict())
    for other, error, message in (
        (adamw, TypeError, "optimizer is of type AdamW, and has no GrokAdamW in it: give the one that trains"),
        (None, TypeError, "optimizer is of type NoneType"),
        (GrokAdamW(model.parameters()), ValueError, r"master_weight_bits=None, .* construct it with .*=32 or 24"),
        (started({"master_weight_bits": 32})[1], ValueError, "optimizer has no parameter of this model: give"),
    ):
        with pytest.raises(error, match=message):
            full_precision_state_dict(model, other)  # type: ignore[arg-type]
        with pytest.raises(error, match=message):
            load_full_precision_state_dict(model, other, weights)  # type: ignore[arg-type]
        assert same(dict(model.state_dict()), dict(before))


def test_where_there_are_no_low_bits_to_keep_any_grokadamw_will_do() -> None:
    """A float32 model has no low bits to keep, nor has a frozen 16-bit model with trained float32 parts."""
    wide = Model(torch.float32)
    frozen = nn.ModuleList([Model(torch.bfloat16).requires_grad_(False), nn.Linear(2, 2)])
    for model, optimizer in (
        (wide, GrokAdamW(wide.parameters())),
        (wide, started({"master_weight_bits": 32})[1]),
        (frozen, GrokAdamW(frozen[1].parameters())),
    ):
        found = full_precision_state_dict(model, optimizer)
        assert same(found, dict(model.state_dict()))
        load_full_precision_state_dict(model, optimizer, found)


@pytest.mark.usefixtures("one_rank")
def test_wrapped_optimizers_keep_low_bits() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, optimizer = started({"master_weight_bits": 32})
    sharded = ZeroRedundancyOptimizer(model.parameters(), GrokAdamW, master_weight_bits=32)
    for wrapped in (Accumulate(optimizer, 1), sharded):
        train(model, wrapped, 0, 2)
        found = full_precision_state_dict(model, wrapped)
        assert any(not torch.equal(x, x.bfloat16().float()) for x in found.values())
        load_full_precision_state_dict(model, wrapped, Model(torch.float32).state_dict())
        assert same(full_precision_state_dict(model, wrapped), dict(Model(torch.float32).state_dict()))


def test_24_bits_come_out_to_their_precision() -> None:
    model, optimizer = started({"master_weight_bits": 24})
    weights = {name: torch.randn(x.shape) for name, x in model.state_dict().items()}
    weights["tied"] = weights["even"]
    load_full_precision_state_dict(model, optimizer, weights)
    for name, x in full_precision_state_dict(model, optimizer).items():
        assert ((x - weights[name]).abs() <= weights[name].abs() * 2.0**-16).all()
    with pytest.raises(TypeError, match="model is a dict"):
        full_precision_state_dict({}, optimizer)  # type: ignore[arg-type]


def test_weights_that_are_too_large_for_float16_are_not_loaded() -> None:
    model = nn.Linear(3, 2).half()
    optimizer = GrokAdamW(model.named_parameters(), master_weight_bits=32)
    before = copy.deepcopy(model.state_dict())
    weights = {"weight": torch.ones(2, 3), "bias": torch.tensor([65519.0, 65520.0])}
    with pytest.raises(ValueError, match=r"state_dict\['bias'\] has weights that are too large for float16"):
        load_full_precision_state_dict(model, optimizer, weights)
    assert same(dict(model.state_dict()), dict(before))
    weights["bias"] = torch.tensor([65519.0, -torch.inf])
    load_full_precision_state_dict(model, optimizer, weights)
    assert same(full_precision_state_dict(model, optimizer), weights)


@pytest.mark.parametrize("implementation", ["cpu", "gpu", "blocks", "foreach", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_model_that_is_no_longer_of_16_bits_has_no_low_bits(
    implementation: str, dtype: torch.dtype, half: torch.dtype
) -> None:
    """After a cast to float32 or float64 the weights are the rounded ones, which is said. No step adds low bits."""
    with running(implementation, chunk=4096) as how:
        model = nn.Sequential(nn.Linear(70, 64), nn.Linear(64, 3)).to(half)
        optimizer = GrokAdamW(model.named_parameters(), master_weight_bits=32, **how)

        def step(seed: int) -> None:
            torch.manual_seed(seed)
            for param in model.parameters():
                param.grad = torch.randn(param.shape).to(param.dtype)
            optimizer.step()

        for seed in range(2):
            step(seed)
        model.to(dtype)
        weights = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=f"model was cast to {dtype} .* before the cast"):
            full_precision_state_dict(model, optimizer)
        optimizer.param_groups[0]["lr"] = 0.0
        saved = saved_and_loaded(optimizer.state_dict())
        for seed in range(2, 4):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step(seed)
            assert ["low bits of master_weight_bits are dropped" in str(w.message) for w in caught] == [True] * (
                seed == 2
            )
            assert same(dict(model.state_dict()), dict(weights))
            assert same(full_precision_state_dict(model, optimizer), weights)
        assert not any("param_low" in state for state in optimizer.state.values())
        optimizer.param_groups[0]["lr"] = 0.01
        step(4)
        moved = [(param.detach() - weights[name]).abs() for name, param in model.named_parameters()]
        assert all(0 < way.max() < 0.1 for way in moved)
        model.to(half)
        step(5)
        assert all("param_low" in state for state in optimizer.state.values())
        model.to(dtype)
        with pytest.warns(UserWarning, match=f"which are {dtype} here: they are dropped"):
            GrokAdamW(model.named_parameters(), master_weight_bits=32, **how).load_state_dict(saved)


def test_loading_makes_no_copies_in_the_parameters_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's loader would cast int8 state to the parameter's dtype, and need four times the memory while it loads."""
    model, optimizer = started(FORMATS["int8"])
    train(model, optimizer, 0, 2)
    monkeypatch.setattr(torch.optim.Optimizer, "_process_value_according_to_param_policy", None)
    other = started(FORMATS["int8"])[1]
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


def test_what_full_weights_were_loaded_into_can_be_saved_before_a_step() -> None:
    model, optimizer = started(FORMATS["24 bits"])
    load_full_precision_state_dict(model, optimizer, Model(torch.float32).state_dict())
    other, resumed = started(FORMATS["24 bits"])
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    for pair in ((model, optimizer), (other, resumed)):
        train(*pair, 0, 2)
    expected, found = tensors(model, optimizer), tensors(other, resumed)
    assert all(torch.equal(found[key], x) for key, x in expected.items())


def test_full_weights_make_no_state_for_frozen_parameters() -> None:
    model, optimizer = started(FORMATS["24 bits"])
    frozen = next(param for param in model.parameters() if param.dim() > 1)
    frozen.requires_grad_(False)
    full = {name: x + 2**-12 for name, x in Model(torch.float32).state_dict().items()}
    expected = optimizer.memory()["total"]
    load_full_precision_state_dict(model, optimizer, full)
    assert frozen not in optimizer.state
    assert optimizer.memory()["total"] == expected
    name = next(name for name, param in model.named_parameters() if param is frozen)
    assert torch.equal(frozen, full[name].to(frozen.dtype))


def test_16_low_bits_are_rounded_to_the_nearest_8() -> None:
    low = torch.tensor([0, 0x7F, 0x80, 0x17F, -0x80, -0x81, 0x7FFF, -0x8000], dtype=torch.int16)
    assert formats.low_bits(low, torch.int8).tolist() == [0, 0, 1, 1, 0, -1, 127, -128]
    assert formats.low_bits(low.to(torch.int8), torch.int16).tolist()[-1] == 0


def test_names_are_those_of_the_models_state_dict() -> None:
    """A checkpoint wrapper adds its name to the parameters' names, and its hook removes it from the state dict's."""
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(3, 2)), nn.Linear(2, 1)).bfloat16()
    optimizer = GrokAdamW(model.named_parameters(), lr=1e-4, master_weight_bits=32)
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    saved = full_precision_state_dict(model, optimizer)
    assert saved.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert all(x.dtype == torch.float32 for x in saved.values())
    new = {name: x + 1e-4 for name, x in saved.items()}
    load_full_precision_state_dict(model, optimizer, new)
    assert same(full_precision_state_dict(model, optimizer), new)


def test_a_state_dict_of_other_tensors_has_no_low_bits() -> None:
    """The function refuses a state dict that holds other tensors than the parameters, as FSDP1's gathered one does."""
    model = nn.Linear(3, 2).bfloat16()
    optimizer = GrokAdamW(model.named_parameters(), master_weight_bits=32)
    model._register_state_dict_hook(lambda module, state, prefix, _: state.update(weight=state["weight"].clone()))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(ValueError, match="other tensors than the parameters of this Linear"):
        full_precision_state_dict(model, optimizer)


def test_before_the_first_step_the_weights_are_float32_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).bfloat16()
    model[1].requires_grad_(False)
    optimizer = GrokAdamW(model[0].named_parameters(), master_weight_bits=24)
    weights = full_precision_state_dict(model, optimizer)
    assert [x.dtype for x in weights.values()] == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert all(torch.equal(x.bfloat16(), model.state_dict()[name]) for name, x in weights.items())


@pytest.mark.filterwarnings("error")
def test_zeros_are_no_codes() -> None:
    p = nn.Parameter(torch.ones(64, 128))
    optimizer = GrokAdamW([p], state_dtype="int8", lamb=0.0)
    saved, zeros = optimizer.state_dict(), torch.zeros(64, 128)
    saved["state"] = {0: {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros}}
    optimizer.load_state_dict(saved)


def test_scales_mean_nothing_once_their_codes_were_replaced() -> None:
    p = nn.Parameter(torch.ones(64, 128))
    p.grad = torch.ones_like(p)
    optimizer = GrokAdamW([p], state_dtype="int8")
    optimizer.step()
    optimizer.state[p]["exp_avg"] = torch.full_like(p, 0.25)
    saved = copy.deepcopy(optimizer.state_dict())
    assert torch.equal(to_float32(saved)["state"][0]["exp_avg"], torch.full((64, 128), 0.25))


def test_weights_beyond_float16_load_into_bfloat16() -> None:
    model = nn.Linear(3, 2).bfloat16()
    optimizer = GrokAdamW(model.named_parameters(), master_weight_bits=32)
    weights = {"weight": torch.full((2, 3), 1e5), "bias": torch.tensor([-3e38, torch.inf])}
    load_full_precision_state_dict(model, optimizer, weights)
    assert same(full_precision_state_dict(model, optimizer), weights)


def test_names_that_are_missing_are_torchs_error() -> None:
    model = nn.Linear(3, 2).half()
    optimizer = GrokAdamW(model.named_parameters(), master_weight_bits=32)
    with pytest.raises(RuntimeError, match='Missing key.* "bias"'):
        load_full_precision_state_dict(model, optimizer, {"weight": torch.ones(2, 3)})


def test_each_of_two_optimizers_keeps_the_low_bits_of_its_part() -> None:
    """An optimizer may have a part of the model, or parameters of another model, too."""
    model, other = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).bfloat16(), nn.Linear(3, 3).bfloat16()
    optimizer = GrokAdamW([*model[0].parameters(), *other.parameters()], master_weight_bits=32)
    for param in (*model.parameters(), *other.parameters()):
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = full_precision_state_dict(other, optimizer)
    weights = {name: torch.randn(x.shape) for name, x in model.state_dict().items()}
    load_full_precision_state_dict(model, optimizer, weights)
    for name, x in full_precision_state_dict(model, optimizer).items():
        assert torch.equal(x, weights[name] if name.startswith("0.") else weights[name].bfloat16()), name
    assert same(full_precision_state_dict(other, optimizer), before)


@pytest.mark.parametrize("lamb", [0.0, 2.0])
def test_full_weights_make_the_state_that_a_step_makes(lamb: float) -> None:
    found = []
    for loads in (True, False):
        model = nn.Linear(3, 2).bfloat16()
        optimizer = GrokAdamW(model.named_parameters(), master_weight_bits=32, lamb=lamb)
        if loads:
            load_full_precision_state_dict(model, optimizer, nn.Linear(3, 2).state_dict())
        else:
            for param in model.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
        found.append({name: optimizer.state[param].keys() for name, param in model.named_parameters()})
    assert found[0] == found[1]
