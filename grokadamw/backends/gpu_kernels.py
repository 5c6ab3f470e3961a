"""The kernels of `gpu`, in Triton. One launch takes any number of tensors.

`gpu` makes tables on the device, with an entry for the addresses and numbers of each tensor. A program takes one chunk
of one tensor. Neither the number of tensors nor any value that changes from step to step is compiled in.

A full chunk of aligned tensors is read and written in words of 16 bytes. A body with masks handles other chunks, such
as a tensor's last. TAIL=False leaves that body out if no chunk needs it.
"""

import triton
import triton.language as tl

# `gpu._launch` finds all kernels in this module, by name
from .gpu_coded_kernel import update_coded  # noqa: F401
from .gpu_norm import chunk, judge, load, pointer_to, squares, store  # noqa: F401
from .gpu_stages import (
    AT_ROW_WIDTH,
    AT_ROWS,
    BIT,
    LONG,
    MAX_ROW_CHANGE,
    MAX_ROW_NORM,
    NARROW,
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
from .gpu_tables import STRAIGHT as _STRAIGHT

STRAIGHT = tl.constexpr(_STRAIGHT)


@triton.jit
def _new(
    theta, grad, m, v, mu, at, inside, usable, numbers,
    HAS_MU: tl.constexpr, RAW: tl.constexpr, MOVES: tl.constexpr, MAY_BE_UNUSABLE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return θ of the elements at these places before and after the update. Write m, v and μ, but not θ."""
    clip, keep_mu, add_mu, lamb, keep_m, add_m, keep_v, add_v, root, eps, decay, step = numbers
    REAL: tl.constexpr = keep_m.dtype
    # load everything before storing: the compiler cannot know that the pointers do not alias
    g = clip * load(grad, at, inside, MASKED, REAL)
    if MAY_BE_UNUSABLE:
        g = tl.where(usable, g, 0)
    slow = load(mu, at, inside, MASKED, REAL) if HAS_MU else g
    first = load(m, at, inside, MASKED, REAL)
    second = load(v, at, inside, MASKED, REAL)
    old = load(theta, at, inside, MASKED, REAL) if MOVES else g
    g_hat = g
    if HAS_MU:
        slow, g_hat = slow_and_amplified(g, slow, keep_mu, add_mu, lamb)
        store(mu, at, inside, slow, MASKED)
    first, second = moments(g, g_hat, first, second, keep_m, add_m, keep_v, add_v, RAW)
    store(m, at, inside, first, MASKED)
    store(v, at, inside, second, MASKED)
    new = old
    if MOVES:
        new = updated(old, first, second, root, eps, decay, step).to(theta.dtype.element_ty).to(REAL)
    return old, new


@triton.jit
def _chunk_of_elements(
    theta, grad, m, v, mu, start, size, usable, numbers,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    HAS_MU: tl.constexpr, RAW: tl.constexpr, MOVES: tl.constexpr, MAY_BE_UNUSABLE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Update the chunk that begins at `start`."""
    theta, grad = pointer_to(theta, PARAM, MASKED), pointer_to(grad, GRAD, MASKED)
    m, v, mu = pointer_to(m, STATE, MASKED), pointer_to(v, STATE, MASKED), pointer_to(mu, STATE, MASKED)
    end = tl.minimum(start + CHUNK, size) if MASKED else start + CHUNK
    for block in range(start, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        inside = at < size
        _, new = _new(
            theta, grad, m, v, mu, at, inside, usable, numbers, HAS_MU, RAW, MOVES, MAY_BE_UNUSABLE, MASKED,
        )  # fmt: skip
        if MOVES:
            store(theta, at, inside, new, MASKED)


@triton.jit
def _chunk_of_rows(
    theta, grad, m, v, mu, first, end, width, change, norm, usable, numbers,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    HAS_MU: tl.constexpr, RAW: tl.constexpr, MAY_BE_UNUSABLE: tl.constexpr,
    HAS_CHANGE: tl.constexpr, HAS_NORM: tl.constexpr, IS_STRAIGHT: tl.constexpr,
):  # fmt: skip
    """Update and limit some rows of a matrix, of no more than WIDTH elements each."""
    ODD: tl.constexpr = not IS_STRAIGHT
    theta, grad = pointer_to(theta, PARAM, ODD), pointer_to(grad, GRAD, ODD)
    m, v, mu = pointer_to(m, STATE, ODD), pointer_to(v, STATE, ODD), pointer_to(mu, STATE, ODD)
    if IS_STRAIGHT:
        width = width // STRAIGHT * STRAIGHT  # tell the compiler that STRAIGHT divides it
    else:  # each element computes its own index, for which 32 bits are enough
        start = first * width
        theta, grad, m, v, mu = theta + start, grad + start, m + start, v + start, mu + start
        width, end, first = width.to(tl.int32), (end - first).to(tl.int32), tl.full([], 0, tl.int32)
    AT_ONCE: tl.constexpr = BLOCK // WIDTH if BLOCK > WIDTH else 1
    column = tl.arange(0, WIDTH)[None, :]
    for block in range(first, end, AT_ONCE):
        row = block + tl.arange(0, AT_ONCE)[:, None]
        at, inside = row * width + column, (row < end) & (column < width)
        old, new = _new(
            theta, grad, m, v, mu, at, inside, usable, numbers, HAS_MU, RAW, True, MAY_BE_UNUSABLE, True,
        )  # fmt: skip
        moved = moved_by(old, new, inside)
        wide, before, after = moved.to(tl.float64), old.to(tl.float64), tl.where(inside, new, 0).to(tl.float64)
        moveds = tl.sum(wide * wide, axis=1, keep_dims=True)
        olds = tl.sum(before * before, axis=1, keep_dims=True) if HAS_CHANGE else moveds
        news = tl.sum(after * after, axis=1, keep_dims=True) if HAS_NORM else moveds
        products = tl.sum(after * wide, axis=1, keep_dims=True) if HAS_NORM else moveds
        share, share_of_norm = shares(olds, moveds, news, products, change, norm, HAS_CHANGE, HAS_NORM)
        new = limited(new, moved, share, share_of_norm, HAS_CHANGE, HAS_NORM, PARAM)
        store(theta, at, inside, new, True)


@triton.jit
def _row(
    theta, grad, m, v, mu, start, width, change, norm, usable, numbers,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr, HAS_MU: tl.constexpr,
    RAW: tl.constexpr, MAY_BE_UNUSABLE: tl.constexpr, HAS_CHANGE: tl.constexpr, HAS_NORM: tl.constexpr,
    IS_STRAIGHT: tl.constexpr,
):  # fmt: skip
    """Update and limit a row of any length, in two passes: one for its sums, m, v and μ; and one for θ."""
    _, _, _, _, keep_m, _, _, _, root, eps, decay, step = numbers
    REAL: tl.constexpr = keep_m.dtype
    theta, grad = pointer_to(theta, PARAM, not IS_STRAIGHT), pointer_to(grad, GRAD, not IS_STRAIGHT)
    m, v = pointer_to(m, STATE, not IS_STRAIGHT), pointer_to(v, STATE, not IS_STRAIGHT)
    mu = pointer_to(mu, STATE, not IS_STRAIGHT)
    if IS_STRAIGHT:  # tell the compiler that STRAIGHT divides both
        width, start = width // STRAIGHT * STRAIGHT, start // STRAIGHT * STRAIGHT
    theta, grad, m, v, mu = theta + start, grad + start, m + start, v + start, mu + start
    columns = width if IS_STRAIGHT else width.to(tl.int32)  # each takes fewer registers in its case
    # first add up the few elements of a thread: a sum for each of them would take most of the registers
    OF_A_THREAD: tl.constexpr = 4
    THREADS: tl.constexpr = BLOCK // OF_A_THREAD
    if IS_STRAIGHT:
        offsets = OF_A_THREAD * tl.arange(0, THREADS)[:, None] + tl.arange(0, OF_A_THREAD)[None, :]
        AXIS: tl.constexpr = 1
    else:
        offsets = THREADS * tl.arange(0, OF_A_THREAD)[:, None] + tl.arange(0, THREADS)[None, :]
        AXIS: tl.constexpr = 0
    olds = tl.zeros([THREADS], tl.float64)
    moveds, news, products = olds, olds, olds
    for block in range(0, columns, BLOCK):
        at = block + offsets
        inside = at < columns
        old, new = _new(
            theta, grad, m, v, mu, at, inside, usable, numbers, HAS_MU, RAW, True, MAY_BE_UNUSABLE, True,
        )  # fmt: skip
        moved = moved_by(old, new, inside).to(tl.float64)
        moveds += tl.sum(moved * moved, axis=AXIS)
        if HAS_CHANGE:
            before = old.to(tl.float64)
            olds += tl.sum(before * before, axis=AXIS)
        if HAS_NORM:
            after = tl.where(inside, new, 0).to(tl.float64)
            news += tl.sum(after * after, axis=AXIS)
            products += tl.sum(after * moved, axis=AXIS)
    share, share_of_norm = shares(
        tl.sum(olds, keep_dims=True), tl.sum(moveds, keep_dims=True), tl.sum(news, keep_dims=True),
        tl.sum(products, keep_dims=True), change, norm, HAS_CHANGE, HAS_NORM,
    )  # fmt: skip
    tl.debug_barrier()  # from here on, a thread may read what another one has written
    for block in range(0, columns, BLOCK):
        at = block + offsets
        inside = at < columns
        old = load(theta, at, inside, True, REAL)
        first, second = load(m, at, inside, True, REAL), load(v, at, inside, True, REAL)
        new = updated(old, first, second, root, eps, decay, step).to(PARAM).to(REAL)
        new = limited(new, moved_by(old, new, inside), share, share_of_norm, HAS_CHANGE, HAS_NORM, PARAM)
        store(theta, at, inside, new, True)


@triton.jit(do_not_specialize=["tensors"])
def update(
    chunks, table, grads, numbers, finite, tensors,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, HAS_MU: tl.constexpr, RAW: tl.constexpr,
    EPS_FIRST: tl.constexpr, HAS_FINITE: tl.constexpr, IS_PART: tl.constexpr, MOVES: tl.constexpr, TAIL: tl.constexpr,
    HAS_CHANGE: tl.constexpr, HAS_NORM: tl.constexpr, OF_ROWS: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update a chunk of a tensor. If `finite` is 0, write nothing; but in a micro-batch, use a gradient of 0.

    With HAS_CHANGE or HAS_NORM, limit rows, too; a program then takes whole rows of a matrix. The bits of OF_ROWS say
    which sizes of rows need a body, as in `gpu_tables.sizes_of_rows`: a body that is not compiled takes no registers.

    The step count is not advanced here, because other programs read it.
    """
    usable = tl.load(finite) != 0 if HAS_FINITE else True
    if HAS_FINITE and not (IS_PART or usable):
        return
    i, nth = chunk(chunks)
    here, size, theta, m, v, mu, t, beta1, log_bias_beta1, of_batch = entry_of(table, tensors, i, numbers, HAS_MU)
    grad = tl.load(grads + i)

    REAL: tl.constexpr = tl.float64 if STATE == tl.float64 else tl.float32
    scalars = numbers_of(of_batch, t, beta1, log_bias_beta1, REAL, EPS_FIRST, IS_PART, MOVES)
    aligned = (theta | m | v | mu | grad) % 16 == 0
    HAS_ROWS: tl.constexpr = HAS_CHANGE or HAS_NORM
    width = tl.load(here + AT_ROW_WIDTH * tensors) if HAS_ROWS else size
    if HAS_ROWS and width > 0:
        change, norm = number_at(of_batch, MAX_ROW_CHANGE), float64_at(of_batch, MAX_ROW_NORM)
        rows = tl.load(here + AT_ROWS * tensors)  # of a chunk
        end = tl.minimum(nth * rows + rows, size // width)
        is_straight = aligned and width % STRAIGHT == 0
        for odd in tl.static_range(2):
            for n in tl.static_range(LONG):  # each of WIDTHS is twice the one before it
                if BIT << ODD * odd + n & OF_ROWS:
                    fits = (width <= NARROW << n) & (n == 0 or 2 * width > NARROW << n)
                    if fits and is_straight == (odd == 0):
                        _chunk_of_rows(
                            theta, grad, m, v, mu, nth * rows, end, width, change, norm, usable, scalars, PARAM, GRAD,
                            STATE, BLOCK // 2 if odd else BLOCK, NARROW << n, HAS_MU, RAW, IS_PART and HAS_FINITE,
                            HAS_CHANGE, HAS_NORM, odd == 0,
                        )  # fmt: skip
            if BIT << ODD * odd + LONG & OF_ROWS:
                is_long = width > WIDEST
                if is_long and is_straight == (odd == 0):
                    _row(
                        theta, grad, m, v, mu, nth * width, width, change, norm, usable, scalars, PARAM, GRAD, STATE,
                        BLOCK, HAS_MU, RAW, IS_PART and HAS_FINITE, HAS_CHANGE, HAS_NORM, odd == 0,
                    )  # fmt: skip
    else:
        start = nth * CHUNK
        if TAIL and not (aligned and start + CHUNK <= size):
            _chunk_of_elements(
                theta, grad, m, v, mu, start, size, usable, scalars, PARAM, GRAD, STATE, CHUNK, BLOCK // 4,
                HAS_MU, RAW, MOVES, IS_PART and HAS_FINITE, True,
            )  # fmt: skip
        else:
            _chunk_of_elements(
                theta, grad, m, v, mu, start, size, usable, scalars, PARAM, GRAD, STATE, CHUNK, BLOCK,
                HAS_MU, RAW, MOVES, IS_PART and HAS_FINITE, False,
            )  # fmt: skip
