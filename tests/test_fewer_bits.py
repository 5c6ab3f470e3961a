"""Training with states and parameters in fewer bits: everything that holds in float32 holds here, too."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grokadamw import GrokAdamW, full_precision_state_dict
from grokadamw.backends import cpu, decoded, native, rows
from grokadamw.checkpoints import to_float32
from grokadamw.options import STATES
from grokadamw.state import formats

from .models import compiled_for, running

KEPT: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "int8": (torch.float32, {"state_dtype": "int8"}),
    "bfloat16": (torch.float32, {"state_dtype": "bfloat16"}),
    "int8, 32 bits": (torch.bfloat16, {"state_dtype": "int8", "master_weight_bits": 32}),
    "bfloat16, 24 bits": (torch.bfloat16, {"state_dtype": "bfloat16", "master_weight_bits": 24}),
    "int8, rounded": (torch.bfloat16, {"state_dtype": "int8", "rounding": "stochastic"}),
    "float16 of 32 bits": (torch.float16, {"master_weight_bits": 32}),
}
SHAPES = [(64, 70), (5000,), (8, 64, 3, 3), (3, 2)]


@pytest.fixture(params=KEPT.values(), ids=KEPT)
def kept(request: pytest.FixtureRequest) -> Any:
    return request.param


def made(
    dtype: torch.dtype, seed: int = 0, shapes: list[tuple[int, ...]] = SHAPES, device: str = "cpu"
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = [0.3 * torch.randn(shape, generator=generator) for shape in shapes]
    params = [p.to(memory_format=torch.channels_last) if p.dim() == 4 else p for p in params]
    return [nn.Parameter(p.to(device, dtype)) for p in params]


def train(params: list[nn.Parameter], optimizer: GrokAdamW, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params:
            grad = torch.randn(p.shape, generator=generator) + p.detach().float().cpu()
            p.grad = torch.empty_like(p).copy_(grad)
        optimizer.step()


def bits_of(params: list[nn.Parameter], optimizer: GrokAdamW) -> list[Tensor]:
    """Return copies of everything that a step writes."""
    states = [optimizer.state[p][name] for p in params if p in optimizer.state for name in sorted(optimizer.state[p])]
    return [x.detach().clone() for x in (*params, *(x for x in states if isinstance(x, Tensor)))]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("form", "dtype"), [("int8", torch.int8), ("bfloat16", torch.bfloat16)])
def test_state_of_fewer_than_4096_elements_is_not_coded(form: str, dtype: torch.dtype) -> None:
    params = made(torch.float32, shapes=[(64, 64), (63, 65)])
    optimizer = GrokAdamW(params, state_dtype=form)
    train(params, optimizer, range(1))
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [dtype, torch.float32]


def test_what_is_kept_has_the_dtypes_that_were_asked_for(kept: Any) -> None:
    dtype, options = kept
    params = made(dtype)
    optimizer = GrokAdamW(params, **options)
    train(params, optimizer, range(1))
    for p in params:
        state = optimizer.state[p]
        form = options.get("state_dtype") if p.numel() >= formats.SMALL else "float32"
        expected = {"int8": torch.int8, "bfloat16": torch.bfloat16}.get(form, torch.float32)
        assert state["exp_avg"].dtype == state["grok_ema"].dtype == expected
        assert ("exp_avg_scale" in state) == (form == "int8")
        low = {32: torch.int16, 24: torch.int8}.get(options.get("master_weight_bits"))
        assert (state["param_low"].dtype if "param_low" in state else None) == low


@pytest.mark.parametrize("implementation", ["cpu", "foreach", "reference", "blocks"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_every_bit(kept: Any, implementation: str, poison: float) -> None:
    dtype, options = kept
    with running(implementation, chunk=4096) as how:
        params = made(dtype)
        optimizer = GrokAdamW(params, **options, **how)
        train(params, optimizer, range(3))
        before = bits_of(params, optimizer)
        for p in params:
            p.grad = torch.randn_like(p)
        params[1].grad[7] = poison
        with pytest.warns(RuntimeWarning, match="a step was skipped"):
            optimizer.step()
        assert equal(before, bits_of(params, optimizer))


@pytest.mark.parametrize("implementation", ["cpu", "gpu", "foreach"])
def test_a_step_that_a_device_finds_not_finite_leaves_every_bit(
    kept: Any, implementation: str, nothing_is_free_to_read: None
) -> None:
    dtype, options = kept
    with running(implementation, chunk=4096) as how:
        params = made(dtype)
        optimizer = GrokAdamW(params, **options, **how)
        train(params, optimizer, range(2))
        assert optimizer.implementation().startswith("decoded" if how else implementation)
        before = bits_of(params, optimizer)
        for p in params:
            p.grad = torch.full_like(p, torch.nan)
        optimizer.step()
        assert equal(before, bits_of(params, optimizer))


@pytest.mark.parametrize("steps", [1, 3])
def test_all_follow_the_kernel_of_the_cpu(kept: Any, steps: int) -> None:
    """Results differ by neighbouring numbers: all backends round alike, but the last bits of their inputs differ."""
    dtype, options = kept
    found = []
    for implementation in ("cpu", "foreach", "reference", *(["gpu"] if steps == 1 else [])):  # the interpreter is slow
        with running(implementation, chunk=4096) as how:
            params = made(dtype)
            optimizer = GrokAdamW(params, lr=1e-2, accumulation_steps=steps, second_moment="raw", **options, **how)
            train(params, optimizer, range(4 * steps))
            found.append([p.detach().float() for p in params])
    start = made(dtype)
    for other in found[1:]:
        for a, b, p in zip(found[0], other, start, strict=True):
            assert (a - b).norm() < 2e-3 * (a - p.detach().float()).norm() + (2e-3 * a.norm() if a.norm() else 0)


def test_copies_and_pickles_go_on_with_the_same_bits(kept: Any) -> None:
    dtype, options = kept
    params = made(dtype)
    optimizer = GrokAdamW(params, **options)
    train(params, optimizer, range(3))
    both = copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))
    train(params, optimizer, range(3, 6))
    for ps, other in both:
        train(ps, other, range(3, 6))
        assert equal(bits_of(params, optimizer), bits_of(ps, other))


@pytest.mark.parametrize("how", [{}, {"foreach": True}])
def test_a_resumed_run_is_the_uninterrupted_one(kept: Any, how: dict[str, Any]) -> None:
    dtype, options = kept
    params = made(dtype)
    optimizer = GrokAdamW(params, **options, **how)
    train(params, optimizer, range(3))
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), [p.detach() for p in params]), file)
    train(params, optimizer, range(3, 6))
    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    others = [nn.Parameter(p) for p in weights]
    resumed = GrokAdamW(others, **options, **how)
    resumed.load_state_dict(saved)
    train(others, resumed, range(3, 6))
    assert equal(bits_of(params, optimizer), bits_of(others, resumed))


def test_groups_differ_and_parameters_may_come_late_or_have_no_gradient(kept: Any) -> None:
    """Each parameter ends as if it were trained alone in the same place."""
    dtype, options = kept
    a, b, c, d = made(dtype, shapes=[(64, 70)] * 4)
    optimizer = GrokAdamW(
        [{"params": [a]}, {"params": [b], "lr": 1e-2, "weight_decay": 0.1}], gradient_clipping=0.0, gamma=0.0, **options
    )
    before = b.detach().clone()
    train([a], optimizer, range(3))
    assert torch.equal(b, before)
    assert b not in optimizer.state
    optimizer.add_param_group({"params": [c], "lr": 3e-3})
    for param in (a, b, c):
        train([param], optimizer, range(3))
        param.grad = None
    for number, (param, lr, decay) in enumerate([(a, 1e-3, 1e-2), (b, 1e-2, 0.1), (c, 3e-3, 1e-2)]):
        fresh = made(dtype, shapes=[(64, 70)] * 4)
        idle = [nn.Parameter(torch.zeros(1)) for _ in range(number)]
        alone = GrokAdamW(
            [*idle, fresh[number]], lr=lr, weight_decay=decay, gradient_clipping=0.0, gamma=0.0, **options
        )
        train([fresh[number]], alone, range(3))
        if param is a:
            train([fresh[0]], alone, range(3))
        assert equal(bits_of([param], optimizer), bits_of([fresh[number]], alone))
    assert d.grad is None


MATRICES = [(name, shape) for name in ("cpu", "foreach") for shape in [(64, 70), (40, 3, 64), (3, 5000), (600, 20)]]
MATRICES += [("gpu", shape) for shape in [(64, 70), (20, 3, 64), (2, 2000), (50, 20)]]  # the interpreter is slow


@pytest.mark.parametrize(("implementation", "shape"), [*MATRICES, ("foreach", (2, 70000))])
@pytest.mark.parametrize("limits", [{}, {"max_row_change": 0.01, "max_row_norm": 2.0}], ids=["free", "limited"])
def test_32_bits_are_float32_weights(implementation: str, shape: tuple[int, ...], limits: dict[str, float]) -> None:
    """The weights agree to the bit, also with limits on rows. foreach takes very long rows of 16 bits."""
    with running(implementation, chunk=4096) as how:
        compare_with_32_bits(shape, limits | how)


def compare_with_32_bits(shape: tuple[int, ...], options: dict[str, Any], device: str = "cpu") -> None:
    (low,) = made(torch.bfloat16, shapes=[shape], device=device)
    wide = nn.Parameter(low.detach().float())
    pairs = [
        (low, GrokAdamW([low], lr=1e-2, state_dtype="int8", master_weight_bits=32, **options)),
        (wide, GrokAdamW([wide], lr=1e-2, state_dtype="int8", **options)),
    ]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        grad = torch.randn(shape, generator=generator).bfloat16()
        for param, optimizer in pairs:
            param.grad = grad.to(device, param.dtype)
            optimizer.step()
    state = pairs[0][1].state[low]
    assert torch.equal(formats.full(low.detach(), state["param_low"]), wide)


@pytest.mark.parametrize("name", ["bfloat16", "int8, 32 bits"])
@pytest.mark.parametrize("limits", [{"max_row_change": 0.02}, {"max_row_change": 0.05, "max_row_norm": 2.0}], ids=str)
def test_all_limit_rows_alike(name: str, limits: dict[str, float]) -> None:
    """There are rows of whole blocks and others, short rows, and rows that the GPU's kernel reads twice."""
    dtype, options = KEPT[name]
    shapes = [(40, 128), (50, 90), (3, 1500), (4, 1088)]
    found = []
    for implementation in ("cpu", "gpu", "foreach"):
        with running(implementation, chunk=4096) as how:
            params = made(dtype, shapes=shapes)
            optimizer = GrokAdamW(params, lr=0.1, **options, **limits, **how)
            train(params, optimizer, range(2))
            found.append([formats.full(p.detach(), optimizer.state[p].get("param_low")) for p in params])
    for other, start in zip(found[1:], [made(dtype, shapes=shapes)] * 2, strict=True):
        for a, b, before in zip(found[0], other, start, strict=True):
            assert (a - b).norm() < 2e-3 * (a - before.detach().float()).norm()
            norm = limits.get("max_row_norm", torch.inf)
            assert (b.norm(dim=1) <= 1.001 * norm).all()


def test_rows_are_limited_once_if_memory_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that decodes limits the rows, a piece at a time."""
    calls = []
    limit = rows.limit
    monkeypatch.setattr(rows, "limit", lambda batch, *rest: (calls.append(batch), limit(batch, *rest)))
    for foreach in (None, True):
        (p,) = made(torch.float32, shapes=[(2, 70_000)])
        p.grad = p.detach()
        optimizer = GrokAdamW([p], max_row_change=0.01, state_dtype="int8", foreach=foreach)
        optimizer.step()
        assert optimizer.implementation().startswith("decoded: ")
        assert [batch.coded for batch in calls] == [None] * (1 if foreach is None else 2)


LIES = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "with gaps": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}


CHANGES = [
    ("contiguous", "channels last"),
    ("channels last", "contiguous"),
    ("contiguous", "with gaps"),
    ("transposed", "contiguous"),
]


@pytest.mark.parametrize(
    ("implementation", "first", "then"),
    [
        *((name, *change) for name in ("cpu", "foreach", "reference") for change in CHANGES),
        *(("gpu", *change) for change in CHANGES[:2]),
        *(pytest.param("gpu", *change, marks=pytest.mark.long) for change in CHANGES[2:]),  # interpreted, and so slow
    ],
)
def test_a_memory_format_may_change_in_the_middle_of_a_run(
    kept: Any, implementation: str, first: str, then: str
) -> None:
    """If state in another memory format were updated in a copy alone, it would never change again."""
    dtype, options = kept
    shapes = [(8, 64, 3, 3), (20, 8, 5, 8)]
    start, expected = made(dtype, shapes=shapes), made(dtype, shapes=shapes)
    for p in expected:
        p.data = LIES["contiguous"](p.data)
    plain = GrokAdamW(expected, lr=1e-2, **options)
    train(expected, plain, range(7))
    with running(implementation, chunk=4096) as how:
        params = made(dtype, shapes=shapes)
        optimizer = GrokAdamW(params, lr=1e-2, **options, **how)
        for layout, steps in ((first, range(3)), (then, range(3, 7))):
            for p in params:
                p.data, p.grad = LIES[layout](p.data), None
            train(params, optimizer, steps)
    for p, other, before in zip(params, expected, start, strict=True):
        assert (p.float() - other.float()).norm() < 0.06 * (other.float() - before.float()).norm()
        found, wanted = optimizer.state[p], plain.state[other]
        for name in ("exp_avg", "exp_avg_sq", "grok_ema"):
            x, y = formats.unpacked(found, name), formats.unpacked(wanted, name)
            assert (x - y).norm() < 0.03 * y.norm()
            fresh = formats.new(p, name, optimizer.defaults, torch.float32)[name]
            assert found[name].dtype == fresh.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_some_rows_at_a_time_or_all_at_once(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kernel that decodes, pieces and whole tensors give the same bits, also with limits on rows."""
    runs = []
    for piece in (decoded._PIECE, 700):
        monkeypatch.setattr(decoded, "_PIECE", piece)
        params = made(dtype, shapes=[(70, 64), (20, 300), (5000,)])
        limits = {"max_row_change": 0.01, "max_row_norm": 1.0}
        optimizer = GrokAdamW(params, lr=0.01, state_dtype=form, rounding="stochastic", foreach=True, **limits)
        train(params, optimizer, range(3))
        runs.append([*params, *(x for p in params for x in optimizer.state[p].values())])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("implementation", ["cpu", "foreach"])
def test_low_bits_follow_their_weights_into_another_memory_format(implementation: str, bits: int) -> None:
    weights = []
    for is_changed in (True, False):
        with running(implementation) as how:
            (p,) = made(torch.bfloat16, shapes=[(8, 64, 3, 3)])
            optimizer = GrokAdamW([p], lr=1e-3, master_weight_bits=bits, **how)
            train([p], optimizer, range(3))
            if is_changed:
                p.data, p.grad = LIES["contiguous"](p.data), None
            train([p], optimizer, range(3, 4))
        weights.append(formats.full(p.detach(), optimizer.state[p]["param_low"]))
    torch.testing.assert_close(*weights, rtol=2.0**-14, atol=1e-6)  # the last bit of a bfloat16 is 2^-8 of it


@pytest.mark.parametrize("lamb", [0.0, 2.0])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("implementation", ["cpu", "gpu", "foreach", "reference"])
def test_a_model_of_float64_has_state_of_full_precision(form: str, implementation: str, lamb: float) -> None:
    """State becomes float64 if the model is converted within a run, even if the slow gradient is made after that."""
    with running(implementation, chunk=4096) as how:
        params = made(torch.float32)
        optimizer = GrokAdamW(params, state_dtype=form, lamb=lamb, **how)
        train(params, optimizer, range(2))
        for p in params:
            p.data, p.grad = p.data.double() + 1e-9, None
        others = copy.deepcopy(params)
        plain = GrokAdamW(others, lamb=lamb, foreach=False)
        saved = to_float32(optimizer.state_dict())
        plain.load_state_dict({**saved, "param_groups": plain.state_dict()["param_groups"]})
        for trained, stepped in ((params, optimizer), (others, plain)):
            stepped.param_groups[0]["lamb"] = 2.0
            train(trained, stepped, range(2, 4))
    for p, other in zip(params, others, strict=True):
        torch.testing.assert_close(p, other, rtol=1e-12, atol=1e-12)
        assert {optimizer.state[p][name].dtype for name in STATES} == {torch.float64}
        assert not any(name.endswith("_scale") for name in optimizer.state[p])


# the kernel: the same bits everywhere

WIDE = [(3, 60_001), (300, 700), (200_000,), (70, 33), (64, 64)]


def results(kept: Any, limits: dict[str, float]) -> list[Tensor]:
    dtype, options = kept
    params = made(dtype, shapes=WIDE)
    optimizer = GrokAdamW(params, **options, **limits)
    train(params, optimizer, range(2))
    assert optimizer.implementation().startswith("cpu")
    return bits_of(params, optimizer)


@pytest.mark.parametrize("limits", [{}, {"max_row_change": 0.01, "max_row_norm": 2.0}], ids=["free", "limited"])
def test_any_number_of_threads_gives_the_same_bits(
    kept: Any, limits: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_ALONE", 0)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(results(kept, limits))
    assert all(equal(found[0], other) for other in found[1:])


WEIGHTS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {}),
    (torch.bfloat16, {"rounding": "stochastic"}),
    (torch.bfloat16, {"master_weight_bits": 24}),
    (torch.bfloat16, {"master_weight_bits": 32}),
    (torch.float16, {"master_weight_bits": 24}),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("state", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("lamb", [0.0, 2.0])
@pytest.mark.parametrize("limits", [{}, {"max_row_change": 0.01, "max_row_norm": 2.0}], ids=["free", "limited"])
def test_every_instruction_set_gives_the_same_bits(
    weights: Any, state: str, lamb: float, limits: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype, options = weights
    found = []
    for name in dict.fromkeys(("baseline", *native._instruction_sets())):
        with compiled_for(monkeypatch, name):
            found.append(results((dtype, {**options, "state_dtype": state, "lamb": lamb}), limits))
    assert all(equal(found[0], other) for other in found[1:])


def test_a_tensors_bits_do_not_depend_on_the_others(kept: Any) -> None:
    """Threads take pieces that begin anywhere in a tensor."""
    dtype, options = kept
    found = []
    for before in (0, 1, 63, 65_000):
        first = nn.Parameter(torch.zeros(before, dtype=dtype))
        params = made(dtype, shapes=WIDE[1:])
        optimizer = GrokAdamW([first, *params], gradient_clipping=0.0, gamma=0.0, **options)
        train([*params, first], optimizer, range(2))
        found.append(bits_of(params, optimizer))
    assert all(equal(found[0], other) for other in found[1:])


# compiled


@pytest.mark.parametrize("name", ["int8", "bfloat16", "int8, 32 bits", "int8, rounded"])
def test_torch_compile_takes_the_same_step(name: str) -> None:
    torch._dynamo.reset()
    dtype, options = KEPT[name]
    found = []
    for compiles in (False, True):
        params = made(dtype, shapes=[(64, 70), (3, 2)])
        optimizer = GrokAdamW(params, lr=1e-2, **options, foreach=True)
        if compiles:
            optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
        train(params, optimizer, range(4))
        found.append([p.detach().float() for p in params])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize("bits", [None, 24, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0,), (0, 64), (5, 0), (), (1,)])
def test_tensors_of_no_or_one_element_take_a_step(bits: int | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for how in ({}, {"foreach": True}, {"foreach": False}):
        p = nn.Parameter(torch.ones(shape, dtype=dtype))
        rounding = "stochastic" if bits is None else "nearest"
        optimizer = GrokAdamW([p], state_dtype="int8", master_weight_bits=bits, rounding=rounding, **how)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert p.isfinite().all()


@pytest.mark.parametrize("implementation", ["cpu", "gpu", "foreach", "reference"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001], ids=hex)
def test_a_weight_that_is_not_a_number_stays_so(implementation: str, weights: Any, bits: int) -> None:
    """Every form of NaN stays NaN. 0x7FFFFFFF, a GPU's own, is one less than the bits of -0."""
    dtype, options = weights
    p = nn.Parameter(torch.ones(70, 64, dtype=dtype))
    with running(implementation, chunk=4096) as how:
        optimizer = GrokAdamW([p], nonfinite="propagate", gradient_clipping=0.0, **options, **how)
        for step in range(3):
            if step == 1:
                optimizer.state[p]["exp_avg"].view(torch.int32)[::2] = bits
            p.grad = torch.ones_like(p)
            optimizer.step()
    assert p[::2].isnan().all()
    assert p[1::2].isfinite().all()
    module = nn.Module()
    module.p = p
    if "master_weight_bits" in options:
        assert full_precision_state_dict(module, optimizer)["p"][::2].isnan().all()


@pytest.mark.parametrize("implementation", ["cpu", "gpu", "foreach", "reference"])
@pytest.mark.parametrize("bits", [24, 32])
def test_a_weight_that_is_too_large_for_float16_becomes_infinite(implementation: str, bits: int) -> None:
    """Its low bits are 0: otherwise the next step would make another number of it."""
    p = nn.Parameter(torch.full((70, 64), 65472.0).half())
    p.data[1::2] *= -1
    with running(implementation) as how:
        optimizer = GrokAdamW(
            [p], lr=40.0, weight_decay=0.0, lamb=0.0, gradient_clipping=0.0, master_weight_bits=bits, **how
        )
        for step in range(3):
            p.grad = p.detach().sign() if step == 2 else -p.detach().sign()
            optimizer.step()
            assert (p.isinf() | (p.abs() == 65504)).all() if step == 0 else p.isinf().all()
    assert torch.equal(formats.full(p.detach(), optimizer.state[p]["param_low"]), p.float())


def test_a_parameter_that_was_set_keeps_its_value() -> None:
    """Low bits that belonged to another value change the new one by no more than rounding does."""
    for dtype in (torch.bfloat16, torch.float16):
        (p,) = made(dtype, shapes=[(64, 70)])
        optimizer = GrokAdamW([p], master_weight_bits=32)
        train([p], optimizer, range(2))
        new = 5 * torch.randn_like(p)
        with torch.no_grad():
            p.copy_(new)
        whole = formats.full(p.detach(), optimizer.state[p]["param_low"])
        assert ((whole - new.float()).abs() <= new.abs().float() * 2.0**-7 + 2.0**-24).all()


def test_long_rows_of_halves_take_another_way_only_while_they_are_limited() -> None:
    """Float32 copies take twenty times as long as the kernel, which cannot limit rows as long as these."""
    if isinstance(native.kernel(), str):
        pytest.skip("the native kernel is not here")
    p = nn.Parameter(torch.ones(2, native.kernel().row_bytes, dtype=torch.bfloat16))
    optimizer = GrokAdamW([p], state_dtype="int8", rounding="stochastic")
    for limit in (0.0, 1.0, 0.0):
        optimizer.param_groups[0]["max_row_norm"] = limit
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.implementation().startswith("decoded" if limit else "cpu")
        if limit:
            assert float(p.detach().float().norm(dim=1).max()) == pytest.approx(1.0, rel=0.01)


def test_scales_must_be_contiguous() -> None:
    p = nn.Parameter(torch.ones(64, 128))
    p.grad = torch.ones_like(p)
    optimizer = GrokAdamW([p], state_dtype="int8")
    optimizer.step()
    optimizer.state[p]["exp_avg_scale"] = optimizer.state[p]["exp_avg_scale"].t().contiguous().t()
    with pytest.raises(RuntimeError, match="'exp_avg_scale'.* must be contiguous"):
        optimizer.step()
