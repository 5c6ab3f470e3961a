"""The optimizers that `step_time.py` compares, and the memory that they share.

They are GrokAdamW in each implementation, torch's AdamW, and peers from PyPI. `make peers` installs each peer in a
folder of its own, .venv/peers/NAME, without its dependencies. Release 0.1.2 of this package is in .venv/published,
because the two have the same name. DeepSpeed compiles itself when it is first used, with a C++ compiler. Optimizers
that are not installed are left out of the comparison.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from grokadamw import GrokAdamW
from grokadamw.backends import native

PEERS = Path(sys.prefix) / "peers"
PUBLISHED = Path(sys.prefix) / "published"

Step: TypeAlias = Callable[[], Any]
Shapes: TypeAlias = list[tuple[int, ...]]
Make: TypeAlias = Callable[[list[nn.Parameter]], Step]

# The filter adds to gradients that no backward pass rewrites. With the usual λ of 2 they would soon be infinite.
LAMB = 1e-3

# Bytes per parameter: the parameter, its gradient and a writable copy of it; the scratch memory of any arm's step.
SHARED, SCRATCH = 12, 40


class Arm(NamedTuple):
    """An optimizer and its settings. Bytes are those of one float32 parameter."""

    name: str
    make: Make  # the function that takes one step
    kept: int  # bytes of state
    traffic: float | None = None  # bytes that a step reads and writes if no cache holds the tensors; None: not counted
    clips: bool = False
    writes: bool = False  # to the gradients
    ours: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    package: str | None = None  # a peer's name on PyPI


def grokadamw(**options: Any) -> Make:
    """Return a maker of GrokAdamW whose β1 falls from tensor to tensor, but too little for a warning."""
    return lambda params: GrokAdamW(params, gamma=1e-3, **options).step


def preset(params: list[nn.Parameter], **options: Any) -> Step:
    """Return a step of `for_grokking` on a model of these parameters: an embedding first, and a norm layer."""
    model = nn.Module()
    model.embedding = nn.Embedding(1, 1)
    model.embedding.weight = params[0]
    model.norm = nn.LayerNorm(1, elementwise_affine=False)
    model.rest = nn.ParameterList(params[1:])
    return GrokAdamW.for_grokking(model, **options).step


def without_compiler(params: list[nn.Parameter]) -> Step:
    """Return a step of GrokAdamW without its native kernel, as on a machine where it was not built."""
    with no_kernel():
        optimizer = GrokAdamW(params, gamma=1e-3, gradient_clipping=0.0, nonfinite="propagate")

    def step() -> None:
        with no_kernel():
            optimizer.step()

    return step


@contextmanager
def no_kernel() -> Iterator[None]:
    kernel = native.kernel
    native.kernel = lambda: "left out"
    try:
        yield
    finally:
        native.kernel = kernel


def adamw(**options: Any) -> Make:
    return lambda params: torch.optim.AdamW(params, **options).step


def clipped(params: list[nn.Parameter]) -> Step:
    """Return a step of AdamW after `clip_grad_norm_`, as training loops use it."""
    optimizer = torch.optim.AdamW(params, fused=True)

    def step() -> None:
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()

    return step


def filtered(params: list[nn.Parameter]) -> Step:
    """Return Grokfast's published loop (arXiv:2405.20233), followed by AdamW. Each operation makes a new tensor."""
    optimizer = torch.optim.AdamW(params, fused=True)
    emas = [p.grad.clone() for p in params]

    @torch.no_grad()
    def step() -> None:
        for i, p in enumerate(params):
            emas[i] = emas[i] * 0.98 + p.grad * (1 - 0.98)
            p.grad = p.grad + emas[i] * LAMB
        optimizer.step()

    return step


def imported(package: str, module: str) -> Any:
    """Import a peer's module from the peer's own folder, which is searched after all installed packages."""
    folder = str(PEERS / package)
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(module)


def peer(package: str, module: str, name: str, **options: Any) -> Make:
    """Return a maker of an optimizer from a peer's package."""
    return lambda params: getattr(imported(package, module), name)(params, lr=1e-3, weight_decay=0.01, **options).step


def published(params: list[nn.Parameter]) -> Step:
    """Return a step of release 0.1.2, imported under another name, because its own name is this package's."""
    if "grokadamw_published" not in sys.modules:
        spec = importlib.util.spec_from_file_location("grokadamw_published", PUBLISHED / "grokadamw" / "__init__.py")
        if not PUBLISHED.is_dir() or spec is None or spec.loader is None:
            raise ImportError("release 0.1.2 is not installed")
        logging.getLogger().addHandler(logging.NullHandler())  # otherwise the release would configure logging
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules["grokadamw_published"].GrokAdamW(params, gamma=1e-3).step


def version(package: str) -> str | None:
    """Return the version of a peer, or None if it is not installed."""
    folder = PUBLISHED if package == "grokadamw" else PEERS / package
    found = importlib.metadata.Distribution.discover(name=package, path=[str(folder)])
    return next((distribution.version for distribution in found), None)


FUSED = Arm("torch AdamW, fused", adamw(fused=True), kept=8, traffic=28)
CLIPPED = Arm("torch AdamW, fused + clip_grad_norm_", clipped, kept=8, traffic=40, clips=True, writes=True)
PROPAGATE = {"gradient_clipping": 0.0, "nonfinite": "propagate"}

# Traffic counts a tensor's 4 bytes as often as an operation reads or writes it. A fused AdamW reads and writes θ, m and
# v, and reads g. A norm reads g, clipping reads and writes it; μ is read and written. AdamW in single operations takes
# 8 for the decay, 12 for m, 8 + 12 for v, 8 for the root, 8 + 8 for its two corrections, 16 for the step. The Grokfast
# loop takes 8 + 8 + 12 for the EMA and 8 + 12 for the gradient before AdamW's 28.
ARMS = [
    Arm("GrokAdamW, no clipping, propagate", grokadamw(**PROPAGATE), kept=12, traffic=36, ours=True),
    Arm("GrokAdamW, no clipping", grokadamw(gradient_clipping=0.0), kept=12, traffic=40, ours=True),
    Arm("GrokAdamW, clip 1", grokadamw(), kept=12, traffic=40, clips=True, ours=True),
    Arm("GrokAdamW, the preset", preset, kept=12, clips=True, ours=True),
    Arm("GrokAdamW, without a C compiler", without_compiler, kept=12, traffic=36, ours=True, devices=("cpu",)),
    Arm("GrokAdamW, foreach=True", grokadamw(foreach=True, **PROPAGATE), kept=12, ours=True),
    Arm("GrokAdamW, foreach=False", grokadamw(foreach=False, **PROPAGATE), kept=12, ours=True),
    FUSED,
    CLIPPED,
    Arm("torch AdamW, foreach", adamw(foreach=True), kept=8, traffic=80),
    Arm("torch AdamW, for-loop", adamw(foreach=False), kept=8, traffic=80),
    Arm("Grokfast's loop + torch AdamW, fused", filtered, kept=16, traffic=76),
    Arm("grokadamw 0.1.2", published, kept=12, clips=True, writes=True, package="grokadamw"),
    Arm(
        "pytorch-optimizer GrokFastAdamW",
        peer("pytorch-optimizer", "pytorch_optimizer", "GrokFastAdamW", grokfast_lamb=LAMB),
        kept=12,
        writes=True,
        package="pytorch-optimizer",
    ),
    Arm(
        "grokfast-pytorch GrokFastAdamW",
        peer("grokfast-pytorch", "grokfast_pytorch", "GrokFastAdamW", grokfast_lamb=LAMB),
        kept=12,
        writes=True,
        package="grokfast-pytorch",
    ),
    Arm("torch-optimi AdamW", peer("torch-optimi", "optimi", "AdamW"), kept=8, package="torch-optimi"),
    Arm("bitsandbytes AdamW", peer("bitsandbytes", "bitsandbytes.optim", "AdamW"), kept=8, package="bitsandbytes"),
    Arm(
        "DeepSpeed CPUAdam",
        peer("deepspeed", "deepspeed.ops.adam", "DeepSpeedCPUAdam"),
        kept=8,
        traffic=28,
        package="deepspeed",
    ),
]


def gpt2() -> Shapes:
    """Return the shapes of GPT-2's 124 M parameters, in 148 tensors; the head is the token embedding."""
    width = 768
    norm: Shapes = [(width,), (width,)]
    attention: Shapes = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp: Shapes = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *12 * [*norm, *attention, *norm, *mlp], *norm]


class Tensors:
    """Parameters and gradients that all arms of a model share. Arms that write to gradients share a copy of them."""

    def __init__(self, shapes: Shapes, device: str) -> None:
        torch.manual_seed(0)
        self.values = [torch.randn(shape, device=device).mul_(0.02) for shape in shapes]
        self.grads = [torch.randn(shape, device=device).mul_(0.01) for shape in shapes]
        self.written: list[Tensor] = []

    def params(self, arm: Arm) -> list[nn.Parameter]:
        """Return an arm's own parameters, in the shared memory."""
        if arm.writes and not self.written:
            self.written = [grad.clone() for grad in self.grads]
        params = [nn.Parameter(value) for value in self.values]
        for param, grad in zip(params, self.written if arm.writes else self.grads, strict=True):
            param.grad = grad
        return params


def heats(arms: Sequence[Arm], parameters: int, free: int) -> list[list[Arm]]:
    """Split arms into heats whose state fits into memory. Each heat has the two arms that all are compared with."""
    compared = [FUSED, CLIPPED]
    room = free - (SHARED + SCRATCH) * parameters
    result: list[list[Arm]] = []
    for arm in arms:
        if arm not in compared:
            if not result or sum(a.kept for a in [*result[-1], arm]) * parameters > room:
                result.append(list(compared))
            result[-1].append(arm)
    return result or [compared]


def free_memory(device: str) -> int:
    """Return the free bytes, or 8 GiB if the system does not say."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except OSError:
        return 8 << 30
