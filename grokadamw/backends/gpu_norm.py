"""The kernels that compute the norm of all gradients, and the helpers with which every kernel loads and stores."""

import triton
import triton.language as tl

# a chunk is one word: the tensor's index times 2⁴⁰, plus the chunk's number in the tensor
CHUNK_BITS = tl.constexpr(40)
CHUNK_MASK = tl.constexpr((1 << 40) - 1)


@triton.jit
def chunk(chunks):
    """Return the index of the tensor that has this program's chunk, and the number of the chunk in it."""
    word = tl.load(chunks + tl.program_id(0))
    return word >> CHUNK_BITS, word & CHUNK_MASK


@triton.jit
def pointer_to(address, dtype: tl.constexpr, MASKED: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    if not MASKED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(pointer, at, inside, MASKED: tl.constexpr, REAL: tl.constexpr):
    if MASKED:
        return tl.load(pointer + at, mask=inside, other=0).to(REAL)
    return tl.load(pointer + at).to(REAL)


@triton.jit
def store(pointer, at, inside, value, MASKED: tl.constexpr):
    """Write values in the pointer's dtype."""
    value = value.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + at, value, mask=inside)
    else:
        tl.store(pointer + at, value)


@triton.jit
def _squares(grad, start, size, GRAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    grad = pointer_to(grad, GRAD, MASKED)
    sums = tl.zeros([BLOCK], tl.float64)
    end = tl.minimum(start + CHUNK, size) if MASKED else start + CHUNK
    for block in range(start, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        g = load(grad, at, at < size, MASKED, tl.float64)
        sums += g * g
    return tl.sum(sums)


@triton.jit(do_not_specialize=["first"])
def squares(
    chunks, sizes, grads, sums, first,
    GRAD: tl.constexpr, TAIL: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum g² over each chunk, in float64, and write the sums to `sums` from `first` on."""
    i, nth = chunk(chunks)
    start = nth * CHUNK
    size = tl.load(sizes + i)
    grad = tl.load(grads + i)
    if TAIL and not (grad % 16 == 0 and start + CHUNK <= size):
        total = _squares(grad, start, size, GRAD, CHUNK, BLOCK // 4, True)
    else:
        total = _squares(grad, start, size, GRAD, CHUNK, BLOCK, False)
    tl.store(sums + first + tl.program_id(0), total)


@triton.jit(do_not_specialize=["count", "batches"])
def judge(
    sums, limits, grad_scale, found_inf, verdict, finite, skipped, count, batches,
    HAS_SCALE: tl.constexpr, HAS_FOUND: tl.constexpr, SKIPS: tl.constexpr, BATCHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the norm and the clip coefficients from the sums of squares, which are added in a fixed order.

    `verdict` gets N, then c of each batch, then each c divided by the loss scale. `finite` says whether the step may be
    written. `skipped` is incremented if it may not, unless GradScaler counts that step itself.
    """
    totals = tl.zeros([BLOCK], tl.float64)
    for block in range(0, count, BLOCK):
        at = block + tl.arange(0, BLOCK)
        totals += tl.load(sums + at, mask=at < count, other=0)
    total = tl.sum(totals)
    unscale = 1 / tl.load(grad_scale).to(tl.float64) if HAS_SCALE else tl.full([], 1, tl.float64)
    norm = tl.sqrt(total) * unscale
    at = tl.arange(0, BATCHES)
    limit = tl.load(limits + at, mask=at < batches, other=0).to(tl.float64, bitcast=True)
    clip = tl.where(limit == 0, 1, limit / (norm + 1e-6))
    clip = tl.where(clip > 1, 1, clip)  # NaN stays NaN, as in clip_grad_norm_
    tl.store(verdict, norm)
    tl.store(verdict + 1 + at, clip, mask=at < batches)
    tl.store(verdict + 1 + batches + at, clip * unscale, mask=at < batches)
    usable = tl.full([], 1, tl.int1)
    if HAS_FOUND:
        usable = tl.load(found_inf) == 0
    if SKIPS:
        good = total - total == 0
        tl.store(skipped, tl.load(skipped) + (usable & (good == 0)).to(tl.int64))
        usable = usable & good
    tl.store(finite, usable.to(tl.int8))
