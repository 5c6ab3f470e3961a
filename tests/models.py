"""Small models, training that is the same each time, and a way to run each implementation."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from grokadamw import Accumulate, GrokAdamW, Grokfast, GrokfastMA
from grokadamw.backends import blocks, gpu, native
from grokadamw.backends.gpu_tables import SHAPES, Shape

AS_ADAMW = {"lamb": 0.0, "gamma": 0.0, "gradient_clipping": 0.0}


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Return three linear layers, 5 → 8 → 8 → 3."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x[:, 3] - x[:, 4]], dim=1).to(dtype)


def train(model: nn.Module, steps: range, take_step: Callable[[int, Tensor], object]) -> None:
    """Run forward and backward at each step, then call take_step(step, loss)."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        x, y = batch(step, dtype)
        model.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        take_step(step, loss)


def parameters(count: int = 2) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2)) for _ in range(count)]


def set_gradients(params: list[nn.Parameter], seed: int = 1, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def same(a: Any, b: Any) -> bool:
    """Return True if a and b are equal to the bit, dtypes included."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def trained(**options: Any) -> tuple[nn.Module, GrokAdamW]:
    model = network()
    optimizer = GrokAdamW(model.named_parameters(), lr=0.01, **options)
    optimizer.record(train_loss=0.1, eval_loss=0.4)
    train(model, range(3), lambda step, loss: optimizer.step())
    return model, optimizer


def saved_and_loaded(value: Any) -> Any:
    """Return the value after it went through a file, which may hold nothing but plain data."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(model.named_parameters())


# optimizers with more state than GrokAdamW's own: filters around others, windows, gradients of micro-batches
KEEPERS: dict[str, Callable[[nn.Module], Any]] = {
    "Grokfast": lambda m: Grokfast(torch.optim.Adam(_named(m), lr=0.01), alpha=0.8),
    "Grokfast, SGD": lambda m: Grokfast(torch.optim.SGD(_named(m), lr=0.1)),
    "GrokfastMA": lambda m: GrokfastMA(torch.optim.AdamW(_named(m), lr=0.01), 3),
    "GrokfastMA, SGD": lambda m: GrokfastMA(torch.optim.SGD(_named(m), lr=0.1), 4, 0.5, "sum", False),
    "Accumulate": lambda m: Accumulate(torch.optim.AdamW(_named(m), lr=0.01), 2, 0.5),
    "Accumulate, SGD": lambda m: Accumulate(torch.optim.SGD(_named(m), lr=0.1, momentum=0.9), 2),
    "Accumulate, GrokAdamW": lambda m: Accumulate(GrokAdamW(_named(m), lr=0.01), 2),
    "Accumulate, Grokfast": lambda m: Accumulate(Grokfast(torch.optim.Adam(_named(m), lr=0.01)), 2),
    "a window": lambda m: GrokAdamW(_named(m), lr=0.01, window_size=3),
    "micro-batches": lambda m: GrokAdamW(_named(m), lr=0.01, accumulation_steps=2, second_moment="raw"),
}

# implementation → the options that ask for it
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "gpu": {},
    "blocks": {},
    "foreach": {"foreach": True},
    "reference": {"foreach": False},
}


def laid_out(values: Tensor, dtype: torch.dtype, layout: str) -> Tensor:
    """Return the values in a tensor that is "transposed", "not aligned", or plain."""
    if layout == "transposed" and values.dim() > 1:
        return values.to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    offset = int(layout == "not aligned")
    return torch.empty(values.numel() + offset, dtype=dtype)[offset:].view(values.shape).copy_(values)


@contextmanager
def compiled_for(monkeypatch: pytest.MonkeyPatch, instruction_set: str) -> Iterator[None]:
    """Use the native kernel for this instruction set inside the context."""
    with monkeypatch.context() as changed:
        native.kernel.cache_clear()
        changed.setattr(native, "_instruction_sets", lambda: [instruction_set])
        yield
    native.kernel.cache_clear()


def skip_unless_interpreted() -> None:
    """Skip the test if Triton's interpreter cannot run the kernels on the CPU."""
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU, kernels are not interpreted: tests/gpu")
    if isinstance(reason := gpu.kernels(), str):
        pytest.skip(reason)
    reason = gpu._why_not_for_codes(torch.device("cpu"))  # its first call launches kernels, which a test may count
    if reason is not None and "only 0-dimensional arrays" in reason:
        # the interpreter makes Python integers of arrays with one element, which NumPy 2.4 refuses
        pytest.skip(f"the interpreter of Triton 3.6 and older does not fit NumPy 2.4 and newer: {reason}")
    assert reason is None, reason


@contextmanager
def running(implementation: str, chunk: int = 64) -> Iterator[dict[str, Any]]:
    """Yield the options that select this implementation; for "blocks", act as if the kernel had not been built.

    "gpu" runs on the CPU in Triton's interpreter, in small chunks; tests/gpu tests what a GPU does. Large tensors need
    large chunks, because each program costs the interpreter milliseconds, however small it is.
    """
    if implementation == "blocks":
        reason = "the native kernel was not built"
        with patch.object(native, "kernel", lambda: reason), patch.object(blocks, "_SMALL", 0):
            yield IMPLEMENTATIONS[implementation]
    elif implementation == "gpu":
        skip_unless_interpreted()
        small, coded = dict.fromkeys(SHAPES, Shape(chunk, block=chunk, warps=1)), Shape(4096, block=4096, warps=1)
        with (
            patch.object(gpu, "_DEVICE_TYPE", "cpu"),
            patch.dict(SHAPES, small),
            patch("grokadamw.backends.gpu_tables.CODED", coded),
        ):
            yield IMPLEMENTATIONS[implementation]
    else:
        yield IMPLEMENTATIONS[implementation]
