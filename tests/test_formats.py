"""The formats of states and parameters equal the oracle's bit for bit, also in kernels, and keep to their bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grokadamw.backends import cpu, decoded, foreach, gpu
from grokadamw.backends.types import Batch, Coded, MicroStep
from grokadamw.options import STATES
from grokadamw.state import formats
from grokadamw.state.formats import BLOCK, decode, dither, encode, full, split

from . import formats_oracle as oracle
from .backends.test_update import numbers
from .models import skip_unless_interpreted

SHORT = {"bfloat16": torch.bfloat16, "int8": torch.int8}
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
BACKENDS = {"cpu": (cpu, cpu), "gpu": (gpu, gpu), "decoded": (decoded, foreach)}  # for codes, and for float32
LOWS = {16: None, 24: torch.int8, 32: torch.int16}

places = st.tuples(st.integers(0, 2**20), st.integers(0, 2**40))  # a parameter's number, and a draw
finite = st.floats(-(2.0**99), 2.0**99, width=32)
near_one = st.floats(2**-20, 8, width=32)
small = st.floats(0, 2**-95, width=32)
values = st.one_of(
    st.lists(finite, min_size=3, max_size=140),
    st.lists(st.one_of(near_one, near_one.map(lambda x: -x), st.just(0.0)), min_size=3, max_size=140),
    st.lists(small, min_size=3, max_size=140),
    st.builds(lambda x, n: [x] * n, finite, st.integers(3, 140)),
    st.builds(lambda xs, x: [*xs, x], st.lists(near_one, min_size=2, max_size=63), st.floats(2**10, 2**99, width=32)),
)
matrices = st.builds(
    lambda numbers, rows: torch.tensor(numbers[: len(numbers) // rows * rows]).float().view(rows, -1),
    values,
    st.integers(1, 3),
)


def fit(x: Tensor, name: str) -> Tensor:
    """Return x as the state may hold it: v has no sign, and no infinity."""
    return x.abs() if name == "exp_avg_sq" else x


def kept_in(form: str, name: str) -> torch.dtype:
    return torch.uint8 if form == "int8" and name == "exp_avg_sq" else SHORT[form]


def words(x: Tensor, name: str, number: int = 2, draw: int = 3) -> Tensor:
    return dither(0, x.shape, number, torch.tensor(draw))(name)


def back(x: Tensor, form: str, name: str, number: int = 2, draw: int = 3) -> Tensor:
    return decode(*encode(x, kept_in(form, name), name, words(x, name, number, draw)), name)


def weights_back(x: Tensor, half: str, bits: int, draw: int = 3) -> Tensor:
    return full(*split(x, HALVES[half], LOWS[bits], words(x, "param", draw=draw), True))


def same_bits(a: Tensor, b: np.ndarray) -> bool:
    return a.numpy().dtype == b.dtype and a.numpy().tobytes() == b.tobytes()


@given(places, st.sampled_from([*STATES, "param"]), st.integers(0, 3), st.integers(1, 140), st.integers(0, 2))
def test_dithers_are_the_oracles(place: tuple[int, int], name: str, rows: int, width: int, first: int) -> None:
    expected = oracle.words(*place, name, first + rows, width)[first:]
    for draw in (torch.tensor(place[1]), torch.tensor(place[1]).view(())):
        found = dither(first, (rows, width), place[0], draw)(name)
        assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("name", STATES)
@given(matrices, places)
def test_int8_is_the_oracles(name: str, x: Tensor, place: tuple[int, int]) -> None:
    x = fit(x, name)
    expected = oracle.encoded(x.numpy(), name, oracle.words(*place, name, *x.shape))
    kept = encode(x, kept_in("int8", name), name, words(x, name, *place))
    assert kept[1] is not None
    assert all(map(same_bits, kept, expected))
    assert same_bits(decode(*kept, name), oracle.decoded(*expected, name))


@pytest.mark.parametrize("name", STATES)
@given(matrices, places)
def test_bfloat16_is_the_oracles(name: str, x: Tensor, place: tuple[int, int]) -> None:
    x = fit(x, name)
    expected = oracle.bfloat16(x.numpy(), name, oracle.words(*place, name, *x.shape))
    assert same_bits(back(x, "bfloat16", name, *place), expected)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("bits", LOWS)
@given(matrices, places)
def test_weights_are_the_oracles(half: str, bits: int, x: Tensor, place: tuple[int, int]) -> None:
    x = x.clamp(-60000, 60000)
    dithers = oracle.words(*place, "param", *x.shape)
    whole, near = oracle.weights(x.numpy(), half, bits, dithers)
    rounded, low = split(x, HALVES[half], LOWS[bits], words(x, "param", *place), True)
    assert rounded.dtype == HALVES[half]
    assert same_bits(rounded.float(), near)
    assert same_bits(full(rounded, low), whole)


@pytest.mark.parametrize("half", HALVES)
def test_weights_that_are_tried_one_by_one_are_the_oracles(half: str) -> None:
    """The weights lie around each power of two, and where float16 begins to have fewer bits."""
    ones = torch.tensor([0.0, *(2.0**i for i in range(-60, 15)), 2047 * 2.0**-25, 3 * 2.0**-25])
    bits = ones.view(torch.int32)[:, None] + torch.arange(-70000, 70000, 700, dtype=torch.int32)
    x = bits.clamp(min=0).view(torch.float32)
    x = torch.cat([x, -x])
    for kept in LOWS:
        whole, near = oracle.weights(x.numpy(), half, kept, oracle.words(2, 3, "param", *x.shape))
        rounded, low = split(x, HALVES[half], LOWS[kept], words(x, "param"), True)
        assert same_bits(rounded.float(), near)
        assert same_bits(full(rounded, low), whole)


# in the backends


def coded_batch(shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype, number: int = 0) -> Batch:
    """Return a batch of one parameter after two steps, as a step under these options finds it."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    options = {"state_dtype": "float32", "master_weight_bits": None, "rounding": "nearest", **options}

    def random() -> Tensor:
        sizes = 10 ** (-2 * torch.rand(shape, generator=generator))
        return torch.randn(shape, generator=generator) * sizes

    param = random().to(dtype)
    columns, scales = [], []
    for name in STATES:
        entries, x = formats.new(param, name, options, torch.float32), fit(random(), name)
        rows = formats.as_rows(x)
        if entries[name].dtype != torch.float32:
            draw = words(rows, name, number, 1)
            codes, scale = encode(rows, entries[name].dtype, name, draw)
            x = codes.view(shape)
            if scale is not None:
                entries[f"{name}_scale"].copy_(scale.view(entries[f"{name}_scale"].shape))
        columns.append([x])
        scales.append([entries[f"{name}_scale"]] if f"{name}_scale" in entries else None)
    low = formats.low_dtype(param, options)
    lows = None if low is None else [torch.randint(-100, 100, shape, generator=generator, dtype=low)]
    coded = Coded(*scales, lows, options["rounding"] == "stochastic")
    return Batch([param], [random().to(dtype)], *columns, [torch.tensor(2.0)], indices=(number,), coded=coded)


def on(device: str, batch: Batch) -> Batch:
    """Return a copy of the batch on the device."""
    lists: Any = [None if column is None else [x.to(device, copy=True) for x in column] for column in batch[:6]]
    coded = batch.coded
    if coded is not None:
        kept: Any = [None if column is None else [x.to(device, copy=True) for x in column] for column in coded[:4]]
        coded = Coded(*kept, *coded[4:])
    return Batch(*lists, indices=batch.indices, coded=coded)


def plain(batch: Batch) -> Batch:
    """Return the same batch in float32."""
    coded = batch.coded
    assert coded is not None
    decoded = []
    for name, column, scales in zip(STATES, batch[2:5], coded[:3], strict=True):
        x = column[0]
        if x.dtype != torch.float32:
            rows = formats.as_rows(x)
            x = decode(rows, scales[0].view(len(rows), -1) if scales else None, name).view(x.shape)
        decoded.append([x.clone()])
    low = None if coded.lows is None else coded.lows[0]
    param = full(batch.params[0], low)
    return Batch([param], [batch.grads[0].float()], *decoded, [batch.steps[0].clone()])


CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "int8": ({"state_dtype": "int8"}, torch.float32),
    "bfloat16": ({"state_dtype": "bfloat16"}, torch.float32),
    "mixed": ({"state_dtype": {"exp_avg": "bfloat16", "exp_avg_sq": "int8"}}, torch.float32),
    "int8, bfloat16 of 32 bits": ({"state_dtype": "int8", "master_weight_bits": 32}, torch.bfloat16),
    "bfloat16 of 24 bits": ({"state_dtype": "bfloat16", "master_weight_bits": 24}, torch.bfloat16),
    "bfloat16 of 32 bits, float32": ({"master_weight_bits": 32}, torch.bfloat16),
    "float16 of 32 bits": ({"master_weight_bits": 32}, torch.float16),
    "float16 of 24 bits": ({"master_weight_bits": 24}, torch.float16),
    "bfloat16, rounded": ({"rounding": "stochastic"}, torch.bfloat16),
    "float16, rounded": ({"rounding": "stochastic"}, torch.float16),
}


@pytest.fixture(autouse=True)
def _small_tensors_have_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "SMALL", 1)


def modules(backend: str) -> tuple[Any, Any]:
    """Return the backend for coded state, and the one that computes the same in float32."""
    if backend == "gpu":
        skip_unless_interpreted()
    return BACKENDS[backend]


CPU_SHAPES = [(5, 33), (3, 97), (40, 100), (2, 700), (64, 64), (3, 5, 40), (4099,), (128,), (1, 64)]
PLACES = [(backend, shape, nth) for backend in ("cpu", "decoded") for shape in CPU_SHAPES for nth in (None, 0, 2)]
PLACES += [("gpu", shape, None) for shape in [(3, 97), (40, 100), (65, 64), (3, 5, 40), (4099,)]]
PLACES += [("gpu", (4, 100), nth) for nth in (0, 2)]  # few, because the interpreter is slow


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("backend", "shape", "nth"), PLACES)
def test_a_step_is_the_plain_one_between_the_oracles_decoding_and_encoding(
    case: str, backend: str, shape: tuple[int, ...], nth: int | None
) -> None:
    coded, whole = modules(backend)
    batch = coded_batch(shape, *CASES[case], number=7)
    expected, before = plain(batch), on("cpu", batch)
    micro_step = {} if nth is None else {"micro_step": MicroStep(3, nth == 0, nth == 2, nth)}
    scalars = numbers(beta1=[0.9], bias_beta1=[0.9], raw_second_moment=nth is not None, **micro_step)
    whole.step(expected, scalars)
    coded.step(batch, scalars)
    check_codes(batch, expected, before, nth)


def check_codes(batch: Batch, expected: Batch, before: Batch, nth: int | None = None) -> None:
    """Check that a step of parameter 7, or its micro-batch `nth`, has left the codes of the expected float32 values."""
    assert batch.coded is not None
    assert before.coded is not None
    rows = formats.as_rows(batch.params[0]).shape
    draw = 2 if nth is None else 2 * 3 + nth
    for name, column, scales, exact in zip(STATES, batch[2:5], batch.coded[:3], expected[2:5], strict=True):
        x, y = exact[0].view(rows).numpy(), column[0].view(rows)
        dithers = oracle.words(7, draw, name, *rows)
        if scales is not None:
            codes, its_scales = oracle.encoded(x, name, dithers)
            assert same_bits(y, codes)
            assert same_bits(scales[0].view(its_scales.shape), its_scales)
        else:
            assert same_bits(y.float(), x if y.dtype == torch.float32 else oracle.bfloat16(x, name, dithers))
    if nth == 0:
        assert torch.equal(batch.params[0], before.params[0])
        assert all(map(torch.equal, batch.coded.lows or [], before.coded.lows or []))
        return
    theta, low = batch.params[0], batch.coded.lows
    dtype = theta.dtype
    if dtype == torch.float32:
        assert torch.equal(theta, expected.params[0])
        return
    bits = 16 if low is None else {torch.int8: 24, torch.int16: 32}[low[0].dtype]
    x = expected.params[0].view(rows).numpy()
    whole_weights, near = oracle.weights(
        x, str(dtype).removeprefix("torch."), bits, oracle.words(7, draw, "param", *rows)
    )
    assert same_bits(theta.float().view(rows), near)
    assert same_bits(full(theta, None if low is None else low[0]).view(rows), whole_weights)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_weights_move_as_they_do_in_float32(dtype: torch.dtype, bits: int, backend: str) -> None:
    """Weights that float16 rounds to 0 move, too, and do not become NaN."""
    coded, whole = modules(backend)
    batch = coded_batch((64, 64), {"master_weight_bits": bits}, dtype)
    assert batch.coded is not None
    assert batch.coded.lows is not None
    batch.params[0].zero_()
    batch.coded.lows[0].zero_()
    expected = plain(batch)
    for lr in (1e-9, 1e-8, 3e-7, 1e-6, 1e-4):
        scalars = numbers(beta1=[0.9], bias_beta1=[0.9], lr=lr, weight_decay=0.0)
        coded.step(batch, scalars)
        whole.step(expected, scalars)
        rtol, atol = {32: (1e-6, 2.0**-37), 24: (2.0**-13, 2.0**-29)}[bits]
        weights = full(batch.params[0], batch.coded.lows[0])
        torch.testing.assert_close(weights, expected.params[0], rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(64, 64), (40, 100)])
def test_weights_that_were_set_to_0_go_on_from_there(
    dtype: torch.dtype, bits: int, backend: str, shape: tuple[int, ...]
) -> None:
    """The low bits beside a 0 may be anything; a 0 with low bits below 0 must not become NaN."""
    coded, whole = modules(backend)
    batch = coded_batch(shape, {"master_weight_bits": bits}, dtype, number=7)
    assert batch.coded is not None
    assert batch.coded.lows is not None
    param, low = batch.params[0], batch.coded.lows[0]
    low[0], low[1] = torch.iinfo(low.dtype).min, torch.iinfo(low.dtype).max
    param[:2] = 0
    param[2:, ::2] = -0.0
    weights = full(param, low)
    assert weights.isfinite().all()
    assert not weights[(param == 0) & (low <= 0)].any()
    assert weights[(param == 0) & (low > 0)].all()
    assert torch.equal(weights.signbit()[param == 0], param.signbit()[param == 0])
    expected, before = plain(batch), on("cpu", batch)
    scalars = numbers(beta1=[0.9], bias_beta1=[0.9])
    whole.step(expected, scalars)
    coded.step(batch, scalars)
    check_codes(batch, expected, before)


def test_what_is_not_finite_has_the_same_bits_in_the_kernel() -> None:
    """NaN and infinity may get any bits, but the kernel and `encode` must agree on them."""
    batch = coded_batch((4, 64), {"state_dtype": "int8"}, torch.float32)
    batch.grads[0].view(-1)[[0, 64, 130]] = torch.tensor([torch.nan, 1e25, torch.inf])
    expected, coded = plain(batch), batch.coded
    assert coded is not None
    for updated in (batch, expected):
        cpu.step(updated, numbers(beta1=[0.9], bias_beta1=[0.9], clip=1.0))
    for name, column, scales, (x,) in zip(STATES, batch[2:5], coded[:3], expected[2:5], strict=True):
        codes, its_scales = encode(x, column[0].dtype, name, words(x, name, number=0, draw=2))
        assert torch.equal(column[0], codes)
        assert scales is not None
        assert torch.equal(scales[0], its_scales)


@pytest.mark.parametrize("form", SHORT)
@pytest.mark.parametrize("name", STATES)
def test_processors_that_flush_denormals_find_the_same_bits(form: str, name: str) -> None:
    x = fit(torch.tensor([[2.0**-126, -(2.0**-120), 2.0**-105, 2.0**-102, 1.0] * 20]), name)
    plain = encode(x, kept_in(form, name), name, words(x, name))
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush denormals")
    try:
        flushed = encode(x, kept_in(form, name), name, words(x, name))
        y = decode(*plain, name)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(flushed[0], plain[0])
    assert torch.equal(y, decode(*plain, name))


# the bounds of the docstring


def largest(x: Tensor) -> Tensor:
    """Return the largest size in each element's block."""
    blocks = -(-x.shape[1] // BLOCK)
    padded = torch.nn.functional.pad(x.abs(), (0, blocks * BLOCK - x.shape[1]))
    return padded.view(len(x), blocks, BLOCK).amax(2).repeat_interleave(BLOCK, dim=1)[:, : x.shape[1]]


@pytest.mark.parametrize("form", SHORT)
@pytest.mark.parametrize("name", STATES)
@given(matrices, places)
def test_what_comes_back_is_within_the_bounds(form: str, name: str, x: Tensor, place: tuple[int, int]) -> None:
    x = fit(x, name)
    y, x = back(x, form, name, *place).double(), x.double()
    assert (y[x == 0] == 0).all()
    if form == "bfloat16":
        bound = (x.abs() / 128).clamp(min=2.0 ** (-126 if name == "exp_avg_sq" else -133))
        assert ((y - x).abs() <= bound).all()
        assert name != "exp_avg_sq" or (y[x > 0] > 0).all()
    elif name == "exp_avg_sq":
        x = x.clamp(max=2.0**127)
        assert ((y.sqrt() - x.sqrt()).abs() <= (largest(x).sqrt() / 254).clamp(min=2.0**-74)).all()
        assert (y[(x > 0) & (largest(x) > 2.0**-133)] > 0).all()
    else:
        assert ((y - x).abs() <= (largest(x) / 126).clamp(min=2.0**-100)).all()


@given(matrices, matrices, places)
def test_no_outlier_makes_another_step_explode(m: Tensor, g: Tensor, place: tuple[int, int]) -> None:
    width = min(m.shape[1], g.shape[1])
    m, v = (x[:1, :width].clamp(-(2.0**60), 2.0**60) for x in (m, g))
    v = v.square()
    m, v = torch.where(v > 0, m, 0), torch.where(largest(v) > 2.0**-133, v, 0)
    kept = back(m, "int8", "exp_avg", *place).double().abs(), back(v, "int8", "exp_avg_sq", *place).double().sqrt()
    m, v, steps = m.double(), v.double(), kept[0] / kept[1]
    bound = 2.01 * m.abs() / v.sqrt() + (2.03 * largest(m)).clamp(min=2.0**-99) * 1.01 / largest(v).sqrt()
    assert (steps <= bound)[v > 0].all()


@pytest.mark.parametrize("outlier", [1e3, 1e6, 1e12])
def test_steps_beside_an_outlier_stay_as_they_are_or_get_shorter(outlier: float) -> None:
    torch.manual_seed(0)
    g = torch.randn(1000, BLOCK)
    g[:, 0] *= outlier
    m, v = 0.1 * g, 0.001 * g.square()
    steps = back(m, "int8", "exp_avg") / back(v, "int8", "exp_avg_sq").sqrt()
    assert steps[:, 1:].abs().max() < (2.01 + 2.03) * (m / v.sqrt()).abs().max()


@pytest.mark.parametrize("half", HALVES)
@given(matrices, places)
def test_weights_are_within_the_bounds(half: str, x: Tensor, place: tuple[int, int]) -> None:
    x = x.clamp(-60000, 60000)
    y = weights_back(x, half, 32, place[1])
    if half == "bfloat16":
        assert same_bits(y, x.numpy())
    else:
        assert torch.equal(y[x.abs() >= 2.0**-17], x[x.abs() >= 2.0**-17])
        assert ((y - x).abs() < 2.0**-40).all()
    y = weights_back(x, half, 24, place[1])
    least = 2.0**-141 if half == "bfloat16" else 2.0**-31  # float16 is rounded twice
    assert ((y.double() - x.double()).abs() <= (x.double().abs() / 2**15).clamp(min=least)).all()


# the mean


def kept_anyhow(x: Tensor, kind: str, draw: int = 3) -> Tensor:
    form, name = kind.split(" ")
    return weights_back(x, form, int(name), draw) if name.isdigit() else back(x, form, name, draw=draw)


KINDS = [f"{form} {name}" for form in SHORT for name in STATES]
KINDS += ["bfloat16 16", "bfloat16 24", "float16 16", "float16 24"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", [1.03, 1.9374, 0.3337, 0.0123, 1e-3])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_is_kept_over_elements_and_over_steps(kind: str, x: float, sign: int) -> None:
    """The mean of 10^5 numbers is right to 4 standard errors and 2^-16 of a code. Half are 1.9, to fix the scale."""
    is_v = kind == "int8 exp_avg_sq"
    given = torch.full((1000, 200), sign * x) if "_sq" not in kind else torch.full((1000, 200), x)
    given[:, ::2] = 1.9
    several = [kept_anyhow(given[:10], kind, draw) for draw in range(100)]
    for y in (kept_anyhow(given, kind)[:, 1::2], torch.stack(several)[:, :, 1::2]):
        mean = given[0, 1].double()
        y, mean = (y.double().sqrt(), mean.sqrt()) if is_v else (y.double(), mean)  # v is coded as √v
        if is_v and mean < 1.9**0.5 / 255:
            assert y.mean() >= mean  # no code is 0
        else:
            assert abs(float(y.mean() - mean)) <= 4 * float(y.std()) / 1e5**0.5 + 1.9 / 127 / 2**16


@pytest.mark.parametrize("kind", KINDS)
def test_a_slow_average_is_followed(kind: str) -> None:
    """The average moves by a hundredth of a code per step. Rounding to nearest would never store such a move."""
    x = torch.ones(16, 256)
    for step in range(1500):
        x = kept_anyhow(0.999 * x + 0.001 * 0.5, kind, step)
    exact = 0.5 + 0.5 * 0.999**1500
    assert float(x.mean()) == pytest.approx(exact, rel=1e-2)
    assert float(x.std()) < 0.06 * exact


def test_over_steps_dithers_are_more_even_than_random_numbers() -> None:
    """A tenth of a code is stored in 100 of 1000 steps, with a mean error of 2; random numbers would have one of 10."""
    seen = [dither(0, (1, 500), 2, torch.tensor(step))("exp_avg") < 0.1 * 2**32 for step in range(1000)]
    assert float((torch.stack(seen).sum(0) - 100.0).abs().mean()) < 2


def test_dithers_follow_from_all_that_names_them() -> None:
    """Dithers differ at random between blocks, and are spread evenly within one."""
    count = 2000 * BLOCK
    found = [
        dither(0, (1, count), number, torch.tensor(3))(name).flatten()
        for number in (2, 3)
        for name in (*STATES, "param")
    ]
    noise = torch.stack(found).double() / 2**32 - 0.5
    for lane in (0, 1, 63):
        first = noise[:, lane::BLOCK]
        assert (torch.corrcoef(first) - torch.eye(len(found))).abs().max() < 5 / first.shape[1] ** 0.5
    one = noise[0, ::BLOCK]
    assert torch.corrcoef(torch.stack([one[1:], one[:-1]]))[0, 1].abs() < 5 / len(one) ** 0.5
    assert (noise.mean(1).abs() < 5 * (1 / 12 / count) ** 0.5).all()
    blocks = noise[0].view(-1, BLOCK).sort(1).values
    assert (blocks[:, 1:] - blocks[:, :-1]).max() < 2.5 / BLOCK
    assert not torch.equal(found[0], dither(0, (1, count), 2, torch.tensor(4))("exp_avg").flatten())


# which tensors have a format, and their memory layout


def test_three_states_take_less_than_33_tenths_of_a_byte() -> None:
    options = {"state_dtype": "int8"}
    entries = [formats.new(torch.zeros(64, 64), name, options, torch.float32) for name in STATES]
    assert sum(x.nbytes for entry in entries for x in entry.values()) <= 3.3 * 4096


@pytest.mark.parametrize("form", SHORT)
@pytest.mark.parametrize("shape", [(0, 64), (64,), (33, 40), (2, 3, 40), (130,), (131,)])
def test_a_new_state_is_zero(form: str, shape: tuple[int, ...]) -> None:
    param = torch.zeros(shape)
    for name in STATES:
        entries = formats.new(param, name, {"state_dtype": form}, torch.float32)
        rows, scales = formats.as_rows(entries[name]), entries.get(f"{name}_scale")
        if scales is not None:
            assert scales.shape == (*shape[:1], -(-rows.shape[1] // BLOCK)) if len(shape) > 1 else (-(-shape[0] // 64),)
            scales = scales.view(len(rows), -1) if len(rows) else scales.view(0, 1)
        assert not decode(rows, scales, name).any()


@pytest.mark.parametrize(
    ("param", "form", "expected"),
    [
        (torch.zeros(64, 64), "int8", "int8"),
        (torch.zeros(64, 31), "int8", "float32"),
        (torch.zeros(128, 32), "int8", "int8"),
        (torch.zeros(4096, 1).t(), "int8", "int8"),  # one row, whose stride to the next one means nothing
        (torch.zeros(64, 31), "bfloat16", "bfloat16"),
        (torch.zeros(64, 64).t(), "int8", "float32"),
        (torch.zeros(64, 64).t(), "bfloat16", "bfloat16"),
        (torch.zeros(8, 8, 3, 3).to(memory_format=torch.channels_last), "int8", "int8"),
        (torch.zeros(64, 128)[:, ::2], "int8", "float32"),
        (torch.zeros(64, 64, dtype=torch.float64), "int8", "float32"),
        (torch.zeros(64, 64, dtype=torch.complex64), "bfloat16", "float32"),
        (torch.zeros(64, 64), {"exp_avg": "int8"}, "int8"),
        (torch.zeros(64, 64), {"grok_ema": "int8"}, "float32"),
    ],
)
def test_which_tensors_have_which_format(param: Tensor, form: Any, expected: str) -> None:
    assert formats.format_of(param, "exp_avg", {"state_dtype": form}) == expected
