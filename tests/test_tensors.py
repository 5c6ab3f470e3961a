"""Tests of the tensors that a step accepts: dtypes, strides, and groups with different options."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grokadamw import GrokAdamW
from grokadamw import backends as update
from grokadamw.backends import native
from grokadamw.options import STATES
from grokadamw.signals import SlowGradient
from grokadamw.state import window
from grokadamw.state.formats import unpacked

from .models import AS_ADAMW, parameters, set_gradients


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
    optimizer = GrokAdamW([{"params": [p], **options} for p, options in zip(params, settings, strict=True)])
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
    assert seen[8:] == ["cpu", "foreach", "foreach"]  # the second and the fourth have the same options now


@pytest.mark.parametrize("option", ["foreach", "fused"])
def test_what_is_asked_for_in_the_middle_of_a_run_counts_at_once(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p])
    seen: list[str] = []
    for module, name in ((update.cpu, "cpu"), (update.foreach, "foreach")):
        step = module.step
        monkeypatch.setattr(module, "step", lambda b, n, name=name, step=step: (seen.append(name), step(b, n)))
    for value in (None, None, option == "foreach", None):
        optimizer.param_groups[0][option] = value
        p.grad = torch.ones(3)
        optimizer.step()
    assert seen == ["cpu", "cpu", "foreach", "cpu"]


def test_groups_with_the_same_options_share_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups with equal options share a backend call, because some libraries make a group of each parameter."""
    params = parameters(5)
    optimizer = GrokAdamW([{"params": [p], "lr": lr} for p, lr in zip(params, (0.1, 0.2, 0.1, 0.2, 0.1), strict=True)])
    set_gradients(params)
    seen, step = [], update.cpu.step
    monkeypatch.setattr(
        update.cpu, "step", lambda batch, numbers: (seen.append(len(batch.params)), step(batch, numbers))
    )
    optimizer.step()
    optimizer.step()
    assert seen == [3, 2, 3, 2]
    optimizer.param_groups[3]["lr"] = 0.1
    optimizer.step()
    optimizer.param_groups[0]["betas"] = [0.9, 0.9]
    optimizer.step()
    assert seen[4:] == [4, 1, 1, 1, 3]


OF_GROUPS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([0.1, 0.01]),
        "betas": st.sampled_from([(0.9, 0.99), [0.9, 0.99], (0.5, 0.99)]),
        "weight_decay": st.sampled_from([0.0, 0, 1.0]),
        "alpha_init": st.sampled_from([0.98, 0.5]),
        "lamb": st.sampled_from([0.0, 2.0]),
        "signal_boost": st.sampled_from([0.0, 1.0]),
        "decay_boost": st.sampled_from([0.0, 2.0]),
        "max_row_change": st.sampled_from([0.0, 0.05]),
        "foreach": st.sampled_from([None, True]),
        "maximize": st.booleans(),
    }
)


@settings(max_examples=20)
@given(st.lists(st.lists(OF_GROUPS, min_size=4, max_size=4), min_size=3, max_size=3), st.sampled_from([1, 2]))
def test_groups_step_as_optimizers_of_their_own(steps: list[list[dict[str, Any]]], accumulation_steps: int) -> None:
    """Groups step as separate optimizers would, whichever options they share, and however options change."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 2)) for _ in range(4)]
    alone = copy.deepcopy(params)
    raw = {"second_moment": "raw", "accumulation_steps": accumulation_steps, "gradient_clipping": 0.0}
    together = GrokAdamW([{"params": [p], "layer": i} for i, p in enumerate(params)], **raw)
    apart = [GrokAdamW([{"params": [p], "layer": i}], **raw) for i, p in enumerate(alone)]
    for number, options in enumerate(steps):
        for optimizer in (together, *apart):
            optimizer.record(train_loss=1.0, eval_loss=1.0 + 0.5 * number)
        groups = [optimizer.param_groups[0] for optimizer in apart]
        for p, q, a, b, new in zip(params, alone, together.param_groups, groups, options, strict=True):
            a.update(new)
            b.update(new)
            p.grad, q.grad = (torch.full((3, 2), 0.1 * (number + 1)) for _ in range(2))
        for optimizer in (together, *apart):
            optimizer.step()
        for p, q in zip(params, alone, strict=True):
            assert torch.equal(p, q)


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
    optimizer, other = GrokAdamW([p]), GrokAdamW([q])
    for _ in range(2):
        assert optimizer.implementation() == other.implementation()
        optimizer.step()
        other.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clipping": 0.0, "nonfinite": "propagate"},
        {"nonfinite": "raise"},
        {"state_dtype": "int8"},
        {"foreach": True},
        {"window_size": 2},
        {"accumulation_steps": 2, "second_moment": "raw"},
        {"grokking_signal_fns": SlowGradient(every=1)},
    ],
    ids=["default", "not clipped", "raise", "int8", "foreach", "window", "accumulated", "a signal of gradients"],
)
@pytest.mark.parametrize("at_first", [True, False])
@pytest.mark.parametrize("without_library", [True, False])
def test_a_gradient_without_memory_is_zero(
    options: dict[str, Any], at_first: bool, without_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of torch.sgn is a ZeroTensor, whose address is 0; a step treats it as zeros."""
    if without_library:
        monkeypatch.setattr(native, "signature", lambda: None)
    p, q = (nn.Parameter(torch.linspace(-1, 1, 4096).view(64, 64)) for _ in range(2))
    optimizers = [GrokAdamW([param], **copy.deepcopy(options)) for param in (p, q)]
    for step in range(6):
        p.grad = q.grad = torch.full_like(p, 0.1)
        if at_first == (step in (0, 1, 3)):
            p.grad, q.grad = None, torch.zeros_like(q)
            torch.sgn(p).sum().backward()
            assert p.grad._is_zerotensor()  # type: ignore[attr-defined]
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(p, q)


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
    ours, expected = nn.Parameter(strided), nn.Parameter(value.clone())
    assert ours.stride() == strided.stride()
    optimizer, adamw = GrokAdamW([ours], **AS_ADAMW, foreach=foreach), torch.optim.AdamW([expected])
    for _ in range(3):
        ours.grad = LAYOUTS[of_grad](torch.randn(3, 4))
        expected.grad = ours.grad.contiguous()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


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
        assert optimizer.metrics()["alpha"] == pytest.approx(0.9 * np.exp(-0.1), rel=1e-7)  # at the last step
        optimizer.step()
        assert optimizer.metrics()["alpha"] == pytest.approx(0.5 * np.exp(-0.1), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("names", [["exp_avg"], ["exp_avg_sq"], ["exp_avg", "exp_avg_sq", "grok_ema"]], ids=str)
@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"state_dtype": "int8"}], ids=str)
def test_state_that_was_set_by_hand_is_as_new_state_would_be(
    options: dict[str, Any], names: list[str], dtype: torch.dtype
) -> None:
    """Users reset dead neurons with zeros_like(param), whose dtype may be narrower; it acts as new state would."""
    params = [nn.Parameter(torch.linspace(-1, 1, 64 * 64).view(64, 64).to(dtype)) for _ in range(2)]
    optimizer = GrokAdamW(params, gamma=0.0, **options)
    for p in params:
        p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    by_hand, expected = (optimizer.state[p] for p in params)
    for name in names:
        by_hand[name] = torch.zeros_like(params[0])
        expected[name].zero_()
        if options.get("state_dtype"):
            expected[f"{name}_scale"].zero_()
    optimizer.step()
    assert {name: x.dtype for name, x in by_hand.items()} == {name: x.dtype for name, x in expected.items()}
    for name in STATES:
        a, b = (unpacked(state, name) for state in (by_hand, expected))
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)  # the rounding of codes depends on the parameter's index
    torch.testing.assert_close(params[0], params[1])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_step_count_keeps_its_memory(shape: tuple[int, ...]) -> None:
    """Processes that train one model share state, and old scripts make the count a vector of one element."""
    (p,) = parameters(1)
    optimizer, count = GrokAdamW([p]), torch.full(shape, 2.0)
    optimizer.state[p] = {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    for _ in range(3):
        set_gradients([p])
        optimizer.step()
    assert count.item() == 5


def test_state_follows_a_parameters_memory_format() -> None:
    """Otherwise each step would convert the state, and a resumed run would differ from the first in the last bits."""
    optimizers = []
    for is_late in (False, True):
        torch.manual_seed(0)
        model = nn.Conv2d(8, 8, 3)
        optimizer = GrokAdamW(model.named_parameters())
        for step in range(3):
            if step == is_late:
                model.to(memory_format=torch.channels_last)
            for p in model.parameters():
                p.grad = torch.full_like(p, 0.1 * (step + 1))
            optimizer.step()
        optimizers.append(optimizer)
    for p, q in zip(*(optimizer.param_groups[0]["params"] for optimizer in optimizers), strict=True):
        assert torch.equal(p, q)
    assert all(optimizers[1].state[p][name].stride() == p.stride() for p in model.parameters() for name in STATES)
    assert optimizers[0].implementation() == optimizers[1].implementation()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize(
    "options", [{}, {"lamb": 0.0}, {"lamb": 0.0, "master_weight_bits": 24}, {"rounding": "stochastic"}], ids=str
)
def test_the_implementation_is_known_before_a_step_and_without_gradients(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    params = [nn.Parameter(torch.ones(64, 64, dtype=dtype))]
    optimizer = GrokAdamW(params, **options)
    before = optimizer.implementation()
    assert not optimizer.state
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    stepped = optimizer.implementation()
    optimizer.zero_grad()
    assert [before, optimizer.implementation()] == [stepped, stepped]


def test_asking_for_the_implementation_makes_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "new", lambda *args: pytest.fail("it made a window"))
    optimizer = GrokAdamW([nn.Parameter(torch.ones(64, 64))], window_size=100)
    assert optimizer.implementation().startswith("cpu: ")


@pytest.mark.usefixtures("nothing_is_free_to_read")
def test_a_default_device_without_numbers_makes_none() -> None:
    p = nn.Parameter(torch.ones(2))
    with torch.device("meta"):
        optimizer = GrokAdamW([p], accumulation_steps=2, second_moment="raw")
        p.grad = torch.full((2,), torch.nan, device="cpu")
        optimizer.step()
    assert torch.equal(p, torch.ones(2))
