"""The kernel of `gpu` for tensors that are kept in fewer bits, in Triton: any number of them in one launch.

It does what `gpu_kernels.update` does, between decoding and encoding. A program takes whole blocks. The 64 elements of
a block share a scale; the last block of each row may be shorter. A body without masks handles full, aligned blocks.
"""

import triton
import triton.language as tl

from .gpu_codes import (
    BLOCK_SIZE,
    TURN_OF_M,
    TURN_OF_MU,
    TURN_OF_V,
    hash_of,
    load_param,
    load_state,
    pointer_to_state,
    rest_of,
    store_param,
    store_state,
)
from .gpu_norm import chunk, load, pointer_to
from .gpu_stages import (
    AT_DITHER,
    AT_LOW,
    AT_M_SCALES,
    AT_MU_SCALES,
    AT_ROW_WIDTH,
    AT_ROWS,
    AT_V_SCALES,
    AT_WIDTH,
    BIT,
    LONG,
    MAX_ROW_CHANGE,
    MAX_ROW_NORM,
    MICRO_STEPS,
    NARROW,
    NTH,
    ODD,
    WIDEST,
    entry_of,
    float64_at,
    limited,
    moments,
    moved_by,
    number_at,
    numbers_of,
    shares,
    slow_and_amplified,
    updated,
)


@triton.jit
def _from(
    addresses, start, first, PARAM: tl.constexpr, GRAD: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    MU: tl.constexpr, LOW: tl.constexpr, ODD: tl.constexpr,
):  # fmt: skip
    """Return pointers to the element and the block at which a program begins."""
    theta, low, grad, m, v, mu, m_scales, v_scales, mu_scales = addresses
    return (
        pointer_to(theta, PARAM, ODD) + start,
        pointer_to(low, tl.int16 if LOW == 16 else tl.int8, ODD) + start,
        pointer_to(grad, GRAD, ODD) + start,
        pointer_to_state(m, M, ODD) + start,
        pointer_to_state(v, V, ODD) + start,
        pointer_to_state(mu, MU, ODD) + start,
        pointer_to(m_scales, tl.float32, True) + first,
        pointer_to(v_scales, tl.float32, True) + first,
        pointer_to(mu_scales, tl.float32, True) + first,
    )


@triton.jit
def _new(
    tensors, numbers, at, block, inside, there, hashed, rest, usable,
    M: tl.constexpr, V: tl.constexpr, MU: tl.constexpr, LOW: tl.constexpr, HAS_MU: tl.constexpr, RAW: tl.constexpr,
    MOVES: tl.constexpr, MAY_BE_UNUSABLE: tl.constexpr, MASKED: tl.constexpr, WRITES: tl.constexpr,
):  # fmt: skip
    """Return θ of some blocks before and after the update. If WRITES, write m, v and μ, but never θ."""
    theta, low, grad, m, v, mu, m_scales, v_scales, mu_scales = tensors
    clip, keep_mu, add_mu, lamb, keep_m, add_m, keep_v, add_v, root, eps, decay, step = numbers
    # load everything before storing: the compiler cannot know that the pointers do not alias
    g = clip * load(grad, at, inside, MASKED, tl.float32)
    if MAY_BE_UNUSABLE:
        g = tl.where(usable, g, 0)
    slow = load_state(mu, mu_scales, at, block, inside, there, MU, False, MASKED) if HAS_MU else g
    first = load_state(m, m_scales, at, block, inside, there, M, False, MASKED)
    second = load_state(v, v_scales, at, block, inside, there, V, True, MASKED)
    old = load_param(theta, low, at, inside, LOW, MASKED) if MOVES else g
    g_hat = g
    if HAS_MU:
        slow, g_hat = slow_and_amplified(g, slow, keep_mu, add_mu, lamb)
        if WRITES:
            store_state(
                mu, mu_scales, at, block, inside, there, slow, hashed, rest, MU, False, TURN_OF_MU, MASKED
            )  # fmt: skip
    first, second = moments(g, g_hat, first, second, keep_m, add_m, keep_v, add_v, RAW)
    if WRITES:
        store_state(m, m_scales, at, block, inside, there, first, hashed, rest, M, False, TURN_OF_M, MASKED)
        store_state(v, v_scales, at, block, inside, there, second, hashed, rest, V, True, TURN_OF_V, MASKED)
    return old, updated(old, first, second, root, eps, decay, step) if MOVES else old


@triton.jit
def _chunk_of_blocks(
    addresses, numbers, key, before, draw, first, blocks, of_row, pad, usable,
    PARAM: tl.constexpr, GRAD: tl.constexpr, M: tl.constexpr, V: tl.constexpr, MU: tl.constexpr, LOW: tl.constexpr,
    ROUNDS: tl.constexpr, HAS_MU: tl.constexpr, RAW: tl.constexpr, MOVES: tl.constexpr,
    MAY_BE_UNUSABLE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Update the chunk that begins with block `first`. The last block of each row lacks `pad` elements."""
    COUNT: tl.constexpr = CHUNK // BLOCK_SIZE
    AT_ONCE: tl.constexpr = BLOCK // BLOCK_SIZE
    start = first * BLOCK_SIZE
    if MASKED:
        row = first // of_row
        start -= row * pad
        column, pad, of_row = (first - row * of_row).to(tl.int32), pad.to(tl.int32), of_row.to(tl.int32)
    tensors = _from(addresses, start, first, PARAM, GRAD, M, V, MU, LOW, MASKED)
    lane, rest = tl.arange(0, BLOCK_SIZE)[None, :], rest_of(draw)
    end = tl.minimum(blocks - first, COUNT).to(tl.int32) if MASKED else COUNT
    for begin in range(0, end, AT_ONCE):
        block = begin + tl.arange(0, AT_ONCE)[:, None]
        at, there = block * BLOCK_SIZE + lane, block < end
        inside = there
        if MASKED:
            rows = (column + block) // of_row
            at -= rows * pad
            is_last = column + block - rows * of_row == of_row - 1
            inside = there & (lane + tl.where(is_last, pad, 0) < BLOCK_SIZE)
        hashed = hash_of(before + first + block, key)
        _, new = _new(
            tensors, numbers, at, block, inside, there, hashed, rest, usable, M, V, MU, LOW, HAS_MU, RAW, MOVES,
            MAY_BE_UNUSABLE, MASKED, True,
        )  # fmt: skip
        if MOVES:
            store_param(tensors[0], tensors[1], at, inside, new, hashed, rest, LOW, ROUNDS, MASKED)


@triton.jit
def _chunk_of_rows(
    addresses, numbers, key, before, draw, first, end, width, of_row, change, norm, usable,
    PARAM: tl.constexpr, GRAD: tl.constexpr, M: tl.constexpr, V: tl.constexpr, MU: tl.constexpr, LOW: tl.constexpr,
    ROUNDS: tl.constexpr, HAS_MU: tl.constexpr, RAW: tl.constexpr, MAY_BE_UNUSABLE: tl.constexpr,
    HAS_CHANGE: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    IS_STRAIGHT: tl.constexpr,
):  # fmt: skip
    """Update and limit some rows of a matrix, of no more than WIDTH elements each."""
    if IS_STRAIGHT:  # tell the compiler that BLOCK_SIZE divides the width
        width = width // BLOCK_SIZE * BLOCK_SIZE
    tensors = _from(addresses, first * width, first * of_row, PARAM, GRAD, M, V, MU, LOW, not IS_STRAIGHT)
    before += first * of_row
    width, of_row, end = width.to(tl.int32), of_row.to(tl.int32), (end - first).to(tl.int32)
    lane, rest = tl.arange(0, BLOCK_SIZE)[None, :], rest_of(draw)
    OF_ROW: tl.constexpr = WIDTH // BLOCK_SIZE
    AT_ONCE: tl.constexpr = BLOCK // WIDTH if BLOCK > WIDTH else 1
    nth = tl.arange(0, AT_ONCE * OF_ROW)[:, None]
    column = nth % OF_ROW
    for begin in range(0, end, AT_ONCE):
        row = begin + nth // OF_ROW
        there = (row < end) & (column < of_row)
        at, block = row * width + column * BLOCK_SIZE + lane, row * of_row + column
        inside = there if IS_STRAIGHT else there & (column * BLOCK_SIZE + lane < width)
        hashed = hash_of(before + block, key)
        old, new = _new(
            tensors, numbers, at, block, inside, there, hashed, rest, usable, M, V, MU, LOW, HAS_MU, RAW, True,
            MAY_BE_UNUSABLE, True, True,
        )  # fmt: skip
        moved = moved_by(old, new, inside)
        wide, olds, after = moved.to(tl.float64), old.to(tl.float64), tl.where(inside, new, 0).to(tl.float64)
        moveds = _of_rows(wide * wide, AT_ONCE, OF_ROW)
        olds = _of_rows(olds * olds, AT_ONCE, OF_ROW) if HAS_CHANGE else moveds
        news = _of_rows(after * after, AT_ONCE, OF_ROW) if HAS_NORM else moveds
        products = _of_rows(after * wide, AT_ONCE, OF_ROW) if HAS_NORM else moveds
        share, share_of_norm = shares(olds, moveds, news, products, change, norm, HAS_CHANGE, HAS_NORM)
        share = tl.reshape(tl.broadcast_to(share, [AT_ONCE, OF_ROW]), [AT_ONCE * OF_ROW, 1])
        share_of_norm = tl.reshape(tl.broadcast_to(share_of_norm, [AT_ONCE, OF_ROW]), [AT_ONCE * OF_ROW, 1])
        new = limited(new, moved, share, share_of_norm, HAS_CHANGE, HAS_NORM, tl.float32)
        store_param(tensors[0], tensors[1], at, inside, new, hashed, rest, LOW, ROUNDS, True)


@triton.jit
def _of_rows(values, ROWS: tl.constexpr, OF_ROW: tl.constexpr):
    """Return the sum of each row. The blocks of a row follow one another."""
    return tl.sum(tl.reshape(tl.sum(values, axis=1), [ROWS, OF_ROW]), axis=1, keep_dims=True)


@triton.jit
def _row(
    addresses, numbers, key, before, draw, row, width, of_row, change, norm, usable,
    PARAM: tl.constexpr, GRAD: tl.constexpr, M: tl.constexpr, V: tl.constexpr, MU: tl.constexpr, LOW: tl.constexpr,
    ROUNDS: tl.constexpr, HAS_MU: tl.constexpr, RAW: tl.constexpr, MAY_BE_UNUSABLE: tl.constexpr,
    HAS_CHANGE: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK: tl.constexpr, IS_STRAIGHT: tl.constexpr,
):  # fmt: skip
    """Update and limit a row of any length, in two passes: one for its sums, one to write."""
    if IS_STRAIGHT:
        width = width // BLOCK_SIZE * BLOCK_SIZE
    tensors = _from(addresses, row * width, row * of_row, PARAM, GRAD, M, V, MU, LOW, not IS_STRAIGHT)
    before += row * of_row
    width, of_row = width.to(tl.int32), of_row.to(tl.int32)
    lane, rest = tl.arange(0, BLOCK_SIZE)[None, :], rest_of(draw)
    AT_ONCE: tl.constexpr = BLOCK // BLOCK_SIZE
    olds = tl.zeros([AT_ONCE], tl.float64)
    moveds, news, products = olds, olds, olds
    for begin in range(0, of_row, AT_ONCE):
        block = begin + tl.arange(0, AT_ONCE)[:, None]
        there, at = block < of_row, block * BLOCK_SIZE + lane
        inside = there if IS_STRAIGHT else at < width
        old, new = _new(
            tensors, numbers, at, block, inside, there, block, rest, usable, M, V, MU, LOW, HAS_MU, RAW, True,
            MAY_BE_UNUSABLE, True, False,
        )  # fmt: skip
        moved = moved_by(old, new, inside).to(tl.float64)
        moveds += tl.sum(moved * moved, axis=1)
        if HAS_CHANGE:
            old = old.to(tl.float64)
            olds += tl.sum(old * old, axis=1)
        if HAS_NORM:
            after = tl.where(inside, new, 0).to(tl.float64)
            news += tl.sum(after * after, axis=1)
            products += tl.sum(after * moved, axis=1)
    share, share_of_norm = shares(
        tl.sum(olds, keep_dims=True), tl.sum(moveds, keep_dims=True), tl.sum(news, keep_dims=True),
        tl.sum(products, keep_dims=True), change, norm, HAS_CHANGE, HAS_NORM,
    )  # fmt: skip
    share, share_of_norm = share[:, None], share_of_norm[:, None]
    for begin in range(0, of_row, AT_ONCE):
        block = begin + tl.arange(0, AT_ONCE)[:, None]
        there, at = block < of_row, block * BLOCK_SIZE + lane
        inside = there if IS_STRAIGHT else at < width
        hashed = hash_of(before + block, key)
        old, new = _new(
            tensors, numbers, at, block, inside, there, hashed, rest, usable, M, V, MU, LOW, HAS_MU, RAW, True,
            MAY_BE_UNUSABLE, True, True,
        )  # fmt: skip
        new = limited(new, moved_by(old, new, inside), share, share_of_norm, HAS_CHANGE, HAS_NORM, tl.float32)
        store_param(tensors[0], tensors[1], at, inside, new, hashed, rest, LOW, ROUNDS, True)


@triton.jit(do_not_specialize=["tensors"])
def update_coded(
    chunks, table, grads, numbers, finite, tensors,
    PARAM: tl.constexpr, GRAD: tl.constexpr, M: tl.constexpr, V: tl.constexpr, MU: tl.constexpr, LOW: tl.constexpr,
    ROUNDS: tl.constexpr, HAS_MU: tl.constexpr, RAW: tl.constexpr, EPS_FIRST: tl.constexpr, HAS_FINITE: tl.constexpr,
    IS_PART: tl.constexpr, MOVES: tl.constexpr, TAIL: tl.constexpr, HAS_CHANGE: tl.constexpr, HAS_NORM: tl.constexpr,
    OF_ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update a chunk of a tensor whose states have the formats M, V and MU, and whose parameter has LOW extra bits.

    Everything else is as in `gpu_kernels.update`.
    """
    usable = tl.load(finite) != 0 if HAS_FINITE else True
    if HAS_FINITE and not (IS_PART or usable):
        return
    i, nth = chunk(chunks)
    here, size, theta, m, v, mu, t, beta1, log_bias_beta1, of_batch = entry_of(table, tensors, i, numbers, HAS_MU)
    grad = tl.load(grads + i)
    scalars = numbers_of(of_batch, t, beta1, log_bias_beta1, tl.float32, EPS_FIRST, IS_PART, MOVES)
    m_scales = tl.load(here + AT_M_SCALES * tensors)
    v_scales = tl.load(here + AT_V_SCALES * tensors)
    mu_scales = tl.load(here + AT_MU_SCALES * tensors) if HAS_MU else m_scales
    low = tl.load(here + AT_LOW * tensors) if LOW else theta
    width = tl.load(here + AT_WIDTH * tensors)  # of a row whose last block may be shorter
    word = tl.load(here + AT_DITHER * tensors)
    key, before = word.to(tl.uint32), (word >> 32).to(tl.int64)
    draw = ((t - 1) * float64_at(of_batch, MICRO_STEPS) + float64_at(of_batch, NTH)).to(tl.int64)
    addresses = theta, low, grad, m, v, mu, m_scales, v_scales, mu_scales
    aligned = (theta | m | v | mu | grad | low) % 16 == 0
    of_row = (width + BLOCK_SIZE - 1) // BLOCK_SIZE
    HAS_ROWS: tl.constexpr = HAS_CHANGE or HAS_NORM
    limited_width = tl.load(here + AT_ROW_WIDTH * tensors) if HAS_ROWS else size
    if HAS_ROWS and limited_width > 0:
        width, of_row = limited_width, (limited_width + BLOCK_SIZE - 1) // BLOCK_SIZE
        change, norm = number_at(of_batch, MAX_ROW_CHANGE), float64_at(of_batch, MAX_ROW_NORM)
        rows = tl.load(here + AT_ROWS * tensors)  # of a chunk
        first, end = nth * rows, tl.minimum(nth * rows + rows, size // width)
        is_straight = aligned and width % BLOCK_SIZE == 0
        for odd in tl.static_range(2):
            for n in tl.static_range(LONG):  # each of WIDTHS is twice the one before it
                if BIT << ODD * odd + n & OF_ROWS:
                    fits = (width <= NARROW << n) & (n == 0 or 2 * width > NARROW << n)
                    if fits and is_straight == (odd == 0):
                        _chunk_of_rows(
                            addresses, scalars, key, before, draw, first, end, width, of_row, change, norm, usable,
                            PARAM, GRAD, M, V, MU, LOW, ROUNDS, HAS_MU, RAW, IS_PART and HAS_FINITE, HAS_CHANGE,
                            HAS_NORM, BLOCK // 2, NARROW << n if NARROW << n > BLOCK_SIZE else BLOCK_SIZE, odd == 0,
                        )  # fmt: skip
            if BIT << ODD * odd + LONG & OF_ROWS:
                is_long = width > WIDEST
                if is_long and is_straight == (odd == 0):
                    _row(
                        addresses, scalars, key, before, draw, nth, width, of_row, change, norm, usable, PARAM, GRAD, M,
                        V, MU, LOW, ROUNDS, HAS_MU, RAW, IS_PART and HAS_FINITE, HAS_CHANGE, HAS_NORM, BLOCK // 2,
                        odd == 0,
                    )  # fmt: skip
    else:
        COUNT: tl.constexpr = CHUNK // BLOCK_SIZE
        first, pad, blocks = nth * COUNT, of_row * BLOCK_SIZE - width, size // width * of_row
        is_full = aligned and first * BLOCK_SIZE + CHUNK <= size
        if TAIL and not (is_full and (pad == 0 or blocks == of_row)):
            _chunk_of_blocks(
                addresses, scalars, key, before, draw, first, blocks, of_row, pad, usable, PARAM, GRAD, M, V, MU, LOW,
                ROUNDS, HAS_MU, RAW, MOVES, IS_PART and HAS_FINITE, CHUNK, BLOCK // 4, True,
            )  # fmt: skip
        else:
            _chunk_of_blocks(
                addresses, scalars, key, before, draw, first, blocks, of_row, pad, usable, PARAM, GRAD, M, V, MU, LOW,
                ROUNDS, HAS_MU, RAW, MOVES, IS_PART and HAS_FINITE, CHUNK, BLOCK, False,
            )  # fmt: skip
