"""torch.compile(optimizer.step) gives the eager step's results, from one graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from grokadamw import GrokAdamW, step_in_backward
from grokadamw.signals import AccuracyGap

from .models import KEEPERS, batch, network, train

# torch 2.6 and 2.11 make several graphs of a step that limits rows, and 2.6 of other steps, too
ONE_GRAPH = torch.__version__ >= (2, 13)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def two_groups(model: torch.nn.Module, **options: Any) -> GrokAdamW:
    params = list(model.named_parameters())
    return GrokAdamW([{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.1, "gamma": 0.2}], **options)


def run(
    backend: Any,
    steps: int = 20,
    change: Callable[[GrokAdamW, int, torch.Tensor], object] = lambda *_: None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[list[torch.Tensor], GrokAdamW, list[int]]:
    """Return the weights, the optimizer, and the number of graphs after each step."""
    model = network(dtype)
    optimizer = two_groups(model, **options)
    step = optimizer.step if backend is None else torch.compile(optimizer.step, backend=backend)
    graphs = []

    def take_step(i: int, loss: torch.Tensor) -> None:
        change(optimizer, i, loss)
        step()
        graphs.append(getattr(backend, "frame_count", 0))

    train(model, range(steps), take_step)
    return [p.detach() for p in model.parameters()], optimizer, graphs


def close(ours: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 2e-6) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_one_graph_serves_changing_numbers(foreach: bool | None, dtype: torch.dtype, tolerance: float) -> None:
    """Rates, weight decay, signals and losses (from step 4 on) change at every step, and nothing is compiled again."""
    heard: list[int] = []  # the steps that evaluated the signal
    now = [0]

    def rising() -> float:
        heard.append(now[0])
        return 0.05 * now[0]

    def change(optimizer: GrokAdamW, i: int, loss: torch.Tensor) -> None:
        now[0] = i
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-3 * (1 + i % 7), 0.1 * (1 + i % 3)
        if i > 3:
            optimizer.record(train_loss=loss, eval_loss=loss * (1.5 + 0.1 * i))

    signals = [rising, lambda train_loss, eval_loss: eval_loss - train_loss]
    options = {"grokking_signal_fns": signals, "foreach": foreach, "dtype": dtype}
    options |= {"signal_boost": 1.0, "max_row_change": 0.05, "decay_boost": 8.0}
    eager, reference, _ = run(None, 20, change, **options)
    assert heard == list(range(20))
    heard.clear()
    compiled, optimizer, graphs = run(CompileCounter(), 20, change, **options)
    assert heard == list(range(20))  # once per step, compiled steps included
    assert graphs == [1] * 20
    close(compiled, eager, tolerance)
    ours, expected = optimizer.metrics(), reference.metrics()
    assert ours == pytest.approx(expected, rel=10 * tolerance)


@pytest.mark.parametrize(
    ("options", "graphs"),
    [({}, 1), ({"amplify_after": 4}, 1), ({"accumulation_steps": 2, "second_moment": "raw"}, 2)],
    ids=str,
)
@pytest.mark.parametrize("foreach", [None, False])
def test_one_graph_serves_a_changing_lambda(foreach: bool | None, options: dict[str, Any], graphs: int) -> None:
    """λ is changed by hand, and by the signal."""

    def change(optimizer: GrokAdamW, i: int, loss: torch.Tensor) -> None:
        optimizer.record(train_loss=1.0, eval_loss=1.1 + 0.1 * i)
        optimizer.param_groups[0]["lamb"] = 2.0 - 0.05 * i

    options = {"amplify_by_signal": True, "foreach": foreach, "dtype": torch.float64, **options}
    eager, _, _ = run(None, 20, change, **options)
    compiled, _, seen = run(CompileCounter(), 20, change, **options)
    assert seen[-1] == graphs
    close(compiled, eager, 1e-12)


def test_a_learning_rate_in_a_tensor() -> None:
    def change(optimizer: GrokAdamW, i: int, loss: torch.Tensor) -> None:
        optimizer.param_groups[1]["lr"].fill_(1e-3 * (1 + i))

    def options() -> dict[str, Any]:
        return {"lr": torch.tensor(1e-3), "alpha_init": torch.tensor(0.9)}

    eager, _, _ = run(None, 5, change, **options())
    compiled, _, graphs = run(CompileCounter(), 5, change, **options())
    assert graphs == [1] * 5
    close(compiled, eager)


def test_a_beta1_that_is_scheduled_is_compiled_in_once_more() -> None:
    """OneCycleLR cycles β1 in this way. The step of AdamW is compiled twice then, too."""

    def change(optimizer: GrokAdamW, i: int, loss: torch.Tensor) -> None:
        for group in optimizer.param_groups:
            group["betas"] = (0.95 - 0.01 * i, 0.99)

    eager, _, _ = run(None, 10, change)
    compiled, _, graphs = run(CompileCounter(), 10, change)
    assert graphs == [1] + [2] * 9
    close(compiled, eager)


@pytest.mark.parametrize("backend", [pytest.param("aot_eager", marks=pytest.mark.long), "inductor"])
def test_real_backends(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    eager, _, _ = run(None, 6)
    compiled, _, _ = run(counter, 6)
    if ONE_GRAPH:
        assert len([graph for graph in counter.graphs if len(graph.graph.nodes)]) == 1
    close(compiled, eager)


@pytest.mark.filterwarnings("ignore:a step was skipped")
def test_what_is_not_compiled_works_as_ever() -> None:
    """A skipped step, a missing gradient, a checkpoint and GradScaler's numbers come between compiled steps."""

    def change(optimizer: GrokAdamW, i: int, loss: torch.Tensor) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if i == 2:
            params[0].grad.fill_(torch.nan)
        if i == 3:
            params[1].grad = None
        if i == 4:
            optimizer.load_state_dict(optimizer.state_dict())
        if i == 5:
            for p in params:
                p.grad *= 4.0
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        if i == 6:
            optimizer.found_inf.fill_(1.0)
        if i == 7:
            del optimizer.grad_scale, optimizer.found_inf

    eager, reference, _ = run(None, 9, change, grokking_signal_fns=AccuracyGap())
    compiled, optimizer, _ = run(CompileCounter(), 9, change, grokking_signal_fns=AccuracyGap())
    close(compiled, eager)
    assert optimizer.metrics()["skipped_steps"] == reference.metrics()["skipped_steps"] == 1
    assert optimizer.metrics()["step"] == 7


@pytest.mark.filterwarnings("ignore:a step was skipped", "ignore:a step found no gradient")
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("grad", [math.nan, None])
def test_a_step_that_writes_nothing_leaves_one_graph(grad: float | None, at: int) -> None:
    """Dynamo never compiles a function again in which it found no operation, but compiles what the function calls."""
    ran = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return lambda *args: (ran.append(graph), graph(*args))[1]

    def change(optimizer: GrokAdamW, i: int, loss: torch.Tensor) -> None:
        if i == at:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = None if grad is None else torch.full_like(p, grad)

    eager, _, _ = run(None, 6, change)
    compiled, _, _ = run(backend, 6, change)
    close(compiled, eager)
    if ONE_GRAPH:
        assert len(ran) == 6
    assert len(set(ran)) == 2


def test_what_stays_in_its_place_is_marked_so() -> None:
    """torch marks tensors of its own optimizers in the same way, so that the compiler's CUDA graphs make no copies."""
    _, optimizer, _ = run(CompileCounter(), 1)
    for param, state in optimizer.state.items():
        for tensor in (param, *state.values()):
            assert torch._dynamo.utils.get_static_address_type(tensor) is not None


def test_a_closure() -> None:
    def trained(compiled: bool) -> list[torch.Tensor]:
        model = network()
        optimizer = two_groups(model)
        step = torch.compile(optimizer.step, backend=CompileCounter()) if compiled else optimizer.step
        for i in range(3):
            x, y = batch(i)

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                optimizer.zero_grad()
                loss = (model(x) - y).square().mean()
                loss.backward()
                return loss

            assert step(closure) > 0
        return [p.detach() for p in model.parameters()]

    close(trained(True), trained(False))


def test_complex_parameters() -> None:
    def trained(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
        optimizer = GrokAdamW([p], lr=0.01)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for _ in range(3):
            p.grad = torch.randn_like(p)
            step()
        return [torch.view_as_real(p.detach())]

    close(trained(True), trained(False))


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({"window_size": 3}, 1),
        ({"max_row_norm": 0.5, "max_row_change": 0.01}, 1),
        ({"accumulation_steps": 3, "second_moment": "raw"}, 3),  # for the first micro-batch, the last, and the others
    ],
    ids=str,
)
@pytest.mark.parametrize("foreach", [None, False])
def test_windows_rows_and_micro_batches(foreach: bool | None, options: dict[str, Any], graphs: int) -> None:
    counter = CompileCounter()
    ours, optimizer, seen = run(counter, dtype=torch.float64, foreach=foreach, **options)
    expected, eager, _ = run(None, dtype=torch.float64, foreach=foreach, **options)
    close(ours, expected, 1e-12)
    if ONE_GRAPH or "max_row_norm" not in options:
        assert seen[-1] == graphs
    for a, b in zip(optimizer.state.values(), eager.state.values(), strict=True):
        close([torch.as_tensor(x) for x in a.values()], [torch.as_tensor(x) for x in b.values()], 1e-12)


@pytest.mark.parametrize("options", [{"window_size": 3}, {"accumulation_steps": 2, "second_moment": "raw"}], ids=str)
def test_a_number_of_its_own(options: dict[str, Any]) -> None:
    """Compiled by torch, copy_ and add_ lose what they write to a 0-d float64 on a CPU."""
    runs = []
    for backend in (None, "aot_eager"):
        params = [torch.nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in ((), (3,))]
        optimizer = GrokAdamW(params, **options)
        step = torch.compile(optimizer.step, backend=backend) if backend else optimizer.step
        for i in range(4):
            for p in params:
                p.grad = torch.full_like(p, 0.5 + i)
            step()
        runs.append([p.detach() for p in params] + [optimizer.state[p]["grok_ema"] for p in params])
    close(*runs, 1e-12)


@pytest.mark.parametrize("keeper", [name for name in KEEPERS if not name.endswith("SGD")])
def test_around_other_optimizers(keeper: str) -> None:
    """Wrappers run as they are, and so does a GrokAdamW inside one."""
    runs = []
    for backend in (None, "eager"):
        model = network()
        optimizer = KEEPERS[keeper](model)
        step = torch.compile(optimizer.step, backend=backend) if backend else optimizer.step
        train(model, range(7), lambda i, loss, step=step: step())
        runs.append([p.detach() for p in model.parameters()])
    close(*runs)


def test_compiled_autograd_does_not_trace_updates_in_the_backward_pass() -> None:
    model, twin = network(), network()
    optimizers = [GrokAdamW(module.named_parameters(), gradient_clipping=0.0) for module in (model, twin)]
    for optimizer in optimizers:
        step_in_backward(optimizer)

    @torch.compile(backend="aot_eager")
    def backward(x: torch.Tensor) -> None:
        model(x).square().mean().backward()

    for step in range(3):
        x = batch(step)[0]
        with patch.object(torch._dynamo.config, "compiled_autograd", True):
            backward(x)
        twin(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
