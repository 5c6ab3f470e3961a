"""Tests of the norm over all parameters, the clip coefficient, and reads from a device."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer

from grokadamw import Accumulate, GrokAdamW, Grokfast, GrokfastMA
from grokadamw.backends import foreach, native
from grokadamw.signals import SlowGradient
from grokadamw.step.norm import clip_coefficient, global_norm

from .models import same, set_gradients


@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=5), min_size=1, max_size=5), st.floats(0, 100))
def test_norm_and_coefficient_are_clip_grad_norms(values: list[list[float]], max_norm: float) -> None:
    params = [nn.Parameter(torch.zeros(len(v), dtype=torch.float64)) for v in values]
    for p, v in zip(params, values, strict=True):
        p.grad = torch.tensor(v, dtype=torch.float64)
    grads = [p.grad.clone() for p in params if p.grad is not None]
    norm = global_norm(grads, foreach.sum_of_squares, None)
    on_device = global_norm(grads, foreach.sum_of_squares, torch.device("cpu"))
    expected = torch.nn.utils.clip_grad_norm_(params, max_norm).item()
    assert norm == pytest.approx(expected, rel=1e-12)
    assert float(on_device) == pytest.approx(expected, rel=1e-12)
    for coefficient in (clip_coefficient(norm, max_norm), float(clip_coefficient(on_device, max_norm))):
        for p, g in zip(params, grads, strict=True):
            if max_norm > 0:  # 0 turns our clipping off
                torch.testing.assert_close(p.grad, coefficient * g, rtol=1e-12, atol=1e-300)
    assert clip_coefficient(norm, 0) == 1


def test_a_complex_gradient_counts_both_parts() -> None:
    assert global_norm([torch.tensor([3 + 4j])], foreach.sum_of_squares, None) == 5


def test_not_a_number_stays_one() -> None:
    assert math.isnan(clip_coefficient(math.nan, 1.0))  # type: ignore[arg-type]
    assert clip_coefficient(math.inf, 1.0) == 0


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_foreach", [True, False])
def test_nothing_is_read_back_from_a_device(nonfinite: str, dtype: torch.dtype, use_foreach: bool) -> None:
    """Meta tensors hold no numbers, so any read of one raises an error."""
    params = [nn.Parameter(torch.empty(shape, device="meta", dtype=dtype)) for shape in ((), (3,), (2, 5))]
    optimizer = GrokAdamW(
        [{"params": params[:2], "gradient_clipping": 0.0}, {"params": params[2:], "lr": 0.1}],
        grokking_signal_fns=[lambda train_loss, eval_loss: eval_loss - train_loss, SlowGradient(every=1), lambda: 0.5],
        nonfinite=nonfinite,
        foreach=use_foreach,
        amplify_after=1,
    )
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.record(train_loss=torch.empty((), device="meta"), eval_loss=torch.empty(1, device="meta"))
        optimizer.step()
    assert optimizer._run.signals.failures == 0
    assert all(state["step"].is_meta for state in optimizer.state.values())
    with pytest.raises(RuntimeError, match="meta tensors"):
        optimizer.metrics()  # metrics() may read, and this test notices it


@pytest.mark.usefixtures("nothing_is_free_to_read")
def test_skipped_steps_on_a_device_are_counted_when_they_are_read() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p])
    for gradient in (math.nan, 1.0, math.inf):
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
    assert optimizer.param_groups[0]["skipped_steps"] == 0
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        saved = optimizer.state_dict()
    assert saved["param_groups"][0]["skipped_steps"] == 2
    assert optimizer.metrics()["skipped_steps"] == 2
    assert optimizer.metrics()["step"] == 1


CYCLES = {"accumulation_steps": 3, "second_moment": "raw"}


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("options", [{}, CYCLES], ids=["steps", "micro-batches"])
def test_a_skipped_step_whose_warning_is_an_error_leaves_nothing(steps: int, options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p], **options)
    for _ in range(steps - 1):
        p.grad = torch.ones_like(p)
        optimizer.step()
    weights, state = p.detach().clone(), copy.deepcopy(optimizer.state.get(p, {}))
    p.grad = torch.full_like(p, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="NaN or infinity"):
            optimizer.step()
    assert torch.equal(p, weights)
    assert same(optimizer.state.get(p, {}), state)
    assert optimizer.param_groups[0]["micro_step"] == (steps - 1) * bool(options)
    assert optimizer.metrics()["skipped_steps"] == 1


@pytest.mark.parametrize("options", [{}, CYCLES], ids=["steps", "micro-batches"])
def test_a_first_step_whose_gradients_a_signal_makes_infinite_leaves_nothing(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones_like(p)
    optimizer = GrokAdamW([p], nonfinite="raise", grokking_signal_fns=lambda: p.grad.fill_(math.inf) and 0.5, **options)
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(p, torch.ones(3))


WRAPPED: dict[str, Callable[[Optimizer], Optimizer]] = {
    "alone": lambda optimizer: optimizer,
    "Accumulate": lambda optimizer: Accumulate(optimizer, 2),
    "Grokfast": Grokfast,
    "GrokfastMA": lambda optimizer: GrokfastMA(optimizer, 2, warmup=False),
}


@pytest.mark.parametrize("shape", [(1,), (3,)], ids=["broadcast", "not"])
@pytest.mark.parametrize("steps", [0, 1], ids=["at first", "later"])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_gradient_of_another_shape_is_refused_before_anything_changes(
    wrapped: str, steps: int, shape: tuple[int, ...]
) -> None:
    """A parameter's data may be replaced after backward()."""
    p, q = (nn.Parameter(torch.ones(5)) for _ in range(2))
    inner: Optimizer = GrokAdamW([p, q]) if wrapped == "alone" else torch.optim.SGD([p, q], momentum=0.9)
    optimizer = WRAPPED[wrapped](inner)
    for _ in range(steps):
        p.grad, q.grad = torch.ones(5), torch.ones(5)
        optimizer.step()
    q.data, q.grad, p.grad = torch.ones(shape), None, torch.ones(5)
    q.grad = torch.full(shape, 2.0)
    q.data = torch.ones(5)
    before = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    with pytest.raises(RuntimeError, match=r"the gradient has shape .* zero_grad"):
        optimizer.step()
    assert same((optimizer.state_dict(), p.detach()), before)
    assert torch.equal(p.grad, torch.ones(5))
    assert torch.equal(q.grad, torch.full(shape, 2.0))


@pytest.mark.parametrize("wrapped", ["Grokfast", "GrokfastMA"])
def test_a_first_step_that_the_inner_optimizer_refuses_leaves_no_state(wrapped: str) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = WRAPPED[wrapped](GrokAdamW([p], lamb=0.0))
    optimizer.param_groups[0]["gamma"] = 2.0
    with pytest.raises(ValueError, match="gamma"):
        optimizer.step()
    assert not optimizer.state
    optimizer.param_groups[0]["gamma"] = 0.1
    optimizer.step()
    assert len(optimizer.state[p]) > 3


def test_a_lazy_parameter_without_a_gradient_is_left_alone() -> None:
    """As by AdamW: it may belong to a module that is not used."""
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.LazyLinear(2)})
    optimizer = GrokAdamW(model.parameters())
    model["used"](torch.ones(1, 3)).sum().backward()
    whole = optimizer.memory()["total"]
    assert whole == GrokAdamW(model["used"].parameters()).memory()["total"]
    assert "kernel" in optimizer.implementation() or "blocks" in optimizer.implementation()
    optimizer.step()
    assert optimizer.state.keys() == {*model["used"].parameters()}
    model["unused"](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 4


@pytest.mark.usefixtures("nothing_is_free_to_read")
@pytest.mark.parametrize("use_foreach", [True, False])
def test_tensor_numbers_give_the_same_training(use_foreach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[torch.Tensor]:
        from .models import network, train

        model = network(torch.float64)
        optimizer = GrokAdamW(model.named_parameters(), lr=0.01, foreach=use_foreach, grokking_signal_decay_rate=1.0)

        def take_step(step: int, loss: Any) -> None:
            optimizer.record(train_loss=loss, eval_loss=1.5 * loss)
            if step == 2:
                model[0].bias.grad[0] = math.nan
            optimizer.step()

        train(model, range(6), take_step)
        return [p.detach() for p in model.parameters()]

    on_device = run()
    monkeypatch.undo()
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        on_host = run()
    for a, b in zip(on_device, on_host, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_foreach", [None, True, False])
def test_a_second_moment_that_overflows_does_not_become_nan(use_foreach: bool | None) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p], lr=0.1, lamb=0.0, gradient_clipping=0.0, foreach=use_foreach)
    for i in range(3):
        p.grad = torch.tensor([1e20 if i == 0 else 1.0, 1.0, 1.0])
        optimizer.step()
    assert p.isfinite().all()
    assert not optimizer.state[p]["exp_avg_sq"].isnan().any()


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("count", [0, 0.0, torch.tensor(0), torch.tensor([0.0], dtype=torch.float64)], ids=str)
def test_a_step_count_may_be_set_to_any_number(options: dict[str, Any], count: Any) -> None:
    """Old code sets the count to numbers of other types, and torch's AdamW allows it."""
    found = []
    for new in (torch.tensor(0.0), count):
        p = nn.Parameter(torch.ones(70, 64))
        optimizer = GrokAdamW([p], lr=0.1, **options)
        for i in range(3):
            p.grad = torch.ones_like(p)
            if i == 1:
                optimizer.state[p]["step"] = new.clone() if isinstance(new, torch.Tensor) else new
            optimizer.step()
        assert optimizer.state[p]["step"].dtype == torch.float32
        found.append(p.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("strides", [(0, 0), (4, 0), (1, 1), (2, 1)])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}], ids=str)
def test_a_parameter_whose_elements_come_to_overlap_is_refused_before_anything_is_written(
    options: dict[str, Any], strides: tuple[int, int]
) -> None:
    p, q = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([q, p], **options)
    for x in (p, q):
        x.grad = torch.ones_like(x)
    optimizer.step()
    p.data = torch.ones(16).as_strided((4, 4), strides)
    before = q.detach().clone(), optimizer.state[p]["exp_avg"].clone()
    with pytest.raises(RuntimeError, match="has several elements at one address"):
        optimizer.step()
    assert torch.equal(q, before[0])
    assert torch.equal(optimizer.state[p]["exp_avg"], before[1])


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("which", ["parameter", "gradient", "state"])
@pytest.mark.parametrize("sees_by_dlpack", [True, False])
def test_a_tensor_whose_memory_was_freed_is_refused(
    foreach: bool | None, steps: int, which: str, sees_by_dlpack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a parameter would not be updated, and gradient or state would be read from address 0."""
    if not sees_by_dlpack:
        monkeypatch.setattr(native, "signature", lambda: None)
    p, q = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p, q], foreach=foreach)
    for step in range(steps + 1):
        p.grad, q.grad = torch.ones(4, 4), torch.ones(3)
        if step == steps:
            if which == "state" and not steps:
                return
            freed = {"parameter": p.data, "gradient": p.grad, "state": optimizer.state[p].get("exp_avg")}[which]
            freed.untyped_storage().resize_(0)
            before = q.detach().clone()
            with pytest.raises(RuntimeError, match=r"shape \(4, 4\), its gradient or its state has no memory"):
                optimizer.step()
            assert torch.equal(q, before)
        else:
            optimizer.step()


def test_entries_of_the_state_that_are_not_ours_may_be_sparse() -> None:
    params = [nn.Parameter(torch.ones(3, 3, dtype=dtype)) for dtype in (torch.float32, torch.complex64)]
    optimizer = GrokAdamW(params)
    for param in params:
        optimizer.state[param]["mask"] = torch.eye(3).to_sparse()
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(optimizer.state[param]["mask"].is_sparse for param in params)


@pytest.mark.parametrize("count", [0, 5.0, torch.tensor([3.0])])
def test_a_step_count_that_was_set_by_hand_can_be_read(count: Any) -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = GrokAdamW(params)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
    optimizer.state[params[0]]["step"] = count
    assert optimizer.metrics()["step"] == max(2, float(count))


def test_a_sparse_gradient_is_named_before_gradients_are_judged() -> None:
    model = nn.ModuleDict({"dense": nn.Linear(2, 2), "embedding": nn.Embedding(5, 2, sparse=True)})
    optimizer = GrokAdamW(model.named_parameters(), nonfinite="raise")
    set_gradients(list(model["dense"].parameters()))
    optimizer.step()
    model["embedding"](torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"embedding\.weight: grokadamw does not support sparse gradients"):
        optimizer.step()
