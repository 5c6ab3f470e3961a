"""`GrokAdamW.for_grokking`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from grokadamw import GrokAdamW

from .models import network, set_gradients


@pytest.mark.filterwarnings("error")
def test_the_preset_takes_a_model_and_what_is_given_wins() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), *(nn.Linear(4, 4) for _ in range(5)), nn.LayerNorm(4, bias=False))
    model[1].weight.requires_grad_(False)
    optimizer = GrokAdamW.for_grokking(model, lr=0.01, lamb=0.5)
    weights, embeddings, norms, biases = optimizer.param_groups
    assert weights["param_names"] == [f"{i}.weight" for i in (2, 3, 4, 5)]
    assert embeddings["param_names"] == ["0.weight"]
    assert norms["param_names"] == ["6.weight"]
    assert biases["param_names"] == [f"{i}.bias" for i in (1, 2, 3, 4, 5)]
    for group in optimizer.param_groups:
        assert (group["lr"], group["lamb"], group["max_row_change"]) == (0.01, 0.5, 0.015)
        assert (group["betas"], group["alpha_init"], group["gamma"]) == ((0.9, 0.98), 0.8, 0.6)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [3, 3, 1, 0]
    assert [group["max_row_norm"] for group in optimizer.param_groups] == [0, 1, 0, 0]
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(9)
    set_gradients(list(model.parameters()))
    optimizer.step()  # whose low β1 is meant, and not warned of
    assert optimizer.layer_table()[-1].beta1 == pytest.approx(0.9 * 0.4**6)
    assert model[0].weight.norm(dim=1).max() < 1.0001
    assert model[2].weight.norm(dim=1).min() > 1.0001
    given = GrokAdamW.for_grokking(model, max_row_norm=0.25)
    assert {group["max_row_norm"] for group in given.param_groups} == {0.25}


def test_the_preset_limits_how_rows_move_where_there_are_norms() -> None:
    class MyRMSNorm(nn.Module):
        pass

    for norm in (nn.LayerNorm(4), nn.BatchNorm1d(4), MyRMSNorm()):
        optimizer = GrokAdamW.for_grokking(nn.Sequential(nn.Linear(4, 4), norm))
        assert {group["max_row_change"] for group in optimizer.param_groups} == {0.015}

    class Normal(nn.Module):
        pass

    for other in (nn.ReLU(), Normal()):
        optimizer = GrokAdamW.for_grokking(nn.Sequential(nn.Linear(4, 4), other))
        assert {group["max_row_change"] for group in optimizer.param_groups} == {0.0}
    optimizer = GrokAdamW.for_grokking(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), max_row_change=0.5)
    assert {group["max_row_change"] for group in optimizer.param_groups} == {0.5}


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
    for model in (only_matrices, only_vectors):  # what FSDP1 flattened is a vector, too
        (group,) = GrokAdamW.for_grokking(model, weight_decay=2.0).param_groups
        assert group["weight_decay"] == 2
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.ReLU())  # without norms biases decay
    optimizer = GrokAdamW.for_grokking(model, lr=torch.tensor(0.1))
    assert [group["param_names"] for group in optimizer.param_groups] == [["1.weight", "1.bias"], ["0.weight"]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [3, 3]
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 2.0):
        scheduler.step(loss)
    assert [group["lr"].item() for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])


def test_the_preset_warns_of_a_gamma_that_was_given() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    optimizer = GrokAdamW.for_grokking(model, gamma=0.4)
    set_gradients(list(model.parameters()))
    with pytest.warns(UserWarning, match="layer"):
        optimizer.step()


def test_the_preset_needs_a_model_and_numbers() -> None:
    with pytest.raises(TypeError, match="weight_decay='3' is not a number"):
        GrokAdamW.for_grokking(network(), weight_decay="3")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is a generator, and not a torch.nn.Module: give the model itself"):
        GrokAdamW.for_grokking(network().parameters())  # type: ignore[arg-type]
