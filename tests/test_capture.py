"""CUDA graphs: signals are evaluated between replays. A GPU runs real graphs; without one, captures are imitated."""

from __future__ import annotations

import copy
import operator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from grokadamw import GrokAdamW
from grokadamw.backends import gpu, memory
from grokadamw.backends.gpu_tables import Tables

from .models import running

BOOSTED = {"signal_boost": 1.0, "decay_boost": 2.0, "max_row_change": 0.05}


def cuda(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 4, device=device)), nn.Parameter(torch.randn(5, device=device))]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """Write the gradients in place, where a graph reads them."""
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(grad)


def test_capturable_is_for_accelerators() -> None:
    params = parameters()
    optimizer = GrokAdamW([{"params": params[:1]}, {"params": params[1:], "capturable": True}])
    set_gradients(params, 0)
    with pytest.raises(RuntimeError, match=r"If capturable=True, params and state_steps must be .*param_groups\[1\]"):
        optimizer.step()
    assert not optimizer.state


@pytest.fixture
def as_if_captured(monkeypatch: pytest.MonkeyPatch, nothing_is_free_to_read: None) -> list[bool]:
    """Treat the CPU as a device that graphs are captured on while the list holds True."""
    capturing = [False]
    monkeypatch.setattr("grokadamw.step.capture.is_capturing", lambda optimizer: capturing[0])
    monkeypatch.setattr("grokadamw.step.capture._get_capturable_supported_devices", lambda: ["cpu"])
    return capturing


def test_a_captured_step_hears_no_signal_and_reads_alpha_where_it_is_set(as_if_captured: list[bool]) -> None:
    said = [1.0]
    params, twins = parameters(), parameters()
    signal = {"grokking_signal_fns": lambda: said[0], "grokking_signal_decay_rate": 1.0, **BOOSTED}
    captured = GrokAdamW(params, capturable=True, **signal)
    eager = GrokAdamW(twins, **signal)
    for step, (signal_value, alpha_of) in enumerate([(0.1, 0.1), (0.2, 0.1), (0.3, 0.3)]):
        said[0] = signal_value
        set_gradients(params, step)
        set_gradients(twins, step)
        if step == 2:
            captured.update_signals()
            assert captured.metrics()["signal"] == 0.3
        as_if_captured[0] = step > 0
        captured.step()
        as_if_captured[0] = False
        said[0] = alpha_of
        eager.step()
        assert captured.metrics()["alpha"] == eager.metrics()["alpha"]
        assert captured.metrics()["boost"] == eager.metrics()["boost"] == 1 + alpha_of
        assert captured.metrics()["decay_boost"] == eager.metrics()["decay_boost"] == 1 + 2 * alpha_of
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(
                captured.state[p]["grok_ema"], eager.state[twin]["grok_ema"], rtol=1e-6, atol=1e-7
            )


def test_what_a_graph_reads_and_writes_stays_in_its_place(as_if_captured: list[bool]) -> None:
    """α, the boosts and the count of skipped steps keep their addresses, although reading the count sets it to 0."""
    params = parameters()
    optimizer = GrokAdamW([{"params": params}, {"params": []}], capturable=True, **BOOSTED)
    set_gradients(params, 0)
    optimizer.step()

    def read() -> list[int]:
        run = optimizer._run
        return [tensor.data_ptr() for tensor in (*run.last.effects[0], run.skipped)]

    places = read()
    as_if_captured[0] = True
    params[0].grad.fill_(torch.inf)
    optimizer.step()
    optimizer.step()
    as_if_captured[0] = False
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        assert optimizer.metrics()["skipped_steps"] == 2
    optimizer.record(train_loss=1.0, eval_loss=2.0)
    optimizer.update_signals()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.update_signals()
    optimizer.step()
    assert read() == places
    assert optimizer.metrics()["skipped_steps"] == 3


def test_a_boost_that_is_switched_off_ends_in_a_graph_and_in_copies(as_if_captured: list[bool]) -> None:
    params = parameters()
    optimizer = GrokAdamW(params, capturable=True, grokking_signal_fns=lambda: 1.0, **BOOSTED)
    set_gradients(params, 0)
    optimizer.step()
    _, *read = optimizer._run.last.effects[0]
    assert read == [2, 3]
    optimizer.param_groups[0].update(signal_boost=0.0, decay_boost=0.0)
    optimizer.update_signals()
    assert read == [1, 1]
    assert all(map(operator.is_, optimizer._run.last.effects[0][1:], read))
    metrics = copy.deepcopy(optimizer).metrics()
    assert metrics["boost"] == metrics["decay_boost"] == 1


def to_float64(params: list[nn.Parameter]) -> None:
    for p in params:
        grad, p.grad = p.grad, None
        p.data = p.data.double()
        p.grad = grad.double()


NOT_THERE = {
    "any step": lambda optimizer, params: optimizer.state.clear(),
    "a signal": lambda optimizer, params: optimizer.load_state_dict(optimizer.state_dict()),
    "a slow gradient": lambda optimizer, params: (optimizer.free_slow_gradient(), optimizer.update_signals()),
    "state of its dtype": lambda optimizer, params: to_float64(params),
}


@pytest.mark.parametrize("missing", NOT_THERE)
def test_a_graph_needs_what_it_starts_from(as_if_captured: list[bool], missing: str) -> None:
    params = parameters()
    optimizer = GrokAdamW(params, capturable=True)
    set_gradients(params, 0)
    optimizer.step()
    NOT_THERE[missing](optimizer, params)
    as_if_captured[0] = True
    with pytest.raises(RuntimeError, match=r"before capturing, take a few steps"):
        optimizer.step()
    as_if_captured[0] = False
    optimizer.step()
    as_if_captured[0] = True
    optimizer.step()


def test_what_reads_back_is_not_captured(as_if_captured: list[bool]) -> None:
    params = parameters()
    optimizer = GrokAdamW(params, capturable=True, nonfinite="raise")
    set_gradients(params, 0)
    optimizer.step()
    as_if_captured[0] = True
    with pytest.raises(RuntimeError, match='nonfinite="raise" reads the gradients back'):
        optimizer.step()


class Tape(TorchDispatchMode):
    """An imitated CUDA graph: `replay` runs the recorded calls again, on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number is read back"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = tree_leaves(func(*args, **kwargs))
            for old, new in zip(tree_leaves(result), again, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def recording(self, kernels: Any) -> Any:
        """Return Triton's kernels with their launches recorded, because torch does not dispatch them."""

        def launch(name: str, grid: Any, args: Any, kwargs: Any) -> None:
            with _disable_current_modes():
                getattr(kernels, name)[grid](*args, **kwargs)

        class Kernel:
            def __init__(self, name: str) -> None:
                self.name = name

            def __getitem__(_self, grid: Any) -> Any:
                def run(*args: Any, **kwargs: Any) -> None:
                    launch(_self.name, grid, args, kwargs)
                    self.calls.append((launch, (_self.name, grid, args, kwargs), {}, None))

                return run

        return SimpleNamespace(tl=kernels.tl, **{name: Kernel(name) for name in ("update", "squares", "judge")})


def captured(optimizer: GrokAdamW, capturing: list[bool]) -> Tape:
    tape, capturing[0] = Tape(), True
    kernels = gpu.kernels()
    # a real capture is no dispatch mode, so it rules out no implementation
    watched = patch.object(memory, "memory_is_all", lambda compiling: True)
    with patch.object(gpu, "kernels", lambda: tape.recording(kernels)), tape, watched:
        optimizer.step()
    capturing[0] = False
    return tape


@pytest.mark.filterwarnings("ignore:a step was skipped")
@pytest.mark.parametrize("implementation", ["foreach", "reference", "gpu"])
@pytest.mark.parametrize("after", ["steps", "a checkpoint", "a copy"])
def test_a_replay_is_the_next_step(as_if_captured: list[bool], after: str, implementation: str) -> None:
    """A replay reads α, learning rates and gradients in place, and counts skips. The imitated capture runs a step."""
    with running(implementation) as how:
        tape = a_replay_is_the_next_step(as_if_captured, after, how)
    kernels = [call[1][0] for call in tape.calls if getattr(call[0], "__name__", "") == "launch"]
    # the GPU's implementation needs tables from earlier steps; without them it leaves a capture to foreach
    assert kernels == (["squares", "judge", "update"] if implementation == "gpu" and after == "steps" else [])


def a_replay_is_the_next_step(as_if_captured: list[bool], after: str, how: dict[str, Any]) -> Tape:
    said = [0.0]
    options: dict[str, Any] = {"grokking_signal_fns": lambda: said[0], "grokking_signal_decay_rate": 1.0, **BOOSTED}
    params, twins = parameters(), parameters()
    lr = torch.tensor(0.01)
    replayed = GrokAdamW(params, lr=lr, capturable=True, **how, **options)
    eager = GrokAdamW(twins, lr=0.01, **options)
    tape = None
    for step in range(8):
        said[0] = 0.2 * max(step - 3, 0)
        for ps, optimizer in ((params, replayed), (twins, eager)):
            set_gradients(ps, step)
            if step == 6:
                ps[0].grad.fill_(torch.nan)
            for group in optimizer.param_groups:
                if step == 5:
                    group["lr"] = group["lr"].fill_(0.02) if isinstance(group["lr"], torch.Tensor) else 0.02
        eager.step()
        if step < 3:
            replayed.step()
            continue
        if step == 3 and after == "a checkpoint":
            saved = copy.deepcopy(replayed.state_dict())
            replayed = GrokAdamW(params, lr=lr, capturable=True, **how, **options)
            replayed.load_state_dict(saved)
        if step == 3 and after == "a copy":
            original = replayed
            params, replayed = copy.deepcopy((params, replayed))
            set_gradients(params, step)  # deepcopy does not copy gradients
            original.record(train_loss=1.0, eval_loss=2.0)
        if step > 3 or after != "a copy":
            replayed.update_signals()
        if after == "a copy":
            original.update_signals()
            original._run.last.effects[0].alpha.zero_()
        if tape is None:
            tape = captured(replayed, as_if_captured)
        else:
            tape.replay()
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)
        for name, value in eager.state[twin].items():
            torch.testing.assert_close(replayed.state[p][name], value, rtol=1e-6, atol=1e-7)
    assert replayed.metrics()["skipped_steps"] == eager.metrics()["skipped_steps"] == 1
    assert replayed.metrics()["alpha"] == pytest.approx(eager.metrics()["alpha"], rel=1e-6)
    assert tape is not None
    return tape


def test_what_one_graph_reads_is_no_other_steps(as_if_captured: list[bool]) -> None:
    """Eager steps and a second capture use other gradients and numbers, which must not reach the first graph."""
    with running("gpu"):
        params, twins = parameters(), parameters()
        replayed, eager = GrokAdamW(params, lr=0.01, capturable=True), GrokAdamW(twins, lr=0.01)
        tapes, grads = [], []
        for step in range(4):
            for ps, optimizer in ((params, replayed), (twins, eager)):
                for p in ps:
                    p.grad = None
                set_gradients(ps, step)
                optimizer.param_groups[0].update(lr=0.01 * (1 + step), betas=(0.9 - 0.01 * step, 0.99))
            eager.step()
            if step < 2:
                replayed.step()
            else:
                tapes.append(captured(replayed, as_if_captured))
                grads.append([p.grad for p in params])
                next(iter(replayed._run.cache.plans.values())).tables(False, True)  # as an eager step in between would
        for i in (0, 1, 0):
            for ps, own in ((params, grads[i]), (twins, [p.grad for p in twins])):
                for p, grad in zip(ps, own, strict=True):
                    p.grad = grad
                set_gradients(ps, 10 + i)
            eager.param_groups[0].update(lr=0.03 + 0.01 * i, betas=(0.88 - 0.01 * i, 0.99))
            eager.step()
            tapes[i].replay()
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)
        assert len(replayed._run.graphs) == 2


def test_a_graphs_tables_stay_its_own_whatever_changes(as_if_captured: list[bool]) -> None:
    """Tables made in a capture lie in the graph's memory, where only its replays fill them."""
    with running("gpu"):
        params = parameters()
        optimizer = GrokAdamW(params, capturable=True)

        def step(i: int, beta1: float, capture: bool = False) -> Any:
            set_gradients(params, i)
            optimizer.param_groups[0]["betas"] = (beta1, 0.99)
            tape = captured(optimizer, as_if_captured) if capture else optimizer.step()
            (plan,) = optimizer._run.cache.plans.values()
            return tape, {kind: static.table for kind, static in plan.tables(False, True)._static.items()}

        for i in range(3):
            _, eager = step(i, 0.9)
        _, after = step(3, 0.8, capture=True)
        (graph,) = optimizer._run.graphs
        of_graph = {kind: static.table for kind, static in graph._static.items()}
        assert len(of_graph) == 1
        for kind, table in of_graph.items():
            assert after[kind] is eager[kind]
            assert table is not eager[kind]
        step(4, 0.7)
        assert all(graph._static[kind].table is table for kind, table in of_graph.items())


def test_what_goes_to_a_graph_has_its_room() -> None:
    """A graph's tables need pinned memory, which cannot be allocated during a capture."""
    tables = Tables()
    assert tables.captured() is None
    tables.may_be_captured(tensors=1, batches=1)
    tables.squares([torch.ones(3)])
    own = tables.captured()
    assert own is not None
    assert all(tables.captured() for _ in range(3))  # further captures without an eager step in between go to foreach
    assert tables.captured() is None
    content = torch.arange(52).numpy().tobytes()
    assert own.words(content, torch.device("cpu")).tolist() == list(range(52))
    assert own.words(content, torch.device("cpu")).tolist() == list(range(52))
    with pytest.raises(RuntimeError, match="take a step before capturing"):
        own.words(bytes(8), torch.device("cpu"))


@cuda
def test_without_capturable_it_is_not_captured() -> None:
    params = parameters("cuda")
    optimizer = GrokAdamW(params)
    set_gradients(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="capturable is False"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@cuda
@pytest.mark.parametrize("foreach", [None, False])
def test_replays_are_the_eager_run(foreach: bool | None) -> None:
    said = [0.0]
    params, twins = parameters("cuda"), parameters("cuda")
    options: dict[str, Any] = {"grokking_signal_fns": lambda: said[0], "grokking_signal_decay_rate": 1.0}
    replayed = GrokAdamW(params, lr=torch.tensor(0.01, device="cuda"), capturable=True, foreach=foreach, **options)
    eager = GrokAdamW(twins, lr=0.01, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(3):
            set_gradients(params, step)
            replayed.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.step()
    for step in range(10):
        said[0] = 0.3 * max(step - 2, 0)
        set_gradients(twins, step)
        for group in eager.param_groups:
            group["lr"] = 0.01 * (1 + max(step - 2, 0))
        eager.step()
        if step >= 3:
            set_gradients(params, step)
            if step == 7:
                params[0].grad.fill_(torch.nan)
                graph.replay()
                set_gradients(params, step)
            replayed.param_groups[0]["lr"].fill_(0.01 * (1 + max(step - 2, 0)))
            replayed.update_signals()
            graph.replay()
            with pytest.warns(RuntimeWarning, match="a step was skipped") if step == 7 else nullcontext():
                metrics = replayed.metrics()
            assert metrics["alpha"] == pytest.approx(eager.metrics()["alpha"], rel=1e-6)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)
    assert metrics["skipped_steps"] == 1
    assert metrics["step"] == 10


@cuda
@pytest.mark.parametrize("amp", [False, True])
def test_an_overflow_on_a_gpu_is_no_step_and_waits_for_nothing(amp: bool) -> None:
    params, twins = parameters("cuda"), parameters("cuda")
    scaled, plain = GrokAdamW(params), GrokAdamW(twins)
    scaled._step_supports_amp_scaling = amp
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**16)
    for step in range(6):
        set_gradients(params, step)
        set_gradients(twins, step)
        scaler.scale(torch.zeros((), device="cuda"))
        for p in params:
            p.grad *= scaler.get_scale()
        if step in (0, 3):
            params[1].grad[2] = torch.inf
        else:
            plain.step()
        torch.cuda.set_sync_debug_mode("error" if amp else "default")
        try:
            scaler.step(scaled)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scaler.update()
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)
    assert scaled.metrics() == pytest.approx(plain.metrics(), rel=1e-5, nan_ok=True)
