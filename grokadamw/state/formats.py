"""State and parameters in fewer bits than a step computes with: the definition, which all kernels reproduce.

A step decodes, computes in float32, and encodes. Two formats of states have fewer bits than float32:

- **int8**: 64 adjacent elements of a row form a block and share a float32, the scale s. The last block of a row may be
  shorter. Each element is one byte, the code c. m and μ are c · s with c from -127 to 127. v is (c · s)² with c from 0
  to 255, so that √v, which a step divides by, has evenly spaced values. The element of the largest size in a block gets
  the largest code. A row is a slice along the first dimension, so a shard along that dimension holds whole blocks.
- **bfloat16**: the upper half of a float32.

A 16-bit parameter may have additional bits, in `param_low`: the difference between the full weight and the parameter,
which is the nearest 16-bit number. So low bits start at 0, and a parameter that is set to another value keeps that
value, up to rounding. A parameter of 0 has low bits below 0 only if it was set to 0 by hand. They count as 0, because
adding them to the bits of 0 would give NaN.

- **32 bits**: 16 more. bfloat16 then holds every float32, bit for bit. float16 does so down to 2^-17; smaller weights
  are rounded towards 0, to multiples of 2^-40.
- **24 bits**: 8 more. A dither rounds off the last 8 bits of the float32. A small float16 is rounded to multiples of
  2^-32.
- **none**: no more bits; weights are rounded to nearest, or by a dither.

**Dither.** In most steps a slow average moves by less than one code, and rounding to nearest would never store such a
move. So a number in [0, 1) codes, the dither, is added before a code is rounded down: on average the stored number
equals the value, to 2^-16 of a code. The dithers of a block start at a hash of the numbers of parameter and block, and
increase from element to element by 1 / 1.3247… (from the plastic number). From step to step they advance by the golden
ratio. So a move of a tenth of a code is stored in one step of ten, more regularly than by chance, and a slow average
collects half the noise that random numbers would add. If a gradient never changes, dithers depend on the error that
they left in its average: in int8 the mean is then off by up to 0.04 codes. Dithers depend only on parameter, element
and step, so a resumed run needs no generator state. There is no seed: another one would make no run better or worse.

**Bounds** for a value x that is stored as y. A is the largest |m| of the block, B its largest v. All v are 0 or more:

    m, μ in int8       |y - x| < A / 126, or 2^-100 if that is more
    v in int8          |√y - √x| < √B / 254, and y > 0 if x > 0 and B > 2^-133
    bfloat16           |y - x| < |x| / 128, or 2^-133 if that is more; but a v above 0 is never below 2^-126
    24 bits            |y - x| < |x| / 2^15, or 2^-141 if that is more; for float16 2^-32
    float16, 32 bits   |y - x| < 2^-40 below 2^-17, else y = x (or infinite)

An outlier in a block cannot make the steps of the other elements explode. With m' and v' as stored,

    |m'| / √v' < 2.01 |m| / √v + 2.03 A / √B

and A / √B is at most |m| / √v of the element whose |m| is A. AdamW bounds that: by 7.3 for β = (0.9, 0.999). But an
outlier shortens the other steps: a smaller √v is rounded up to √B / 255, and an outlier whose √v is k times that of the
others leaves them 255 / k codes. Blocks are short so that an outlier affects few elements.

A v beyond 2^128, which is already infinite in float32, stops its whole block. m and μ must be below 2^100. Infinity and
NaN, which only `nonfinite="propagate"` lets into m and μ, are stored as arbitrary numbers.

**Why these formats.** `python -m benchmarks.formats` compares formats by the error of their updates: the norm of the
difference from float32's update, divided by the norm of the latter. β2 = 0.999, α = 0.98, 200 steps, blocks of 64:

    m and μ, v          rounding   noisy batches   one batch       four decades in a block
    bfloat16            dither     0.007           0.014           0.009
    bfloat16            nearest    0.008           0.021           0.008
    int8                dither     0.026           0.072           1.133
    int8                random     0.035           0.112           1.365
    int8                nearest    0.037           0.172           0.829
    softsign, √linear   dither     0.024           0.056           0.828
    linear, linear      dither     0.033           0.089           0.737
    e2m5, √e2m6         dither     0.031           0.065           1.254
    e3m4, e4m4          dither     0.054           0.088           0.505
    e4m3, e4m4          dither     0.091           0.151           0.396

In these terms int8 is linear, √linear. If the elements of a block are of similar size, as in real gradients, linear
codes are as accurate as any that need no division, with half the arithmetic of small floats (e3m4: 3 bits of exponent,
4 of mantissa). If they differ by orders of magnitude, small floats are better, but no 8-bit format is good: the small m
drown in the dither. bfloat16 is good there.

Block scales come from the OCP Microscaling formats. Codes of √v, and weights in two parts, are from
databricks/flashoptim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .._numbers import accumulator
from ..options import STATES, may_be_coded
from ..shards import blocks_before, cuts_blocks, like, part

EXTRAS = (*(f"{name}_scale" for name in STATES), "param_low")  # entries that a state may hold besides STATES
SMALL = 4096  # the state of a parameter with fewer elements is not worth coding
BLOCK = 64  # elements of a row that share one scale
NARROW = 32  # a row with fewer elements is too short for codes
_LOW: dict[int | None, torch.dtype] = {24: torch.int8, 32: torch.int16}
HALVES = (torch.bfloat16, torch.float16)
_CODES = (torch.int8, torch.uint8)
_GOLDEN, _LANE, _WORD = 0x9E3779B9, 0xC13FA9A9, (1 << 32) - 1  # a dither's increments per step and element; 32 bits
_TURNS = {"exp_avg": 0, "grok_ema": 11, "exp_avg_sq": 22, "param": 5}  # by how many bits each rotates a hash
_PARTS = 65536.0  # parts of a code: the precision with which a dither is added
# a scale over its block's largest value: a little above 1 / 127 and 1 / 255, so that no code exceeds 127 or 255
_UNIT, _V_UNIT = _PARTS / (127 * _PARTS - 64), _PARTS / (255 * _PARTS - 128)
_SMALLEST, _LARGEST = 2.0**-100, 0x71800000  # the smallest scale; the bits of 2^100, the largest value to scale
_TINY = 0x387FE000  # bits of the smallest number that float16 rounds to a normal number
_NAN = 0x7FC00000  # bits of the only NaN that is stored: adding to the bits of others may turn them into numbers


def is_coded(tensors: Sequence[Tensor], extras: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Return True if a step must decode or encode a parameter or its state.

    Args:
        tensors: the parameter, its gradient, m, v and, if there is one, μ.
        extras: its state's entries for `EXTRAS`, None where it has none.
    """
    if not may_be_coded(options):
        return False
    has_codes = any(x is not None for x in extras) or any(x.dtype == torch.bfloat16 for x in tensors[2:])
    return has_codes or (options["rounding"] != "nearest" and tensors[0].dtype in HALVES)


def format_of(param: Tensor, name: str, options: Mapping[str, Any]) -> str:
    """Return the format of one of a parameter's states.

    It is float32, which stands for the dtype of a state without codes, for small, complex and float64 parameters. It
    also replaces int8 if rows are shorter than `NARROW` or not contiguous, or a DTensor's block may be on two ranks.
    """
    asked = options["state_dtype"]
    kind: str = asked if isinstance(asked, str) else asked.get(name, "float32")
    is_wide = param.is_complex() or param.dtype == torch.float64
    is_small = param.numel() < SMALL or (kind == "int8" and not _has_blocks(param))
    return "float32" if is_wide or is_small else kind


def _has_blocks(param: Tensor) -> bool:
    return has_rows(param) and width_of(param) >= NARROW and not cuts_blocks(param, BLOCK)


def width_of(x: Tensor) -> int:
    """Return the elements in a row: a slice along the first dimension; for a vector, one block or all elements."""
    if x.dim() > 1:
        return math.prod(x.shape[1:])
    return BLOCK if x.numel() % BLOCK == 0 else x.numel()


def low_dtype(param: Tensor, options: Mapping[str, Any]) -> torch.dtype | None:
    """Return the dtype of a parameter's low bits; None if it has none. The options may be another optimizer's."""
    return _LOW.get(options.get("master_weight_bits")) if param.dtype in HALVES else None


def same_order(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors of one shape have their elements at the same places in memory."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def has_no_gaps(x: Tensor) -> bool:
    """Return True if the elements fill their memory without gaps or overlap, in any order."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def has_rows(x: Tensor) -> bool:
    """Return True if each row lies in one piece in memory, and the rows follow one another."""
    return has_no_gaps(x) and (x.dim() < 2 or x.shape[0] <= 1 or x.stride(0) == width_of(x))


def as_rows(x: Tensor) -> Tensor:
    """Return a (rows, width) view of a tensor for which `has_rows` is True, with the elements in memory order."""
    width = width_of(x)
    rows = x.shape[0] if x.dim() > 1 else x.numel() // max(1, width)
    return x.as_strided((rows, width), (width, 1))


def new(param: Tensor, name: str, options: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the entries of one of a parameter's states, as zeros; `dtype` is used for the format float32."""
    kept = _dtype_in(format_of(param, name, options), name, dtype)
    entries = {name: torch.zeros_like(param, dtype=kept, memory_format=torch.preserve_format)}
    if kept in _CODES:
        scales = part(param).new_zeros(shape_of_scales(part(param)), dtype=torch.float32)
        entries[f"{name}_scale"] = like(scales, shape_of_scales(param), param)
    return entries


def _dtype_in(kind: str, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a state that is kept in a format; for the format float32 that is `dtype`."""
    codes = torch.uint8 if name == "exp_avg_sq" else torch.int8
    return {"float32": dtype, "bfloat16": torch.bfloat16, "int8": codes}[kind]


def shape_of_scales(param: Tensor) -> torch.Size:
    """Return the shape of scales: (rows, blocks of a row), or (blocks,) for a vector."""
    rows = param.shape[:1] if param.dim() > 1 else ()
    width = width_of(param) if rows else param.numel()
    return torch.Size((*rows, -(-width // BLOCK)))


def unpacked(state: Mapping[str, Any], name: str) -> Tensor:
    """Return the numbers that a state stands for; codes and bfloat16 become float32."""
    kept: Tensor = state[name]
    scales = state.get(f"{name}_scale")
    if scales is None or kept.dtype not in _CODES:  # if codes were replaced by hand, their scales mean nothing
        return kept.float() if kept.dtype == torch.bfloat16 else kept
    values = torch.empty_like(kept, dtype=torch.float32)
    rows = as_rows(part(kept))
    as_rows(part(values)).copy_(decode(rows, of_rows(part(scales), rows), name))
    return values


def of_rows(scales: Tensor, rows: Tensor) -> Tensor:
    """Return scales as (rows, blocks of a row); a vector's scales have no dimension for rows."""
    return scales.reshape(len(rows), -(-rows.shape[1] // BLOCK))


def packed(
    state: Mapping[str, Any], name: str, param: Tensor, options: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the entries of one of a parameter's states under these options, converted from any format and layout.

    A state that is already in the right format is copied bit for bit.
    """
    entries = new(param, name, options, dtype)
    parts, scale, old = {entry: part(x) for entry, x in entries.items()}, f"{name}_scale", state[name]
    kept = parts[name]
    if old.dtype == kept.dtype and (scale not in entries or old.stride() == param.stride()):
        for entry in entries:
            parts[entry].copy_(part(state[entry]))
    elif format_of(param, name, options) == "float32":
        kept.copy_(part(unpacked(state, name)))
    else:
        values = torch.empty_like(kept, dtype=torch.float32).copy_(part(unpacked(state, name)))
        rows, places = (as_rows(values), as_rows(kept)) if has_rows(kept) else (values, kept)
        draw = torch.as_tensor(state.get("step", 0)).to(kept.device, torch.int64)
        word = dither(0, rows.shape, 0, draw, blocks_before(param, BLOCK))(name)
        codes, scales = encode(rows, kept.dtype, name, word)
        places.copy_(codes)
        if scales is not None:
            parts[scale].copy_(scales.view_as(parts[scale]))
    return entries


def misfits(state: Mapping[str, Any], param: Tensor, options: Mapping[str, Any], dtype: torch.dtype) -> list[str]:
    """Return the names of states and low bits whose dtype or memory order differs from that of new ones.

    They differ once a parameter's memory format or dtype was changed, or a state was replaced by hand. `dtype` is the
    one for the format float32.
    """
    own, found = part(param), []
    for name in (name for name in (*STATES, "param_low") if name in state):
        kept = part(state[name])
        fits = name == "param_low" or kept.dtype == _dtype_in(format_of(param, name, options), name, dtype)
        if not fits or (not same_order(kept, own) and has_no_gaps(own)):
            found.append(name)
    return found


def low_bits(low: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a parameter's low bits between 8 and 16 bits; 16 are rounded to the nearest 8."""
    if low.dtype == dtype:
        return low
    if dtype == torch.int8:
        return (low.to(torch.int32) + 0x80 >> 8).clamp(max=127).to(dtype)
    return low.to(dtype) << 8


# --- random bits ---


def dither(first: int, shape: Sequence[int], index: int, draw: Tensor, before: int = 0) -> Callable[[str], Tensor]:
    """Return a function that returns the dithers for a name in `_TURNS`, of rows from `first` on: 32 bits in an int64.

    Args:
        shape: of the rows.
        index: of the parameter in the optimizer.
        draw: how often the parameter was rounded before.
        before: the number of blocks that other ranks have before the first row.
    """
    width, device = math.prod(shape[1:]), draw.device
    blocks = -(-width // BLOCK)
    block = torch.arange(before + first * blocks, before + (first + shape[0]) * blocks, device=device) & _WORD
    hashed = _mixed(block ^ key_of(index)).view(shape[0], blocks)
    rest = torch.arange(width, device=device) % BLOCK * _LANE + draw * _GOLDEN

    def of(name: str) -> Tensor:
        turn = _TURNS[name]
        turned = hashed << turn | hashed >> 32 - turn
        word: Tensor = _of_elements(turned, width) + rest & _WORD
        return word.view(*shape)

    return of


def key_of(index: int) -> int:
    """Return the hash at which the dithers of the parameter with this index start."""
    return _mixed(index + 1)  # type: ignore[no-any-return]


def _mixed(word: Any) -> Any:
    """Apply MurmurHash3's 32-bit finalizer to a word."""
    word = (word ^ word >> 16) * 0x85EBCA6B & _WORD
    word = (word ^ word >> 13) * 0xC2B2AE35 & _WORD
    return word ^ word >> 16


# --- states ---


def encode(values: Tensor, kept: torch.dtype, name: str, word: Tensor) -> tuple[Tensor, Tensor | None]:
    """Encode float32 values of a state, (rows, width), as bfloat16, or as codes and their scales."""
    is_v = name == "exp_avg_sq"
    if kept == torch.bfloat16:
        bits = values.view(torch.int32)
        new = bits + (word >> 16).to(torch.int32)
        if is_v:
            new = torch.maximum(new, bits.clamp(max=1) << 23)  # a v above 0 never becomes 0
        return (new & -(1 << 16)).view(torch.float32).to(torch.bfloat16), None
    width = values.shape[1]
    blocks = -(-width // BLOCK)
    # not every CPU rounds the root in float32 correctly
    x = values.to(accumulator(values.device)).sqrt().float() if is_v else values
    sizes = functional.pad(x.view(torch.int32) & 0x7FFFFFFF, (0, blocks * BLOCK - width))
    tops = sizes.view(len(x), blocks, BLOCK).amax(2).clamp(max=_LARGEST).view(torch.float32)
    scales = (tops * (_V_UNIT if is_v else _UNIT)).clamp(min=_SMALLEST)
    codes = (x * _of_elements(_PARTS / scales, width)).to(torch.int32) + (word >> 16).to(torch.int32) >> 16
    if is_v:
        codes = torch.maximum(codes, (x > 0).to(torch.int32))
    return codes.to(torch.uint8 if is_v else torch.int8), scales


def decode(codes: Tensor, scales: Tensor | None, name: str) -> Tensor:
    """Decode a state, (rows, width), to float32 values."""
    if scales is None:
        return codes.float()
    values = codes.float() * _of_elements(scales, codes.shape[1])
    return values * values if name == "exp_avg_sq" else values


def _of_elements(blocks: Tensor, width: int) -> Tensor:
    """Repeat each block's number for each of its elements."""
    return blocks.repeat_interleave(BLOCK, dim=1)[:, :width]


# --- parameters ---


def full(param: Tensor, low: Tensor | None) -> Tensor:
    """Return a 16-bit parameter with its low bits as float32."""
    whole = param.to(torch.float32, copy=True)
    if low is None:
        return whole
    rest, bits = low.to(torch.int32) << 16 - 8 * low.itemsize, whole.view(torch.int32)
    rest = torch.where(bits & 0x7FFFFFFF == 0, rest.clamp(min=0), rest)
    values = (bits + rest).view(torch.float32)
    if param.dtype == torch.bfloat16:
        return values
    size = param.view(torch.int16).to(torch.int32) & 0x7FFF
    tiny = ((size << 16) + rest).float() * 2.0**-40
    return torch.where(size < 0x400, tiny.copysign(whole), values)


def split(
    whole: Tensor, dtype: torch.dtype, low: torch.dtype | None, word: Tensor, rounds: bool
) -> tuple[Tensor, Tensor | None]:
    """Split a float32 parameter into a 16-bit dtype and its low bits. Those of NaN, and of float16's infinity, are 0.

    Args:
        low: the dtype of the low bits; None for none. The bits that do not fit in 8 are rounded by the dither.
        word: from `dither`.
        rounds: True to round a parameter without low bits by the dither, too.
    """
    if low is None and not rounds:
        return whole.to(dtype), None
    is_nan = whole.isnan()
    words = whole.view(torch.int32).masked_fill(is_nan, _NAN)
    if low is None:
        dropped = 16 if dtype == torch.bfloat16 else 13
        words = (words + (word >> 32 - dropped).to(torch.int32)) & -(1 << dropped)
        return words.view(torch.float32).to(dtype), None
    is_tiny = (words & 0x7FFFFFFF) < _TINY
    if dtype == torch.float16:
        words = torch.where(is_tiny, (whole.abs() * 2.0**40).to(torch.int32), words)
    if low == torch.int8:
        words = (words + (word >> 24).to(torch.int32)) & -(1 << 8)
    if dtype == torch.bfloat16:  # to nearest, ties up: the low bits are in [-2¹⁵, 2¹⁵)
        rounded = (words + 0x8000 >> 16).to(torch.int16).view(torch.bfloat16)
    else:
        words = torch.where(is_tiny, words.clamp(max=0x3FF7FFF), words)
        size = words + 0x8000 >> 16
        tiny = (size.float() * 2.0**-24).copysign(whole)
        rounded = torch.where(is_tiny, tiny, words.view(torch.float32)).to(dtype)
        words = words - torch.where(is_tiny, size << 16, rounded.float().view(torch.int32))
        words = words.masked_fill(rounded.isinf(), 0)  # what is too large for float16 becomes infinite
    return rounded, (words if low == torch.int16 else words >> 8).to(low).masked_fill(is_nan, 0)
