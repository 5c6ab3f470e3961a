"""Compare every backend with the same reference. A new backend needs one line in IMPLEMENTATIONS."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grokadamw.backends import blocks, cpu, foreach, gpu, reference
from grokadamw.backends.types import Batch, MicroStep, Scalars, written

from ..models import skip_unless_interpreted

IMPLEMENTATIONS = {"reference": reference, "foreach": foreach, "cpu": cpu, "blocks": blocks, "gpu": gpu}
SHAPES = [(), (0,), (7,), (3, 5), (2, 3, 4)]
# dtype of the parameters → tolerance of the state, which has its own dtype, and of the parameters
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-6, 1e-6),
    torch.bfloat16: (1e-6, 1e-2),
    torch.float16: (1e-6, 2e-3),
}


@pytest.fixture(params=IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Any:
    if request.param is gpu:
        skip_unless_interpreted()
    return request.param


def tensors(dtype: torch.dtype, with_mu: bool = True, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    state = torch.promote_types(dtype, torch.float32)

    def random(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]

    return Batch(
        params=random(dtype),
        grads=random(dtype),
        exp_avgs=random(state),
        exp_avg_sqs=[x.square() for x in random(state)],
        grok_emas=random(state) if with_mu else None,
        steps=[torch.tensor(float(i)) for i in range(len(SHAPES))],
    )


def numbers(**changes: Any) -> Scalars:
    beta1 = [0.9 * 0.8**i for i in range(len(SHAPES))]
    values: dict[str, Any] = {
        "beta1": beta1,
        "bias_beta1": beta1,
        "beta2": 0.99,
        "lr": 0.01,
        "eps": 1e-8,
        "eps_before_correction": False,
        "weight_decay": 0.1,
        "alpha": 0.95,
        "lamb": 1.7,
        "amplify_after": 0,
        "clip": 0.6,
        "raw_second_moment": False,
        "maximize": False,
        "finite": None,
    }
    return Scalars(**values | changes)


def everything(t: Batch) -> list[Tensor]:
    return [x for column in written(t) for x in column]


def copied(t: Batch) -> Batch:
    return Batch(*(None if part is None else [x.clone() for x in part] for part in t[:6]))


CASES = {
    "plain": {},
    "no clipping": {"clip": 1.0},
    "no filter": {"with_mu": False},
    "raw second moment": {"raw_second_moment": True},
    "maximize": {"maximize": True, "clip": 1.0},
    "one beta1": {"beta1": [0.9] * len(SHAPES), "bias_beta1": [0.9] * len(SHAPES)},
    "beta1 of 0": {"beta1": [0.0] * len(SHAPES), "bias_beta1": [0.0] * len(SHAPES)},
    "amplify later": {"amplify_after": 2},
    "first of 3 micro-batches": {"micro_step": MicroStep(3, True, False), "raw_second_moment": True},
    "second of 3 micro-batches": {"micro_step": MicroStep(3, False, False), "raw_second_moment": True},
    "last of 3 micro-batches": {"micro_step": MicroStep(3, False, True), "raw_second_moment": True, "amplify_after": 2},
    "last and only one with a gradient": {"micro_step": MicroStep(3, True, True), "raw_second_moment": True},
    "micro-batch without a filter": {
        "micro_step": MicroStep(3, False, False),
        "raw_second_moment": True,
        "with_mu": False,
        "maximize": True,
    },
    "published": {"bias_beta1": [0.9] * len(SHAPES), "eps_before_correction": True, "eps": 1e-3},
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("on_device", [False, True], ids=["numbers", "tensor numbers"])
def test_agrees_with_the_reference(
    implementation: Any, dtype: torch.dtype, case: str, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = dict(CASES[case])
    start = tensors(dtype, changes.pop("with_mu", True))
    row = [column[0] for column in start[:5] if column is not None]
    monkeypatch.setattr(blocks, "_SMALL", 0)
    if implementation is blocks and blocks.why_not(row, "raw_second_moment" in changes, case == "published"):
        pytest.skip("blocks leaves this to foreach")
    # the reference runs in float64, on inputs that were rounded to the tested dtypes
    wide = Batch(*(None if part is None else [x.to(torch.float64, copy=True) for x in part] for part in start[:6]))
    reference.step(wide, numbers(**changes))
    given = numbers(**changes)
    if on_device:
        as_tensors = {name: torch.tensor(getattr(given, name), dtype=torch.float64) for name in ("lr", "alpha", "clip")}
        given = given._replace(**as_tensors, finite=torch.tensor(True))
    ours = copied(start)
    implementation.step(ours, given)
    assert all(torch.equal(a, b) for a, b in zip(ours.grads, start.grads, strict=True))
    state, param = TOLERANCES[dtype]
    for ours_list, wide_list, tolerance in zip(
        (ours.params, ours.exp_avgs, ours.exp_avg_sqs, ours.grok_emas or [], ours.steps),
        (wide.params, wide.exp_avgs, wide.exp_avg_sqs, wide.grok_emas or [], wide.steps),
        (param, state, state, state, 0),
        strict=True,
    ):
        for a, b in zip(ours_list, wide_list, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_long_lists_are_cut_for_the_cache_and_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [10, foreach._BLOCK, 5, 5, foreach._BLOCK - 1, 1, 7]
    parts = foreach._parts([torch.empty(size) for size in sizes])
    assert [sizes[part] for part in parts] == [sizes[:2], sizes[2:5], sizes[5:]]
    assert foreach._parts([torch.empty(size, device="meta") for size in sizes]) == [slice(None)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the compiler divides lists itself
    assert foreach._parts([torch.empty(size) for size in sizes]) == [slice(None)]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("first_step", [False, True])
def test_a_step_that_is_not_finite_on_a_device_writes_nothing(
    implementation: Any, poison: float, first_step: bool
) -> None:
    given = tensors(torch.float32)
    for g in given.grads:
        g.fill_(poison)
    given.exp_avg_sqs[2].fill_(torch.inf)  # an earlier huge gradient may leave this
    if first_step:
        for x in [*given.exp_avgs, *given.exp_avg_sqs, *(given.grok_emas or []), *given.steps]:
            x.zero_()
    before = [x.clone() for x in everything(given)]
    implementation.step(given, numbers(eps=0.0, finite=torch.tensor(False), clip=torch.tensor(torch.nan)))
    for old, new in zip(before, everything(given), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("with_mu", [True, False])
def test_a_micro_batch_that_is_not_finite_counts_as_0(
    implementation: Any, decays: bool, moves: bool, with_mu: bool
) -> None:
    if implementation is blocks:
        pytest.skip("blocks leaves this to foreach")
    ours, expected = tensors(torch.float32, with_mu), tensors(torch.float32, with_mu)
    for g, zero in zip(ours.grads, expected.grads, strict=True):
        g.fill_(torch.nan)
        zero.zero_()
    micro_step, nan = MicroStep(4, decays, moves), torch.tensor(torch.nan)
    implementation.step(
        ours, numbers(raw_second_moment=True, micro_step=micro_step, finite=torch.tensor(False), clip=nan)
    )
    reference.step(expected, numbers(raw_second_moment=True, micro_step=micro_step))
    for a, b in zip(everything(ours), everything(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_sum_of_squares_is_float64s(implementation: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    many = [torch.randn(shape, generator=generator) * 1e18 for shape in [(), (0,), (300_000,), (10, 20)]]
    expected = sum(x.double().square().sum() for x in many)
    total = implementation.sum_of_squares(many)
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=0)
    assert torch.equal(total, implementation.sum_of_squares([x.clone() for x in many]))
    transposed = torch.randn(30, 40, generator=generator).t()
    torch.testing.assert_close(
        implementation.sum_of_squares([transposed]), transposed.double().square().sum(), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_sum_of_squares_shows_what_is_not_finite(implementation: Any, value: float) -> None:
    x = torch.ones(1000)
    x[777] = value
    assert not implementation.sum_of_squares([torch.ones(3), x]).isfinite()


def test_sum_of_squares_overflows_to_infinity(implementation: Any) -> None:
    assert implementation.sum_of_squares([torch.full((3,), 1e200, dtype=torch.float64)]).isinf()
