"""Measure how far steps with 16- or 8-bit moments are from float32's: the basis of grokadamw/state/formats.py.

    OMP_NUM_THREADS=1 python -m benchmarks.formats [--steps 200] [--training 120] [--seeds 3] [--jobs 2] [--out …]

Every candidate gets the same gradients, and keeps its moments in its own format. The gradients come from two small
transformers that train with float32 moments, and from a random generator:

- hamlet: bytes of text in batches, with noisy gradients;
- add113: arithmetic in one batch, with gradients that change slowly;
- decades: noise whose elements differ by up to four decades within a block.

Then some candidates train on hamlet themselves. Prints two tables and writes formats.json, after the streams and again
after the runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from grokadamw import GrokAdamW
from grokadamw.state.formats import BLOCK, decode, dither, encode

from . import RESULTS
from .grokking import tasks
from .step_time import machine

SAMPLE = 64 * 256  # elements of a model that are replayed, in pieces of 256
SMALLEST = 4096  # elements of the smallest tensor that is worth a format
LAMB = 2.0
STREAMS = ("hamlet", "add113", "decades")
AVERAGES = ((0.999, 0.98), (0.98, 0.9))  # β2 and α
Round = Callable[[Tensor, Tensor, bool], Tensor]  # (values, a block per row; numbers in [0, 1); is v) → values as kept


def cut(codes: Tensor, u: Tensor, highest: int, positive: Tensor | None) -> Tensor:
    """Round codes down or up, as u says. Where `positive` is true, codes do not become 0."""
    codes = torch.floor(codes + u).clamp(max=highest)
    return codes if positive is None else torch.maximum(codes, positive.to(codes.dtype))


def linear(x: Tensor, u: Tensor, is_v: bool) -> Tensor:
    """Use codes in proportion to the value, of 7 bits and a sign or of 8 bits."""
    highest = 255 if is_v else 127
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / highest
    return x.sign() * cut(x.abs() / scale, u, highest, x > 0 if is_v else None) * scale


def softsign(x: Tensor, u: Tensor, is_v: bool) -> Tensor:
    """Use codes in proportion to 2x / (1 + |x|), as in databricks/flashoptim."""
    highest = 255 if is_v else 127
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30)
    code = cut(2 * highest * x.abs() / (scale + x.abs()), u, highest, x > 0 if is_v else None) / highest
    return x.sign() * code / (2 - code) * scale


def floating(x: Tensor, u: Tensor, is_v: bool, exponent: int, mantissa: int) -> Tensor:
    """Use a float of these numbers of bits, with subnormal numbers, below a power of two that the block shares."""
    shift = 23 - mantissa
    bits = x.abs().view(torch.int32)
    top = (bits.amax(1, keepdim=True) + (1 << shift) - 1) >> 23
    low = (top - (1 << exponent) + 2).clamp(min=25) << 23
    code = torch.maximum((x.abs() + low.view(torch.float32)).view(torch.int32) - low, bits - low + (1 << 23))
    code = (code + (u * (1 << shift)).to(torch.int32)) >> shift
    code = torch.maximum(code, bits.clamp(max=1)) if is_v else code
    small = ((code << shift) + low).view(torch.float32) - low.view(torch.float32)
    return x.sign() * torch.minimum(small, ((code << shift) + low - (1 << 23)).view(torch.float32))


def e(name: str) -> Round:
    """Return a small float: `e("3m4")` has three bits for the exponent and four for the mantissa."""
    exponent, mantissa = map(int, name.split("m"))
    return lambda x, u, is_v: floating(x, u, is_v, exponent, mantissa)


def root(square_root: Round) -> Round:
    """Keep √v instead of v."""
    return lambda x, u, is_v: square_root(x.sqrt(), u, is_v).square()


def the_packages(dtype: torch.dtype) -> Round:
    """Keep a state as the package does."""

    def keep(x: Tensor, u: Tensor, is_v: bool) -> Tensor:
        name, kind = ("exp_avg_sq" if is_v else "exp_avg"), torch.uint8 if is_v and dtype == torch.int8 else dtype
        return decode(*encode(x, kind, name, (u.double() * 2**32).long()), name)

    return keep


bfloat16, int8 = the_packages(torch.bfloat16), the_packages(torch.int8)


class Candidate(NamedTuple):
    name: str  # of the formats of m and μ, and of v
    signed: Round
    square: Round
    block: int
    rounding: str  # "nearest", "random", or "dither": the package's


def floats(name: str) -> Candidate:
    """Return a pair of floating-point formats: `"e3m4, √e2m6"` keeps m and μ in e3m4, and √v in e2m6."""
    signed, square = name.split(", ")
    v = e(square.lstrip("√e"))
    return Candidate(name, e(signed[1:]), root(v) if "√" in square else v, BLOCK, "dither")


def linears(block: int) -> Candidate:
    """Return int8 with blocks of another length."""
    return Candidate("linear, √linear", linear, root(linear), block, "dither")


ROUNDINGS = ("nearest", "random", "dither")
CANDIDATES = [
    *(Candidate("bfloat16", bfloat16, bfloat16, 256, rounding) for rounding in ROUNDINGS),
    *(Candidate("int8", int8, int8, BLOCK, rounding) for rounding in ROUNDINGS),
    *map(linears, (32, 128, 256)),
    Candidate("linear, linear", linear, linear, BLOCK, "dither"),
    Candidate("softsign, √linear", softsign, root(linear), BLOCK, "dither"),
    *map(floats, ("e3m4, e4m4", "e4m3, e4m4", "e2m5, √e2m6", "e3m4, √e3m5")),
]
FLOAT32 = Candidate("float32", lambda x, u, is_v: x, lambda x, u, is_v: x, 256, "nearest")
TRAINED = [
    FLOAT32,
    Candidate("bfloat16", bfloat16, bfloat16, 256, "dither"),
    *(Candidate("int8", int8, int8, BLOCK, rounding) for rounding in ("nearest", "dither")),
    floats("e3m4, e4m4"),
]


class Dither:
    """The numbers that are added to the codes of the three moments before the codes are rounded down."""

    def __init__(self, size: int, rounding: str) -> None:
        self.rounding, self.generator = rounding, torch.Generator().manual_seed(0)
        self.shape = (3, size)

    def at(self, step: int) -> Tensor:
        if self.rounding == "nearest":
            return torch.full(self.shape, 0.5)
        if self.rounding == "random":
            return torch.rand(self.shape, generator=self.generator)
        words = dither(0, self.shape[1:], 0, torch.tensor(step))
        # the upper 24 bits alone, or float32 would round some numbers up to 1
        return torch.stack([words(name) >> 8 for name in ("exp_avg", "grok_ema", "exp_avg_sq")]) / 2.0**24


def kept(candidate: Candidate, moments: Sequence[Tensor], u: Tensor) -> list[Tensor]:
    """Return m, μ and v as they come back from a format. Elements that do not fill a block stay unchanged."""
    found = []
    for place, moment in enumerate(moments):
        whole = moment.numel() // candidate.block * candidate.block
        rows = [x.flatten()[:whole].view(-1, candidate.block) for x in (moment, u[place])]
        keep = candidate.square if place == 2 else candidate.signed
        back = torch.cat([keep(*rows, place == 2).flatten(), moment.flatten()[whole:]])
        found.append(back.view_as(moment))
    return found


class Moments:
    """The moments of one candidate."""

    def __init__(self, candidate: Candidate, beta2: float, alpha: float) -> None:
        self.candidate, self.beta2, self.alpha, self.step = candidate, beta2, alpha, 0
        self.m, self.mu, self.v = torch.zeros(3, SAMPLE).unbind()
        self.dither = Dither(SAMPLE, candidate.rounding)

    def update(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return the update that this gradient leads to, and its denominator."""
        self.step += 1
        mu = self.alpha * self.mu + (1 - self.alpha) * g
        g = g + LAMB * mu
        m, v = 0.9 * self.m + 0.1 * g, self.beta2 * self.v + (1 - self.beta2) * g.square()
        denominator = (v / (1 - self.beta2**self.step)).sqrt() + 1e-8
        self.m, self.mu, self.v = kept(self.candidate, (m, mu, v), self.dither.at(self.step))
        return m / (1 - 0.9**self.step) / denominator, denominator


def gradients(stream: str, beta2: float, alpha: float) -> Iterator[Tensor]:
    """Yield gradients of shape (SAMPLE,). A model's are random pieces of 256 elements from all large tensors."""
    generator = torch.Generator().manual_seed(0)
    scales = 10 ** (-4 * torch.rand(SAMPLE, generator=generator))
    while stream == "decades":
        yield torch.randn(SAMPLE, generator=generator) * scales
    task = tasks.load()[stream]
    model, _, batches = task.start(0)
    params = list(model.parameters())
    optimizer = GrokAdamW(params, gamma=0.0, betas=(0.9, beta2), alpha_init=alpha, lamb=LAMB)
    pieces = [param.numel() // 256 if param.numel() >= SMALLEST else 0 for param in params]
    chosen = torch.randperm(sum(pieces), generator=generator)[: SAMPLE // 256]
    for batch in batches:
        optimizer.zero_grad()
        task.loss(model(batch.inputs), batch.targets).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        grads = [p.grad.flatten()[: 256 * n].view(-1, 256) for p, n in zip(params, pieces, strict=True)]
        yield torch.cat(grads)[chosen].flatten()


def replay(stream: str, beta2: float, alpha: float, steps: int) -> list[dict[str, Any]]:
    """Return a row for each candidate: how its updates differ from float32's, as means over the last ten steps.

    `error` is the norm of the difference over the norm of float32's updates. `step_…` are quantiles over the elements
    of the candidate's step size (1 / √v) over float32's. `largest` is its largest update.
    """
    names = ("error", "step_0.1%", "step_median", "step_99.9%", "largest")
    exact, *others = (Moments(candidate, beta2, alpha) for candidate in (FLOAT32, *CANDIDATES))
    seen: list[list[tuple[float, ...]]] = [[] for _ in others]
    for step, g in zip(range(steps), gradients(stream, beta2, alpha), strict=False):
        update, denominator = exact.update(g)
        for moments, numbers in zip(others, seen, strict=True):
            coded, coded_denominator = moments.update(g)
            if step >= steps - 10:
                ratios = (denominator / coded_denominator).quantile(torch.tensor([0.001, 0.5, 0.999])).tolist()
                error = float((coded - update).norm() / update.norm())
                numbers.append((error, *ratios, float(coded.abs().max())))
    return [
        {"stream": stream, "beta2": beta2, "alpha": alpha, "format": c.name, "block": c.block, "rounding": c.rounding}
        | {
            name: round(statistics.mean(found), 4)
            for name, found in zip(names, zip(*numbers, strict=True), strict=True)
        }
        for c, numbers in zip(CANDIDATES, seen, strict=True)
    ]


def train(place: int, seed: int, steps: int) -> dict[str, Any]:
    """Train on hamlet with the large tensors' moments in a format, and return the mean loss on held-out text."""
    candidate = TRAINED[place]
    task = tasks.load()["hamlet"]
    model, data, batches = task.start(seed)
    optimizer = GrokAdamW(model.parameters(), gamma=0.0, lamb=LAMB)
    large = [param for param in model.parameters() if param.numel() >= SMALLEST]
    dithers = [Dither(param.numel(), candidate.rounding) for param in large]
    for step in range(steps):
        batch = next(batches)
        optimizer.zero_grad()
        task.loss(model(batch.inputs), batch.targets).backward()
        optimizer.step()
        for param, noise in zip(large, dithers, strict=True) if candidate is not FLOAT32 else ():
            moments = [optimizer.state[param][name] for name in ("exp_avg", "grok_ema", "exp_avg_sq")]
            for moment, back in zip(moments, kept(candidate, moments, noise.at(step)), strict=True):
                moment.copy_(back)
    with torch.no_grad():
        loss = -float(task.score(model(data.report.inputs), data.report.targets).mean())
    names = {"format": candidate.name, "block": candidate.block, "rounding": candidate.rounding}
    return {**names, "seed": seed, "loss": round(loss, 4)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.formats", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="of each stream (default: %(default)s)")
    parser.add_argument("--training", type=int, default=120, help="steps of each run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="of each format that trains (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: %(default)s)")
    given = parser.parse_args(arguments)
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        replays = [pool.submit(replay, stream, *pair, given.steps) for stream in STREAMS for pair in AVERAGES]
        seeds, places = range(given.seeds), range(len(TRAINED))
        runs = [pool.submit(train, place, seed, given.training) for seed in seeds for place in places]
        rows = [row for replayed in replays for row in replayed.result()]
        write(given, rows, [])
        write(given, rows, [run.result() for run in runs])


def write(given: argparse.Namespace, rows: Sequence[dict[str, Any]], losses: Sequence[dict[str, Any]]) -> None:
    show(rows, losses)
    given.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine("cpu"), "steps": given.steps, "streams": rows}
    results |= {"training_steps": given.training, "training": losses}
    (given.out / "formats.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def show(rows: Sequence[dict[str, Any]], losses: Sequence[dict[str, Any]]) -> None:
    """Print the updates' errors, one column per stream, and each format's mean loss beside each seed's loss."""
    streams = list(dict.fromkeys((row["stream"], row["beta2"]) for row in rows))
    table = Table("error (99.9% of step sizes)", *(f"{stream} β2={beta2}" for stream, beta2 in streams), box=None)
    for key in dict.fromkeys((row["format"], row["block"], row["rounding"]) for row in rows):
        found = [row for row in rows if (row["format"], row["block"], row["rounding"]) == key]
        table.add_row(" ".join(map(str, key)), *(f"{row['error']:.3f} ({row['step_99.9%']:.2f})" for row in found))
    Console(width=160).print(table)
    table = Table("trained on hamlet", "mean loss", "loss of each seed", box=None)
    for key in dict.fromkeys((run["format"], run["rounding"]) for run in losses):
        found = [run["loss"] for run in losses if (run["format"], run["rounding"]) == key]
        table.add_row(" ".join(key), f"{statistics.mean(found):.4f}", " ".join(f"{loss:.4f}" for loss in found))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
