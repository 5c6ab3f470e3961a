"""Tests of the published filter functions and of the window."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

from grokadamw import Grokfast
from grokadamw.grokfast import gradfilter_ema, gradfilter_ma
from grokadamw.state import window

from .models import saved_and_loaded

PEER = Path(sys.prefix) / "peers/pytorch-optimizer"
SHAPES = {"a": (4, 3), "b": (5,), "c": ()}


class Holder(nn.Module):
    """A module that only holds parameters."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))

    def set_grads(self, grads: dict[str, np.ndarray]) -> None:
        for name, p in self.named_parameters():
            p.grad = torch.tensor(grads[name]).to(p.dtype) if name in grads else None

    def grads(self) -> dict[str, np.ndarray]:
        return {name: p.grad.double().numpy().copy() for name, p in self.named_parameters() if p.grad is not None}


def recorded(steps: int, late: int = 0) -> list[dict[str, np.ndarray]]:
    """Return gradients with a slow part. With `late`, "b" has none before that step, and misses some later."""
    rng = np.random.default_rng(0)
    slow = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    return [
        {
            name: slow[name] + rng.normal(size=shape)
            for name, shape in SHAPES.items()
            if name != "b" or late == 0 or (step >= late and step % 7 != 3)
        }
        for step in range(steps)
    ]


# the published definition, in NumPy


def oracle_ema(grads: list[np.ndarray], alpha: float, lamb: float) -> list[np.ndarray]:
    mu, filtered = grads[0], []
    for g in grads:
        mu = alpha * mu + (1 - alpha) * g
        filtered.append(g + lamb * mu)
    return filtered


def oracle_ma(
    grads: list[np.ndarray], window_size: int, lamb: float, filter_type: str, warmup: bool, trigger: bool
) -> list[np.ndarray]:
    filtered, whole = [], np.array(grads)
    for i, g in enumerate(grads):
        last = whole[max(0, i + 1 - window_size) : i + 1]
        waits = warmup and (len(last) < window_size or trigger)
        filtered.append(g if waits else g + lamb * (np.mean if filter_type == "mean" else np.sum)(last, axis=0))
    return filtered


EMA = [{}, {"alpha": 0.9, "lamb": 5.0}, {"alpha": 0.0}, {"alpha": 1.0}, {"lamb": 0.0}]
MA = [
    {"window_size": size, "lamb": 3.0, "filter_type": filter_type, "warmup": warmup, "trigger": trigger}
    for size in (1, 7, 30)
    for filter_type in ("mean", "sum")
    for warmup in (True, False)
    for trigger in (True, False)
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("late", [0, 40])
@pytest.mark.parametrize("options", EMA, ids=str)
def test_ema_is_as_published(options: dict[str, Any], late: int, dtype: torch.dtype, tolerance: float) -> None:
    def expected(grads: list[np.ndarray]) -> list[np.ndarray]:
        return oracle_ema(grads, **{"alpha": 0.98, "lamb": 2.0} | options)

    as_published(gradfilter_ema, expected, options, late, dtype, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("late", [0, 40])
@pytest.mark.parametrize("options", MA, ids=str)
def test_ma_is_as_published(options: dict[str, Any], late: int, dtype: torch.dtype, tolerance: float) -> None:
    as_published(gradfilter_ma, lambda grads: oracle_ma(grads, **options), options, late, dtype, tolerance)


def as_published(
    function: Callable[..., Any],
    published: Callable[[list[np.ndarray]], list[np.ndarray]],
    options: dict[str, Any],
    late: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """Compare 100 steps with the definition. The memory is saved and loaded halfway."""
    model, memory, steps = Holder(dtype), None, recorded(100, late)
    given: dict[str, list[np.ndarray]] = {name: [] for name in SHAPES}
    for grads in steps:
        model.set_grads(grads)
        for name, g in model.grads().items():
            given[name].append(g)
    expected = {name: iter(published(grads)) for name, grads in given.items()}
    added = {name: iter(published(list(map(np.abs, grads)))) for name, grads in given.items()}  # terms may cancel
    for step, grads in enumerate(steps):
        model.set_grads(grads)
        memory = function(model, grads=memory, **options)
        if step == 50:
            memory = saved_and_loaded(memory)
        for name, g in model.grads().items():
            scale = next(added[name]).max()
            np.testing.assert_allclose(g, next(expected[name]), rtol=0, atol=tolerance * scale)
    assert list(memory) == (list(SHAPES) if not late else ["a", "c", "b"])


def published_modules() -> Iterator[Any]:
    """Yield pytorch-optimizer's functions, which `make peers` installs, and the published file."""
    yield pytest.param("peer", marks=pytest.mark.skipif(not PEER.exists(), reason="make peers installs it"))
    reason = "GROKFAST_PY=/path/to/ironjr/grokfast/grokfast.py names the published file"
    yield pytest.param("published", marks=pytest.mark.skipif("GROKFAST_PY" not in os.environ, reason=reason))


@pytest.mark.parametrize("whose", list(published_modules()))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "options"), [("gradfilter_ema", o) for o in EMA] + [("gradfilter_ma", o) for o in MA], ids=str
)
def test_others_functions_do_the_same(whose: str, dtype: torch.dtype, name: str, options: dict[str, Any]) -> None:
    if whose == "peer":
        if options.get("trigger") and options["warmup"]:
            pytest.skip("it has no trigger")
        options = {key: value for key, value in options.items() if key != "trigger"}
        if str(PEER) not in sys.path:
            sys.path.append(str(PEER))
        from pytorch_optimizer.optimizer import grokfast as module
    else:
        spec = importlib.util.spec_from_file_location("published_grokfast", os.environ["GROKFAST_PY"])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    function = {"gradfilter_ema": gradfilter_ema, "gradfilter_ma": gradfilter_ma}[name]
    ours, others, memory, others_memory = Holder(dtype), Holder(dtype), None, None
    summed = options.get("window_size", 1) if options.get("filter_type") == "sum" else 1
    scale = 5 * (1 + options.get("lamb", 2.0) * summed)  # the size of the terms, which may cancel
    for grads in recorded(100):
        ours.set_grads(grads)
        others.set_grads(grads)
        memory = function(ours, memory, **options)
        others_memory = getattr(module, name)(others, others_memory, **options)
        for g, expected in zip(ours.grads().values(), others.grads().values(), strict=True):
            np.testing.assert_allclose(g, expected, rtol=0, atol=1e-6 * scale)
    assert list(memory) == list(others_memory)


# errors of the published functions


@pytest.mark.parametrize("function", [gradfilter_ema, gradfilter_ma])
def test_gradients_that_are_zeroed_in_place_are_remembered(function: Callable[..., Any]) -> None:
    """A window of live gradients would hold zeros after zero_grad(set_to_none=False)."""
    models, memories = [Holder(), Holder()], [None, None]
    for step, grads in enumerate(recorded(12)):
        for i, model in enumerate(models):
            if step == 0 or i == 0:
                model.set_grads(grads)
            else:
                model.zero_grad(set_to_none=False)
                for name, p in model.named_parameters():
                    p.grad.add_(torch.tensor(grads[name]))
            options = {"window_size": 4} if function is gradfilter_ma else {}
            memories[i] = function(model, memories[i], **options)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)


def test_the_published_memory_of_a_window_can_be_gone_on_from() -> None:
    """An older checkpoint of a script may hold a deque of gradients for each parameter."""
    model, steps = Holder(), recorded(20)
    memory: Any = {name: deque([torch.tensor(g[name]) for g in steps[:9]][-5:], maxlen=5) for name in SHAPES}
    expected = {name: oracle_ma([g[name] for g in steps], 5, 5.0, "mean", True, False) for name in SHAPES}
    for i in range(9, 20):
        model.set_grads(steps[i])
        memory = gradfilter_ma(model, memory, window_size=5)
        for name, g in model.grads().items():
            np.testing.assert_allclose(g, expected[name][i], rtol=1e-12)


def test_the_published_memory_of_complex_gradients_can_be_gone_on_from() -> None:
    layer = nn.Linear(3, 2, bias=False, dtype=torch.complex64)
    grads = [torch.randn(2, 3, dtype=torch.complex64) for _ in range(3)]
    layer.weight.grad = grads[2].clone()
    gradfilter_ma(layer, {"weight": deque(grads[:2], maxlen=3)}, window_size=3, lamb=2.0)
    torch.testing.assert_close(layer.weight.grad, grads[2] + 2 * torch.stack(grads).mean(0))


def test_half_precision_gradients_are_averaged_in_float32() -> None:
    model, memory, ring = Holder(torch.bfloat16), None, None
    for grads in recorded(50):
        model.set_grads(grads)
        memory = gradfilter_ema(model, memory)
        model.set_grads(grads)
        ring = gradfilter_ma(model, ring, window_size=10)
    assert {mu.dtype for mu in memory.values()} == {torch.float32}
    assert {(x["ring"].dtype, x["ring_sum"].dtype) for x in ring.values()} == {(torch.bfloat16, torch.float32)}
    exact = np.mean([torch.tensor(g["a"]).bfloat16().double().numpy() for g in recorded(50)[-10:]], axis=0)
    np.testing.assert_allclose(ring["a"]["ring_sum"] / 10, exact, atol=1e-6)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "words"),
    [
        (gradfilter_ema, {"m": "model"}, TypeError, "m is a str"),
        (gradfilter_ema, {"alpha": 1.5}, ValueError, "alpha=1.5"),
        (gradfilter_ema, {"lamb": "2"}, TypeError, "lamb='2'"),
        (
            gradfilter_ema,
            {"grads": {"a": torch.zeros(3)}},
            ValueError,
            r"grads\['a'\] has shape \(3,\), and not shape \(4, 3\)",
        ),
        (gradfilter_ma, {"window_size": 0}, ValueError, "window_size=0"),
        (gradfilter_ma, {"window_size": 2.5}, TypeError, "window_size=2.5"),
        (gradfilter_ma, {"filter_type": "median"}, ValueError, "filter_type='median'.*'mean' or 'sum'"),
        (gradfilter_ma, {"lamb": -1.0}, ValueError, "lamb=-1.0"),
        (gradfilter_ma, {"grads": {"a": {"ring": torch.zeros(5, 4, 3)}}}, ValueError, r"not shape \(100, 4, 3\)"),
        (gradfilter_ma, {"grads": {"a": deque([torch.zeros(3)], 100)}}, ValueError, r"grads\['a'\] has shape"),
        (gradfilter_ma, {"grads": {"a": deque(maxlen=5)}}, ValueError, r"grads\['a'\] is of window_size=5"),
        (gradfilter_ma, {"grads": {"a": torch.zeros(4, 3)}}, ValueError, "what the last call of this function"),
        (gradfilter_ema, {"grads": {"a": {"ring": torch.zeros(5, 4, 3)}}}, ValueError, "has type dict"),
        (gradfilter_ema, {"grads": []}, TypeError, "grads is a list"),
        (gradfilter_ema, {"grads": {"module.a": torch.zeros(4, 3)}}, ValueError, "of other parameters .module.a, "),
    ],
)
def test_bad_input_is_refused_before_anything_has_changed(
    function: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = Holder()
    model.set_grads(recorded(1)[0])
    before = model.grads()
    with pytest.raises(error, match=words):
        function(**{"m": model} | arguments)
    for name, g in model.grads().items():
        assert (g == before[name]).all()


@pytest.mark.parametrize("function", [gradfilter_ema, gradfilter_ma])
def test_sparse_gradients_are_refused_by_name(function: Callable[..., Any]) -> None:
    model = nn.Embedding(4, 2, sparse=True)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="weight: grokadamw does not support sparse gradients"):
        function(model)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0: grokadamw does not support sparse"):
        Grokfast(SGD(model.parameters())).step()


# the window


@settings(max_examples=100)
@given(
    size=st.integers(1, 6),
    dtype=st.sampled_from([None, torch.bfloat16]),
    seed=st.integers(0, 2**31),
    finite=st.lists(st.booleans(), max_size=20),
    known=st.booleans(),
)
def test_a_window_has_the_mean_of_the_last(
    size: int, dtype: torch.dtype | None, seed: int, finite: list[bool], known: bool
) -> None:
    """The host may or may not read which gradients are finite, and the windows begin at different steps."""
    rng = np.random.default_rng(seed)
    params = [torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    windows = [window.new(p, size, dtype, torch.device("cpu")) for p in params]
    past: list[list[Tensor]] = [[], []]
    for step, is_finite in enumerate(finite):
        late = 2 if step >= 3 else 1  # the second window begins later
        grads = [torch.tensor(rng.normal(size=tuple(p.shape))) for p in params][:late]
        if not is_finite:
            grads[0].view(-1)[0] = torch.nan
        means = [torch.full_like(p, 7.0) for p in params[:late]]
        if known and is_finite:
            window.average(windows[:late], grads, means, None)
        else:
            window.average(windows[:late], grads, means, torch.tensor(is_finite))
        for kept, grad, mean in zip(past, grads, means, strict=False):
            if is_finite:
                kept.append(grad.to(dtype or grad.dtype).double())
                torch.testing.assert_close(mean, torch.stack(kept[-size:]).mean(0), rtol=1e-12, atol=1e-12)
            else:
                assert (mean == 7).all()
    assert [int(w.seen) for w in windows] == [len(kept) for kept in past]


def test_rounding_does_not_add_up() -> None:
    """Adding and later subtracting large gradients leaves an error in the sum, which is gone after the lap."""
    w = window.new(torch.zeros(1000), 10, None, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for step in range(1000):
        window.push([w], [torch.randn(1000, generator=generator) * (1e6 if step < 980 else 1.0)])
    exact = w.ring.double().sum(0)
    torch.testing.assert_close(w.total.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [gradfilter_ema, gradfilter_ma])
def test_a_gradient_of_two_parameters_is_amplified_once(function: Any) -> None:
    """Autograd gives both summands the same gradient tensor. Gradients that are views of one buffer stay views."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(3, 2)) for _ in range(4)])
    (torch.ones(1, 3, 2) * model[0][None].add(model[1][None])).sum().backward()
    assert model[0].grad.data_ptr() == model[1].grad.data_ptr()
    buffer = torch.ones(2, 3, 2)
    model[2].grad, model[3].grad = buffer.unbind()
    options = {"window_size": 1} if function is gradfilter_ma else {}
    function(model, lamb=2.0, **options)
    assert all(torch.equal(p.grad, torch.full((3, 2), 3.0)) for p in model)
    assert torch.equal(buffer, torch.full((2, 3, 2), 3.0))


@pytest.mark.parametrize("function", [gradfilter_ema, gradfilter_ma])
def test_an_expanded_gradient_is_filtered(function: Any) -> None:
    """torch.autograd.grad returns the gradient of a sum as one number at all places."""
    model = nn.Module()
    model.first, model.second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3, 4))
    loss = (model.first**2).sum() + model.second.sum()
    model.first.grad, model.second.grad = torch.autograd.grad(loss, [model.first, model.second])
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    other = copy.deepcopy(model)
    for name, p in other.named_parameters():
        p.grad = expected[name]
    function(model), function(other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)


@pytest.mark.parametrize("function", [gradfilter_ema, gradfilter_ma])
def test_what_is_frozen_is_left_out_even_with_a_gradient(function: Any) -> None:
    model = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(2)])
    for p in model:
        p.grad = torch.ones(2)
    model[0].requires_grad_(False)
    options = {"window_size": 1} if function is gradfilter_ma else {}
    assert list(function(model, lamb=1.0, **options)) == ["1"]
    assert [p.grad.tolist() for p in model] == [[1, 1], [2, 2]]


def test_a_gradient_that_autograd_left_negated_is_filtered() -> None:
    model = nn.Module()
    model.p = nn.Parameter(torch.tensor(0.5))
    one = torch.complex(torch.tensor(1.0), model.p).conj()
    (one * torch.complex(torch.tensor(2.0), torch.tensor(1.0))).real.backward()
    assert model.p.grad.is_neg()
    before = model.p.grad.item()
    gradfilter_ema(model, lamb=2.0)
    assert model.p.grad.item() == pytest.approx(3 * before)
