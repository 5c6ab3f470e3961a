"""Load and store tensors kept in fewer bits, in the GPU's kernels; state/formats.py defines the formats.

Values form a matrix of blocks with 64 elements each. `at` holds the offsets of the elements, `block` those of the
blocks' scales. If MASKED, `inside` says which elements exist, and `there` which blocks. A format is the dtype in
memory: float32, bfloat16, or, with scales, int8 or uint8.
"""

import triton
import triton.language as tl

from ..state import formats
from .gpu_norm import load, pointer_to, store

BLOCK_SIZE = tl.constexpr(formats.BLOCK)
PARTS, UNIT, V_UNIT = (tl.constexpr(x) for x in (formats._PARTS, formats._UNIT, formats._V_UNIT))
SMALLEST, LARGEST, TINY = (tl.constexpr(x) for x in (formats._SMALLEST, formats._LARGEST, formats._TINY))
GOLDEN, LANE = tl.constexpr(formats._GOLDEN), tl.constexpr(formats._LANE)
TURN_OF_M, TURN_OF_MU, TURN_OF_V, TURN_OF_PARAM = (
    tl.constexpr(formats._TURNS[name]) for name in ("exp_avg", "grok_ema", "exp_avg_sq", "param")
)
OF_TINY, TO_TINY, OF_HALF = (tl.constexpr(x) for x in (2.0**-40, 2.0**40, 0x3FF7FFF))
INF, NAN = tl.constexpr(0x7F800000), tl.constexpr(formats._NAN)


@triton.jit
def pointer_to_state(address, FORMAT: tl.constexpr, ODD: tl.constexpr):
    """Return a pointer to a state. A state in bfloat16 is read and written as bits, in int16."""
    return pointer_to(address, tl.int16 if FORMAT == tl.bfloat16 else FORMAT, ODD)


# random bits


@triton.jit
def _mixed(word):
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return word ^ (word >> 16)


@triton.jit
def hash_of(block, key):
    """Return the hashes at which the dithers of the blocks with these numbers start."""
    return _mixed(block.to(tl.uint32) ^ key)


@triton.jit
def rest_of(draw):
    """Return the number that is added to the hash for each element of a block at this draw."""
    return tl.arange(0, BLOCK_SIZE)[None, :].to(tl.uint32) * LANE + draw.to(tl.uint32) * GOLDEN


@triton.jit
def dither(hashed, rest, TURN: tl.constexpr, BITS: tl.constexpr):
    """Return the upper BITS bits of the dithers."""
    turned = hashed
    if TURN:
        turned = (hashed << TURN) | (hashed >> (32 - TURN))
    return ((turned + rest) >> (32 - BITS)).to(tl.int32)


# states


@triton.jit
def load_state(state, scales, at, block, inside, there, FORMAT: tl.constexpr, IS_V: tl.constexpr, MASKED: tl.constexpr):
    """Return the values of a state."""
    if FORMAT == tl.float32:
        values = load(state, at, inside, MASKED, tl.float32)
    elif FORMAT == tl.bfloat16:
        values = (load(state, at, inside, MASKED, tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        values = load(state, at, inside, MASKED, tl.float32) * load(scales, block, there, MASKED, tl.float32)
        if IS_V:
            values = values * values
    return values


@triton.jit
def store_state(
    state, scales, at, block, inside, there, values, hashed, rest,
    FORMAT: tl.constexpr, IS_V: tl.constexpr, TURN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Encode and store the values of a state."""
    if FORMAT == tl.float32:
        store(state, at, inside, values, MASKED)
    elif FORMAT == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        new = bits + dither(hashed, rest, TURN, 16)
        if IS_V:
            new = tl.maximum(new, tl.minimum(bits, 1) << 23)  # a v above 0 never becomes 0
        store(state, at, inside, new >> 16, MASKED)
    else:
        x = tl.sqrt_rn(values) if IS_V else values
        sizes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if MASKED:
            sizes = tl.where(inside, sizes, 0)
        top = tl.minimum(tl.max(sizes, axis=1, keep_dims=True), LARGEST).to(tl.float32, bitcast=True)
        scale = tl.maximum(top * (V_UNIT if IS_V else UNIT), SMALLEST)
        codes = (x * tl.div_rn(tl.full(scale.shape, PARTS, tl.float32), scale)).to(tl.int32)
        codes = (codes + dither(hashed, rest, TURN, 16)) >> 16
        if IS_V:
            codes = tl.maximum(codes, (x > 0).to(tl.int32))
        store(state, at, inside, codes, MASKED)
        store(scales, block, there, scale, MASKED)


# parameters


@triton.jit
def load_param(param, low, at, inside, LOW: tl.constexpr, MASKED: tl.constexpr):
    """Return a parameter as float32, with its low bits."""
    PARAM: tl.constexpr = param.dtype.element_ty
    kept = load(param, at, inside, MASKED, PARAM)
    values = kept.to(tl.float32)
    if LOW:
        bits = values.to(tl.int32, bitcast=True)
        rest = load(low, at, inside, MASKED, tl.int32) << (16 - LOW)
        rest = tl.where((bits & 0x7FFFFFFF) == 0, tl.maximum(rest, 0), rest)  # bits below those of 0 would be NaN
        if PARAM == tl.float16:
            size = kept.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
            tiny = ((size << 16) + rest).to(tl.float32) * OF_TINY
            tiny_bits = (tiny.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (bits & -0x80000000)
            bits = tl.where(size < 0x400, tiny_bits, bits + rest)
        else:
            bits = bits + rest
        values = bits.to(tl.float32, bitcast=True)
    return values


@triton.jit
def store_param(
    param, low, at, inside, values, hashed, rest, LOW: tl.constexpr, ROUNDS: tl.constexpr, MASKED: tl.constexpr
):
    """Encode and store a parameter: as its nearest number with low bits, or as a number rounded by the dither."""
    PARAM: tl.constexpr = param.dtype.element_ty
    words = values.to(tl.int32, bitcast=True)
    if LOW or ROUNDS:
        is_nan = (words & 0x7FFFFFFF) > INF
        words = tl.where(is_nan, NAN, words)  # adding to another NaN's bits may make it a number
    if LOW:
        if PARAM == tl.float16:
            is_tiny = (words & 0x7FFFFFFF) < TINY
            words = tl.where(is_tiny, (tl.where(is_tiny, tl.abs(values), 0) * TO_TINY).to(tl.int32), words)
        if LOW == 8:
            words = (words + dither(hashed, rest, TURN_OF_PARAM, 8)) & -256
        if PARAM == tl.float16:
            words = tl.where(is_tiny, tl.minimum(words, OF_HALF), words)
            size = (words + 0x8000) >> 16
            rounded = words.to(tl.float32, bitcast=True).to(tl.float16)
            sign = (values.to(tl.int32, bitcast=True) >> 16) & 0x8000
            half = tl.where(is_tiny, sign | size, rounded.to(tl.int16, bitcast=True).to(tl.int32))
            words = words - tl.where(is_tiny, size << 16, rounded.to(tl.float32).to(tl.int32, bitcast=True))
            words = tl.where((half & 0x7C00) == 0x7C00, 0, words)  # what is too large for float16 becomes infinite
        else:
            half = (words + 0x8000) >> 16  # ties go up: the low bits are in [-2¹⁵, 2¹⁵)
        store(param, at, inside, half.to(tl.int16).to(PARAM, bitcast=True), MASKED)
        store(low, at, inside, tl.where(is_nan, 0, words >> (16 - LOW)), MASKED)
    else:
        if ROUNDS and PARAM != tl.float32:
            DROPPED: tl.constexpr = 16 if PARAM == tl.bfloat16 else 13
            words = (words + dither(hashed, rest, TURN_OF_PARAM, DROPPED)) & -(1 << DROPPED)
        store(param, at, inside, words.to(tl.float32, bitcast=True), MASKED)
