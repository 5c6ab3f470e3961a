"""The checks of stage 1, and the process that runs them.

    python3 -m benchmarks.on_gpu.checks FILE

It runs the checks that FILE lists as not run. smoke.py starts it again after a check has ended the process.
"""

from __future__ import annotations

import faulthandler
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import common
from .common import COMPUTES, DEVICE
from .record import Record

SECONDS = 20  # that a check may take
SIZES = [0, 1, 5, 4095, 4096, 4097, 20_480, 100_003]
# tolerances of the state after a few steps, and of parameters, relative to 1 + |value|
TOLERANCES = {
    torch.float32: (1e-5, 1e-5),
    torch.float64: (1e-11, 1e-11),
    torch.bfloat16: (1e-5, 5e-2),
    torch.float16: (1e-5, 1e-2),
}
# a constant signal, and a β1 that falls from tensor to tensor
HYPER: dict[str, Any] = {"lr": 0.01, "gamma": 0.01, "grokking_signal_fns": lambda: 0.3}


def parameters(
    device: str, dtype: torch.dtype = torch.float32, offset: int = 0, sizes: list[int] = SIZES
) -> list[nn.Parameter]:
    """Return the same parameters each time. With an offset, their addresses are no multiples of 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator) for n in sizes]
    return [
        nn.Parameter(torch.empty(len(x) + offset, dtype=dtype, device=device)[offset:].copy_(x))
        if offset
        else nn.Parameter(x.to(device, dtype))
        for x in values
    ]


def set_gradients(params: list[nn.Parameter], step: int, scale: float = 1.0, poison: bool = False) -> None:
    """Set gradients in place, where a graph reads them. With poison, one element of the largest gradient is NaN."""
    for i, p in enumerate(params):
        grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i))
        if poison and p.numel() == max(q.numel() for q in params):
            grad.view(-1)[-1] = torch.nan
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.copy_(grad)


def optimizer_of(params: Any, **options: Any) -> Any:
    from grokadamw import GrokAdamW

    return GrokAdamW(params, **HYPER | options)


def kept(optimizer: Any) -> dict[str, list[Tensor]]:
    """Return parameters and state by name, on the CPU."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {"params": [p.detach() for p in params]}
    for name in ("step", "exp_avg", "exp_avg_sq", "grok_ema"):
        parts[name] = [optimizer.state[p][name] for p in params]
    return {name: [x.cpu() for x in part] for name, part in parts.items()}


def differences(optimizer: Any, other: Any) -> dict[str, float]:
    """Return the largest difference of each part, relative to 1 + |value|; infinite if a difference is NaN."""
    result = {}
    theirs = kept(other)
    for name, part in kept(optimizer).items():
        pairs = [(a.double(), b.double()) for a, b in zip(part, theirs[name], strict=True) if a.numel()]
        worst = [((a - b).abs() / (1 + b.abs())).nan_to_num(torch.inf).max().item() for a, b in pairs]
        result[name] = max(worst)
    return result


def check(holds: bool, what: str) -> None:
    """Raise if something does not hold, unless this is a rehearsal without results, which cannot tell."""
    if COMPUTES and not holds:
        raise AssertionError(what)


def check_near(found: dict[str, float], dtype: torch.dtype) -> None:
    state, param = TOLERANCES[dtype]
    far = {name: x for name, x in found.items() if x > (param if name == "params" else state)}
    check(not far, f"too far apart: {far}, allowed {param} of parameters and {state} of state")


# checks: each returns the numbers to record


def it_is_chosen() -> dict[str, Any]:
    """Check that GrokAdamW chooses the GPU's kernels for parameters on the GPU."""
    optimizer = optimizer_of(parameters(DEVICE))
    said = optimizer.implementation()
    if not said.startswith("gpu: "):
        raise AssertionError(said)
    return {"implementation": said}


def the_norm(dtype: torch.dtype) -> dict[str, Any]:
    from grokadamw.backends import gpu

    grads = [p.detach() for p in parameters(DEVICE, dtype)]
    exact = sum(grad.double().square().sum().item() for grad in grads)
    found = gpu.sum_of_squares(grads).item()
    check(abs(found / exact - 1) < 1e-12, f"{found}, and not {exact}")
    skipped = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for lists in (1, 3, 300):
        verdict = gpu.judge(grads, lists * [0.5], None, None, skipped, needs_norm=True)
        clip = verdict.clips[-1].item()
        check(abs(clip * (exact**0.5 + 1e-6) / 0.5 - 1) < 1e-9, f"c is {clip} with {lists} lists")
        check(bool(verdict.finite), f"not finite, with {lists} lists")
    return {"of_exact": found / exact}


def steps_agree(dtype: torch.dtype = torch.float32, offset: int = 0, groups: int = 1, **options: Any) -> dict[str, Any]:
    """Compare five steps, with a NaN in the third, with `foreach` on the same device, and with the CPU's kernel."""
    sizes = SIZES if groups == 1 else [1 + i % 50 for i in range(2 * groups)]

    def run(device: str, **more: Any) -> Any:
        params = parameters(device, dtype, offset, sizes)
        per_group = -(-len(params) // groups)
        parts = [params[i : i + per_group] for i in range(0, len(params), per_group)]
        optimizer = optimizer_of([{"params": part} for part in parts], **options | more)
        for step in range(5):
            set_gradients(params, step, poison=step == 2)
            optimizer.step()
        return optimizer

    ours = run(DEVICE)
    others = {"foreach there": run(DEVICE, foreach=True)}
    with common.on_the_cpu():
        others["the CPU"] = run("cpu")
        of_cpu = others["the CPU"].implementation()
    found: dict[str, Any] = {name: differences(ours, other) for name, other in others.items()}
    skipped = ours.metrics()["skipped_steps"]
    for name in others:
        check_near(found[name], dtype)
    check("accumulation_steps" in options or skipped == 1, f"{skipped} steps were skipped, and not 1")
    return found | {"cpu": of_cpu, "skipped_steps": skipped}


def the_preset(dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    """Check embeddings, norms and linear layers whose limited rows are short and long, straight and odd."""
    from grokadamw import GrokAdamW

    optimizers = []
    for foreach in (None, True):
        torch.manual_seed(0)
        layers = [nn.Embedding(97, 64), nn.LayerNorm(64), *(nn.Linear(n, 9) for n in (64, 257, 1500, 1501))]
        model = nn.Sequential(*layers).to(DEVICE, dtype)
        optimizers.append(optimizer := GrokAdamW.for_grokking(model, foreach=foreach, **options))
        for step in range(5):
            set_gradients(list(model.parameters()), step, poison=step == 2)
            optimizer.step()
    found = differences(*optimizers)
    if options:  # codes differ where rounding does
        found = {"params": found["params"]}
    check_near(found, dtype)
    return found


def a_loss_scale() -> dict[str, Any]:
    """Check that a loss scale left to the kernels, with an overflow in the third step, changes no bit of the run."""
    params, twins = parameters(DEVICE), parameters(DEVICE)
    scaled, plain = optimizer_of(params, fused=True), optimizer_of(twins)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    scaler.scale(torch.ones((), device=DEVICE))
    for step in range(5):
        set_gradients(params, step, scale=scaler.get_scale(), poison=step == 2)
        scaler.step(scaled)
        scaler.update()
        if step != 2:
            set_gradients(twins, step)
            plain.step()
    check(scaler.get_scale() == 512.0, f"the scale is {scaler.get_scale()} after one overflow, and not 512")
    found = differences(scaled, plain)
    check(not any(found.values()), f"not the same bits: {found}")
    return found


def a_graph() -> dict[str, Any]:
    """Check that replays of a graph with other lrs, other gradients and a NaN equal the eager run bit for bit."""
    params, twins = parameters(DEVICE), parameters(DEVICE)
    lr = torch.tensor(0.01, dtype=torch.float64, device=DEVICE)
    replayed, eager = optimizer_of(params, lr=lr, capturable=True), optimizer_of(twins)
    for step in range(3):
        set_gradients(params, step)
        replayed.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.step()
    if not replayed._run.graphs:
        raise AssertionError("foreach was captured, and not the kernels")
    for step in range(8):
        set_gradients(twins, step, poison=step == 5)
        eager.param_groups[0]["lr"] = 0.01 / max(1, step - 2)
        eager.step()
        if step >= 3:
            set_gradients(params, step, poison=step == 5)
            lr.fill_(0.01 / (step - 2))
            replayed.update_signals()
            graph.replay()
    found = differences(replayed, eager)
    if not common.REHEARSES and any(found.values()):
        raise AssertionError(f"not the same bits: {found}")
    return found


DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}
CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "it is chosen": it_is_chosen,
    **{f"norm, {name}": partial(the_norm, dtype) for name, dtype in DTYPES.items()},
    **{f"five steps, {name}": partial(steps_agree, dtype) for name, dtype in DTYPES.items()},
    "five steps, not aligned": partial(steps_agree, offset=1),
    "five steps, bfloat16, not aligned": partial(steps_agree, torch.bfloat16, offset=1),
    "five steps, no clipping": partial(steps_agree, gradient_clipping=0.0),
    "five steps, 300 groups": partial(steps_agree, groups=300),
    "a window": partial(steps_agree, window_size=3),
    "micro-batches": partial(steps_agree, accumulation_steps=2, second_moment="raw"),
    "the preset": the_preset,
    "the preset, fewer bits": partial(the_preset, torch.bfloat16, state_dtype="int8", master_weight_bits=24),
    "a loss scale": a_loss_scale,
    "a graph": a_graph,
}


def outcome_of(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a check, and wait for the end of all that it has launched."""
    began = time.perf_counter()
    try:
        found = {"outcome": "passed", **check()}
        torch.cuda.synchronize()  # a kernel's error shows here
    except Exception:
        found = {"outcome": "failed", "traceback": traceback.format_exc()}
    return found | {"seconds": round(time.perf_counter() - began, 2)}


def device_is_lost() -> bool:
    """Return True if an error has made the device useless to this process."""
    try:
        torch.zeros(1, device=DEVICE).add_(1).cpu()
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def run(path: str, checks: dict[str, Callable[[], dict[str, Any]]] = CHECKS) -> None:
    """Run the checks that were not run yet, one after the other, until an error of the device."""
    record = Record(path)
    found = record.results.setdefault("checks", {name: {"outcome": "not run"} for name in checks})
    record.write()
    common.begin()
    warnings.simplefilter("ignore")  # about skipped steps and layers
    for name in [name for name in checks if found[name]["outcome"] == "not run"]:
        found[name] = {"outcome": "running"}
        record.write()
        faulthandler.dump_traceback_later(SECONDS, exit=True)  # says where it hangs, and ends the process
        found[name] = outcome_of(checks[name])
        faulthandler.cancel_dump_traceback_later()
        record.write()
        if found[name]["outcome"] == "failed" and device_is_lost():
            sys.exit(f"after “{name}” the device is lost to this process")


def here(*names: str) -> None:
    """Run checks in this process, and write no file: for tools that watch a process."""
    common.begin()
    warnings.simplefilter("ignore")
    found = {name: outcome_of(CHECKS[name]) for name in names}
    for name, outcome in found.items():
        print(name, outcome, flush=True)
    sys.exit(any(outcome["outcome"] == "failed" for outcome in found.values()))


if __name__ == "__main__":
    run(sys.argv[1])
