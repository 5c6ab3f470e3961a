"""On a GPU, the kernel for fewer bits encodes as the definition does, bit for bit, and agrees with `decoded`."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grokadamw import GrokAdamW
from grokadamw.backends import gpu
from grokadamw.backends.types import MicroStep
from grokadamw.state import formats

from ..backends.test_update import numbers
from ..test_fewer_bits import KEPT, bits_of, compare_with_32_bits, equal, made, train
from ..test_formats import CASES, check_codes, coded_batch, on, plain
from .test_gpu import launches_of, nothing_waits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:layer .* of parameter group"),
    pytest.mark.filterwarnings("ignore:a step was skipped"),
]

# full chunks and a tail; rows whose last block is shorter; a vector; rows of less than a block
SHAPES = [(66, 768), (40, 100), (7, 3, 1000), (4099,), (300, 33), (3, 2)]
LIMITS = {"max_row_change": 0.01, "max_row_norm": 2.0}


@pytest.fixture
def _small_tensors_have_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "SMALL", 1)


# bit for bit


def check_a_step(case: str, shape: tuple[int, ...], nth: int | None) -> None:
    """Check that the codes are the encoded results of `gpu` on float32 tensors."""
    options, dtype = CASES[case]
    before = coded_batch(shape, options, dtype, number=7)
    before = before._replace(grads=[before.grads[0].to(dtype)])
    batch = on("cuda", before)
    expected = plain(batch)
    micro_step = {} if nth is None else {"micro_step": MicroStep(3, nth == 0, nth == 2, nth)}
    scalars = numbers(
        beta1=[0.9],
        bias_beta1=[0.9],
        raw_second_moment=nth is not None,
        finite=torch.tensor(True, device="cuda"),
        **micro_step,
    )
    gpu.step(expected, scalars)
    gpu.step(batch, scalars)
    check_codes(on("cpu", batch), on("cpu", expected), before, nth)


@pytest.mark.usefixtures("_small_tensors_have_formats")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_a_step_is_the_plain_one_between_decoding_and_encoding(case: str, shape: tuple[int, ...]) -> None:
    check_a_step(case, shape, None)


@pytest.mark.usefixtures("_small_tensors_have_formats")
@pytest.mark.parametrize("nth", [0, 2])
def test_so_is_one_of_a_micro_batch(nth: int) -> None:
    for shape in SHAPES[:5]:
        check_a_step("int8, bfloat16 of 32 bits", shape, nth)


@pytest.mark.usefixtures("_small_tensors_have_formats")
def test_so_is_one_of_full_chunks_alone() -> None:
    check_a_step("int8", (64, 64), None)


@pytest.mark.parametrize(
    ("shape", "limits"), [((64, 70), {}), ((96, 768), LIMITS), ((64, 70), LIMITS), ((3, 5000), LIMITS)], ids=str
)
def test_32_bits_are_float32_weights(shape: tuple[int, ...], limits: dict[str, float]) -> None:
    compare_with_32_bits(shape, limits, "cuda")


# comparison with `decoded`


def trained(kept: tuple[torch.dtype, dict[str, Any]], steps: int = 4, **options: Any) -> tuple[list[Any], GrokAdamW]:
    params = made(kept[0], shapes=SHAPES, device="cuda")
    optimizer = GrokAdamW(params, lr=1e-2, **kept[1], **options)
    train(params, optimizer, range(steps))
    return params, optimizer


def check_near(found: list[nn.Parameter], expected: list[nn.Parameter], start: list[nn.Parameter]) -> None:
    """Check that weights differ by neighbours at most: both round alike, but numbers that differ in their last bits."""
    for a, b, before in zip(found, expected, start, strict=True):
        a, b, before = a.detach().float(), b.detach().float(), before.detach().float()
        assert (a - b).norm() < 2e-3 * (a - before).norm() + 2e-3 * a.norm()


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("limits", [{}, LIMITS], ids=["free", "limited"])
def test_it_does_as_decoded_does(kept: Any, limits: dict[str, float]) -> None:
    if limits and kept not in [KEPT[name] for name in ("int8", "int8, 32 bits")]:
        pytest.skip("each kind of rows takes seconds to compile")
    (ours, optimizer), (expected, _) = (trained(kept, **limits, foreach=foreach) for foreach in (None, True))
    assert optimizer.implementation() == "gpu: one Triton launch for all tensors of a kind"
    check_near(ours, expected, made(kept[0], shapes=SHAPES, device="cuda"))
    assert equal(bits_of(ours, optimizer), bits_of(*trained(kept, **limits)))
    before = bits_of(ours, optimizer)
    for p in ours:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert equal(before, bits_of(ours, optimizer))


# few launches, and no waiting


@pytest.fixture(params=["int8", "bfloat16, 24 bits"])
def running(request: pytest.FixtureRequest) -> tuple[list[Any], GrokAdamW]:
    return trained(KEPT[request.param])


def test_launches(running: tuple[list[Any], GrokAdamW]) -> None:
    """A step launches two kernels for the norm, one for fewer bits, one for small tensors, and one for step counts."""
    params, optimizer = running
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    of_device = launches_of(optimizer)
    triton = ("squares", "judge", "update", "update_coded")
    counts = Counter(name if name in triton else "others" for name in of_device if "Mem" not in name)
    assert counts["squares"] == counts["judge"] == 1
    assert counts["update"] + counts["update_coded"] == 2
    assert counts["others"] <= 1, of_device
    assert not any("Memcpy" in name for name in of_device), of_device


def test_no_step_waits_for_the_device(running: tuple[list[Any], GrokAdamW]) -> None:
    params, optimizer = running
    for step in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
        with nothing_waits():
            optimizer.step()
    assert optimizer.metrics()["step"] == 7


def test_replays_are_the_eager_run_bit_for_bit() -> None:
    dtype, options = KEPT["int8, 32 bits"]
    both: list[tuple[list[nn.Parameter], GrokAdamW]] = []
    for capturable in (True, False):
        params = made(dtype, shapes=SHAPES, device="cuda")
        for p in params:
            p.grad = torch.ones_like(p)
        both.append((params, GrokAdamW(params, capturable=capturable, **options)))
    (params, replayed), (twins, eager) = both
    for _ in range(3):
        set_gradients(params, 0)
        replayed.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.step()
    assert replayed._run.graphs  # the kernels were captured, not `decoded`
    for step in range(7):
        set_gradients(twins, max(0, step - 2))
        eager.step()
        if step >= 3:
            set_gradients(params, step - 2)
            graph.replay()
    assert equal(bits_of(params, replayed), bits_of(twins, eager))


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """Set gradients in place, where a CUDA graph reads them."""
    for i, p in enumerate(params):
        grad: Tensor = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        assert p.grad is not None
        p.grad.copy_(grad)


def test_copies_go_on_with_the_same_bits() -> None:
    params, optimizer = trained(KEPT["int8, 32 bits"])
    others, other = copy.deepcopy((params, optimizer))
    for pair in ((params, optimizer), (others, other)):
        train(*pair, range(4, 6))
    assert equal(bits_of(params, optimizer), bits_of(others, other))
