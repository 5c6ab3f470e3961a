"""The optimizer as its users meet it."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from grokadamw import GrokAdamW, update
from grokadamw.signals import AccuracyGap, SlowGradient

from .models import IMPLEMENTATIONS, network, running, train

AS_ADAMW = {"lamb": 0.0, "gamma": 0.0, "gradient_clipping": 0.0}


def parameters(count: int = 2) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2)) for _ in range(count)]


def set_gradients(params: list[nn.Parameter], seed: int = 1, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)


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
        else:  # which cycles β1 too
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=101)

        def take_step(step: int, loss: torch.Tensor) -> None:
            optimizer.step()
            schedule.step()

        train(model, range(30 if implementation == "gpu" else 100), take_step)  # interpreted, it is slow
        return [p.detach() for p in model.parameters()]

    settings = {"lr": 0.01, "weight_decay": 0.1}
    theirs = run(lambda model: torch.optim.AdamW(model.parameters(), **settings))
    with running(implementation) as how:
        ours = run(lambda model: GrokAdamW(model.named_parameters(), **settings, **AS_ADAMW, **how))
    for a, b in zip(ours, theirs, strict=True):
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
    """As found in published code: every argument of 0.1.2, a list for betas, a lambda, and its README's spelling."""
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
    expected = 1 - 0.9**3 + 0 * p.float()  # m without the filter would be this times g; with it, more
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
    with pytest.raises(RuntimeError, match=r"sparse gradients, and embedding\.weight has one.*SparseAdam"):
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
    """Once v is above 0: the norm's root must not spoil it."""
    p = torch.ones(3, dtype=torch.float64)
    optimizer = GrokAdamW([p], differentiable=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = g = torch.zeros_like(p, requires_grad=True)
    optimizer.step()
    (derivative,) = torch.autograd.grad(p.sum(), g)
    assert derivative.isfinite().all()


def test_lr_may_be_a_tensor() -> None:
    ours, theirs = (copy.deepcopy(parameters()) for _ in range(2))
    for params, lr in ((ours, torch.tensor([0.02])), (theirs, 0.02)):
        set_gradients(params)
        GrokAdamW(params, lr=lr).step()
    for a, b in zip(ours, theirs, strict=True):
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
    with pytest.raises(RuntimeError, match=r"shape \(5,\) has a state of shape \(3, 2\)"):
        optimizer.step()
    assert torch.equal(first, before)
    del optimizer.state[second]
    optimizer.step()


@pytest.mark.parametrize("foreach", [True, False])
def test_dtypes_and_kinds_may_be_mixed_in_a_group(foreach: bool) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float16]
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(3, 2, dtype=torch.complex64).to(d) if d.is_complex else torch.randn(3, 2).to(d))
        for d in dtypes
    ]
    alone = copy.deepcopy(params)
    for group in (params, alone):
        for i, p in enumerate(group):
            torch.manual_seed(i)
            p.grad = torch.randn_like(p)
    options = {"gamma": 0.0, "gradient_clipping": 0.0, "foreach": foreach}
    together = GrokAdamW(params, **options)
    for _ in range(2):
        together.step()
    for p, q in zip(params, alone, strict=True):
        by_itself = GrokAdamW([q], **options)
        for _ in range(2):
            by_itself.step()
        assert torch.equal(p, q)


def test_foreach_false_is_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    (p,) = parameters(1)
    set_gradients([p])
    monkeypatch.setattr(torch, "_foreach_mul", None)
    monkeypatch.setattr(torch, "_foreach_lerp_", None)
    GrokAdamW([p], foreach=False).step()
    with pytest.raises(TypeError):
        GrokAdamW([p], foreach=True).step()


def test_groups_may_be_run_in_different_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(4)
    settings = [{"foreach": False}, {}, {"fused": False}, {"foreach": True}]
    optimizer = GrokAdamW([{"params": [p], **each} for p, each in zip(params, settings, strict=True)])
    set_gradients(params)
    seen = []
    for name in ("reference", "foreach", "cpu"):
        module = getattr(update, name)
        step = module.step
        monkeypatch.setattr(module, "step", lambda t, n, name=name, step=step: (seen.append(name), step(t, n)))
    optimizer.step()
    optimizer.step()
    assert seen == 2 * ["reference", "cpu", "foreach", "foreach"]
    optimizer.param_groups[0]["foreach"] = None
    optimizer.param_groups[1]["foreach"] = True
    optimizer.step()
    assert seen[8:] == ["cpu", "foreach", "foreach", "foreach"]


def test_propagate_without_clipping_reads_no_norm() -> None:
    params = parameters()
    optimizer = GrokAdamW(params, nonfinite="propagate", gradient_clipping=0.0)
    set_gradients(params)
    optimizer.step()
    assert np.isnan(optimizer.metrics()["grad_norm"])


def test_a_conjugate_gradient_is_taken_for_what_it_is() -> None:
    p, q = (nn.Parameter(torch.ones(2, dtype=torch.complex64)) for _ in range(2))
    gradient = torch.tensor([1 + 2j, 3 - 1j])
    p.grad, q.grad = gradient.conj(), gradient.conj().resolve_conj()
    GrokAdamW([p]).step()
    GrokAdamW([q]).step()
    assert torch.equal(p, q)


def test_a_group_is_not_written_into() -> None:
    first, second = parameters()
    groups = [{"params": [first]}, {"params": [second], "lr": 0.1}]
    GrokAdamW(groups)
    assert groups == [{"params": [first]}, {"params": [second], "lr": 0.1}]
    GrokAdamW(groups, nonfinite="raise")


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.t().contiguous().t(),
    "every other": lambda x: torch.stack([x, x], dim=-1).flatten(1)[:, ::2],
    "columns of a wider one": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "expanded": lambda x: x[:1, :1].expand_as(x),
    "expanded rows": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_param", [name for name in LAYOUTS if not name.startswith("expanded")])
def test_strides_do_not_matter(of_param: str, of_grad: str, foreach: bool) -> None:
    torch.manual_seed(0)
    value = torch.randn(3, 4)
    strided = LAYOUTS[of_param](value).detach()
    ours, theirs = nn.Parameter(strided), nn.Parameter(value.clone())
    assert ours.stride() == strided.stride()
    optimizer, adamw = GrokAdamW([ours], **AS_ADAMW, foreach=foreach), torch.optim.AdamW([theirs])
    for _ in range(3):
        ours.grad = LAYOUTS[of_grad](torch.randn(3, 4))
        theirs.grad = ours.grad.contiguous()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_parameter_that_overlaps_itself_is_refused() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1).expand(3))
    optimizer = GrokAdamW([("first", first), ("second", second)])
    set_gradients([first, second])
    heard = []
    optimizer.set_signals(lambda: heard.append(1))
    with pytest.raises(RuntimeError, match=r"shape \(3,\).*several.*clone\(\)"):
        optimizer.step()
    assert first.tolist() == [1, 1]
    assert not optimizer.state
    assert not heard


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_a_dtype_that_cannot_be_trained_is_refused(dtype: torch.dtype) -> None:
    p = torch.zeros(3).to(dtype)
    p.grad = torch.zeros(3).to(dtype)
    with pytest.raises(RuntimeError, match=f"shape \\(3,\\) has dtype {dtype}: give parameters of float16"):
        GrokAdamW([p], nonfinite="propagate", gradient_clipping=0.0).step()


@pytest.mark.parametrize("value", [torch.ones(1).as_strided((1, 1), (0, 0)), torch.from_numpy(np.zeros((0, 2)))])
def test_strides_of_0_that_do_not_overlap(value: torch.Tensor) -> None:
    p = nn.Parameter(value)
    assert 0 in p.stride()
    set_gradients([p])
    GrokAdamW([p]).step()


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("given", [0.9, torch.tensor(0.9), torch.tensor([0.9], dtype=torch.float64)])
def test_alpha_may_be_a_tensor(given: Any, foreach: bool) -> None:
    params, kind = parameters(1), copy.deepcopy(given)
    optimizer = GrokAdamW(params, alpha_init=kind, grokking_signal_fns=lambda: 1.0, foreach=foreach)
    set_gradients(params)
    optimizer.step()
    assert optimizer.metrics()["alpha"] == pytest.approx(0.9 * np.exp(-0.1), rel=1e-7)
    if isinstance(kind, torch.Tensor):
        kind.fill_(0.5)
        assert optimizer.metrics()["alpha"] == pytest.approx(0.9 * np.exp(-0.1), rel=1e-7)  # it was, then
        optimizer.step()
        assert optimizer.metrics()["alpha"] == pytest.approx(0.5 * np.exp(-0.1), rel=1e-7)


# the slow gradient, on and off


def test_amplification_is_switched_off_and_on_in_mid_run() -> None:
    """While λ is 0 the step is AdamW's, and μ goes on: back at 2, it is as old as the run."""
    params, twins = parameters(1), parameters(1)
    optimizer = GrokAdamW(params, gamma=0.0, gradient_clipping=0.0, lamb=2.0)
    always = GrokAdamW(twins, gamma=0.0, gradient_clipping=0.0, lamb=2.0)
    for step, lamb in enumerate([2.0, 2.0, 0.0, 0.0, 2.0]):
        optimizer.param_groups[0]["lamb"] = lamb
        set_gradients(params, step)
        set_gradients(twins, step)
        before = {name: value.clone() for name, value in optimizer.state[params[0]].items()}
        optimizer.step()
        always.step()
        state = optimizer.state[params[0]]
        assert torch.equal(state["grok_ema"], always.state[twins[0]]["grok_ema"])
        if lamb == 0:
            g = params[0].grad
            torch.testing.assert_close(state["exp_avg"], 0.9 * before["exp_avg"] + 0.1 * g)
            torch.testing.assert_close(state["exp_avg_sq"], 0.999 * before["exp_avg_sq"] + 0.001 * g.square())


def test_the_slow_gradient_can_be_freed_and_begins_again_at_zero() -> None:
    params = parameters()
    optimizer = GrokAdamW(params, gradient_clipping=0.0)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    optimizer.param_groups[0]["lamb"] = 0.0
    optimizer.free_slow_gradient()
    optimizer.step()
    for state in optimizer.state.values():
        assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
    through_a_file(optimizer.state_dict())
    optimizer.param_groups[0]["lamb"] = 2.0
    optimizer.step()
    for p in params:
        torch.testing.assert_close(optimizer.state[p]["grok_ema"], (1 - 0.98) * p.grad)
        assert optimizer.state[p]["step"] == 5


# what comes in training


def test_a_loss_spike_does_not_end_the_run() -> None:
    """One gradient ten million times too large: clipped, so that no moment remembers it for long."""

    def losses(spike: float) -> list[float]:
        model, seen = network(), []
        optimizer = GrokAdamW(model.named_parameters(), lr=0.01)

        def take_step(step: int, loss: torch.Tensor) -> None:
            seen.append(loss.item())
            if step == 50:
                for p in model.parameters():
                    p.grad *= spike
                loss = loss * spike
            optimizer.record(train_loss=loss, eval_loss=1.1 * loss)
            optimizer.step()

        train(model, range(200), take_step)
        return seen

    spiked, smooth = losses(1e7), losses(1.0)
    assert max(spiked[51:60]) < 1.5 * max(smooth[51:60])
    assert sum(spiked[150:]) < 1.1 * sum(smooth[150:])


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("at", range(5))
@pytest.mark.filterwarnings("ignore:a step was skipped")
def test_an_infinite_gradient_at_any_step_has_not_been(at: int, foreach: bool) -> None:
    def run(with_it: bool) -> list[torch.Tensor]:
        model = network()
        optimizer = GrokAdamW(model.named_parameters(), foreach=foreach)

        def take_step(step: int, loss: torch.Tensor) -> None:
            if step == at and with_it:
                kept = [p.grad.clone() for p in model.parameters()]
                for p in model.parameters():
                    p.grad[0] = torch.inf
                optimizer.step()
                for p, grad in zip(model.parameters(), kept, strict=True):
                    p.grad.copy_(grad)
            optimizer.step()

        train(model, range(5), take_step)
        return [*model.parameters(), *(x for state in optimizer.state.values() for x in state.values())]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_zero_gradient_forever_decays_and_stays_finite(dtype: torch.dtype, foreach: bool) -> None:
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = GrokAdamW([p], lr=0.125, weight_decay=0.25, grokking_signal_fns=SlowGradient(every=1), foreach=foreach)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad.zero_()
    for _ in range(3000):
        optimizer.step()
    assert p.isfinite().all()
    assert all(value.isfinite().all() for value in optimizer.state[p].values())
    assert p.abs().max() < 1e-3

    untouched = nn.Parameter(torch.ones(3, dtype=dtype))
    untouched.grad = torch.zeros_like(untouched)
    optimizer = GrokAdamW([untouched], weight_decay=0.0, foreach=foreach)
    for _ in range(100):
        optimizer.step()
    assert untouched.tolist() == [1, 1, 1]


def test_no_graph_outlives_a_differentiable_step() -> None:
    p = torch.ones(2, dtype=torch.float64)
    optimizer = GrokAdamW([p], differentiable=True)
    p.grad = torch.full_like(p, 0.5, requires_grad=True)
    optimizer.step()
    last = optimizer._run.last
    assert not any(number.requires_grad for number in (*last.norms, *last.clips))  # type: ignore[union-attr]
    assert optimizer.metrics()["grad_norm"] == pytest.approx(0.5**0.5)


def test_a_learning_rate_has_a_derivative() -> None:
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def end(lr: torch.Tensor) -> torch.Tensor:
        p = start.clone()
        optimizer = GrokAdamW([p], lr=lr, differentiable=True, weight_decay=0.5)
        for g in ([0.3, 0.1], [0.2, -0.4]):
            p.grad = torch.tensor(g, dtype=torch.float64)
            optimizer.step()
        return p

    assert torch.autograd.gradcheck(end, lr)


# what is not finite


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("clipping", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_skipped_and_counted(foreach: bool, clipping: float, value: float) -> None:
    params = parameters()
    optimizer = GrokAdamW(params, foreach=foreach, gradient_clipping=clipping)
    set_gradients(params)
    params[1].grad[1, 1] = value  # type: ignore[index]
    before = copy.deepcopy([p.detach() for p in params])
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.metrics()["skipped_steps"] == 2
    assert optimizer.metrics()["step"] == 0
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    set_gradients(params)
    optimizer.step()
    assert optimizer.metrics()["step"] == 1


def test_raise_names_the_parameter_and_writes_nothing() -> None:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), nonfinite="raise")
    train(model, range(1), lambda step, loss: optimizer.step())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    model[2].weight.grad[0, 0] = torch.inf
    with pytest.raises(RuntimeError, match=r"not finite: 2\.weight\. Nothing was written"):
        optimizer.step()
    after = model.state_dict(), optimizer.state_dict()["state"]
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert all(torch.equal(before[1][i][key], after[1][i][key]) for i in before[1] for key in before[1][i])


@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_propagate_does_as_adamw(clipping: float) -> None:
    ours, theirs = parameters(), parameters()
    for params in (ours, theirs):
        set_gradients(params)
        params[0].grad[0, 0] = torch.inf  # type: ignore[index]
    GrokAdamW(ours, nonfinite="propagate", **AS_ADAMW | {"gradient_clipping": clipping}).step()
    if clipping:
        torch.nn.utils.clip_grad_norm_(theirs, clipping)
    torch.optim.AdamW(theirs).step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_a_sum_of_squares_that_overflows_is_skipped() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = GrokAdamW([p])
    p.grad = torch.full_like(p, 1e200)
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        optimizer.step()
    assert torch.equal(p, torch.ones_like(p))


def test_a_skipped_step_is_counted_even_where_warnings_are_errors() -> None:
    params = parameters()
    optimizer = GrokAdamW(params)
    set_gradients(params, scale=float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="a step was skipped"):
            optimizer.step()
    assert optimizer.metrics()["skipped_steps"] == 1
    optimizer.add_param_group({"params": parameters(1)})
    assert optimizer.param_groups[1]["skipped_steps"] == 1


def test_a_step_that_raises_does_not_move_the_signals() -> None:
    params = parameters()
    signal = SlowGradient()
    optimizer = GrokAdamW(params, nonfinite="raise", grokking_signal_fns=signal)
    set_gradients(params, scale=float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    assert signal.state_dict()["calls"] == 0


# checkpoints


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stop", range(14))
@pytest.mark.filterwarnings("ignore:a step was skipped", "ignore:layer")
def test_a_resumed_run_is_the_uninterrupted_run(stop: int, dtype: torch.dtype) -> None:
    """Signals with a memory, recorded losses, skipped steps and float32 state of bfloat16 parameters, at every step."""

    def start() -> tuple[nn.Module, GrokAdamW]:
        model = network(dtype)
        decayed = [(n, p) for n, p in model.named_parameters() if n.endswith("weight")]
        others = [(n, p) for n, p in model.named_parameters() if n.endswith("bias")]
        gap = AccuracyGap()
        optimizer = GrokAdamW(
            [{"params": decayed, "amplify_after": 3}, {"params": others, "weight_decay": 0.0, "alpha_init": 0.9}],
            lr=0.01,
            grokking_signal_fns=[SlowGradient(every=4), gap, lambda train_loss, eval_loss: eval_loss - train_loss],
            grokking_signal_decay_rate=1.0,
        )
        optimizer.gap = gap  # type: ignore[attr-defined]
        return model, optimizer

    def run(model: nn.Module, optimizer: GrokAdamW, steps: range) -> None:
        def take_step(step: int, loss: torch.Tensor) -> None:
            if step in (0, 6):
                model[0].bias.grad[0] = torch.nan
            if step == 4:
                optimizer.gap.record(train=0.9, eval=0.1)  # type: ignore[attr-defined]
            if step % 3 == 0:
                optimizer.record(train_loss=loss, eval_loss=loss + 0.2)
            optimizer.step()

        train(model, steps, take_step)

    model, optimizer = start()
    run(model, optimizer, range(14))

    half, stopped = start()
    run(half, stopped, range(stop))
    saved = through_a_file({"model": half.state_dict(), "optimizer": stopped.state_dict()})
    resumed_model, resumed = start()
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    run(resumed_model, resumed, range(stop, 14))

    assert same(model.state_dict(), resumed_model.state_dict())
    assert same(optimizer.state_dict(), resumed.state_dict())
    assert resumed.metrics()["skipped_steps"] == 2
    if stop < 14:
        assert same(optimizer.metrics(), resumed.metrics())


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, dtypes included."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def trained(**options: Any) -> tuple[nn.Module, GrokAdamW]:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), lr=0.01, **options)
    optimizer.record(train_loss=0.1, eval_loss=0.4)
    train(model, range(3), lambda step, loss: optimizer.step())
    return model, optimizer


def test_a_state_dict_is_plain_data() -> None:
    _, optimizer = trained(grokking_signal_fns=[lambda: 0.5, SlowGradient()])
    state_dict = optimizer.state_dict()
    assert same(through_a_file(state_dict), state_dict)
    group = state_dict["param_groups"][0]
    assert group["grokking_signal_fns"] is None
    assert (group["train_loss"], group["eval_loss"]) == (0.1, 0.4)
    assert group["layers"] == [0, 0, 1, 1, 2, 2]


def test_every_group_has_the_same_keys_from_the_start() -> None:
    first, second, third = parameters(3)
    optimizer = GrokAdamW([{"params": [first]}, {"params": [second], "layer": 3}])
    keys = set(optimizer.param_groups[0])
    optimizer.record(train_loss=1.0, eval_loss=2.0)
    set_gradients([first, second])
    optimizer.step()
    optimizer.add_param_group({"params": [third]})
    assert {"grokking_signal_fns", "train_loss", "eval_loss", "layers"} <= keys
    assert all(set(group) == keys for group in optimizer.param_groups)
    assert all(set(group) == keys for group in optimizer.state_dict()["param_groups"])


def test_pickle_keeps_all_but_signals() -> None:
    _, optimizer = trained(grokking_signal_fns=lambda: 0.5, nonfinite="raise", second_moment="raw")
    copied = pickle.loads(pickle.dumps(optimizer))
    assert same(copied.state_dict(), optimizer.state_dict())
    assert copied.defaults == optimizer.defaults
    copied.step()
    assert copied.metrics()["signal"] == pytest.approx(0.75)  # the default one, of the recorded losses
    copied.set_signals(lambda: 0.25)
    copied.step()
    assert copied.metrics()["signal"] == 0.25


def test_deepcopy_keeps_signals_and_gives_them_the_copy() -> None:
    model, optimizer = trained(grokking_signal_fns=[lambda: 0.5, SlowGradient(every=1)], combine="max")
    twin_model, twin = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin_model, twin)):
        train(m, range(3, 6), lambda step, loss, o=o: o.step())
    assert same(model.state_dict(), twin_model.state_dict())
    assert same(optimizer.metrics(), twin.metrics())
    train(twin_model, range(6, 9), lambda step, loss: twin.step())
    assert twin.metrics()["signal/SlowGradient"] != optimizer.metrics()["signal/SlowGradient"]


def test_deepcopy_knows_what_the_last_step_did_and_what_layers_are_called() -> None:
    model = network()
    optimizer = GrokAdamW(model.parameters())
    optimizer.set_layers(model)
    train(model, range(2), lambda step, loss: optimizer.step())
    copied = copy.deepcopy(optimizer)
    assert same(copied.metrics(), optimizer.metrics())
    assert copied.layer_table() == optimizer.layer_table()


def test_a_loss_with_a_graph_that_was_set_by_hand_can_be_copied() -> None:
    _, optimizer = trained()
    optimizer.param_groups[0]["train_loss"] = (2 * torch.ones(1, requires_grad=True)).sum()
    copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["train_loss"] == 2.0


def test_state_waits_for_signals_that_are_registered_later() -> None:
    _, optimizer = trained(grokking_signal_fns=SlowGradient(every=2))
    saved = through_a_file(optimizer.state_dict())
    _, late = trained()
    late.load_state_dict(saved)
    assert late.state_dict()["param_groups"][0]["signal_state"] == saved["param_groups"][0]["signal_state"]
    signal = SlowGradient(every=2)
    late.set_signals(signal)
    assert signal.state_dict() == json.loads(saved["param_groups"][0]["signal_state"])["SlowGradient"]


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_keep_what_signals_remember_until_they_are_registered(how: str) -> None:
    _, optimizer = trained(grokking_signal_fns=SlowGradient(every=2))
    remembered = json.loads(optimizer.state_dict()["param_groups"][0]["signal_state"])["SlowGradient"]
    copied = pickle.loads(pickle.dumps(optimizer))
    if how == "deepcopy":
        copied = copy.deepcopy(copied)
    assert "SlowGradient" in copied.state_dict()["param_groups"][0]["signal_state"]
    signal = SlowGradient(every=2)
    copied.set_signals([lambda: 0.5, signal])
    assert signal.state_dict() == remembered


def test_what_signals_remember_goes_by_their_names() -> None:
    gap = AccuracyGap()
    gap.record(train=0.9, eval=0.5)
    _, optimizer = trained(grokking_signal_fns=[gap, SlowGradient()])
    saved = through_a_file(optimizer.state_dict())
    other_gap, slow = AccuracyGap(), SlowGradient()
    _, other = trained(grokking_signal_fns=[lambda: 0.5, slow, other_gap])
    other.load_state_dict(saved)
    assert other_gap() == pytest.approx(0.4)
    assert slow.state_dict()["calls"] == 3
    _, without = trained()
    without.load_state_dict(saved)
    assert without.state_dict()["param_groups"][0]["signal_state"] == saved["param_groups"][0]["signal_state"]


def test_a_signal_that_cannot_go_on_starts_afresh() -> None:
    class Renamed(SlowGradient):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("count")

    Renamed.__name__ = "SlowGradient"
    _, optimizer = trained(grokking_signal_fns=SlowGradient())
    _, other = trained(grokking_signal_fns=Renamed())
    with pytest.warns(RuntimeWarning, match="SlowGradient cannot go on"):
        other.load_state_dict(optimizer.state_dict())
    other.step()


def test_what_another_optimizers_checkpoint_does_not_say_stays_as_it_was() -> None:
    ours, theirs = parameters(), parameters()
    adamw = torch.optim.AdamW([{"params": theirs[:1]}, {"params": theirs[1:], "lr": 0.5}])
    set_gradients(theirs)
    adamw.step()
    optimizer = GrokAdamW(
        [{"params": ours[:1], "lamb": 0.0, "gamma": 0.3}, {"params": ours[1:], "layer": 3, "gradient_clipping": 0.0}]
    )
    signal = SlowGradient()
    optimizer.set_signals(signal)
    optimizer.state_dict()
    signal()
    optimizer.load_state_dict(adamw.state_dict())
    assert signal.state_dict()["calls"] == 1
    first, second = optimizer.param_groups
    assert (first["lamb"], first["gamma"], first["layers"]) == (0, 0.3, [0])
    assert (second["lr"], second["layer"], second["layers"], second["gradient_clipping"]) == (0.5, 3, [3], 0)


def test_loading_forgets_what_the_last_step_did() -> None:
    _, optimizer = trained()
    assert optimizer.metrics()["alpha"] < 0.98
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert np.isnan(optimizer.metrics()["alpha"])
    assert "signal/loss_gap" not in optimizer.metrics()


def test_a_step_count_from_elsewhere_becomes_a_tensor() -> None:
    _, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for i, state in saved["state"].items():
        state["step"] = 3 if i % 2 else torch.tensor(3)
    optimizer.load_state_dict(saved)
    assert all(s["step"].dtype == torch.float32 and s["step"] == 3 for s in optimizer.state.values())
    optimizer.step()


def test_a_wrapper_that_copies_attributes_shares_what_changes() -> None:
    """As Lightning's does."""
    params = parameters()
    optimizer = GrokAdamW(params)
    wrapper = GrokAdamW.__new__(GrokAdamW)
    wrapper.__dict__ = dict(optimizer.__dict__)
    wrapper.set_signals(lambda: 0.25)
    set_gradients(params)
    optimizer.step()
    assert wrapper.metrics()["signal"] == optimizer.metrics()["signal"] == 0.25


def test_a_state_of_another_shape_is_refused_before_anything_changes() -> None:
    _, optimizer = trained()
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    wrong["state"][3]["exp_avg"] = torch.zeros(2, 2)
    wrong["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match=r"exp_avg of parameter 3 has shape \(2, 2\), the parameter itself \(8,\)"):
        optimizer.load_state_dict(wrong)
    assert same(optimizer.state_dict(), before)


def test_load_hooks_see_what_is_loaded() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = GrokAdamW([p])
    p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    seen = []
    optimizer.register_load_state_dict_pre_hook(
        lambda o, s: {**s, "state": {0: {**s["state"][0], "step": torch.tensor(9.0)}}}
    )
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append((o.state[p]["exp_avg"].dtype, o.state[p]["step"]))
    )
    optimizer.load_state_dict(saved)
    assert seen == [(torch.float32, 9.0)]


def test_how_to_run_is_not_a_checkpoints_affair() -> None:
    model, optimizer = trained(foreach=False)
    _, other = trained()
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["foreach"] is None
    saved = optimizer.state_dict()
    for name in ("foreach", "fused", "capturable"):
        del saved["param_groups"][0][name]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["foreach"] is False


def test_what_a_hook_keeps_in_the_state_is_no_trouble() -> None:
    _, optimizer = trained()
    optimizer.state["a hook's"] = 1  # type: ignore[index]
    assert optimizer.metrics()["step"] > 0
    optimizer.free_slow_gradient()
    assert optimizer.state["a hook's"] == 1  # type: ignore[index]


def test_a_slow_gradient_that_is_not_in_the_checkpoint_is_missed() -> None:
    _, optimizer = trained()
    optimizer.free_slow_gradient()
    with pytest.warns(UserWarning, match="lamb=2 in group 0, and no slow gradient") as caught:
        optimizer.load_state_dict(optimizer.state_dict())
    assert caught[0].filename == __file__


@pytest.mark.usefixtures("nothing_is_free_to_read")
def test_losses_come_back_to_the_device_that_they_were_on() -> None:
    """From a checkpoint that was loaded to the CPU: so that α is computed where it was."""
    optimizer = GrokAdamW([nn.Parameter(torch.empty(2, device="meta"))])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["train_loss"] = torch.tensor(0.5, dtype=torch.float64)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["train_loss"].device.type == "meta"


def test_a_corrupt_memory_of_signals_starts_afresh() -> None:
    optimizer = GrokAdamW(parameters(), grokking_signal_fns=AccuracyGap())
    saved = optimizer.state_dict()
    saved["param_groups"][0]["signal_state"] = "{"
    with pytest.warns(RuntimeWarning, match="no JSON.*start afresh"):
        optimizer.load_state_dict(saved)


def test_init_group_is_that_of_torchs_optimizers() -> None:
    real, complex_, frozen = parameters(1)[0], nn.Parameter(torch.ones(2, dtype=torch.complex64)), parameters(1)[0]
    optimizer = GrokAdamW([{"params": [real, complex_, frozen]}, {"params": parameters(1), "lamb": 0.0}])
    other = optimizer.param_groups[1]["params"][0]
    for p in (real, complex_, other):
        p.grad = torch.ones_like(p)
    lists: list[list[Any]] = [[] for _ in range(6)]
    assert optimizer._init_group(optimizer.param_groups[0], *lists) is True
    assert optimizer._init_group(optimizer.param_groups[1], *lists) is False
    params = [real, complex_, other]
    assert [id(p) for p in lists[0]] == [id(p) for p in params]
    assert [id(g) for g in lists[1]] == [id(p.grad) for p in params]
    for values, name in zip(lists[2:], ("exp_avg", "exp_avg_sq", "grok_ema", "step"), strict=True):
        assert [id(value) for value in values] == [id(optimizer.state[p].get(name)) for p in params]
    assert frozen not in optimizer.state
    assert "grok_ema" not in optimizer.state[other]


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
        with pytest.raises(error, match=message):
            optimizer.step()
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
    """A learning rate that is 0 but for rounding, and NumPy's numbers, which no checkpoint could be read back with."""
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
    saved = through_a_file(optimizer.state_dict())
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
    """It may be on a GPU."""
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
    with pytest.warns(UserWarning, match="run with second_moment='raw', and this optimizer goes on with .*'filtered'"):
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


@pytest.mark.parametrize("loss", ["0.3", [1.0], torch.zeros(2)])
def test_a_bad_loss_is_refused_before_it_is_kept(loss: Any) -> None:
    optimizer = GrokAdamW(parameters())
    with pytest.raises(TypeError, match="eval_loss"):
        optimizer.record(train_loss=1.0, eval_loss=loss)
    assert optimizer.param_groups[0]["train_loss"] is None


def test_numpys_numbers_are_numbers() -> None:
    ours, theirs = parameters(), parameters()
    for params, kind in ((ours, np.float32), (theirs, float)):
        set_gradients(params)
        numbers = {"lr": kind(0.5), "eps": kind(0.25), "weight_decay": kind(0.5), "lamb": kind(2), "gamma": kind(0.25)}
        optimizer = GrokAdamW(params, betas=(kind(0.5), kind(0.75)), **numbers)
        optimizer.record(train_loss=kind(0.5), eval_loss=kind(0.75))
        optimizer.step()
        assert type(optimizer.param_groups[0]["train_loss"]) is float
        optimizer.add_param_group({"params": parameters(1), "layer": np.int64(3), "amplify_after": np.int64(3)})
        through_a_file(optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# The preset


@pytest.mark.filterwarnings("error")
def test_the_preset_takes_a_model_and_what_is_given_wins() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), *(nn.Linear(4, 4) for _ in range(5)), nn.LayerNorm(4, bias=False))
    model[1].weight.requires_grad_(False)
    optimizer = GrokAdamW.for_grokking(model, lr=0.01, lamb=0.5)
    weights, embeddings, vectors = optimizer.param_groups
    assert weights["param_names"] == [f"{i}.weight" for i in (2, 3, 4, 5)]
    assert embeddings["param_names"] == ["0.weight"]
    assert vectors["param_names"] == [f"{i}.bias" for i in (1, 2, 3, 4, 5)] + ["6.weight"]
    for group in optimizer.param_groups:
        assert (group["lr"], group["lamb"], group["max_row_change"]) == (0.01, 0.5, 0.015)
        assert (group["betas"], group["alpha_init"], group["gamma"]) == ((0.9, 0.98), 0.8, 0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [3, 3, 0]
    assert [group["max_row_norm"] for group in optimizer.param_groups] == [0, 1, 0]
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(9)
    set_gradients(list(model.parameters()))
    optimizer.step()  # whose low β1 is meant, and not warned of
    assert optimizer.layer_table()[-1].beta1 == pytest.approx(0.9 * 0.7**6)
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
    optimizer = GrokAdamW.for_grokking(nn.Linear(4, 4), lr=torch.tensor(0.1))
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


def test_the_preset_needs_a_model() -> None:
    with pytest.raises(TypeError, match="model is a generator, and not a torch.nn.Module: give the model itself"):
        GrokAdamW.for_grokking(network().parameters())  # type: ignore[arg-type]
