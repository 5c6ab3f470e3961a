"""The tables that the GPU's kernels read, and the class that keeps them on the device between steps."""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..state.formats import BLOCK, key_of, width_of
from . import memory
from .types import Addresses, Batch, Coded, Scalars, limited_widths

_ANOTHER = "the captured step differs from the one before it: take a step before capturing"
_KEPT = 64  # how many tables the device keeps a copy of
_COLUMNS = ("params", "exp_avgs", "exp_avg_sqs", "grok_emas", "steps")
_NUMBERS = struct.Struct("QdQdQdQdQd10d")  # a batch's numbers, as `words_of` packs them
_ALIGNED = bytes(range(0, 256, 16))
_SPARES = 4  # captures that may follow one another without an eager step in between


class Shape(NamedTuple):
    """The amount of work that a program does at a time."""

    chunk: int  # elements of a tensor that one program takes
    block: int  # elements that it holds in registers at once: 16 bytes or more of each tensor for every thread
    warps: int


SHAPES = {8: Shape(2048, 512, 4), 4: Shape(4096, 1024, 4), 2: Shape(4096, 1024, 4)}  # by bytes of an element
CODED = Shape(4096, 1024, 4)  # of tensors that are kept in fewer bits: whole blocks of 64
# A program that limits rows takes as many whole rows as fit into its chunk, their length rounded up to the next of
# WIDTHS. It takes one row if that is longer than all of WIDTHS, and reads it twice. Rows of more than LONGEST elements
# are too much for one program: rows.py limits them after the step. A row is straight if its length is a multiple of
# STRAIGHT elements and its tensors are aligned; any other row is odd.
WIDTHS, STRAIGHT, LONGEST = tuple(1 << n for n in range(4, 11)), 4, 1 << 16
# In `sizes_of_rows` bit n stands for WIDTHS[n], bit LONG for longer rows, and bit ODD + n for odd rows of size n.
LONG, ODD = len(WIDTHS), len(WIDTHS) + 1
# `judge` is one program that adds up the sums of all chunks, with as many threads and loads at once as a GPU allows
JUDGE_BLOCK, JUDGE_THREADS = 4096, 1024


class Verdict(NamedTuple):
    """The results of `judge` about the gradients of a step, all on the device."""

    numbers: Tensor  # the next three fields are views of it
    norm: Tensor  # N
    clips: list[Tensor]  # c for each limit
    factors: list[Tensor]  # c divided by the loss scale
    finite: Tensor  # 0-d bool: True if the step may be written


class Static(NamedTuple):
    """The data that the device keeps for batches until one of them moves."""

    key: Any  # the values from which it was made
    table: Tensor
    chunks: Tensor
    tail: bool  # some chunk is not full, or some tensor not aligned
    shape: Shape
    of_rows: int = 0  # the sizes of rows, as `sizes_of_rows` returns them


class Codes(NamedTuple):
    """The data that a launch needs about tensors kept in fewer bits; `Addresses.table` holds it."""

    kind: Any  # the dtypes in which m, v and μ are kept, the number of low bits, and True if parameters are rounded
    columns: tuple[bytes, ...]  # addresses of the states' scales and of low bits; empty if there are none
    widths: tuple[int, ...]  # elements in a row if its last block is shorter, otherwise in the whole tensor
    words: bytes  # for each tensor the key of its dithers, and the number of its blocks on ranks before this one


class Call(NamedTuple):
    """One of the batches that a launch takes, with its scalars and addresses."""

    batch: Batch
    scalars: Scalars
    at: Addresses


class Kind(NamedTuple):
    """The properties that tensors must share to be in one launch: all that is compiled into a kernel."""

    device: torch.device
    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    has_mu: bool
    raw: bool  # v averages (c g)²
    eps_first: bool  # ε joins √v before v's bias correction
    has_finite: bool
    is_part: bool  # a step has several micro-batches
    moves: bool  # θ moves
    coded: Any  # `Codes.kind`; None if no tensor is kept in fewer bits


class _Key(NamedTuple):
    """The values on which a table depends, for one batch. If any of them has changed, the table is made again."""

    at: tuple[Any, ...]  # the fields of `Addresses` up to `ends`
    beta1: Sequence[float]
    bias_beta1: Sequence[float]
    widths: list[int]  # elements of the rows that are limited
    codes: Codes | None

    @property
    def cut(self) -> tuple[Any, ...]:
        """The values that decide how tensors are cut into chunks: their ends, rows and codes."""
        return self.at[5], self.widths, self.codes


class Tables:
    """The tables on a device, for one stream and for steps whose tensors look alike. The cache's plans keep them."""

    def __init__(self) -> None:
        self._static: dict[Any, Static] = {}  # by kinds of tensors
        self._squares: tuple[Tensor, list[tuple[torch.dtype, list[int], Static]]] | None = None
        self._words: dict[tuple[torch.device, bytes], Tensor] = {}
        self._runs: dict[bytes, list[tuple[int, int]]] = {}
        self._verdicts: dict[tuple[torch.device, int], Verdict] = {}
        self._spares: list[Tensor] = []
        self._room: Tensor | None = None
        self._sent = 0
        self.masked = False  # True if every launch includes the masked body

    def may_be_captured(self, tensors: int, batches: int) -> None:
        """Prepare what a graph needs and a capture cannot obtain: pinned memory for its tables, and its kernels.

        Args:
            tensors, batches: the largest possible number of each.
        """
        self.masked = True  # a kernel that is first used during a capture cannot be loaded
        size = 20 * tensors + 32 * batches  # the gradients twice, and the table; the limits and numbers
        while len(self._spares) < _SPARES:
            pinned = torch.cuda.is_available()
            self._spares.append(torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=pinned))

    def captured(self) -> Tables | None:
        """Return tables for a graph. It reads the same tables at every replay, so keep them as long as it lives.

        Return None if `may_be_captured` was not called before, or if too many captures have followed that call.
        """
        if not self._spares or not (self._static or self._squares):
            return None
        tables = Tables()
        tables._static, tables._squares, tables.masked = dict(self._static), self._squares, True
        tables._room = self._spares.pop()
        return tables

    def words(self, content: bytes, device: torch.device) -> Tensor:
        """Return the content on the device, as integers of 64 bits."""
        found = self._words.pop((device, content), None)
        if found is None:
            found = self._send(torch.frombuffer(bytearray(content or bytes(8)), dtype=torch.int64), device)
            if len(self._words) >= _KEPT:
                del self._words[next(iter(self._words))]  # the least recently used one
        self._words[device, content] = found
        return found

    def _send(self, words: Tensor, device: torch.device) -> Tensor:
        if self._room is None:
            return words.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else words
        start, self._sent = self._sent, self._sent + len(words)
        if self._sent > len(self._room):
            raise RuntimeError(_ANOTHER)
        room = self._room[start : self._sent].copy_(words)
        return torch.empty_like(words, device=device).copy_(room, non_blocking=True)

    def static(self, kind: Kind, calls: Sequence[Call]) -> Static:
        """Return the chunks of all tensors and their table, which are made again if the tensors have changed."""
        key = [
            _Key(x.at[:6], x.scalars.beta1, x.scalars.bias_beta1, limited_widths(x.batch, x.scalars), x.at.table)
            for x in calls
        ]
        found = self._static.get(kind)
        if found is None or found.key != key:
            found = self._static[kind] = self._made(key, calls, found)
        return found

    def _made(self, key: list[_Key], calls: Sequence[Call], before: Static | None) -> Static:
        """Return new chunks and a new table. If the tensors' sizes are those of `before`, its chunks are kept."""
        tensors, codes = calls[0].batch, [x.codes for x in key if x.codes is not None]
        device = tensors.params[0].device
        shape = CODED if codes else SHAPES[max(tensors.exp_avgs[0].element_size(), 4)]  # computed in float32 at least
        chunk = shape.chunk
        sizes = [size for x in calls for size in _sizes(x.at.ends)]
        widths = [width for x in key for width in x.widths]
        coded_widths = [width for x in codes for width in x.widths]
        beta1s = [beta1 for x in key for beta1 in x.beta1]
        logs = [math.log(beta1) if beta1 else -math.inf for x in key for beta1 in x.bias_beta1]
        places = [b"".join(getattr(x.at, name) or b"" for x in calls) for name in _COLUMNS]
        coded_places = [b"".join(columns) for columns in zip(*(x.columns for x in codes), strict=True)]
        none = bytes(8 * len(sizes))
        columns = [  # in the order of the kernels' AT_SIZE, AT_THETA, …
            memory.packed(sizes),
            *(column or none for column in places),
            struct.pack(f"{len(sizes)}d", *beta1s),
            struct.pack(f"{len(sizes)}d", *logs),
            memory.packed([i for i, x in enumerate(key) for _ in x.beta1]),
            memory.packed(widths),
            memory.packed([rows_of_a_chunk(width, chunk) for width in widths]),
            *(column or none for column in coded_places),
            memory.packed(coded_widths),
            *(x.words for x in codes),
        ]
        words = torch.frombuffer(bytearray(b"".join(columns)), dtype=torch.int64)
        aligned = not any(misaligned(column) for column in (*places[:4], *coded_places[3:]))
        counted = list(map(_padded, sizes, coded_widths)) if codes else sizes
        same = before is not None and [x.cut for x in before.key] == [x.cut for x in key]
        counts = _chunk_counts(sizes, counted, widths, chunk)
        chunks = before.chunks if before and same else self._send(_chunks(counts), device)
        tail = not aligned or any(
            n % chunk or n != size for n, size, width in zip(counted, sizes, widths, strict=True) if not width
        )
        of_rows = sizes_of_rows(widths, aligned, BLOCK if codes else STRAIGHT)
        return Static(key, self._send(words, device), chunks, tail, shape, of_rows)

    def squares(self, grads: Sequence[Tensor]) -> tuple[Tensor, list[tuple[torch.dtype, list[int], Static]]]:
        """Return a tensor for the sums of all chunks, and the places, chunks and sizes of each dtype's gradients."""
        if self._squares is None:
            if self._room is not None:
                raise RuntimeError(_ANOTHER)
            places: dict[torch.dtype, list[int]] = {}
            for i, grad in enumerate(grads):
                places.setdefault(grad.dtype, []).append(i)
            found, device = list[tuple[torch.dtype, list[int], Static]](), grads[0].device
            for dtype, of_dtype in places.items():
                sizes, shape = [grads[i].numel() for i in of_dtype], SHAPES[dtype.itemsize]
                words = torch.tensor(sizes, dtype=torch.int64, device="cpu")
                counts = [-(-n // shape.chunk) for n in sizes]
                table, chunks = (self._send(x, device) for x in (words, _chunks(counts)))
                static = Static(None, table, chunks, any(n % shape.chunk for n in sizes), shape)
                found.append((dtype, of_dtype, static))
            programs = sum(static.chunks.numel() for *_, static in found)
            self._squares = torch.empty(programs, dtype=torch.float64, device=device), found
        return self._squares

    def vectors(self, numbers: Sequence[Tensor], at: bytes) -> list[Tensor]:
        """Return 0-d float32 tensors, which lie at these addresses, as the fewest vectors that hold them all."""
        if at not in self._runs:
            self._runs[at] = list(_runs(at, [x.untyped_storage().data_ptr() for x in numbers]))
        runs = self._runs[at]
        return [numbers[i] if length == 1 else numbers[i].as_strided((length,), (1,)) for i, length in runs]

    def verdict(self, device: torch.device, batches: int) -> Verdict:
        """Return the tensors for a step's verdict: always the same, because the next kernel gets their addresses."""
        if (device, batches) not in self._verdicts:
            numbers = torch.empty(1 + 2 * batches, dtype=torch.float64, device=device)
            norm, *rest = numbers.unbind()
            finite = torch.empty((), dtype=torch.bool, device=device)
            self._verdicts[device, batches] = Verdict(numbers, norm, rest[:batches], rest[batches:], finite)
        return self._verdicts[device, batches]


def _sizes(ends: bytes) -> list[int]:
    numbers = struct.unpack(f"{len(ends) // 8}q", ends)
    return [end - start for start, end in zip((0, *numbers), numbers, strict=False)]


def _chunk_counts(sizes: Sequence[int], counted: Sequence[int], widths: Sequence[int], chunk: int) -> list[int]:
    """Return how many chunks each tensor has: chunks of its counted elements or, if it has a width, of whole rows."""
    return [
        -(-n // chunk) if not width else -(-(size // width) // rows_of_a_chunk(width, chunk))
        for size, n, width in zip(sizes, counted, widths, strict=True)
    ]


def _padded(size: int, width: int) -> int:
    """Return how many elements a tensor would have if the last block of each row were full."""
    return size // max(width, 1) * -(-width // BLOCK) * BLOCK


def codes_of(batch: Batch, coded: Coded) -> Codes:
    """Return the data that the kernel needs about tensors kept in fewer bits."""
    odd = [x.dim() > 1 and width_of(x) % BLOCK > 0 for x in batch.params]
    before = coded.blocks_before or [0] * len(odd)
    words = [key_of(index) | blocks % 2**32 << 32 for index, blocks in zip(batch.indices, before, strict=True)]
    return Codes(
        (
            *(column[0].dtype if column else torch.float32 for column in batch[2:5]),
            8 * coded.lows[0].itemsize if coded.lows else 0,
            coded.rounds,
        ),
        tuple(memory.addresses(column or []) for column in coded[:4]),
        tuple(width_of(x) if is_odd else x.numel() for x, is_odd in zip(batch.params, odd, strict=True)),
        memory.packed(words),
    )


def rows_of_a_chunk(width: int, chunk: int) -> int:
    """Return how many whole rows a program takes."""
    return 1 if width > WIDTHS[-1] else max(chunk // WIDTHS[bisect_left(WIDTHS, width)], 1)


def sizes_of_rows(widths: Iterable[int], aligned: bool, straight: int) -> int:
    """Return the sizes of rows that occur, as bits: the sizes in WIDTHS, longer ones, and both again for odd rows.

    Unless all tensors are `aligned`, rows of each size may be odd in one tensor and straight in another.
    """
    places = {bisect_left(WIDTHS, width) + ODD * (width % straight > 0) for width in widths if width}
    of_rows = sum(1 << place for place in places)
    return of_rows if aligned else and_odd(of_rows)


def and_odd(of_rows: int) -> int:
    """Return sizes of rows, as bits, for the case that rows of each size may also be odd."""
    return of_rows | (of_rows & ((1 << ODD) - 1)) << ODD


def _chunks(counts: Sequence[int]) -> Tensor:
    """Return a word for each chunk of each tensor: the tensor's index times 2⁴⁰, plus the chunk's number in it."""
    of_each = torch.tensor(counts, dtype=torch.int64, device="cpu")
    tensors = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), of_each)
    starts = torch.repeat_interleave(of_each.cumsum(0) - of_each, of_each)
    return (tensors << 40) + torch.arange(len(tensors), device="cpu") - starts


def misaligned(at: bytes) -> bool:
    return bool(at[::8].strip(_ALIGNED))  # the lowest byte of each address, as no host of a GPU is big-endian


def words_of(n: Scalars) -> bytes:
    """Return a batch's numbers as the kernel reads them: the first five as an address and a value, one of them 0."""
    first: list[Any] = []
    for number in (n.lr, n.alpha, n.clip, n.max_row_change, n.weight_decay):  # a check for Tensor takes longer
        first += (0, number) if isinstance(number, (float, int)) else (number.data_ptr(), 0.0)
    log_beta2, micro = math.log(n.beta2) if n.beta2 else -math.inf, n.micro_step
    rest = (n.beta2, log_beta2, n.eps, n.lamb, n.amplify_after, -1.0 if n.maximize else 1.0)
    return _NUMBERS.pack(*first, *rest, micro.k, micro.decays, n.max_row_norm, micro.nth)


def _runs(at: bytes, storages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the index of the first number and the length, for each run of float32 numbers at adjacent addresses."""
    addresses = struct.unpack(f"{len(at) // 8}Q", at)
    order = sorted(range(len(addresses)), key=addresses.__getitem__)
    # two storages may be adjacent, but no vector may cross them
    breaks = [addresses[b] != addresses[a] + 4 or storages[b] != storages[a] for a, b in pairwise(order)]
    starts = [0, *(i for i, is_break in enumerate(breaks, start=1) if is_break)]
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        yield order[start], end - start
