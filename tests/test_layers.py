"""Tests of layers, which come from names, the model, the group or the position."""

from __future__ import annotations

import copy
import gc
import linecache
import re
import warnings
import weakref
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from grokadamw import GrokAdamW, layers, step_in_backward
from grokadamw.layers import layer_path, unwrapped

from .models import network, parameters, same, saved_and_loaded, set_gradients, train
from .oracle import layer_numbers


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("layers.3.attn.q.weight", "layers.3"),
        ("encoder.layer.11.output.dense.bias", "encoder.layer.11"),
        ("h.3.ln_1.weight", "h.3"),
        ("module.layers.3.weight", "layers.3"),
        ("module.module.layers.3.weight", "layers.3"),
        ("_orig_mod.module.layers.3.weight", "layers.3"),
        ("module._orig_mod.layers.3.weight", "layers.3"),
        ("layers.3._fsdp_wrapped_module.attn._checkpoint_wrapped_module.q.weight", "layers.3"),
        ("experts.0.layers.7.weight", "experts.0"),
        ("embed.weight", "embed"),
        ("model.embed.tokens.weight", "model.embed.tokens"),
        ("fc1.weight", "fc1"),
        ("scale", ""),
        ("module.scale", ""),
        ("0.weight", "0"),
        ("residual.module.weight", "residual.module"),
        ("module.module", ""),
        ("module", ""),
        ("fc.parametrizations.weight.original0", "fc"),
        ("fc.bias", "fc"),
        ("layers.3.fc.parametrizations.weight.0.base", "layers.3"),
    ],
)
def test_layer_path(name: str, path: str) -> None:
    (plain,) = unwrapped([name])
    assert layer_path(plain) == path


components = ["a", "fc1", "0", "12", "layers", "module", "_orig_mod", "_fsdp_wrapped_module"]
of_models = st.lists(st.sampled_from(components), max_size=4).filter(
    lambda path: [part for part in path if part[0] != "_"][:1] != ["module"]
)


@given(st.lists(of_models, min_size=1, max_size=6, unique_by=tuple), st.integers(0, 2))
def test_numbering_is_by_first_appearance_over_all_groups(paths: list[list[str]], in_ddp: int) -> None:
    names = [".".join([*in_ddp * ["module"], *path, f"p{i}"]) for i, path in enumerate(paths)]
    params = [nn.Parameter(torch.zeros(1)) for _ in names]
    pairs = list(zip(names, params, strict=True))
    groups = [pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]]
    optimizer = GrokAdamW([{"params": group} for group in groups if group])
    ours = [layer for group in optimizer.param_groups for layer in group["layers"]]
    assert ours == [layer for group in layer_numbers([[n for n, _ in pairs]]) for layer in group]
    assert unwrapped(names)[0].split(".")[0] != "module"


class WithModule(nn.Module):
    """A model with a part that may be called `module`, as DDP calls what it wraps."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Sequential(OrderedDict(conv=nn.Linear(4, 4), fc=nn.Linear(4, 4))))
        self.fc = nn.Linear(4, 2)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_a_module_that_is_called_module_is_one(prefix: str) -> None:
    optimizers = []
    for name in ("module", "body"):
        weights, biases = [], []
        for full, p in WithModule(name).named_parameters():
            (weights if p.dim() > 1 else biases).append((prefix + full, p))
        optimizers.append(GrokAdamW([{"params": weights}, {"params": biases}]))
        for p in (p for _, p in (*weights, *biases)):
            p.grad = torch.ones_like(p)
        optimizers[-1].step()
        GrokAdamW([{"params": biases}, {"params": weights}]).load_state_dict(optimizers[-1].state_dict())
    ours, expected = ([group["layers"] for group in optimizer.param_groups] for optimizer in optimizers)
    assert ours == expected == [[0, 1, 2], [0, 1, 2]]
    model = WithModule("module")
    preset = GrokAdamW.for_grokking(model)
    assert [row.names[0] for row in preset.layer_table()] == ["module.conv.weight", "module.fc.weight", "fc.weight"]
    assert not list(layers.warnings_for(preset.param_groups, preset._run.names))


def test_what_has_no_module_takes_nothing_from_the_first_module() -> None:
    """Such a parameter comes first in `named_parameters()`. As a layer of its own it lowered β1 of all others."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    optimizer = GrokAdamW(model.named_parameters())
    assert [row.names for row in optimizer.layer_table()] == [["scale", "0.weight", "0.bias"], ["1.weight", "1.bias"]]
    one_by_one = GrokAdamW([{"params": [pair]} for pair in model.named_parameters()])
    one_by_one.add_param_group({"params": [("shift", nn.Parameter(torch.ones(())))]})
    assert [group["layers"] for group in one_by_one.param_groups] == [[0], [0], [0], [1], [1], [0]]


def test_unnamed_parameters_are_numbered_within_their_group() -> None:
    params = [nn.Parameter(torch.zeros(1)) for _ in range(5)]
    optimizer = GrokAdamW([{"params": params[:3]}, {"params": params[3:]}])
    assert [group["layers"] for group in optimizer.param_groups] == [[0, 1, 2], [0, 1]]
    assert optimizer.layer_table()[1].names == ["parameter 1 of group 0", "parameter 1 of group 1"]


def test_a_group_may_say_its_layer() -> None:
    a, b, c = (nn.Linear(1, 1) for _ in range(3))
    optimizer = GrokAdamW(
        [
            {"params": [(f"a.{n}", p) for n, p in a.named_parameters()], "layer": 7},
            {"params": [(f"b.{n}", p) for n, p in b.named_parameters()]},
            {"params": [(f"c.{n}", p) for n, p in c.named_parameters()]},
        ]
    )
    assert [group["layers"] for group in optimizer.param_groups] == [[7, 7], [0, 0], [1, 1]]
    optimizer.set_layers(nn.ModuleDict({"c": c, "b": b, "a": a}))
    assert [group["layers"] for group in optimizer.param_groups] == [[7, 7], [1, 1], [0, 0]]


def test_set_layers_takes_the_models_order_however_groups_are_split() -> None:
    model = network()
    decayed = [p for n, p in model.named_parameters() if n.endswith("weight")]
    others = [p for n, p in model.named_parameters() if n.endswith("bias")]
    optimizer = GrokAdamW([{"params": others}, {"params": decayed}])
    optimizer.set_layers(nn.DataParallel(model))
    assert [group["layers"] for group in optimizer.param_groups] == [[0, 1, 2], [0, 1, 2]]
    assert [row.beta1 for row in optimizer.layer_table()] == pytest.approx([0.9, 0.81, 0.729])

    assert optimizer.layer_table()[1].names == ["2.bias", "2.weight"]


def test_the_table_shows_the_smallest_beta1_of_a_layer() -> None:
    first, second = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = GrokAdamW([{"params": [first]}, {"params": [second], "betas": (0.5, 0.9)}])
    assert optimizer.layer_table() == [(0, ["parameter 0 of group 0", "parameter 0 of group 1"], 0.5)]


def test_parameters_beside_the_model_go_in_a_group_that_says_its_layer() -> None:
    model, beside = network(), nn.Parameter(torch.zeros(1))
    optimizer = GrokAdamW([{"params": list(model.parameters())}, {"params": [beside], "layer": 2}])
    optimizer.set_layers(model)
    assert optimizer.param_groups[1]["layers"] == [2]


@pytest.mark.parametrize("model", [None, {}, "model"])
def test_set_layers_wants_a_module(model: object) -> None:
    with pytest.raises(TypeError, match=f"model is a {type(model).__name__}, and not a torch.nn.Module"):
        GrokAdamW(network().parameters()).set_layers(model)  # type: ignore[arg-type]


def test_names_that_do_not_tell_layers_apart_are_warned_of() -> None:
    model = network()
    groups = [{"params": list(module.named_parameters())} for module in (model[0], model[2])]
    optimizer = GrokAdamW(groups)
    with pytest.warns(UserWarning, match=r"two parameters are called 'weight'.*set_layers"):
        train(model, range(1), lambda step, loss: optimizer.step())
    optimizer.set_layers(model)
    of_no_matter = GrokAdamW(groups, gamma=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, range(1), lambda step, loss: optimizer.step())
        train(model, range(1), lambda step, loss: of_no_matter.step())


def test_the_warning_comes_again_for_what_is_added_or_set() -> None:
    model = deep()
    optimizer = GrokAdamW(list(model.parameters())[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer, model)
    optimizer.add_param_group({"params": list(model.parameters())[2:], "gamma": 0.5})
    with pytest.warns(UserWarning, match=r"parameter group 1 .*at most 0\.\d+"):
        step(optimizer, model)


def test_the_warning_comes_for_a_group_that_an_outer_optimizer_appends() -> None:
    model = deep()
    optimizer = GrokAdamW(list(model.parameters())[:2])
    step(optimizer, model)
    optimizer.param_groups.append({"params": list(model.parameters())[2:], "gamma": 0.5})
    with pytest.warns(UserWarning, match=r"parameter group 1 .*at most 0\.\d+"):
        step(optimizer, model)


def test_a_group_that_an_outer_optimizer_appends_may_have_layers() -> None:
    """As the groups of `decay_groups` do."""
    model = deep()
    optimizer = GrokAdamW(list(model.parameters())[:2])
    group = {"params": list(model.parameters())[2:4], "layers": [7, 3]}
    optimizer.param_groups.append({**group})
    step(optimizer, model)
    assert optimizer.param_groups[1]["layers"] == [7, 3]
    optimizer.param_groups.append({**group, "layers": [7]})
    with pytest.raises(ValueError, match="layers"):
        step(optimizer, model)


@pytest.mark.parametrize("deepest", range(1, 60))
def test_the_way_out_is_one(deepest: int) -> None:
    pairs = [(f"l{i}.w", nn.Parameter(torch.ones(1))) for i in range(deepest + 1)]
    (sentence,) = layers.warnings_for(GrokAdamW(pairs, gamma=0.9).param_groups, {})
    named = float(re.search(r"gamma of at most ([\d.]+\d)", sentence).group(1))  # type: ignore[union-attr]
    for gamma in (named, 1 - 0.5 ** (1 / deepest)):  # the second is the README's formula
        assert not list(layers.warnings_for(GrokAdamW(pairs, gamma=gamma).param_groups, {}))
    assert list(layers.warnings_for(GrokAdamW(pairs, gamma=1.03 * named + 0.001).param_groups, {}))


def test_names_are_not_doubted_where_layers_do_not_come_from_them() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp = nn.Linear(2, 2), nn.Linear(2, 2)

    model = nn.Sequential(Block(), Block())
    modules = [model[0].attn, model[0].mlp, model[1].attn, model[1].mlp]
    optimizer = GrokAdamW([{"params": list(module.named_parameters())} for module in modules])
    assert "two parameters are called" in next(layers.warnings_for(optimizer.param_groups, {}))
    optimizer.set_layers(model)
    assert not list(layers.warnings_for(optimizer.param_groups, optimizer._run.names))
    groups = [{"params": list(module.named_parameters()), "layer": i} for i, module in enumerate(modules[:2])]
    assert not list(layers.warnings_for(GrokAdamW(groups).param_groups, {}))


def test_both_doubts_are_said() -> None:
    pairs = [(f"l{i % 20}.w", nn.Parameter(torch.ones(1))) for i in range(21)]
    optimizer = GrokAdamW([{"params": pairs[:20]}, {"params": pairs[20:]}])
    assert len(list(layers.warnings_for(optimizer.param_groups, {}))) == 2


def test_groups_that_say_their_layer_take_no_part_in_the_numbering() -> None:
    model = nn.Sequential()
    for name in ("embed", "fc1", "fc2"):
        model.add_module(name, nn.Linear(2, 2))
    named = list(model.named_parameters())
    optimizer = GrokAdamW([{"params": named[:2], "layer": 0}, {"params": named[2:]}])
    from_names = [group["layers"] for group in optimizer.param_groups]
    optimizer.set_layers(model)
    assert [group["layers"] for group in optimizer.param_groups] == from_names == [[0, 0], [0, 0, 1, 1]]


def test_a_layer_that_is_said_wins_over_layers_that_are_copied() -> None:
    optimizer = GrokAdamW([nn.Parameter(torch.zeros(1)) for _ in range(2)])
    new = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer.add_param_group({**optimizer.param_groups[0], "params": new, "layer": 5})
    assert optimizer.param_groups[1]["layers"] == [5, 5]


def test_the_warning_comes_for_layers_that_are_set_later() -> None:
    model = deep()
    optimizer = GrokAdamW([{"params": [p]} for p in model.parameters()], gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer, model)
    optimizer.set_layers(model)
    with pytest.warns(UserWarning, match="less than half") as caught:
        step(optimizer, model)
    assert "set_layers" not in str(caught[0].message)  # it was called already


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("change", ["more", "less"])
def test_set_layers_mends_a_list_of_parameters_that_was_changed(named: bool, change: str) -> None:
    model = network()
    optimizer = GrokAdamW(model.named_parameters() if named else model.parameters())
    set_gradients(list(model.parameters()))
    optimizer.step()
    params = optimizer.param_groups[0]["params"]
    if change == "less":
        optimizer.state.pop(params.pop(0))
    else:
        model.more = nn.Linear(2, 2)
        params.append(model.more.weight)
    with pytest.raises(RuntimeError, match="set_layers"):
        optimizer.step()
    optimizer.set_layers(model)
    optimizer.step()
    names = {p: name for name, p in model.named_parameters()}
    assert [name for row in optimizer.layer_table() for name in row.names] == [names[p] for p in params]
    optimizer.load_state_dict(optimizer.state_dict())


def test_names_keep_no_parameter_alive() -> None:
    model = network()
    optimizer = GrokAdamW(model.parameters())
    optimizer.set_layers(model)
    optimizer = copy.deepcopy(optimizer)
    old = weakref.ref(optimizer.param_groups[0]["params"][0])
    assert optimizer.layer_table()[0].names[0] == next(name for name, _ in model.named_parameters())
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(2))
    gc.collect()
    assert old() is None


def test_set_layers_refuses_another_model_and_changes_nothing() -> None:
    optimizer = GrokAdamW(network().named_parameters())
    before = copy.deepcopy(optimizer.param_groups[0]["layers"])
    with pytest.raises(ValueError, match=r"this Sequential has no 0\.weight"):
        optimizer.set_layers(network())
    assert optimizer.param_groups[0]["layers"] == before


def test_a_parameter_without_a_gradient_shifts_nobody() -> None:
    states = []
    for frozen in (False, True):
        model = network()
        model[0].requires_grad_(not frozen)
        optimizer = GrokAdamW(model.parameters())
        train(model, range(1), lambda step, loss, o=optimizer: o.step())
        states.append(optimizer.state[model[4].bias]["exp_avg"])
    assert torch.equal(*states)


def test_beta1_falls_from_layer_to_layer() -> None:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), gamma=0.5, lamb=0.0, gradient_clipping=0.0)
    with pytest.warns(UserWarning, match="β1"):
        train(model, range(1), lambda step, loss: optimizer.step())
    for layer, module in enumerate([model[0], model[2], model[4]]):
        beta1 = 0.9 * 0.5**layer
        torch.testing.assert_close(optimizer.state[module.weight]["exp_avg"], (1 - beta1) * module.weight.grad)
    assert (optimizer.metrics()["beta1_min"], optimizer.metrics()["beta1_max"]) == (0.225, 0.9)


def deep() -> nn.Module:
    return nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(3)))


def step(optimizer: GrokAdamW, model: nn.Module) -> None:
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_one_warning_where_beta1_has_fallen_far() -> None:
    model = deep()
    optimizer = GrokAdamW(model.parameters())
    with pytest.warns(
        UserWarning, match=r"named_parameters\(\).*set_layers\(model\).*gamma of at most 0\.06"
    ) as caught:
        step(optimizer, model)
    assert linecache.getline(caught[0].filename, caught[0].lineno) == "    optimizer.step()\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer, model)


def test_a_warning_points_past_schedulers_and_compilers() -> None:
    for wrapped in ("scheduler", "compiler"):
        model = deep()
        optimizer = GrokAdamW(model.parameters())
        if wrapped == "scheduler":
            torch.optim.lr_scheduler.StepLR(optimizer, 1)
        else:
            optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
        with pytest.warns(UserWarning, match="less than half of betas") as caught:
            step(optimizer, model)
        (ours,) = (warning for warning in caught if "less than half" in str(warning.message))  # the compiler warns, too
        assert linecache.getline(ours.filename, ours.lineno) == "    optimizer.step()\n"


@pytest.mark.parametrize("way_out", ["names", "set_layers", "gamma", "compat"])
def test_no_warning_with_a_way_out(way_out: str) -> None:
    model = deep()
    options = {"gamma": 0.01} if way_out == "gamma" else {"compat": "0.1.2"} if way_out == "compat" else {}
    params = model.named_parameters() if way_out == "names" else model.parameters()
    optimizer = GrokAdamW(params, **options)  # type: ignore[arg-type]
    if way_out == "set_layers":
        optimizer.set_layers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(optimizer, model)


def test_parameters_changed_by_hand_are_noticed() -> None:
    model = network()
    optimizer = GrokAdamW(model.parameters())
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(1)))
    with pytest.raises(RuntimeError, match=r"param_groups\[0\] has 7 parameters and 6 layers.*set_layers"):
        optimizer.step()
    optimizer.param_groups[0]["layers"] = [0] * 7
    optimizer.step()


def test_a_group_is_added_whole_although_another_lacks_layers() -> None:
    """The next step says what is wrong with the other group."""
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = GrokAdamW([("first.weight", p)])
    optimizer.param_groups[0]["layers"] = []
    optimizer.add_param_group({"params": [("second.weight", q)]})
    assert len(optimizer.param_groups[1]["layers"]) == 1
    with pytest.raises(RuntimeError, match=r"param_groups\[0\] has 1 parameters and 0 layers"):
        optimizer.step()


BAD = {
    "below 0": ([0, -1], ValueError, r"layers.*\[1\]=-1 is out of range: give an integer of at least 0"),
    "not whole": ([0.5, 1], TypeError, r"layers.*\[0\]=0.5 is not an integer"),
    "a text": (["a", 1], TypeError, r"layers.*\[0\]='a' is not an integer"),
    "a tensor": (torch.arange(2), TypeError, r"layers.*\[0\]=tensor\(0\) is not an integer"),
    "a number": (3, TypeError, "layers.*=3 is not a list of integers, one for each parameter"),
    "too few": (
        [0],
        (ValueError, RuntimeError),
        "has 1 layers, but its group has 2 |2 parameters and 1 layers",
    ),
    "too many": (
        np.arange(3),
        (ValueError, RuntimeError),
        "has 3 layers, but its group has 2 |2 parameters and 3 layers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_layers_that_are_given_are_checked(case: str) -> None:
    layers, kind, words = BAD[case]
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for of_group in (params, iter(params), list(zip("ab", params, strict=True))):
        with pytest.raises(kind, match=words):
            GrokAdamW([{"params": of_group, "layers": layers}])
    optimizer = GrokAdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(kind, match=words):
        optimizer.add_param_group({"params": params, "layers": layers})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("in_place", [False, True])
def test_layers_that_were_set_by_hand_are_checked_before_signals_are_heard(
    case: str, steps: int, in_place: bool
) -> None:
    layers, kind, words = BAD[case]
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    heard: list[int] = []
    optimizer = GrokAdamW(params, grokking_signal_fns=lambda: heard.append(1))
    set_gradients(params)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*returned None")
        for _ in range(steps):
            optimizer.step()
    before = [p.detach().clone() for p in params]
    if in_place and isinstance(layers, list):
        optimizer.param_groups[0]["layers"][:] = layers
    else:
        optimizer.param_groups[0]["layers"] = layers
    for _ in range(2):
        with pytest.raises(kind, match=words):
            optimizer.step()
    assert len(heard) == steps
    assert all(map(torch.equal, before, params))
    optimizer.param_groups[0]["layers"] = [0, 1]
    optimizer.zero_grad()
    handle = step_in_backward(optimizer, clip_by="last")
    optimizer.param_groups[0]["layers"] = layers
    with pytest.raises(kind, match=words):
        sum(p.sum() for p in params).backward()
    assert all(map(torch.equal, before, params))
    optimizer.param_groups[0]["layers"] = [0, 1]
    handle.remove()


def test_a_layer_that_is_set_by_hand_is_that_of_the_whole_group() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = GrokAdamW(params)
    for layer in (3, 0):
        optimizer.param_groups[0]["layer"] = layer
        set_gradients(params)
        optimizer.step()
        assert optimizer.param_groups[0]["layers"] == [layer, layer]


@pytest.mark.parametrize("layers", [np.array([1, 0]), (1, 0), [np.int64(1), 0]])
def test_layers_that_were_given_can_be_saved(layers: Any) -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = GrokAdamW([{"params": params, "layers": layers}])
    assert saved_and_loaded(optimizer.state_dict())["param_groups"][0]["layers"] == [1, 0]
    set_gradients(params)
    for _ in range(2):
        optimizer.param_groups[0]["layers"] = layers
        optimizer.step()
        assert saved_and_loaded(optimizer.state_dict())["param_groups"][0]["layers"] == [1, 0]


def test_layers_may_be_changed_in_place() -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = GrokAdamW(params, gamma=0.5)
    set_gradients(params)
    optimizer.step()
    optimizer.param_groups[0]["layers"][1] = 3
    optimizer.step()
    assert optimizer.metrics()["beta1_min"] == pytest.approx(0.9 / 8)


def test_a_group_taken_from_another_optimizer_keeps_its_layers() -> None:
    model = network()
    first = GrokAdamW(model.parameters())
    first.set_layers(model)
    assert GrokAdamW(first.param_groups).param_groups[0]["layers"] == [0, 0, 1, 1, 2, 2]


def test_an_optimizer_of_another_ones_groups_counts_its_own_skipped_steps() -> None:
    p = nn.Parameter(torch.ones(2))
    first = GrokAdamW([p])
    p.grad = torch.full((2,), torch.nan)
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        first.step()
    second = GrokAdamW(first.param_groups)
    assert second.metrics()["skipped_steps"] == 0
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        second.step()
    assert second.metrics()["skipped_steps"] == 1


def test_names_may_be_none_as_in_torch() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = GrokAdamW([{"params": [p], "param_names": None}])
    saved = torch.optim.AdamW([q]).state_dict()
    saved["param_groups"][0]["param_names"] = None
    for loading in (optimizer, GrokAdamW([("weight", p)])):
        loading.load_state_dict(saved)
        p.grad = torch.ones(2)
        loading.step()


def _flattened(**options: Any) -> GrokAdamW:
    """Return an optimizer whose parameters were replaced by one vector after its construction, as DeepSpeed does."""
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), **options)
    flat = torch.cat([p.detach().view(-1) for p in model.parameters()]).requires_grad_()
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    return optimizer


def test_a_flat_tensor_is_one_layer_and_says_so_once() -> None:
    optimizer = _flattened(max_row_norm=1.0)
    said = (
        "one flat tensor instead of its parameters, as DeepSpeed makes it: gamma=0.1 finds no layers in it, and treats "
        "all of it as layer 0; max_row_norm=1 finds no rows in it. Give gamma=0; max_row_norm=0"
    )
    with pytest.warns(UserWarning, match=re.escape(said)):
        optimizer.step()
    assert optimizer.param_groups[0]["layers"] == [0]
    assert "param_names" not in optimizer.param_groups[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        quiet = _flattened(gamma=0.0)
        quiet.load_state_dict(optimizer.state_dict())  # before its first step
        quiet.step()
        at_once = GrokAdamW([{"params": [torch.zeros(2, 2), torch.zeros(2)], "layer": 3}])
        at_once.param_groups[0]["params"] = [torch.zeros(6)]
        assert [row.layer for row in at_once.layer_table()] == [3]
    (flat,), (same,) = (x.param_groups[0]["params"] for x in (optimizer, quiet))
    assert quiet.state[same]["step"] == optimizer.state[flat]["step"] + 1


@pytest.mark.parametrize("named_by", ["for_grokking", "set_layers"])
def test_named_parameters_can_be_swapped(named_by: str) -> None:
    """torch swaps tensors to move an FSDP2 model, and refuses to swap one that has a weak reference."""
    model = network()
    if named_by == "for_grokking":
        optimizer = GrokAdamW.for_grokking(model)
    else:
        optimizer = GrokAdamW(model.parameters())
        optimizer.set_layers(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    names = [name for row in optimizer.layer_table() for name in row.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_a_group_has_a_list_of_layers_of_its_own() -> None:
    own = [3, 4]
    optimizer = GrokAdamW([{"params": parameters(), "layers": own}])
    own[0] = 7
    assert optimizer.param_groups[0]["layers"] == [3, 4]


def test_layers_changed_in_place_are_those_of_the_next_step() -> None:
    found = []
    for in_place in (False, True):
        params = parameters()
        optimizer = GrokAdamW([{"params": params, "layers": [0, 1]}], lr=0.1)
        for step in range(3):
            set_gradients(params, seed=step)
            if step == 2 and in_place:
                optimizer.param_groups[0]["layers"][0] = 5
            elif step == 2:
                optimizer.param_groups[0]["layers"] = [5, 1]
            optimizer.step()
        found.append(params)
    assert same(*found)


def test_saved_layers_that_are_too_few_leave_those_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = GrokAdamW(model.parameters())
    optimizer.set_layers(model)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["layers"] = [0]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["layers"] == [0, 0, 1, 1]
