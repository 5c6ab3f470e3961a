"""Backends that get addresses never get a stale one or tensors that overlap, and tell autograd what they wrote."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grokadamw import GrokAdamW
from grokadamw import backends as update
from grokadamw.backends import cpu, gpu, native
from grokadamw.step import batches, cache

from ..models import batch, network, running
from .test_update import TOLERANCES

DTYPES = list(TOLERANCES)


@pytest.fixture(params=["cpu", "gpu"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    with running(request.param):
        yield request.param


def twins(**options: Any) -> tuple[list[nn.Module], list[GrokAdamW]]:
    """Return two equal networks and an optimizer for each: the first uses the kernel, the second foreach."""
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
    """Replace the data of the state's tensors, as functions that move an optimizer to a device do."""
    for state in optimizer.state.values():
        for x in state.values():
            x.data = x.data.clone()


def share_the_state(model: nn.Module, optimizer: GrokAdamW) -> None:
    """Share the state with other processes, which moves its memory but keeps its storages."""
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
    """Replace the parameters in the groups, as FSDP2 under Accelerate does."""
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
    """Change the strides of the square weight and of its gradient, but not those of its state."""
    p = model[2].weight  # type: ignore[index, union-attr]
    p.data, p.grad.data = p.data.t().contiguous().t(), p.grad.data.t().contiguous().t()  # type: ignore[union-attr]


def transpose_a_gradient(model: nn.Module, optimizer: GrokAdamW) -> None:
    p = model[2].weight  # type: ignore[index, union-attr]
    p.grad = p.grad.t().contiguous().t()  # type: ignore[union-attr]


def stretch_a_gradient(model: nn.Module, optimizer: GrokAdamW) -> None:
    p = model[4].bias  # type: ignore[index, union-attr]
    p.grad = torch.full((1,), 0.5, device=p.device).expand(3)


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
def _looks(request: pytest.FixtureRequest, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:  # as with a torch older than 2.10
        if implementation == "gpu":
            pytest.skip("signatures do not depend on the implementation, and interpreted kernels are slow")
        monkeypatch.setattr(native, "signature", lambda: None)


@pytest.mark.usefixtures("_looks")
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
@pytest.mark.parametrize("from_a_signal", [False, True])
def test_whatever_moves_is_followed(
    event: Callable[[nn.Module, GrokAdamW], None],
    from_a_signal: bool,
    implementation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors move between two steps, or in a signal during one. Memory that they left is not written again."""
    if from_a_signal and event is replace_the_parameters:
        pytest.skip("a signal cannot replace the parameters of the step that calls it")
    steps_of_kernel = []
    module, name = (cpu, "step") if implementation == "cpu" else (gpu, "_update")
    step = getattr(module, name)

    def spy(*args: Any) -> None:
        tensors = args[0] if implementation == "cpu" else args[1][0].batch
        steps_of_kernel.append(len(tensors.params))
        step(*args)

    monkeypatch.setattr(module, name, spy)
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


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_a_sign_that_is_pending_is_seen_in_any_later_step(shape: tuple[int, ...]) -> None:
    """A gradient with a pending negation is noticed, even if it has one element, whose strides reveal nothing."""
    params = [nn.Parameter(torch.ones(shape)) for _ in range(2)]
    optimizers = [GrokAdamW([p], lr=0.1) for p in params]
    for step in range(5):
        value = torch.full(shape, 1.0 + step)
        ours = torch.complex(value, value).conj().imag if step == 3 else value.clone()
        assert ours.is_neg() == (step == 3)
        for p, grad, optimizer in zip(params, (ours, ours.resolve_neg().clone()), optimizers, strict=True):
            p.grad = grad
            optimizer.step()
    assert torch.equal(*params)


def test_a_step_count_of_another_dtype_is_no_float32() -> None:
    """The step count is float64 if a user sets `optimizer.state[p]["step"]` so by hand."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [GrokAdamW([p], lr=0.1) for p in params]
    for step in range(4):
        for p, optimizer in zip(params, optimizers, strict=True):
            p.grad = torch.full((3,), 1.0 + step)
            optimizer.step()
            if step == 1 and p is params[0]:
                optimizer.state[p]["step"] = optimizer.state[p]["step"].double()
    torch.testing.assert_close(*params)
    assert optimizers[0].state[params[0]]["step"] == 4


@pytest.mark.usefixtures("_looks")
@pytest.mark.parametrize("comes", [True, False], ids=["comes", "goes"])
def test_a_gradient_that_a_signal_brings_or_takes_counts_at_once(comes: bool) -> None:
    """A step uses the gradients that its signal leaves behind, and none of the later steps is lost."""

    def run(change: bool) -> list[nn.Parameter]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.float32)]
        which, step = params[-1 if comes else 0], [0]

        def signal() -> float:
            if change and step[0] == 1:
                which.grad = torch.ones(4) if comes else None
            return 0.0

        optimizer = GrokAdamW(params, lr=0.1, grokking_signal_fns=signal)
        for step[0] in range(5):
            for p in params:
                p.grad = torch.ones_like(p)
            if comes == (step[0] < (2 if change else 1)):  # without the signal, step 1 begins with the change
                which.grad = None
            optimizer.step()
        return params

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def memory(optimizer: GrokAdamW) -> list[Tensor]:
    """Return the parameters and the state as tensors that keep their memory alive."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [*params, *(x for state in optimizer.state.values() for x in state.values())]
    return [x.detach() for x in tensors]


def assert_same_places(models: list[nn.Module], optimizers: list[GrokAdamW]) -> None:
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        ours, expected = (optimizer.state.get(x, {}) for optimizer, x in zip(optimizers, (p, q), strict=True))
        assert ours.keys() == expected.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-6)


@settings(max_examples=settings().max_examples // 5)
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
    with pytest.raises(RuntimeError, match="the parameter.s data was replaced"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, memory(optimizer), strict=True))


@pytest.mark.parametrize(("shape", "grad"), [((6, 8), (4, 8)), ((4, 8), (1, 8))], ids=["other", "broadcast"])
def test_a_gradient_of_another_shape_is_refused_by_name(shape: tuple[int, ...], grad: tuple[int, ...]) -> None:
    first, second = nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.ones(grad))
    optimizer = GrokAdamW([("first", first), ("head.weight", second)])
    first.grad, second.grad = torch.ones(2, 8), torch.ones(grad)
    second.data = torch.ones(shape)
    with pytest.raises(RuntimeError, match=r"head\.weight: the gradient has shape .*Call zero_grad"):
        optimizer.step()
    assert torch.equal(first, torch.ones(2, 8))
    assert not optimizer.state


def test_gradients_are_not_kept() -> None:
    """The optimizer keeps no reference to the user's gradients, so zero_grad() frees their memory."""
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
    """A step keeps no reference to tensors that others drop, e.g. if state goes to the CPU to make room on a GPU."""
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
    assemble = batches.assemble
    monkeypatch.setattr(batches, "assemble", lambda *args: (made.append(1), assemble(*args))[1])
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([p])
    optimizer.state["mine"] = 0.5
    for i in range(5):
        p.grad = torch.ones(3)
        optimizer.step()
        optimizer.state[p]["count"] = 1000 + i
    assert len(made) == 1  # entries of others do not cause a new plan


def test_a_gradient_that_becomes_sparse_is_refused_by_name() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = GrokAdamW([("embedding", p)])
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="embedding: grokadamw does not support sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize("implementation", ["cpu", "blocks", "foreach", "gpu"])
@pytest.mark.parametrize("offset", [0, 3])
def test_gradients_that_come_to_share_memory_with_parameters(implementation: str, offset: int) -> None:
    """Each parameter's gradient becomes the other parameter's memory, as in a game of two players."""
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


# memory layouts


def strided(p: Tensor) -> Tensor:
    return torch.zeros(*p.shape, 2, dtype=p.dtype)[..., 0].copy_(p)


def channels_last(p: Tensor) -> Tensor:
    return p.to(memory_format=torch.channels_last)


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], str]] = {
    "contiguous": (torch.clone, torch.clone, "itself"),
    "channels last": (channels_last, channels_last, "itself"),
    "transposed": (lambda p: p.transpose(0, 3).contiguous().transpose(0, 3),) * 2 + ("itself",),  # type: ignore[dict-item]
    "with gaps": (strided, torch.clone, "foreach"),
    "a gradient with gaps": (torch.clone, strided, "foreach"),
    "a gradient that lies otherwise": (torch.clone, channels_last, "foreach"),
    "a stretched gradient": (torch.clone, lambda g: g[:1, :1, :1, :1].expand(g.shape), "foreach"),
    "a slice": (lambda p: torch.cat([p, p])[2:4], torch.clone, "itself"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", ["cpu", "blocks", "gpu"])
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
        instead = implementation if expected == "itself" and not (implementation == "blocks" and half) else "foreach"
        assert optimizers[0].implementation().startswith(f"{instead}: ")
    state, param = TOLERANCES[dtype]
    if implementation == "gpu" and dtype == torch.bfloat16:
        param *= 3  # Triton's interpreter truncates where GPUs round
    torch.testing.assert_close(params[0], params[1], rtol=param, atol=param)
    for name, x in optimizers[1].state[params[1]].items():
        torch.testing.assert_close(optimizers[0].state[params[0]][name], x, rtol=5 * state, atol=state)


@pytest.mark.parametrize("in_groups", [False, True])
@pytest.mark.parametrize("shared", ["whole", "part"])
def test_parameters_that_share_memory_are_updated_one_after_the_other(
    shared: str, in_groups: bool, implementation: str
) -> None:
    def run(**options: Any) -> tuple[Tensor, str]:
        room = torch.linspace(-1, 1, 12)
        params = [nn.Parameter(room[:8]), nn.Parameter(room[:8] if shared == "whole" else room[4:])]
        apart = [{"params": [p], "lr": lr} for p, lr in zip(params, (0.1, 0.05), strict=True)]
        optimizer = GrokAdamW(apart if in_groups else params, lr=0.1, **options)
        for i in range(3):
            for p in params:
                p.grad = torch.sin(torch.arange(8.0) + i)
            optimizer.step()
        return room, optimizer.implementation()

    (ours, which), (expected, _) = run(), run(foreach=True)
    if in_groups and implementation == "cpu":  # the native kernel takes one group after the other
        torch.testing.assert_close(ours, expected)
        assert which.startswith("cpu: ")
    else:
        assert torch.equal(ours, expected)
        assert which == "foreach: parameters, gradients or state share memory"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_that_share_memory_are_both_updated(dtype: torch.dtype) -> None:
    room = torch.zeros(8, dtype=dtype)
    params = [nn.Parameter(room), nn.Parameter(room)]
    optimizer = GrokAdamW(params, lr=0.1, weight_decay=0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(room, torch.full_like(room, -0.2))
    assert optimizer.implementation() == "reference: parameters, gradients or state share memory"


def test_only_what_the_kernel_cannot_take_goes_another_way(implementation: str) -> None:
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(strided(torch.ones(4))), nn.Parameter(torch.ones(4))]
    optimizer = GrokAdamW(params)
    lines = optimizer.implementation().splitlines()
    for p in params:
        p.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.implementation().splitlines() == lines
    assert [line.partition(":")[0] for line in lines] == [
        f"{implementation} for 2 parameters",
        "foreach for 1 parameter",
    ]
    assert torch.equal(params[0], params[1])


# autograd


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8", "master_weight_bits": 24}], ids=str)
def test_autograd_is_told(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(2, 64, dtype=torch.bfloat16))
    optimizer = GrokAdamW([p], **options)
    p.grad = torch.ones_like(p)
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


# cases that are left to torch's operations


@pytest.fixture
def _never_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the kernel was called")

    for module, name in ((cpu, "step"), (update.blocks, "step"), (gpu, "steps")):
        monkeypatch.setattr(module, name, refuse)


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
        def train(start: Tensor, **options: Any) -> Tensor:
            p = start.clone()
            return stepped(p, GrokAdamW([p], **options))

        start = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
        for options in ({"differentiable": True}, {"gradient_clipping": 0.0}):
            train_one = partial(train, nonfinite="propagate", **options)
            expected = torch.stack([train_one(row, foreach=False) for row in start])
            torch.testing.assert_close(torch.func.vmap(train_one)(start), expected)
        with pytest.raises(RuntimeError, match="under torch.func.vmap: each example would skip"):
            torch.func.vmap(partial(train, differentiable=True))(start)

        def clipped(gradient: Tensor) -> Tensor:
            p = nn.Parameter(torch.ones(3))
            p.grad = gradient
            GrokAdamW([p]).step()
            return p.detach() * 1

        moved, _ = torch.func.jvp(clipped, (torch.ones(3),), (torch.ones(3),))
        assert (moved < 1).all()

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


def test_sets_of_gradients_that_come_back_are_not_looked_at_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to `SETS` sets of gradients keep their plans, e.g. of heads that take turns or modules left out at random."""
    made: list[int] = []
    assemble = batches.assemble
    monkeypatch.setattr(batches, "assemble", lambda *args: (made.append(1), assemble(*args))[1])
    ours, expected = ([nn.Parameter(torch.ones(3, 2)) for _ in range(cache.SETS + 2)] for _ in range(2))
    optimizers = [GrokAdamW(ours, gamma=0.0), GrokAdamW(expected, gamma=0.0, foreach=True)]
    for turn in range(4):
        for i in range(cache.SETS):
            for params, optimizer in zip((ours, expected), optimizers, strict=True):
                for j, p in enumerate(params):
                    p.grad = torch.full((3, 2), 0.1 * (turn + j + 1)) if j != i else None
                made.clear()
                optimizer.step()
                assert len(made) == (turn == 0)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    for without, is_new in ((0, False), (None, True), (0, False), (1, True)):  # the new set replaces 1, not 0
        for j, p in enumerate(ours):
            p.grad = torch.ones(3, 2) if j != without else None
        made.clear()
        optimizers[0].step()
        assert len(made) == is_new
    assert len(optimizers[0]._run.cache.plans) == cache.SETS
