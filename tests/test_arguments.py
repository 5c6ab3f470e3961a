"""Wrong arguments are refused by the constructor, in a group, and at the next step."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from grokadamw import GrokAdamW
from grokadamw.options import STATES
from grokadamw.signals import AccuracyGap

from .models import parameters, same, saved_and_loaded, set_gradients, trained

BY_HAND = [
    ({"nonfinite": "raise"}, ValueError, "nonfinite='raise' in a parameter group: it holds for the whole optimizer"),
    ({"second_moment": "raw"}, ValueError, "second_moment='raw'"),
    ({"compat": "0.1.2"}, ValueError, "compat='0.1.2'"),
    ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True`"),
    ({"betas": (1.5, 0.9)}, ValueError, r"betas\[0\]=1\.5"),
    ({"betas": (0.9,)}, TypeError, "betas="),
    ({"gamma": 2}, ValueError, "gamma=2"),
    ({"lamb": -1}, ValueError, "lamb=-1"),
    ({"lr": None}, TypeError, "lr=None"),
    ({"lr": -1e-6}, ValueError, "lr=-1e-06"),
    ({"lr": torch.zeros(2)}, ValueError, "Tensor lr must be 1-element"),
    ({"gradient_clipping": None}, TypeError, "gradient_clipping=None is not a number; 0 switches it off"),
]


@pytest.mark.parametrize(("change", "error", "message"), BY_HAND)
@pytest.mark.parametrize("at_first", [True, False])
def test_what_is_set_wrong_by_hand_is_refused_before_the_step(
    change: dict[str, Any], error: type[Exception], message: str, at_first: bool
) -> None:
    heard = []
    params = parameters()
    optimizer = GrokAdamW([{"params": params[:1]}, {"params": params[1:]}], grokking_signal_fns=lambda: heard.append(1))
    set_gradients(params)
    if not at_first:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
    before, count = copy.deepcopy(optimizer.state_dict()["state"]), len(heard)
    kept = [p.detach().clone() for p in params]
    was = {name: optimizer.param_groups[1][name] for name in change}
    optimizer.param_groups[1].update(change)
    for _ in range(2):
        with pytest.raises(error, match=message) as caught:
            optimizer.step()
        assert str(caught.value).startswith("in param_groups[1]: ")
    assert same(optimizer.state_dict()["state"], before)
    assert all(torch.equal(p, old) for p, old in zip(params, kept, strict=True))
    assert len(heard) == count
    optimizer.param_groups[1].update(was)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    assert len(heard) == count + 1


@pytest.mark.parametrize("scheduler", ["linear", "numpy"])
def test_what_schedulers_leave_is_taken(scheduler: str) -> None:
    """Rounding may leave a learning rate below 0; NumPy's numbers become Python's, as torch.load refuses others."""
    params = parameters()
    optimizer = GrokAdamW(params)
    if scheduler == "linear":
        schedule: Any = torch.optim.lr_scheduler.LinearLR(optimizer, 0.3, 0.0, 3)
    else:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.interp(epoch, [0, 10], [0, 1]))
    for step in range(5):
        set_gradients(params, step)
        optimizer.step()
        schedule.step()
    assert scheduler == "numpy" or optimizer.param_groups[0]["lr"] < 0
    saved = saved_and_loaded(optimizer.state_dict())
    assert type(saved["param_groups"][0]["lr"]) is float
    optimizer.load_state_dict(saved)


def test_a_list_that_is_changed_in_place_and_an_array_are_looked_at() -> None:
    optimizer = GrokAdamW(parameters())
    optimizer.param_groups[0]["betas"] = [0.9, 0.99]
    optimizer.step()
    optimizer.param_groups[0]["betas"][0] = 3.0
    with pytest.raises(ValueError, match=r"betas\[0\]=3\.0"):
        optimizer.step()
    optimizer.param_groups[0]["betas"] = np.array([0.9, 0.99])
    with pytest.raises(TypeError, match="betas=array"):
        optimizer.step()
    optimizer.param_groups[0].update(betas=(0.9, 0.99), combine="max")
    with pytest.raises(ValueError, match="combine='max'"):
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 10**400),
        ("lr", torch.tensor(1j)),
        *(("lr", torch.tensor(wrong)) for wrong in (float("nan"), -0.1)),
        *(("alpha_init", torch.tensor(wrong)) for wrong in (float("nan"), 1.5)),
    ],
)
def test_wrong_numbers_set_by_hand_are_refused_as_the_constructor_refuses_them(name: str, value: Any) -> None:
    params = parameters()
    optimizer = GrokAdamW(params)
    set_gradients(params)
    optimizer.step()
    optimizer.param_groups[0][name] = value
    with pytest.raises((TypeError, ValueError), match=rf"in param_groups\[0\]: {name}"):
        optimizer.step()


def test_groups_of_adamws_are_taken_over() -> None:
    params = parameters()
    adamw = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.5}], lr=0.25)
    optimizer = GrokAdamW(adamw.param_groups)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.25, 0.01), (0.25, 0.5)]
    assert not {"amsgrad", "decoupled_weight_decay"} & optimizer.param_groups[0].keys()
    set_gradients(params)
    optimizer.step()
    other = GrokAdamW(adamw.param_groups)
    other.load_state_dict(optimizer.state_dict())
    assert "grok_ema" in other.state[params[0]]
    with pytest.raises(ValueError, match="amsgrad=True"):
        GrokAdamW([{"params": params, "amsgrad": True}])


def test_a_tensor_that_is_set_by_hand_is_not_read() -> None:
    """The tensor may be on a GPU, where reading it makes the host wait."""
    p = nn.Parameter(torch.empty(2, device="meta"))
    p.grad = torch.empty_like(p)
    optimizer = GrokAdamW([p])
    optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    optimizer.param_groups[0]["alpha_init"] = torch.tensor(0.9, device="meta")
    optimizer.step()


def test_options_of_the_whole_optimizer_stay_as_constructed() -> None:
    _, optimizer = trained(nonfinite="propagate", second_moment="raw")
    _, other = trained()
    with pytest.warns(UserWarning, match="run with second_moment='raw', and this optimizer keeps .*'filtered'"):
        other.load_state_dict(optimizer.state_dict())
    assert (other.param_groups[0]["nonfinite"], other.param_groups[0]["second_moment"]) == ("skip", "filtered")


# bad arguments


BAD = [
    ({"lr": -1.0}, ValueError, r"lr=-1\.0"),
    ({"lr": float("nan")}, ValueError, "lr=nan"),
    ({"lr": "0.1"}, TypeError, "lr='0.1'"),
    ({"lr": True}, TypeError, "lr=True"),
    ({"lr": torch.zeros(2)}, ValueError, "Tensor lr must be 1-element"),
    ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\]=1\.0"),
    ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\]=-0\.1"),
    ({"betas": 0.9}, TypeError, r"betas=0\.9"),
    ({"betas": (0.9,)}, TypeError, r"betas=\(0\.9,\)"),
    ({"betas": ("a", 0.9)}, TypeError, r"betas\[0\]='a'"),
    ({"eps": -1e-8}, ValueError, "eps=-1e-08"),
    ({"weight_decay": -0.1}, ValueError, r"weight_decay=-0\.1"),
    ({"alpha_init": 1.1}, ValueError, r"alpha_init=1\.1"),
    ({"alpha_init": -0.1}, ValueError, r"alpha_init=-0\.1"),
    ({"lamb": -1.0}, ValueError, r"lamb=-1\.0"),
    ({"lamb": float("inf")}, ValueError, "lamb=inf"),
    ({"lr": 10**400}, ValueError, "lr is an integer beyond the range of floats"),
    ({"gamma": -0.1}, ValueError, r"gamma=-0\.1"),
    ({"gamma": 1.0}, ValueError, r"gamma=1\.0"),
    ({"grokking_signal_decay_rate": -0.1}, ValueError, r"grokking_signal_decay_rate=-0\.1"),
    ({"gradient_clipping": -1.0}, ValueError, r"gradient_clipping=-1\.0"),
    ({"gradient_clipping": None}, TypeError, "gradient_clipping=None is not a number; 0 switches it off"),
    ({"amplify_after": -1}, ValueError, "amplify_after=-1"),
    ({"amplify_after": 1.5}, TypeError, r"amplify_after=1\.5"),
    ({"maximize": 1}, ValueError, "maximize=1"),
    ({"combine": "median"}, ValueError, "combine='median'"),
    ({"combine": 3}, ValueError, "combine=3"),
    ({"combine": ["mean"]}, ValueError, r"combine=\['mean'\] is unknown"),
    ({"combine": np.zeros(2)}, ValueError, "combine=array"),
    ({"amplify_by_signal": torch.zeros(2)}, ValueError, "amplify_by_signal=tensor"),
    ({"window_size": 3, "window_dtype": np.zeros(2)}, ValueError, "window_dtype=array"),
    ({"grokking_signal_fns": torch.tensor(0.5)}, TypeError, "grokking_signal_fns=tensor"),
    ({"grokking_signal_fns": np.array(0.5)}, TypeError, "grokking_signal_fns=array"),
    ({"lr": torch.tensor(1j)}, TypeError, "lr=tensor.* is complex"),
    ({"second_moment": "both"}, ValueError, "second_moment='both'"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite='ignore'"),
    ({"compat": "0.1.2", "nonfinite": "raise"}, ValueError, r"nonfinite='raise' with compat='0\.1\.2'"),
    ({"lr": torch.tensor(-1.0)}, ValueError, r"lr=-1\.0"),
    ({"grokking_signal_fns": AccuracyGap}, TypeError, "AccuracyGap"),
    ({"compat": "0.1.1"}, ValueError, r"compat='0\.1\.1'"),
    ({"foreach": "yes"}, ValueError, "foreach='yes'"),
    ({"foreach": 1}, ValueError, "foreach=1"),
    ({"differentiable": None}, ValueError, "differentiable=None"),
    ({"foreach": True, "differentiable": True}, ValueError, "foreach=True with differentiable=True"),
    ({"foreach": True, "lr": torch.tensor(0.1)}, ValueError, "lr as a Tensor is not supported"),
    ({"fused": 1}, ValueError, "fused=1"),
    ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together."),
    ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
    ({"capturable": None}, ValueError, "capturable=None"),
    ({"alpha_init": torch.zeros(2)}, ValueError, "Tensor alpha_init must be 1-element"),
    ({"alpha_init": torch.tensor(1.5)}, ValueError, r"alpha_init=1\.5"),
    ({"grokking_signal_fns": 3}, TypeError, "grokking_signal_fns=3"),
    ({"grokking_signal_fns": "loss_gap"}, TypeError, "grokking_signal_fns='loss_gap' is neither"),
    ({"grokking_signal_fns": {}}, TypeError, "grokking_signal_fns={} is neither"),
    ({"grokking_signal_fns": [3]}, TypeError, "grokking_signal_fns holds 3"),
    ({"grokking_signal_fns": lambda a, b, c: 0.0}, TypeError, r"<lambda>, which requires \(a, b, c\)"),
    ({"grokking_signal_fns": lambda a: 0.0}, TypeError, r"<lambda>, which requires \(a\)"),
    ({"grokking_signal_fns": lambda *, a, b: 0.0}, TypeError, r"<lambda>, which requires \(a, b\)"),
    ({"grokking_signal_fns": [], "grokking_signal_fn": []}, ValueError, "grokking_signal_fns and its alias"),
    ({"state_dtype": "int4"}, ValueError, "state_dtype='int4' is not a format"),
    ({"state_dtype": {"exp_avg": 8}}, ValueError, r"state_dtype\['exp_avg'\]=8 is not a format"),
    (
        {"state_dtype": {"grok_ema": {"exp_avg": "int8"}}},
        ValueError,
        r"state_dtype\['grok_ema'\]={'exp_avg': 'int8'} is no",
    ),
    ({"state_dtype": {"step": "int8"}}, ValueError, "state_dtype=.* names 'step'"),
    (
        {"state_dtype": "int8", "window_size": 2},
        ValueError,
        "state_dtype='int8' with window_size=2, whose memory window_dtype controls",
    ),
    ({"state_dtype": "int8", "compat": "0.1.2"}, ValueError, "state_dtype='int8' with compat='0.1.2'"),
    ({"state_dtype": "int8", "differentiable": True}, ValueError, "state_dtype='int8' with differentiable=True"),
    *(
        ({name: value, **other}, ValueError, f"{name}={value!r} with {next(iter(other))}=")
        for name, value in (("master_weight_bits", 24), ("rounding", "stochastic"))
        for other in ({"compat": "0.1.2"}, {"differentiable": True})
    ),
    ({"window_size": 3, "differentiable": True}, ValueError, "window_size=3 with differentiable=True"),
    ({"decay_boost": -1.0}, ValueError, "decay_boost=-1.0"),
    ({"decay_boost": 1.0, "compat": "0.1.2"}, ValueError, r"decay_boost=1\.0 with compat='0\.1\.2', which lacks"),
    ({"signal_boost": 1.0, "compat": "0.1.2"}, ValueError, r"signal_boost=1\.0 with compat='0\.1\.2', which lacks"),
    ({"master_weight_bits": 16}, ValueError, "master_weight_bits=16 is unknown"),
    ({"rounding": "up"}, ValueError, "rounding='up' is unknown"),
    ({"rounding": "stochastic", "master_weight_bits": 24}, ValueError, "rounding='stochastic' with master_weight_bits"),
]
BAD_IN_A_GROUP = [
    ({"second_moment": "raw"}, ValueError, "second_moment='raw'"),
    ({"nonfinite": "raise"}, ValueError, "nonfinite='raise'"),
    ({"compat": "0.1.2"}, ValueError, r"compat='0\.1\.2'"),
    ({"foreach": "no"}, ValueError, "foreach='no'"),
    ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True`"),
    ({"differentiable": True}, ValueError, "differentiable=True"),
    ({"combine": "max"}, ValueError, "combine='max'"),
    ({"grokking_signal_fns": [len]}, ValueError, "grokking_signal_fns="),
    ({"layer": -1}, ValueError, "layer=-1"),
    ({"layer": "head"}, TypeError, "layer='head'"),
    ({"lr": -1.0}, ValueError, r"lr=-1\.0"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]=1\.0"),
    ({"gamma": 2.0}, ValueError, r"gamma=2\.0"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_a_bad_argument_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GrokAdamW(parameters(), **options)


@pytest.mark.parametrize("given", [torch.bfloat16, {"exp_avg": torch.bfloat16}])
def test_a_group_may_repeat_what_the_whole_optimizer_has(given: Any) -> None:
    (group,) = GrokAdamW([{"params": parameters(), "state_dtype": given}], state_dtype=given).param_groups
    assert group["state_dtype"] == ("bfloat16" if given is torch.bfloat16 else {"exp_avg": "bfloat16"})


@pytest.mark.parametrize("value", ["int8", dict.fromkeys(STATES, torch.int8)], ids=["alone", "in a dict"])
def test_one_format_for_all_states_may_be_spelt_out(value: Any) -> None:
    optimizer = GrokAdamW([{"params": parameters(), "state_dtype": "int8"}], state_dtype=value)
    assert optimizer.param_groups[0]["state_dtype"] == optimizer.defaults["state_dtype"] == "int8"


@pytest.mark.parametrize(("options", "error", "message"), BAD_IN_A_GROUP)
def test_a_bad_group_is_refused_before_it_is_added(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    first, second = parameters()
    with pytest.raises(error, match=message):
        GrokAdamW([{"params": [first], **options}])
    optimizer = GrokAdamW([first])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [second], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "loss",
    [
        *("0.3", [1.0], 1j, pytest.param(10**400, id="1e400"), pytest.param(10**5000, id="1e5000")),
        *(torch.zeros(2), torch.tensor(1j), torch.zeros((), dtype=torch.complex64, device="meta")),
        *(np.zeros(2), np.zeros(0), np.zeros((1, 2)), np.array([1j]), np.complex64(1), np.array(["0.3"])),
    ],
)
@pytest.mark.parametrize("name", ["eval_loss", "eval_acc"])
def test_a_bad_loss_is_refused_before_it_is_kept(loss: Any, name: str) -> None:
    optimizer = GrokAdamW(parameters())
    with pytest.raises((TypeError, ValueError), match=rf"^{name}(=| is )"):
        optimizer.record(train_loss=1.0, **{name: loss})
    assert optimizer.param_groups[0]["train_loss"] is None


@pytest.mark.parametrize("loss", [np.array(0.5), np.array([0.5]), np.array([[0.5]], np.float32), np.float16(0.5)])
def test_a_numpy_array_of_one_element_is_a_number(loss: Any) -> None:
    optimizer = GrokAdamW(parameters())
    optimizer.record(train_loss=loss, eval_acc=loss)
    (group,) = optimizer.param_groups
    assert [(group[name], type(group[name])) for name in ("train_loss", "eval_acc")] == [(0.5, float)] * 2


@pytest.mark.parametrize("name", ["train_acc", "eval_acc"])
@pytest.mark.parametrize(
    ("accuracy", "error", "message"),
    [
        ("0.3", TypeError, "'0.3' is not one number"),
        (torch.zeros(2), TypeError, "is a tensor of shape"),
        (95.0, ValueError, r"=95\.0 is not an accuracy: give a fraction of correct answers, in \[0, 1\]"),
        (-0.01, ValueError, r"=-0\.01 is not an accuracy"),
        (torch.tensor(1.5), ValueError, r"=tensor\(1\.5.* is not an accuracy"),
        (float("nan"), ValueError, "=nan is not an accuracy"),
        (float("inf"), ValueError, "=inf is not an accuracy"),
    ],
)
def test_a_bad_accuracy_is_refused_before_anything_is_kept(
    name: str, accuracy: Any, error: type[Exception], message: str
) -> None:
    optimizer = GrokAdamW(parameters())
    optimizer.record(**{name: 0.5})
    with pytest.raises(error, match=f"{name}.*{message}"):
        optimizer.record(**{"train_loss": 1.0, "train_acc": 0.25, "eval_acc": 0.75, name: accuracy})
    group = optimizer.param_groups[0]
    assert group["train_loss"] is None
    assert {key: group[key] for key in ("train_acc", "eval_acc")} == {"train_acc": None, "eval_acc": None, name: 0.5}


@pytest.mark.parametrize("accuracy", [0, 1, True, 0.25, np.float32(0.5), torch.tensor([[0.75]]), 1 + 1e-7, -1e-9])
def test_an_accuracy_is_a_share_to_rounding(accuracy: Any) -> None:
    optimizer = GrokAdamW([{"params": [p]} for p in parameters()])
    optimizer.record(train_acc=accuracy, eval_acc=accuracy)
    for group in optimizer.param_groups:
        for name in ("train_acc", "eval_acc"):
            assert type(group[name]) is float
            assert group[name] == pytest.approx(float(accuracy), abs=1e-6)
            assert 0 <= group[name] <= 1


def test_numpys_numbers_are_numbers() -> None:
    ours, expected = parameters(), parameters()
    for params, kind in ((ours, np.float32), (expected, float)):
        set_gradients(params)
        numbers = {"lr": kind(0.5), "eps": kind(0.25), "weight_decay": kind(0.5), "lamb": kind(2), "gamma": kind(0.25)}
        optimizer = GrokAdamW(params, betas=(kind(0.5), kind(0.75)), **numbers)
        optimizer.record(train_loss=kind(0.5), eval_loss=kind(0.75))
        optimizer.step()
        assert type(optimizer.param_groups[0]["train_loss"]) is float
        optimizer.add_param_group({"params": parameters(1), "layer": np.int64(3), "amplify_after": np.int64(3)})
        saved_and_loaded(optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("pair", [tuple, list])
def test_numpys_numbers_keep_their_kind_when_saved(pair: type) -> None:
    params = parameters()
    optimizer = GrokAdamW(params)
    optimizer.param_groups[0].update(amplify_after=np.int64(3), layer=np.int64(2), lr=np.float64(0.5))
    optimizer.param_groups[0]["betas"] = pair([np.float64(0.5), 0.75])  # as OneCycleLR may set it
    (group,) = saved_and_loaded(optimizer.state_dict())["param_groups"]
    assert [(group[name], type(group[name])) for name in ("amplify_after", "layer", "lr", "betas")] == [
        (3, int),
        (2, int),
        (0.5, float),
        (pair([0.5, 0.75]), pair),
    ]
    set_gradients(params)
    optimizer.step()


@pytest.mark.parametrize("foreach", [None, True, False])
def test_amplification_may_wait_for_ever(foreach: bool | None) -> None:
    """An integer beyond 64 bits, which no kernel can hold, is not reached either."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p], amplify_after=10**30, lr=0.1, foreach=foreach)
    without = torch.nn.Parameter(torch.ones(3))
    plain = GrokAdamW([without], lamb=0.0, lr=0.1, foreach=foreach)
    for _ in range(2):
        p.grad, without.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        plain.step()
    assert torch.equal(p, without)


@pytest.mark.parametrize("name", ["lr", "alpha_init"])
def test_a_tensor_of_no_element_is_refused_as_one_of_two(name: str) -> None:
    for size in (0, 2):
        with pytest.raises(ValueError, match=f"Tensor {name} must be 1-element"):
            GrokAdamW(parameters(), **{name: torch.zeros(size)})


def test_a_learning_rate_that_is_set_by_hand_may_be_a_tensor_with_foreach() -> None:
    """As in torch, which refuses the two together only in the constructor."""
    params = parameters()
    optimizer = GrokAdamW(params, foreach=True)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    set_gradients(params)
    optimizer.step()
    assert optimizer.stepped


def test_a_parameter_in_two_groups_gets_no_hint_about_names() -> None:
    params = parameters()
    optimizer = GrokAdamW(params)
    with pytest.raises(ValueError, match="more than one parameter group$"):
        optimizer.add_param_group({"params": params})
