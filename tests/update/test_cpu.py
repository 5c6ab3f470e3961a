"""The native kernel, and what leads to it: the same bits everywhere, and never a stale pointer."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grokadamw import GrokAdamW, update, work
from grokadamw.update import cpu, native
from grokadamw.update.reference import Numbers, Tensors

from ..models import batch, network, running
from .test_update import TOLERANCES, everything, numbers

DTYPES = list(TOLERANCES)


@pytest.fixture(autouse=True)
def _without_the_warning_of_many_layers() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "layer .* of parameter group")
        yield


def test_it_was_built_and_looks_through_dlpack() -> None:
    """Development has a compiler, and a torch that shows its tensors."""
    found = native.kernel()
    assert not isinstance(found, str), found
    assert found.instruction_set in ("baseline", "x86-64-v3", "x86-64-v4")
    assert found.look is not None


@contextmanager
def compiled_for(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    with monkeypatch.context() as patch:
        native.kernel.cache_clear()
        patch.setattr(native, "_instruction_sets", lambda: [name])
        yield
    native.kernel.cache_clear()


# bits


def some(sizes: list[int], dtype: torch.dtype, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    state = torch.promote_types(dtype, torch.float32)

    def random(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]

    steps = [torch.tensor(3.0) for _ in sizes]
    return Tensors(
        random(dtype), random(dtype), random(state), [x.square() for x in random(state)], random(state), steps
    )


def with_numbers(count: int) -> Numbers:
    return numbers(beta1=[0.9] * count, bias_beta1=[0.9] * count, amplify_after=0)


def part(tensors: Tensors, place: slice) -> Tensors:
    """A slice of each tensor: copies at the same distance from a multiple of 64 bytes as there."""
    lists = []
    for column in tensors[:5]:
        copies = []
        for x in column:
            room = torch.empty(x.numel() + 64, dtype=x.dtype)
            start = place.start % 64
            copies.append(room[start : start + place.stop - place.start].copy_(x[place]))
        lists.append(copies)
    return Tensors(*lists, [x.clone() for x in tensors.steps])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_elements_bits_do_not_depend_on_where_it_lies(dtype: torch.dtype) -> None:
    """Lengths 0 to 64 at every offset: vectors and what is left over after them round alike."""
    whole = some([128], dtype)
    expected = Tensors(*([x.clone() for x in column] for column in whole[:6]))
    cpu.step(expected, with_numbers(1))
    for offset in range(64):
        places = [slice(offset, offset + length) for length in range(65)]
        lists = [part(whole, place) for place in places]
        together = Tensors(*([x for each in lists for x in each[i]] for i in range(6)))
        cpu.step(together, with_numbers(len(places)))
        for column, theirs in zip(together[:5], expected[:5], strict=True):
            for place, x in zip(places, column, strict=True):
                assert torch.equal(x, theirs[0][place])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["v3", "v4"])
def test_every_instruction_set_gives_the_same_bits(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in native._instruction_sets():
        pytest.skip(f"this processor has no x86-64-{name}")
    results, sums = [], []
    for each in ("baseline", name):
        with compiled_for(monkeypatch, each):
            found = native.kernel()
            assert not isinstance(found, str)
            assert found.instruction_set.endswith(each)
            tensors = some([1, 1000, 33], dtype)
            sums.append(cpu.sum_of_squares(tensors.grads))
            cpu.step(tensors, with_numbers(3))
            results.append(everything(tensors))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(*sums)


@pytest.mark.parametrize("own_threads", [False, True], ids=["OpenMP", "own threads"])
def test_any_number_of_threads_gives_the_same_bits(own_threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = native.kernel()
    assert not isinstance(found, str)
    sizes = [3, found.piece - 1, 0, 5 * found.piece + 7, 1, 2 * found.piece]
    monkeypatch.setattr(cpu, "_ALONE", 0)
    if own_threads:
        monkeypatch.setattr(cpu, "_openmp", lambda: None)
    else:
        assert sys.platform != "linux" or cpu._openmp() is not None
    results = []
    for threads in (1, 2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        tensors = some(sizes, torch.float32)
        total = cpu.sum_of_squares(tensors.grads)
        cpu.step(tensors, with_numbers(len(sizes)))
        results.append([total, *everything(tensors)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_norm_is_summed_in_table_order() -> None:
    """Over fixed blocks of all elements, whatever the tensors are that they belong to."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double()
    found = native.kernel()
    assert not isinstance(found, str)
    blocks = [cpu.sum_of_squares([block]).item() for block in x.split(found.piece)]
    assert cpu.sum_of_squares([x]).item() == sum(blocks)
    many = list(x.split(found.piece // 4))
    assert cpu.sum_of_squares(many).item() == pytest.approx(sum(blocks), rel=1e-14)
    assert cpu.sum_of_squares(many) == cpu.sum_of_squares([block.clone() for block in many])


def test_the_norm_of_what_has_no_gaps_is_the_kernels_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update.foreach, "sum_of_squares", None)
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert cpu.sum_of_squares([x]).item() == pytest.approx(x.double().square().sum().item(), rel=1e-14)


# half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.7, 0.001, -1.3, 3.0, 2.0**-20])
def test_every_half_number_is_read_and_rounded_as_torch_does(dtype: torch.dtype, factor: float) -> None:
    """θ times a number, as decoupled weight decay has it, for all 65,536 of them."""
    theta = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    zeros = [torch.zeros(theta.shape) for _ in range(3)]
    tensors = Tensors([theta.clone()], [torch.zeros_like(theta)], *([x] for x in zeros), [torch.zeros(())])
    cpu.step(tensors, with_numbers(1)._replace(lr=1.0, weight_decay=1 - factor))
    expected = (theta.float() * torch.tensor(1 - (1 - factor), dtype=torch.float64).float()).to(dtype)
    torch.testing.assert_close(tensors.params[0], expected, rtol=0, atol=0, equal_nan=True)
    squares = cpu.sum_of_squares([theta[theta.isfinite()]])
    torch.testing.assert_close(squares, theta[theta.isfinite()].double().square().sum(), rtol=1e-14, atol=0)


# pointers


def twins(**options: Any) -> tuple[list[nn.Module], list[GrokAdamW]]:
    """The same network twice: for the kernel, and for foreach."""
    models = [network(), network()]
    return models, [
        GrokAdamW(model.named_parameters(), lr=0.01, foreach=foreach, **options)
        for model, foreach in zip(models, (None, True), strict=True)
    ]


def backward(model: nn.Module, step: int) -> None:
    x, y = batch(step, next(model.parameters()).dtype)
    model.zero_grad()
    (model(x) - y).square().mean().backward()


def swap_data(model: nn.Module, optimizer: GrokAdamW) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def swap_gradients(model: nn.Module, optimizer: GrokAdamW) -> None:
    for p in model.parameters():
        if p.grad is not None:
            p.grad.data = 2 * p.grad.data


def swap_states_data(model: nn.Module, optimizer: GrokAdamW) -> None:
    """As functions that move an optimizer to a device do."""
    for state in optimizer.state.values():
        for x in state.values():
            x.data = x.data.clone()


def share_the_state(model: nn.Module, optimizer: GrokAdamW) -> None:
    """Which moves the memory under the same storage."""
    for state in optimizer.state.values():
        for x in state.values():
            x.share_memory_()


def share_the_model(model: nn.Module, optimizer: GrokAdamW) -> None:
    model.share_memory()


def replace_the_state(model: nn.Module, optimizer: GrokAdamW) -> None:
    for state in optimizer.state.values():
        state.update({name: x.clone() for name, x in state.items()})


def replace_the_states(model: nn.Module, optimizer: GrokAdamW) -> None:
    for p in list(optimizer.state):
        optimizer.state[p] = {name: x.clone() for name, x in optimizer.state[p].items()}


def forget_a_state(model: nn.Module, optimizer: GrokAdamW) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][1]]


def exchange_two_states(model: nn.Module, optimizer: GrokAdamW) -> None:
    params = [p for p in optimizer.state if p.shape == (8,)]
    for p, state in zip(params, [optimizer.state[p] for p in reversed(params)], strict=True):
        optimizer.state[p] = state


def replace_the_parameters(model: nn.Module, optimizer: GrokAdamW) -> None:
    """In the groups, as FSDP2 under Accelerate does."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            new = nn.Parameter(p.detach().clone())
            new.grad = p.grad
            for group in optimizer.param_groups:
                group["params"] = [new if x is p else x for x in group["params"]]
            setattr(module, name, new)
            if p in optimizer.state:
                optimizer.state[new] = optimizer.state.pop(p)


def to_double_and_back(model: nn.Module, optimizer: GrokAdamW) -> None:
    model.double().float()


def load(model: nn.Module, optimizer: GrokAdamW) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def freeze(model: nn.Module, optimizer: GrokAdamW) -> None:
    model[2].weight.grad = None  # type: ignore[index, union-attr, operator]


def free_the_slow_gradient(model: nn.Module, optimizer: GrokAdamW) -> None:
    optimizer.free_slow_gradient()


def transpose(model: nn.Module, optimizer: GrokAdamW) -> None:
    """The square weight and its gradient lie otherwise, its state as before."""
    p = model[2].weight  # type: ignore[index, union-attr]
    p.data, p.grad.data = p.data.t().contiguous().t(), p.grad.data.t().contiguous().t()  # type: ignore[union-attr]


def transpose_a_gradient(model: nn.Module, optimizer: GrokAdamW) -> None:
    p = model[2].weight  # type: ignore[index, union-attr]
    p.grad = p.grad.t().contiguous().t()  # type: ignore[union-attr]


def stretch_a_gradient(model: nn.Module, optimizer: GrokAdamW) -> None:
    p = model[4].bias  # type: ignore[index, union-attr]
    p.grad = torch.full((1,), 0.5).expand(3)


def turn_a_sign(model: nn.Module, optimizer: GrokAdamW) -> None:
    p = model[4].bias  # type: ignore[index, union-attr]
    p.grad = torch.complex(p.grad, p.grad).conj().imag  # type: ignore[union-attr]
    assert p.grad.is_neg()


def add_a_group(model: nn.Module, optimizer: GrokAdamW) -> None:
    p = nn.Parameter(torch.ones(7))
    model.register_parameter("more", p)
    p.grad = torch.linspace(-1, 1, 7)
    optimizer.add_param_group({"params": [("more", p)]})


def change_numbers(model: nn.Module, optimizer: GrokAdamW) -> None:
    optimizer.param_groups[0].update(lr=0.02, betas=(0.8, 0.9), gamma=0.3, lamb=0.0, eps=1e-3, maximize=True)


def change_layers(model: nn.Module, optimizer: GrokAdamW) -> None:
    optimizer.param_groups[0]["layers"][:] = [3, 0, 1, 0, 2, 2]


EVENTS: list[Callable[[nn.Module, GrokAdamW], None]] = [
    *(swap_data, swap_gradients, swap_states_data, share_the_state, share_the_model, replace_the_state),
    *(replace_the_states, forget_a_state, exchange_two_states, replace_the_parameters, to_double_and_back, load),
    *(freeze, free_the_slow_gradient, transpose, transpose_a_gradient, stretch_a_gradient, turn_a_sign),
    *(add_a_group, change_numbers, change_layers),
]


@pytest.fixture(params=[True, False], ids=["DLPack", "Python"])
def _looks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:  # as with a torch older than 2.10
        monkeypatch.setattr(native, "look", lambda: None)


@pytest.mark.usefixtures("_looks")
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("from_a_signal", [False, True])
def test_whatever_moves_is_followed(
    event: Callable[[nn.Module, GrokAdamW], None], from_a_signal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two steps, or by a signal within one; and what was left behind is written no more."""
    if from_a_signal and event is replace_the_parameters:
        pytest.skip("a step's parameters are those that it begins with")
    steps_of_kernel = []
    step = cpu.step
    monkeypatch.setattr(cpu, "step", lambda t, n: (steps_of_kernel.append(len(t.params)), step(t, n)))
    models, optimizers = twins(nonfinite="propagate", gradient_clipping=0.0)
    due = []
    for model, optimizer in zip(models, optimizers, strict=True):
        if from_a_signal:
            optimizer.set_signals(lambda m=model, o=optimizer: (due.pop(), event(m, o), 0.0)[2] if due else 0.0)
    for i in range(6):
        left_behind: list[tuple[Tensor, Tensor]] = []
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model, i)
            if i == 3:
                if model is models[0]:
                    left_behind = [(x, x.clone()) for x in memory(optimizer)]
                due.append(None)
                if not from_a_signal:
                    due.pop()
                    event(model, optimizer)
            optimizer.step()
            if model is models[0]:
                now = {x.data_ptr() for x in memory(optimizer)}
                assert all(torch.equal(x, old) for x, old in left_behind if x.data_ptr() not in now)
        assert_same_places(models, optimizers)
    assert steps_of_kernel[:2] == [6, 6]


def memory(optimizer: GrokAdamW) -> list[Tensor]:
    """Parameters and state as tensors that keep their memory."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [*params, *(x for state in optimizer.state.values() for x in state.values())]
    return [x.detach() for x in tensors]


def assert_same_places(models: list[nn.Module], optimizers: list[GrokAdamW]) -> None:
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        ours, theirs = (optimizer.state.get(x, {}) for optimizer, x in zip(optimizers, (p, q), strict=True))
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


@settings(max_examples=40)
@given(events=st.lists(st.none() | st.sampled_from(EVENTS), max_size=12), clip=st.sampled_from([0.0, 0.5]))
def test_whatever_moves_in_any_order(events: list[Any], clip: float) -> None:
    models, optimizers = twins(gradient_clipping=clip)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, event in enumerate(events):
            for model, optimizer in zip(models, optimizers, strict=True):
                backward(model, i)
                ready = bool(optimizer.state) and (event is not add_a_group or len(optimizer.param_groups) == 1)
                if event is not None and ready:
                    event(model, optimizer)
                optimizer.step()
            assert_same_places(models, optimizers)


def test_a_parameter_of_another_shape_is_refused_before_anything_is_written() -> None:
    (model, _), (optimizer, _) = twins()
    backward(model, 0)
    optimizer.step()
    p = model[0].weight
    p.data = p.data[:4].clone()
    before = [x.clone() for x in memory(optimizer)]
    with pytest.raises(RuntimeError, match="its data was replaced"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, memory(optimizer), strict=True))


def test_gradients_are_not_kept() -> None:
    """Their memory is the user's, and zero_grad() gives it back."""
    import weakref

    (model, _), (optimizer, _) = twins()
    for i in range(3):
        backward(model, i)
        optimizer.step()
    grads = [weakref.ref(p.grad) for p in model.parameters()]
    optimizer.zero_grad()
    assert all(grad() is None for grad in grads)


def test_a_state_that_is_dropped_is_freed() -> None:
    import weakref

    (model, _), (optimizer, _) = twins()
    for i in range(2):
        backward(model, i)
        optimizer.step()
    slow = [weakref.ref(state["grok_ema"]) for state in optimizer.state.values()]
    optimizer.free_slow_gradient()
    assert all(x() is None for x in slow)
    state_dict = copy.deepcopy(optimizer.state_dict())
    moments = [weakref.ref(state["exp_avg"]) for state in optimizer.state.values()]
    optimizer.load_state_dict(state_dict)
    assert all(x() is None for x in moments)


def test_nothing_is_kept_that_others_drop() -> None:
    """As when the state goes to the CPU after a step, to make room on a GPU."""
    import weakref

    model = network()
    optimizer = GrokAdamW(model.named_parameters())
    for i in range(3):
        backward(model, i)
        optimizer.step()
    moments = [weakref.ref(state["exp_avg"]) for state in optimizer.state.values()]
    for state in optimizer.state.values():
        state.update({name: x.clone() for name, x in state.items()})
    assert all(x() is None for x in moments)
    p = weakref.ref(optimizer.param_groups[0]["params"].pop())
    optimizer.param_groups[0]["layers"].pop()
    del optimizer.state[p()], model[4]
    assert p() is None


def test_what_others_keep_in_the_state_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    calls_for = work.calls_for
    monkeypatch.setattr("grokadamw.grokadamw.calls_for", lambda *args: (made.append(1), calls_for(*args))[1])
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p])
    optimizer.state["mine"] = 0.5
    for i in range(5):
        p.grad = torch.ones(3)
        optimizer.step()
        optimizer.state[p]["count"] = 1000 + i
    assert len(made) == 1  # and does not have the plan made anew


def test_a_gradient_that_becomes_sparse_is_refused_by_name() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([("embedding", p)])
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients, and embedding has one"):
        optimizer.step()


@pytest.mark.parametrize("implementation", ["cpu", "blocks", "foreach"])
@pytest.mark.parametrize("offset", [0, 3])
def test_gradients_that_come_to_share_memory_with_parameters(implementation: str, offset: int) -> None:
    """As in a game of two players, whose gradients are each other's weights."""
    with running(implementation) as options:
        rooms = [torch.linspace(-1, 1, 12), torch.linspace(1, 2, 12)]
        params = [nn.Parameter(room[:8]) for room in rooms]
        optimizer = GrokAdamW(params, lr=0.1, **options)
        for i in range(4):
            for p, room in zip(params, reversed(rooms), strict=True):
                p.grad = room[offset : offset + 8] if i > 1 else room[offset : offset + 8].clone()
            before = [p.grad.clone() for p in params]
            expected = [p.detach().clone().requires_grad_() for p in params]
            twin = GrokAdamW(expected, lr=0.1, foreach=True)
            twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for p, grad in zip(expected, before, strict=True):
                p.grad = grad
            twin.step()
            optimizer.step()
            torch.testing.assert_close(params, expected)


def test_a_table_of_dlpack_that_is_another_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "__dlpack_c_exchange_api__", 123)
    assert native._look("baseline") is None


def test_denormal_numbers_are_flushed_by_every_thread_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_ALONE", 0)
    found = native.kernel()
    assert not isinstance(found, str)
    results = []
    torch.set_flush_denormal(True)
    try:
        for own in (False, True):
            monkeypatch.setattr(torch, "get_num_threads", lambda own=own: 1 + own)
            tensors = some([8 * found.piece], torch.float32)
            tensors.params[0].fill_(1e-39)
            cpu.step(tensors, with_numbers(1)._replace(lr=0.0))
            results.append(tensors.params[0].view(torch.int32))
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(*results)


def test_lambda_may_wait_for_longer_than_anybody_counts() -> None:
    given, expected = (some([4], torch.float32) for _ in range(2))
    cpu.step(given, with_numbers(1)._replace(amplify_after=2**70))
    cpu.step(expected, with_numbers(1)._replace(lamb=0.0))
    assert torch.equal(given.params[0], expected.params[0])


# tensors that lie otherwise


def strided(p: Tensor) -> Tensor:
    return torch.zeros(*p.shape, 2, dtype=p.dtype)[..., 0].copy_(p)


def channels_last(p: Tensor) -> Tensor:
    return p.to(memory_format=torch.channels_last)


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], str]] = {
    "contiguous": (torch.clone, torch.clone, "cpu"),
    "channels last": (channels_last, channels_last, "cpu"),
    "transposed": (lambda p: p.transpose(0, 3).contiguous().transpose(0, 3),) * 2 + ("cpu",),  # type: ignore[dict-item]
    "with gaps": (strided, torch.clone, "foreach"),
    "a gradient with gaps": (torch.clone, strided, "foreach"),
    "a gradient that lies otherwise": (torch.clone, channels_last, "foreach"),
    "a stretched gradient": (torch.clone, lambda g: g[:1, :1, :1, :1].expand(g.shape), "foreach"),
    "a slice": (lambda p: torch.cat([p, p])[2:4], torch.clone, "cpu"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", ["cpu", "blocks"])
def test_tensors_that_lie_otherwise(layout: str, dtype: torch.dtype, implementation: str) -> None:
    of_param, of_grad, expected = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    with running(implementation):
        start = torch.randn(2, 3, 4, 5, generator=generator).to(dtype)
        params = [of_param(start).requires_grad_(), start.clone().requires_grad_()]
        optimizers = [GrokAdamW(params[:1], lr=0.1), GrokAdamW(params[1:], lr=0.1, foreach=False)]
        for _ in range(3):
            grad = torch.randn(2, 3, 4, 5, generator=generator).to(dtype)
            params[0].grad = of_grad(grad)
            params[1].grad = params[0].grad.contiguous()
            for optimizer in optimizers:
                optimizer.step()
        half = dtype not in (torch.float32, torch.float64)
        instead = implementation if expected == "cpu" and not (implementation == "blocks" and half) else "foreach"
        assert optimizers[0].implementation().startswith(f"{instead}: ")
    state, param = TOLERANCES[dtype]
    torch.testing.assert_close(params[0], params[1], rtol=param, atol=param)
    for name, x in optimizers[1].state[params[1]].items():
        torch.testing.assert_close(optimizers[0].state[params[0]][name], x, rtol=5 * state, atol=state)


@pytest.mark.parametrize("shared", ["whole", "part"])
def test_parameters_that_share_memory_are_updated_one_after_the_other(shared: str) -> None:
    def run(**options: Any) -> tuple[Tensor, str]:
        room = torch.linspace(-1, 1, 12)
        params = [nn.Parameter(room[:8]), nn.Parameter(room[:8] if shared == "whole" else room[4:])]
        optimizer = GrokAdamW(params, lr=0.1, **options)
        for i in range(3):
            for p in params:
                p.grad = torch.sin(torch.arange(8.0) + i)
            optimizer.step()
        return room, optimizer.implementation()

    (ours, which), (theirs, _) = run(), run(foreach=True)
    assert torch.equal(ours, theirs)
    assert which == "foreach: parameters, gradients or state share memory"


def test_only_what_the_kernel_cannot_take_goes_another_way() -> None:
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(strided(torch.ones(4))), nn.Parameter(torch.ones(4))]
    optimizer = GrokAdamW(params)
    lines = optimizer.implementation().splitlines()
    for p in params:
        p.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.implementation().splitlines() == lines
    assert [line.partition(":")[0] for line in lines] == ["cpu for 2 parameters", "foreach for 1 parameters"]
    assert torch.equal(params[0], params[1])


# autograd


def test_autograd_is_told() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p])
    p.grad = torch.ones(3)
    for _ in range(2):
        optimizer.step()
    tensors = [p, *optimizer.state[p].values()]
    before = [x._version for x in tensors]
    loss = (p * p).sum() + (p * optimizer.state[p]["exp_avg"]).sum()
    optimizer.step()
    assert all(x._version > version for x, version in zip(tensors, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_step_that_is_skipped_leaves_graphs_alone() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    loss = (p * p).sum()
    p.grad = torch.full((3,), torch.nan)
    with pytest.warns(RuntimeWarning, match="skipped"):
        optimizer.step()
    p.grad = None
    loss.backward()
    assert torch.equal(p.grad, 2 * p)


# stepping aside


@pytest.fixture
def _never_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the kernel was called")

    for module in (update.cpu, update.blocks):
        monkeypatch.setattr(module, "step", refuse)


def stepped(p: Tensor, optimizer: GrokAdamW) -> Tensor:
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    return p


@pytest.mark.usefixtures("_never_the_kernel")
class TestStepsAside:
    def test_for_the_compiler(self) -> None:
        p = nn.Parameter(torch.ones(3))
        optimizer = GrokAdamW([p])
        p.grad = torch.ones(3)
        torch.compile(optimizer.step, backend="eager")()
        assert (p < 1).all()

    def test_for_transforms_of_functions(self) -> None:
        def train(start: Tensor) -> Tensor:
            p = start.clone()
            return stepped(p, GrokAdamW([p], nonfinite="propagate", gradient_clipping=0.0))

        start = torch.ones(2, 3)
        assert (torch.func.vmap(train)(start) < 1).all()

    def test_for_fake_tensors(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        for options in ({}, {"nonfinite": "propagate", "gradient_clipping": 0.0}):
            with FakeTensorMode():
                p = nn.Parameter(torch.ones(3))
                stepped(p, GrokAdamW([p], **options))

    def test_for_real_tensors_that_somebody_watches(self) -> None:
        from torch.utils._python_dispatch import TorchDispatchMode

        class Watch(TorchDispatchMode):
            seen = 0

            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                Watch.seen += "foreach" in str(function)
                return function(*args, **kwargs or {})

        p = nn.Parameter(torch.ones(3))
        optimizer = GrokAdamW([p])
        with Watch():
            stepped(p, optimizer)
        assert Watch.seen > 5

    def test_on_meta(self) -> None:
        p = nn.Parameter(torch.ones(3, device="meta"))
        stepped(p, GrokAdamW([p], nonfinite="propagate", gradient_clipping=0.0))

    def test_for_autograd(self) -> None:
        p = torch.ones(3)
        stepped(p, GrokAdamW([p], differentiable=True))

    def test_for_subclasses(self) -> None:
        class Mine(nn.Parameter):
            pass

        p = Mine(torch.ones(3))
        optimizer = GrokAdamW([p])
        assert optimizer.implementation() == "foreach: a tensor subclass, Mine"
        assert (stepped(p, optimizer) < 1).all()

    def test_where_asked_to(self) -> None:
        for options in ({"foreach": True}, {"foreach": False}, {"fused": False}):
            p = nn.Parameter(torch.ones(3))
            assert (stepped(p, GrokAdamW([p], **options)) < 1).all()


# threads and processes


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LARGE = """
import os, torch
from grokadamw import GrokAdamW
def make():
    p = torch.nn.Parameter(torch.linspace(-1, 1, 1_000_000))
    return p, GrokAdamW([p], lr=0.01)
def step(p, optimizer):
    p.grad = p.detach().cos()
    optimizer.step()
torch.set_num_threads(2)
p, optimizer = make()
step(p, optimizer)
"""


def test_a_fork_steps_on() -> None:
    """The child has none of its parent's threads, and does not wait for them."""
    code = f"""{LARGE}
child = os.fork()
if not child:
    from grokadamw.update import cpu
    assert cpu._threads(1_000_000) == (2, None)
    optimizer.step()
    os._exit(17)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
step(p, optimizer)
print(optimizer.metrics()["step"])
"""
    assert run(code) == "2.0"


def test_the_number_of_threads_is_torchs_of_this_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    found = native.kernel()
    assert not isinstance(found, str)
    seen: list[int] = []
    spy = found._replace(step=lambda table, threads, openmp: (seen.append(threads), found.step(table, threads, openmp)))
    monkeypatch.setattr(native, "kernel", lambda: spy)
    p, small = nn.Parameter(torch.ones(cpu._ALONE + 1)), nn.Parameter(torch.ones(2))
    optimizer = GrokAdamW([{"params": [p]}, {"params": [small]}])
    p.grad, small.grad = torch.ones_like(p), torch.ones_like(small)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1, 2, 1, 3, 1]


def test_where_no_thread_can_be_started_one_does_it_all() -> None:
    code = f"""
import resource
{LARGE}
from grokadamw.update import cpu
cpu._openmp = lambda: None
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
os.setuid(65534)  # root may have as many as it likes
step(p, optimizer)
q, other = make()
step(q, other)
step(q, other)
assert torch.equal(p, q)
print("done")
"""
    if os.getuid() != 0:
        pytest.skip("needs root, to become somebody who may start none")
    assert run(code) == "done"


def test_a_step_needs_no_memory() -> None:
    """Beyond parameters, gradients and state; of the process's own peak, as Linux counts it."""
    code = """
import torch
from grokadamw import GrokAdamW
def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024
p = torch.nn.Parameter(torch.ones(16_000_000))
p.grad = torch.ones_like(p)
optimizer = GrokAdamW([p])
for _ in range(2):
    optimizer.step()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = status("VmRSS")
optimizer.step()
print(status("VmHWM") - before)
"""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("counts memory as Linux does")
    assert float(run(code)) < 4


# which one, and why


def test_it_says_which_one_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [nn.Parameter(torch.ones(2))]

    def said(**options: Any) -> str:
        return GrokAdamW(params, **options).implementation()

    found = native.kernel()
    assert not isinstance(found, str)
    ours = f"cpu: the native kernel, compiled for {found.instruction_set}"
    assert said() == said(fused=True) == ours
    assert said(fused=False) == "foreach: fused=False"
    assert said(foreach=True) == "foreach: foreach=True"
    assert said(foreach=False) == "reference: foreach=False"
    assert said(differentiable=True) == "reference: differentiable=True"
    assert GrokAdamW([torch.ones(2, device="meta")]).implementation() == "foreach: parameters on meta"
    assert GrokAdamW([torch.ones(2, dtype=torch.complex64)]).implementation() == ours
    assert GrokAdamW([{"params": []}]).implementation() == ""
    with running("blocks"):
        assert said() == "blocks: the native kernel was not built"
        with monkeypatch.context() as patch:
            patch.setattr(update.blocks, "_SMALL", 3)
            assert said().startswith("foreach: the native kernel was not built, and so small a tensor is quicker")
        assert said(compat="0.1.2").startswith("foreach: the native kernel was not built, and torch's fused AdamW")
        assert said(second_moment="raw").startswith("foreach: the native kernel was not built, and torch's fused")
        monkeypatch.delattr(torch, "_fused_adamw_")
        assert said() == "foreach: the native kernel was not built, and this torch has no fused AdamW"


def test_it_says_what_the_next_step_will_do() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = GrokAdamW([p])
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.add_param_group({"params": [q], "foreach": True})
    lines = optimizer.implementation().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["cpu for 1 parameters", "foreach for 1 parameters"]
    optimizer.param_groups[0]["foreach"] = True
    assert optimizer.implementation() == "foreach: foreach=True"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"_LIBRARY": native._LIBRARY.with_name("absent.so")}, "was not built, for want of a C compiler"),
        ({"_LIBRARY": native._LIBRARY.with_name("cpu.py")}, "cannot be loaded: .*cpu.py"),
        ({"Table": native._Python}, "is of another version of grokadamw: install it again"),
        ({"_instruction_sets": lambda: ["mmx"]}, "is of another version of grokadamw: install it again"),
    ],
    ids=str,
)
def test_why_there_is_no_kernel(change: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in change.items():
        monkeypatch.setattr(native, name, value)
    monkeypatch.setattr(native, "kernel", native.kernel.__wrapped__)
    with pytest.raises(RuntimeError, match=f"the native kernel {reason}"):
        cpu.step(some([3], torch.float32), with_numbers(1))


def test_torch_may_limit_the_instructions() -> None:
    """By its own variable, for all that it computes."""
    code = "from grokadamw.update import native; print(native.kernel().instruction_set)"
    assert run(code, ATEN_CPU_CAPABILITY="default") == "baseline"


def test_a_dtensor_needs_no_kernel() -> None:
    code = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from grokadamw import GrokAdamW
from grokadamw.update import native
native.kernel = lambda: "not built"
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
p = torch.nn.Parameter(distribute_tensor(torch.ones(100, 100), init_device_mesh("cpu", (1,)), [Shard(0)]))
optimizer = GrokAdamW([p])
p.grad = torch.ones_like(p)
optimizer.step()
print(optimizer.implementation().partition(":")[0], bool((p.to_local() < 1).all()))
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "foreach True", done.stderr
