"""Tests of how DTensors are sharded, on meshes of ranks that do not exist: each rank only looks at its own part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from grokadamw.shards import blocks_before, cuts_blocks

BLOCK = 4
ROWS, COLUMNS, COPIES = Shard(0), Shard(1), Replicate()


@contextmanager
def as_rank(rank: int, sizes: tuple[int, ...]) -> Iterator[Any]:
    """Be one rank of a mesh, whose other ranks do not exist: what would be communicated is ignored."""
    mesh = torch.empty(sizes)
    dist.init_process_group("fake", rank=rank, world_size=mesh.numel(), store=FakeStore())
    try:
        yield init_device_mesh("cpu", sizes)
    finally:
        dist.destroy_process_group()


def on_ranks(whole: Tensor, sizes: tuple[int, ...], placements: list[Any], look: Callable[[Any], Any]) -> list[Any]:
    """Return each rank's elements of a tensor, and what `look` says of its DTensor."""
    found = []
    for rank in range(torch.empty(sizes).numel()):
        with as_rank(rank, sizes) as mesh:
            own = whole
            for place, size, placement in zip(mesh.get_coordinate(), sizes, placements, strict=True):
                if isinstance(placement, Shard):
                    pieces = own.chunk(size, placement.dim)
                    empty = own.narrow(placement.dim, 0, 0)
                    own = pieces[place] if place < len(pieces) else empty
            shape, stride = whole.shape, whole.stride()
            dtensor = DTensor.from_local(own, mesh, placements, run_check=False, shape=shape, stride=stride)
            found.append((own.flatten().tolist(), look(dtensor)))
    return found


def blocks_of(shape: tuple[int, ...]) -> Tensor:
    """Number the blocks of a vector, or of a tensor's rows, one after the other; return each element's number."""
    rows = torch.empty(shape).reshape(1 if len(shape) == 1 else shape[0], -1)
    of_a_row = torch.arange(rows.shape[1]) // BLOCK
    return (of_a_row + torch.arange(len(rows))[:, None] * (of_a_row[-1] + 1)).reshape(shape)


WAYS: list[tuple[tuple[int, ...], tuple[int, ...], list[Any]]] = [  # shapes, sizes of the mesh and placements
    *[(shape, (2,), [ROWS]) for shape in ((16,), (15,), (13,), (7, 10), (1, 9), (6, 2, 3))],
    *[(shape, (2,), [COLUMNS]) for shape in ((3, 16), (3, 15), (3, 10), (3, 8, 5), (3, 4, 10))],
    *[((size,), (2, 2), placements) for size in (32, 24) for placements in ([ROWS, ROWS], [ROWS, COPIES])],
    *[((8, width), (2, 2), [COLUMNS, COLUMNS]) for width in (32, 24)],
    ((8, 32), (2, 2), [ROWS, COLUMNS]),
    ((5, 9), (4,), [COPIES]),
    ((5, 9), (1,), [COLUMNS]),
    ((5, 9), (4,), [ROWS]),
]


@pytest.mark.parametrize(("shape", "sizes", "placements"), WAYS)
def test_a_block_is_cut_if_two_ranks_have_elements_of_it(
    shape: tuple[int, ...], sizes: tuple[int, ...], placements: list[Any]
) -> None:
    whole = blocks_of(shape)
    found = on_ranks(whole, sizes, placements, lambda x: cuts_blocks(x, BLOCK))
    (answer,) = {said for _, said in found}
    counts = {block: (whole == block).sum() for block in whole.unique().tolist()}
    is_cut = any(0 < own.count(block) < counts[block] for own, _ in found for block in own)
    is_cautious = len(shape) > 2 or len(placements) == 2  # then some that are not cut count as cut, too
    assert answer == is_cut or (answer and is_cautious)


@pytest.mark.parametrize(("shape", "sizes", "placements"), WAYS)
def test_no_two_ranks_number_different_blocks_alike(
    shape: tuple[int, ...], sizes: tuple[int, ...], placements: list[Any]
) -> None:
    """A rank with whole rows, or with whole blocks of a vector, has the numbers that one process has."""
    whole = torch.arange(torch.empty(shape).numel()).reshape(shape)
    blocks, width = blocks_of(shape).flatten().tolist(), whole[0].numel() if len(shape) > 1 else whole.numel()
    found = on_ranks(whole, sizes, placements, lambda x: (blocks_before(x, BLOCK), x.to_local().shape))
    ranks_of: dict[int, set[Any]] = {}
    for own, (before, size) in found:
        if own and (COLUMNS not in placements or sizes == (1,)):
            assert before == blocks[own[0]]
        for i in range(size[0] * -(-size[1:].numel() // BLOCK)):
            ranks_of.setdefault(before + i, set()).add(tuple(own))
    begin_within_a_block = any(own[0] % width % BLOCK for own, _ in found if own)
    if COLUMNS in placements and not begin_within_a_block:
        assert {len(ranks) for ranks in ranks_of.values()} == {1}
