"""CUDA graphs: signals are heard between replays. On a GPU a real graph; without one, what a capture may not do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grokadamw import GrokAdamW

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 4, device=device)), nn.Parameter(torch.randn(5, device=device))]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """In place, where a graph reads them."""
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
    """Treats the CPU as a device that graphs are captured on, while the list holds True."""
    capturing = [False]
    monkeypatch.setattr("grokadamw.capture.is_capturing", lambda optimizer: capturing[0])
    monkeypatch.setattr("grokadamw.capture._get_capturable_supported_devices", lambda: ["cpu"])
    return capturing


def test_a_captured_step_hears_no_signal_and_reads_alpha_where_it_is_set(as_if_captured: list[bool]) -> None:
    said = [1.0]
    params, twins = parameters(), parameters()
    signal = {"grokking_signal_fns": lambda: said[0], "grokking_signal_decay_rate": 1.0}
    captured = GrokAdamW(params, capturable=True, **signal)
    eager = GrokAdamW(twins, **signal)
    for step, (signal_value, alpha_of) in enumerate([(1.0, 1.0), (2.0, 1.0), (3.0, 3.0)]):
        said[0] = signal_value
        set_gradients(params, step)
        set_gradients(twins, step)
        if step == 2:
            captured.update_signals()
            assert captured.metrics()["signal"] == 3.0
        as_if_captured[0] = step > 0
        captured.step()
        as_if_captured[0] = False
        said[0] = alpha_of
        eager.step()
        assert captured.metrics()["alpha"] == eager.metrics()["alpha"]
        for p, twin in zip(params, twins, strict=True):
            torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(
                captured.state[p]["grok_ema"], eager.state[twin]["grok_ema"], rtol=1e-6, atol=1e-7
            )


def test_what_a_graph_reads_and_writes_stays_in_its_place(as_if_captured: list[bool]) -> None:
    """α, and the count of skipped steps, which reading it sets back to 0."""
    params = parameters()
    optimizer = GrokAdamW([{"params": params}, {"params": []}], capturable=True)
    set_gradients(params, 0)
    optimizer.step()
    places = [optimizer._run.last.alphas[0].data_ptr(), optimizer._run.skipped.data_ptr()]
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
    assert [optimizer._run.last.alphas[0].data_ptr(), optimizer._run.skipped.data_ptr()] == places
    assert optimizer.metrics()["skipped_steps"] == 3


NOT_THERE = {
    "any step": lambda optimizer, params: optimizer.state.clear(),
    "a signal": lambda optimizer, params: optimizer.load_state_dict(optimizer.state_dict()),
    "a slow gradient": lambda optimizer, params: (optimizer.free_slow_gradient(), optimizer.update_signals()),
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
    """A CUDA graph in small: what is run under it is run again by `replay`, on the same memory."""

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


def captured(optimizer: GrokAdamW, capturing: list[bool]) -> Tape:
    tape, capturing[0] = Tape(), True
    with tape:
        optimizer.step()
    capturing[0] = False
    return tape


@pytest.mark.filterwarnings("ignore:a step was skipped")
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("after", ["steps", "a checkpoint", "a copy"])
def test_a_replay_is_the_next_step(as_if_captured: list[bool], after: str, foreach: bool | None) -> None:
    """Here capturing runs the step, too. α, learning rates and gradients come from their places; skips are counted."""
    said = [0.0]
    options: dict[str, Any] = {"grokking_signal_fns": lambda: said[0], "grokking_signal_decay_rate": 1.0}
    params, twins = parameters(), parameters()
    lr = torch.tensor(0.01)
    replayed = GrokAdamW(params, lr=lr, capturable=True, foreach=foreach, **options)
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
            replayed = GrokAdamW(params, lr=lr, capturable=True, foreach=foreach, **options)
            replayed.load_state_dict(saved)
        if step == 3 and after == "a copy":
            original = replayed
            params, replayed = copy.deepcopy((params, replayed))
            set_gradients(params, step)  # which are not copied
            original.record(train_loss=1.0, eval_loss=2.0)
        if step > 3 or after != "a copy":
            replayed.update_signals()
        if after == "a copy":
            original.update_signals()
            original._run.last.alphas[0].zero_()
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
            assert replayed.metrics()["alpha"] == pytest.approx(eager.metrics()["alpha"], rel=1e-6)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)
    with pytest.warns(RuntimeWarning, match="a step was skipped"):
        assert replayed.metrics()["skipped_steps"] == 1
    assert replayed.metrics()["step"] == 10


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
    assert scaled.metrics() == pytest.approx(plain.metrics(), rel=1e-5)
