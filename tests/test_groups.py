"""Tests of `decay_groups`, which chooses the parameters that decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from grokadamw import GrokAdamW, decay_groups

from .models import network


class Model(nn.Module):
    """A model with embeddings, a head that shares them, two-dimensional norms, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((3, 4))) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(4, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight


def names(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [[name for name, _ in group["params"]] for group in groups]


def test_biases_norms_and_embeddings_do_not_decay() -> None:
    groups = decay_groups(Model(), weight_decay=0.5)
    assert names(groups) == [
        ["scale", "blocks.0.0.weight", "blocks.1.0.weight"],
        [
            "embed.weight",
            *(f"blocks.{i}.{name}" for i in (0, 1) for name in ("0.bias", "1.weight", "1.bias")),
            "head.bias",
        ],
    ]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]


class ScaleNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 4, 1, 1))


def test_nor_do_norms_of_other_classes() -> None:
    assert names(decay_groups(nn.Sequential(nn.Linear(4, 4), ScaleNorm()))) == [["0.weight"], ["0.bias", "1.gain"]]


def test_layers_are_in_the_models_order() -> None:
    model = Model()
    optimizer = GrokAdamW(decay_groups(model))
    found = [(group["param_names"], list(group["layers"])) for group in optimizer.param_groups]
    optimizer.set_layers(model)
    assert found == [(group["param_names"], group["layers"]) for group in optimizer.param_groups]
    assert found[0][1] == [0, 1, 2]  # `scale`, which is in no submodule, and the blocks
    assert [layer.layer for layer in optimizer.layer_table()] == [0, 1, 2, 4]  # 3 is frozen


def test_another_rule() -> None:
    model = Model()
    groups = decay_groups(model, no_decay=lambda name, param: param.dim() < 2)
    assert "embed.weight" in names(groups)[0]
    (everything,) = decay_groups(model, no_decay=lambda name, param: False)
    assert len(everything["params"]) == sum(p.requires_grad for p in model.parameters())


def test_what_is_flat_decays() -> None:
    flat = nn.Module()
    flat.register_parameter("all", nn.Parameter(torch.ones(12)))
    (group,) = decay_groups(flat, weight_decay=0.5)
    assert group["weight_decay"] == 0.5


@pytest.mark.filterwarnings("ignore:.*is frozen")
def test_of_a_model_of_which_only_biases_are_trained_none_decays() -> None:
    model = nn.Sequential(network(), nn.LayerNorm(3, elementwise_affine=False))
    for name, param in model.named_parameters():
        param.requires_grad_(name.endswith("bias"))
    (group,) = decay_groups(model, weight_decay=0.5)
    assert group["weight_decay"] == 0.0
    assert [g["weight_decay"] for g in GrokAdamW.for_grokking(model).param_groups] == [0.0]


def test_optimizers_made_of_the_same_groups_share_no_lists() -> None:
    groups = decay_groups(network())
    one, other = GrokAdamW(groups), GrokAdamW(groups)
    one.param_groups[0]["layers"][0] = 7
    assert other.param_groups[0]["layers"][0] == 0


def test_torchs_optimizers_take_them() -> None:
    model, other = network(), network()
    one = GrokAdamW(decay_groups(model, 0.5), lamb=0, gamma=0, gradient_clipping=0)
    two = torch.optim.AdamW(decay_groups(other, 0.5))
    for net, optimizer in ((model, one), (other, two)):
        net(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model",), TypeError, "model is a str"),
        ((network(), -1.0), ValueError, "weight_decay=-1.0"),
        ((network(), "0.1"), TypeError, "weight_decay='0.1'"),
        ((network(), 0.1, ["bias"]), TypeError, r"no_decay=\['bias'\] cannot be called"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        decay_groups(*arguments)


def test_a_model_without_parameters_has_no_groups() -> None:
    assert decay_groups(nn.ReLU()) == []
