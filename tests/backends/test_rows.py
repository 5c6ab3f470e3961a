"""Tests of limit_rows by itself, and in steps by torch's operations and by the native kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from grokadamw import GrokAdamW
from grokadamw.backends import cpu, native
from grokadamw.backends.rows import before, limit
from grokadamw.backends.types import Batch

from .test_update import numbers

needs_the_kernel = pytest.mark.skipif(isinstance(native.kernel(), str), reason="the native kernel was not built")


@pytest.fixture(params=[False, pytest.param(True, marks=needs_the_kernel)], ids=["torch", "kernel"])
def _by_both(request: pytest.FixtureRequest) -> Iterator[None]:
    """Limit rows with torch's operations, or with the native kernel."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.param:
            patch.setattr(cpu, "row_width", lambda param, coded: 0)
        yield


by_both = pytest.mark.usefixtures("_by_both")


def limited(
    params: list[torch.Tensor], was: list[torch.Tensor] | None = None, *, change: float = 0, norm: float = 0
) -> None:
    reals = [torch.view_as_real(p) if p.is_complex() else p for p in params]
    batch = Batch(reals, *[[]] * 5, unlimited=range(len(params)))
    scalars = numbers(max_row_change=change, max_row_norm=norm)
    olds = None if was is None else [torch.view_as_real(p) if p.is_complex() else p for p in was]
    limit(batch, scalars, before(batch, scalars) if olds is None else olds)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_rows_are_slices_along_the_first_dimension(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    filters = torch.randn(4, 3, 2, 2).to(dtype)
    filters[1] *= 0.01
    filters[2] = 0
    was = filters.clone()
    limited([filters], norm=1.5)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    norms = filters.to(wide).flatten(1).norm(dim=1)
    exact = 2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-6
    torch.testing.assert_close(norms[[0, 3]].real, torch.tensor([1.5, 1.5], dtype=torch.float64), rtol=exact, atol=0)
    assert torch.equal(filters[1:3], was[1:3])  # shorter rows keep their bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_a_row_moves_by_a_share_of_its_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    was = torch.randn(5, 3, 2, 2).to(dtype)
    was[3] *= 1e-3  # a short row moves like one of norm 0.1
    was[4] = 0
    step = torch.randn_like(was)
    step[1] *= 1e-3
    step[2] = 0
    filters = was + step
    asked = filters.clone()
    limited([filters], [was], change=0.25)
    wide = torch.complex128 if dtype.is_complex else torch.float64

    def norms(rows: torch.Tensor) -> torch.Tensor:
        return rows.to(wide).flatten(1).norm(dim=1).real

    exact = 3e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-5
    moved = filters.to(wide) - was.to(wide)
    torch.testing.assert_close(
        norms(moved)[[0, 3, 4]], 0.25 * norms(was)[[0, 3, 4]].clamp(min=0.1), rtol=exact, atol=1e-6
    )
    for i in (0, 3, 4):
        direction = asked[i].to(wide) - was[i].to(wide)
        torch.testing.assert_close(moved[i] / moved[i].norm(), direction / direction.norm(), rtol=0, atol=exact)
    assert torch.equal(filters[1:3], asked[1:3])  # rows that move little enough keep their bits


@by_both
def test_the_limits_hold_for_decay_too_and_the_norm_has_the_last_word() -> None:
    p = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.3, 0.4]]))
    optimizer = GrokAdamW([p], lr=0.1, weight_decay=5.0, max_row_change=0.1, max_row_norm=10.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()  # AdamW would halve the rows
    torch.testing.assert_close(p.detach(), torch.tensor([[2.7, 3.6], [6.0, 8.0], [0.27, 0.36]]))


@by_both
def test_long_and_short_rows_are_limited_where_gradients_share_their_memory() -> None:
    """The kernel limits short rows alone, and the backend for shared memory limits none."""
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in ((2, 70_000), (4, 8))]
    optimizer = GrokAdamW(params, lr=0.5, weight_decay=0.0, max_row_change=0.01)
    for p in params:
        p.grad = p.detach()
    optimizer.step()
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, 0.99))


@by_both
def test_what_has_no_rows_is_not_limited() -> None:
    params = [torch.nn.Parameter(torch.full(shape, 5.0)) for shape in [(), (3,), (3, 2), (0, 2), (2, 0)]]
    limits = {"max_row_norm": 6.0, "max_row_change": 0.1}
    optimizer = GrokAdamW(params, lr=2.0, weight_decay=0, gradient_clipping=0, gamma=0, **limits)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    seen = [p.detach().flatten()[:1].tolist() for p in params]
    assert seen == [[pytest.approx(3)], [pytest.approx(3)], [pytest.approx(6 * 0.5**0.5)], [], []]


@by_both
def test_one_row_of_complex_numbers_is_none() -> None:
    """A complex vector is not limited, although it has two dimensions when it is viewed as real numbers."""
    p = torch.nn.Parameter(torch.full((3,), 5 + 5j))
    optimizer = GrokAdamW([p], lr=0.1, weight_decay=0, max_row_norm=1.0, max_row_change=0.001)
    p.grad = torch.full_like(p, 1 + 1j)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, 4.9 + 4.9j))


@by_both
@pytest.mark.filterwarnings("ignore:a step was skipped")
@pytest.mark.parametrize("on_device", [False, True])
def test_a_skipped_step_leaves_long_rows_alone(on_device: bool, request: pytest.FixtureRequest) -> None:
    if on_device:
        request.getfixturevalue("nothing_is_free_to_read")
    p = torch.nn.Parameter(torch.full((2, 2), 5.0))
    optimizer = GrokAdamW([p], max_row_norm=1.0, max_row_change=0.1)
    p.grad = torch.full((2, 2), torch.nan)
    optimizer.step()
    assert (p.detach() == 5).all()
    p.grad = torch.ones(2, 2)
    optimizer.step()
    assert p.detach().norm(dim=1).max() < 1.001


@by_both
@pytest.mark.filterwarnings("ignore:the gradients of a micro-batch")
@pytest.mark.parametrize("poisoned", [0, 1])
def test_of_micro_batches_that_are_not_finite_the_others_are_a_step(poisoned: int) -> None:
    p = torch.nn.Parameter(torch.full((1, 4), 5.0))
    optimizer = GrokAdamW([p], accumulation_steps=2, second_moment="raw", max_row_norm=1.0)
    for i in range(2):
        p.grad = torch.full_like(p, torch.nan if i == poisoned else 1.0)
        optimizer.step()
    assert p.detach().norm().item() == pytest.approx(1)


def test_what_is_not_finite_stays_and_spoils_nothing() -> None:
    """Elements that are not finite stay, and do not affect others, in a skipped step and with a propagated NaN."""
    was = torch.tensor([[5, -torch.inf], [3, 4], [3, 4]])
    rows = was.clone()
    limited([rows], [was], change=0.1, norm=1)
    assert rows.tolist()[0] == [5, -torch.inf]
    torch.testing.assert_close(rows[1], torch.tensor([0.6, 0.8]))
    rows = was + torch.tensor([[1, 0], [torch.nan, 1], [torch.inf, 1]])
    limited([rows], [was], change=0.1)
    assert rows.tolist()[0] == [6, -torch.inf]
    torch.testing.assert_close(rows[1:], torch.tensor([[torch.nan, 4.5], [torch.inf, 4.5]]), equal_nan=True)


def test_norms_whose_squares_overflow() -> None:
    for dtype, large in ((torch.float32, 1e30), (torch.bfloat16, 1e30), (torch.float16, 6e4)):
        p = torch.full((2, 4), large, dtype=dtype)
        limited([p], norm=1e-3)
        torch.testing.assert_close(p.double().norm(dim=1), torch.tensor([1e-3, 1e-3]).double(), rtol=1e-2, atol=0)


def test_a_backward_pass_goes_through() -> None:
    start = torch.tensor([[3.0, 4.0], [0.1, 0.2]], dtype=torch.float64, requires_grad=True)

    def stepped(start: torch.Tensor) -> torch.Tensor:
        p = start.clone()
        optimizer = GrokAdamW([p], lr=0.1, differentiable=True, max_row_norm=1.0, max_row_change=0.1)
        p.grad = 0.1 * start
        optimizer.step()
        return p

    assert torch.autograd.gradcheck(stepped, start)


@by_both
def test_a_whole_step_moves_no_row_further() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7))
    optimizer = GrokAdamW(model.named_parameters(), lr=0.5, max_row_change=0.02)
    for _ in range(5):
        was = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        model(torch.arange(7)).square().sum().backward()
        optimizer.step()
        for p, old in zip(model.parameters(), was, strict=True):
            moved = (p.detach() - old).norm(dim=-1)
            if p.dim() > 1:
                torch.testing.assert_close(moved, 0.02 * old.norm(dim=1).clamp(min=0.1), rtol=1e-3, atol=0)
            else:
                assert moved > 0.1


@by_both
def test_groups_have_limits_of_their_own_and_micro_batches_wait_for_the_last() -> None:
    params = [torch.nn.Parameter(torch.full((1, 4), 5.0)) for _ in range(2)]
    groups = [{"params": params[:1], "max_row_norm": 2.0}, {"params": params[1:]}]
    optimizer = GrokAdamW(groups, lr=1e-9, weight_decay=0, accumulation_steps=2, second_moment="raw")
    for expected in ([10, 10], [2, 10]):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert [p.detach().norm().item() for p in params] == pytest.approx(expected)
