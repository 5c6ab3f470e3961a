"""Tests of the optimizer as users see it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from grokadamw import GrokAdamW

from .models import AS_ADAMW, IMPLEMENTATIONS, network, parameters, running, set_gradients, train

# AdamW


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("scheduler", ["cosine", "one cycle"])
def test_without_filter_gamma_and_clipping_it_is_adamw(
    implementation: str, dtype: torch.dtype, tolerance: float, scheduler: str
) -> None:
    def run(make: Any) -> list[torch.Tensor]:
        model = network(dtype)
        optimizer = make(model)
        if scheduler == "cosine":
            schedule: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        else:  # it cycles β1 too
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=101)

        def take_step(step: int, loss: torch.Tensor) -> None:
            optimizer.step()
            schedule.step()

        train(model, range(10 if implementation == "gpu" else 100), take_step)  # the interpreter is slow
        return [p.detach() for p in model.parameters()]

    settings = {"lr": 0.01, "weight_decay": 0.1}
    expected = run(lambda model: torch.optim.AdamW(model.parameters(), **settings))
    with running(implementation) as how:
        ours = run(lambda model: GrokAdamW(model.named_parameters(), **settings, **AS_ADAMW, **how))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_adamws_state_loads() -> None:
    model, twin = network(), network()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, range(5), lambda step, loss: adamw.step())
    twin.load_state_dict(model.state_dict())
    ours = GrokAdamW(twin.named_parameters(), **AS_ADAMW)
    ours.load_state_dict(adamw.state_dict() | {"state": copy.deepcopy(adamw.state_dict()["state"])})
    assert [row.layer for row in ours.layer_table()] == [0, 1, 2]
    train(model, range(5, 10), lambda step, loss: adamw.step())
    train(twin, range(5, 10), lambda step, loss: ours.step())
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# the step


def test_published_users_pass_everything_by_name() -> None:
    """Published code passes every argument of 0.1.2, a list for betas, a lambda, and the spelling of its README."""
    optimizer = GrokAdamW(
        parameters(),
        lr=1e-3,
        betas=[0.9, 0.99],  # type: ignore[arg-type]
        eps=1e-8,
        weight_decay=1e-2,
        alpha_init=0.98,
        lamb=2.0,
        gamma=0.1,
        grokking_signal_fns=[lambda: 0.5],
        grokking_signal_decay_rate=0.1,
        gradient_clipping=1.0,
    )
    set_gradients(optimizer.param_groups[0]["params"])
    optimizer.step()
    assert optimizer.metrics()["signal"] == 0.5
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)

    def grokking_signal_fn(training_loss: float, validation_loss: float) -> float:
        return (validation_loss - training_loss) / training_loss

    optimizer = GrokAdamW(parameters(), grokking_signal_fn=grokking_signal_fn)
    optimizer.record(train_loss=1.0, eval_loss=1.5)
    optimizer.step()
    assert optimizer.metrics()["signal"] == 0.5


def test_the_closure_runs_first_and_its_loss_comes_back() -> None:
    (p,) = parameters(1)
    optimizer = GrokAdamW([p])
    before = p.detach().clone()

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        optimizer.record(train_loss=loss, eval_loss=2 * loss)
        return loss

    assert optimizer.step(closure) == before.square().sum()
    assert not torch.equal(p, before)
    assert optimizer.metrics()["signal"] == 0.5


def test_hooks_fire() -> None:
    optimizer, seen = GrokAdamW(parameters()), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.step()
    assert seen == ["pre", "post"]


def test_groups_have_their_own_numbers_and_one_norm() -> None:
    first, second = parameters(2)
    optimizer = GrokAdamW(
        [{"params": [first], "lr": 0.0, "gradient_clipping": 0.5}, {"params": [second], "alpha_init": 0.5, "lamb": 0.0}]
    )
    set_gradients([first, second], scale=100)
    norm = torch.cat([first.grad.view(-1), second.grad.view(-1)]).norm().item()  # type: ignore[union-attr]
    kept = first.detach().clone()
    optimizer.step()
    assert torch.equal(first, kept)
    assert "grok_ema" in optimizer.state[first]
    assert "grok_ema" not in optimizer.state[second]
    metrics = optimizer.metrics()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert metrics["clip_coefficient"] == pytest.approx(0.5 / norm, rel=1e-6)
    assert metrics["alpha"] == 0.5
    torch.testing.assert_close(optimizer.state[second]["exp_avg"], 0.1 * second.grad / norm)  # type: ignore[operator]


@pytest.mark.parametrize("foreach", [True, False])
def test_half_precision_keeps_a_full_state(foreach: bool) -> None:
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = GrokAdamW([p], lr=1e-3, foreach=foreach)
    p.grad = torch.full_like(p, 1e-3)
    for _ in range(3):
        optimizer.step()
    assert {optimizer.state[p][key].dtype for key in ("exp_avg", "exp_avg_sq", "grok_ema")} == {torch.float32}
    expected = 1 - 0.9**3 + 0 * p.float()  # without the filter m is this times g; with it, more
    assert (optimizer.state[p]["exp_avg"] > 0.99 * expected * p.grad.float()).all()


def test_freezing_unfreezing_and_adding_in_mid_run() -> None:
    model = network()
    names = [name for name, _ in model.named_parameters()]
    optimizer = GrokAdamW([(n, p) for n, p in model.named_parameters() if not n.startswith("4.")], lr=0.01)
    layers_before = optimizer.layer_table()
    model[0].requires_grad_(False)
    train(model, range(3), lambda step, loss: optimizer.step())
    assert not any(p in optimizer.state for p in model[0].parameters())
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": [(n, p) for n, p in model.named_parameters() if n.startswith("4.")]})
    train(model, range(3, 5), lambda step, loss: optimizer.step())
    steps = {n: optimizer.state[p]["step"].item() for n, p in model.named_parameters()}
    assert steps == {"0.weight": 2, "0.bias": 2, "2.weight": 5, "2.bias": 5, "4.weight": 2, "4.bias": 2}
    table = optimizer.layer_table()
    assert table[:2] == layers_before
    assert [row.names for row in table] == [names[:2], names[2:4], names[4:]]


def test_a_step_without_gradients_changes_nothing() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = GrokAdamW(params)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert not optimizer.state


def test_a_sparse_gradient_is_refused_before_anything_is_written() -> None:
    dense, embedding = nn.Linear(2, 2), nn.Embedding(5, 2, sparse=True)
    model = nn.ModuleDict({"dense": dense, "embedding": embedding})
    optimizer = GrokAdamW(model.named_parameters())
    dense(embedding(torch.tensor([1]))).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RuntimeError, match=r"embedding\.weight: grokadamw does not support sparse gradients.*SparseAdam"
    ):
        optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("clipping", [0.0, 0.5])
def test_autograd_passes_through_the_step(clipping: float) -> None:
    torch.manual_seed(0)
    start = torch.randn(4, dtype=torch.float64, requires_grad=True)
    grads = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def end(start: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
        p = start.clone()
        optimizer = GrokAdamW([p], lr=0.1, differentiable=True, gradient_clipping=clipping, amplify_after=1)
        for g in grads:
            p.grad = g
            optimizer.step()
        return p

    assert torch.autograd.gradcheck(end, (start, grads))


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_reset_in_both_ways(set_to_none: bool, foreach: bool | None) -> None:
    params = parameters()
    optimizer = GrokAdamW(params, foreach=foreach)
    set_gradients(params)
    grads = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) if set_to_none else (p.grad is g) for p, g in zip(params, grads, strict=True))
    assert set_to_none or not any(g.any() for g in grads)


def test_a_zero_gradient_has_a_derivative_too() -> None:
    """Once v is above 0, the derivative is finite, although the norm takes the square root of 0."""
    p = torch.ones(3, dtype=torch.float64)
    optimizer = GrokAdamW([p], differentiable=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = g = torch.zeros_like(p, requires_grad=True)
    optimizer.step()
    (derivative,) = torch.autograd.grad(p.sum(), g)
    assert derivative.isfinite().all()


def test_lr_may_be_a_tensor() -> None:
    ours, expected = (copy.deepcopy(parameters()) for _ in range(2))
    for params, lr in ((ours, torch.tensor([0.02])), (expected, 0.02)):
        set_gradients(params)
        GrokAdamW(params, lr=lr).step()
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_learning_rate_that_stays_a_tensor_is_not_rounded_with() -> None:
    ends = []
    for lr in (torch.tensor(0.02), torch.tensor(0.02).item()):
        p = torch.ones(1, dtype=torch.float64)
        p.grad = torch.full_like(p, 0.5)
        GrokAdamW([p], lr=lr, weight_decay=0.1, differentiable=True).step()
        ends.append(p.item())
    assert ends[0] == pytest.approx(ends[1], rel=1e-15)


def test_numbers_may_change_while_training() -> None:
    params = parameters()
    optimizer = GrokAdamW(params, amplify_after=5)
    group = optimizer.param_groups[0]
    for change in (
        {"lamb": 0.0},
        {"lamb": 3.0, "gamma": 0.5},
        {"alpha_init": 0.5},
        {"maximize": True},
        {"betas": (0, 0)},
    ):
        group.update(change)
        set_gradients(params)
        optimizer.step()
        assert all(p.isfinite().all() for p in params)
    assert optimizer.metrics()["alpha"] == 0.5
    assert optimizer.metrics()["beta1_max"] == 0


@pytest.mark.parametrize("empty_first", [True, False])
def test_an_empty_group_is_no_trouble(empty_first: bool) -> None:
    (p,) = parameters(1)
    groups = [{"params": []}, {"params": [p]}]
    optimizer = GrokAdamW(groups if empty_first else groups[::-1], grokking_signal_fns=lambda: 0.5)
    set_gradients([p])
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.metrics()["step"] == 2
    assert set(optimizer.param_groups[0]) == set(optimizer.param_groups[1])


def test_the_step_count_does_not_depend_on_the_default_dtype() -> None:
    (p,) = parameters(1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer = GrokAdamW([p])
        set_gradients([p])
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[p]["step"].dtype == torch.float32


def test_under_another_default_device() -> None:
    (p,) = parameters(1)
    optimizer = GrokAdamW([p])
    set_gradients([p])
    with torch.device("meta"):
        optimizer.step()
    assert optimizer.state[p]["exp_avg"].is_cpu


def test_memory_that_runs_out_for_state_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = parameters()
    optimizer = GrokAdamW([{"params": [first]}, {"params": [second]}])
    set_gradients([first, second])
    before = first.detach().clone()
    zeros_like, calls = torch.zeros_like, []

    def out_of_memory(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:  # the second group's second tensor
            raise torch.OutOfMemoryError
        return zeros_like(*args, **options)

    monkeypatch.setattr(torch, "zeros_like", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert torch.equal(first, before)
    assert not optimizer.state[second]
    optimizer.step()
    assert optimizer.metrics()["step"] == 1


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"lr": None},
        {"lr": torch.ones(2)},
        {"betas": (0.9,)},
        {"eps": None},
        {"alpha_init": None},
        {"amplify_after": None},
    ]
    + [{"lamb": None}, {"weight_decay": None}, {"gradient_clipping": None}],
)
def test_what_is_set_wrong_by_hand_leaves_everything_as_it_was(change: dict[str, Any], foreach: bool) -> None:
    first, second = parameters()
    optimizer = GrokAdamW([{"params": [first]}, {"params": [second]}], foreach=foreach)
    set_gradients([first, second])
    optimizer.param_groups[1].update(change)
    optimizer.record(train_loss=1.0, eval_loss=2.0)
    before = first.detach().clone()
    with pytest.raises((TypeError, ValueError, RuntimeError, IndexError)):
        optimizer.step()
    assert torch.equal(first, before)
    assert all(state.get("step", 0) == 0 for state in optimizer.state.values())


def test_data_that_was_replaced_by_another_shape_is_noticed_before_anything_is_written() -> None:
    first, second = parameters()
    optimizer = GrokAdamW([first, second])
    set_gradients([first, second])
    optimizer.step()
    before = first.detach().clone()
    second.data = torch.zeros(5)
    second.grad = torch.ones(5)
    with pytest.raises(RuntimeError, match=r"state\['exp_avg'\] of a parameter of shape \(5,\) has shape \(3, 2\)"):
        optimizer.step()
    assert torch.equal(first, before)
    del optimizer.state[second]
    optimizer.step()


class Outer(torch.optim.Optimizer):
    """An optimizer like SAM, which shares its parameter groups with a base optimizer."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {})
        self.base = GrokAdamW(self.param_groups, **options)
        self.param_groups = self.base.param_groups
        self.defaults.update(self.base.defaults)

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


@pytest.mark.parametrize("how", ["an outer optimizer's", "appended", "appended, with defaults", "in place of all"])
def test_a_group_that_did_not_pass_add_param_group_is_one_as_well(how: str) -> None:
    (first, second), (same, like) = parameters(), parameters()
    expected = GrokAdamW([{"params": [same]}, {"params": [like], "weight_decay": 0.5}], lr=0.1)
    group: dict[str, Any] = {"params": [second], "weight_decay": 0.5}
    optimizer: torch.optim.Optimizer
    if how == "an outer optimizer's":
        outer = Outer([first], lr=0.1)
        outer.add_param_group(group)
        optimizer, ours = outer, outer.base
    else:
        optimizer = ours = GrokAdamW([first], lr=0.1)
        if how == "in place of all":
            ours.param_groups = [{"params": [first]}, group]
        else:
            ours.param_groups.append({**ours.defaults, **group} if "defaults" in how else group)
    assert len(ours.layer_table()) == 1  # without names each group's first parameter is its layer 0
    assert math.isnan(ours.metrics()["signal"])
    for _ in range(3):
        set_gradients([first, second])
        set_gradients([same, like])
        optimizer.step()
        expected.step()
    assert torch.equal(first, same)
    assert torch.equal(second, like)
    assert ours.state_dict()["param_groups"][1].keys() == expected.state_dict()["param_groups"][1].keys()


def test_a_group_from_outside_is_completed_by_whatever_reads_it() -> None:
    first, second = parameters()
    optimizer = GrokAdamW([("a.weight", first)])
    optimizer.param_groups.append({"params": [second], "param_names": ["b.weight"]})
    optimizer.record(train_loss=1.0, eval_loss=2.0)
    assert [group["eval_loss"] for group in optimizer.param_groups] == [2.0, 2.0]
    optimizer = GrokAdamW([("a.weight", first)])
    optimizer.param_groups.append({"params": [second], "param_names": ["b.weight"]})
    optimizer.add_param_group({"params": [("c.weight", torch.nn.Parameter(torch.ones(2)))]})
    assert [group["layers"] for group in optimizer.param_groups] == [[0], [1], [2]]


def test_a_wrong_group_from_outside_is_refused_before_anything_is_written() -> None:
    first, second = parameters()
    optimizer = GrokAdamW([first])
    optimizer.param_groups.append({"params": [second], "lr": -1.0})
    before = first.detach().clone()
    set_gradients([first, second])
    with pytest.raises(ValueError, match="lr=-1.0 is out of range"):
        optimizer.step()
    assert torch.equal(first, before)
    optimizer.param_groups[1]["lr"] = 1e-3
    optimizer.step()


@pytest.mark.parametrize("window_size", [None, 3])
def test_state_that_no_longer_fits_is_named_with_both_ways_out(window_size: int | None) -> None:
    """The rows of a parameter are pruned, but at first not those of its state tensors."""
    p = torch.nn.Parameter(torch.ones(6, 2))
    optimizer = GrokAdamW([p], window_size=window_size)
    set_gradients([p])
    optimizer.step()
    state, new = optimizer.state.pop(p), torch.nn.Parameter(torch.ones(4, 2))
    optimizer.param_groups[0]["params"][0], optimizer.state[new] = new, state
    new.grad = torch.ones(4, 2)
    for name in [name for name, kept in state.items() if kept.dim()]:
        is_ring = name == "grok_ring"
        with pytest.raises(RuntimeError, match=rf"state\['{name}'\] of a parameter of shape \(4, 2\).*or delete"):
            optimizer.step()
        assert torch.equal(new, torch.ones(4, 2))
        state[name] = state[name][:, :4] if is_ring else state[name][:4]
        state[name] = state[name].clone()
    optimizer.step()
    assert not torch.equal(new, torch.ones(4, 2))
