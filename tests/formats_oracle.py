"""The formats of states and parameters in NumPy, written from the docstring of the package's formats, not its code."""

from __future__ import annotations

import numpy as np

BLOCK = 64
TURNS = {"exp_avg": 0, "grok_ema": 11, "exp_avg_sq": 22, "param": 5}
f32 = np.float32


def _mixed(word: np.ndarray) -> np.ndarray:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = (word ^ (word >> np.uint32(shift))) * np.uint32(factor)
    return word ^ (word >> np.uint32(16))


def words(number: int, draw: int, name: str, rows: int, width: int) -> np.ndarray:
    """Return a parameter's dithers as a (rows, width) uint32 array, in units of 2^-32."""
    key = _mixed(np.array([(number + 1) % 2**32], np.uint32))
    found = np.zeros((rows, width), np.uint32)
    block, turn = 0, TURNS[name]
    for row in range(rows):
        for start in range(0, width, BLOCK):
            word = int(_mixed(np.array([block], np.uint32) ^ key)[0])
            word = (word << turn | word >> 32 - turn) % 2**32
            lanes = np.arange(min(BLOCK, width - start), dtype=np.uint64)
            word = word + lanes * np.uint64(0xC13FA9A9) + np.uint64(draw * 0x9E3779B9 % 2**32)
            found[row, start : start + BLOCK] = word % np.uint64(2**32)
            block += 1
    return found


def encoded(values: np.ndarray, name: str, dithers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales of (rows, width) float32 values below 2^100.

    The codes are computed in float32, because their last bit counts.
    """
    is_v = name == "exp_avg_sq"
    rows, width = values.shape
    highest, spare = (255, 128) if is_v else (127, 64)
    unit = f32(65536 / (highest * 65536 - spare))
    codes = np.zeros(values.shape, np.uint8 if is_v else np.int8)
    scales = np.zeros((rows, -(-width // BLOCK)), f32)
    for row in range(rows):
        for block, start in enumerate(range(0, width, BLOCK)):
            x = values[row, start : start + BLOCK]
            x = np.sqrt(x) if is_v else x
            scale = scales[row, block] = max(np.abs(x).max() * unit, f32(2.0**-100))
            place = np.trunc((x * (f32(65536) / scale)).astype(np.float64)) / 65536
            code = np.floor(place + (dithers[row, start : start + BLOCK] >> np.uint32(16)) / 65536)
            codes[row, start : start + BLOCK] = np.maximum(code, x > 0) if is_v else code
    return codes, scales


def decoded(codes: np.ndarray, scales: np.ndarray, name: str) -> np.ndarray:
    y = codes.astype(f32) * np.repeat(scales, BLOCK, axis=1)[:, : codes.shape[1]]
    return y * y if name == "exp_avg_sq" else y


def _step(x: np.ndarray, bits: int, least: int) -> np.ndarray:
    """Return the distance between neighbours near x among numbers of `bits` bits, with exponents of `least` or more."""
    exponent = np.where(x != 0, np.frexp(x)[1] - 1, least)
    return np.ldexp(1.0, np.maximum(exponent, least) - bits + 1)


def bfloat16(values: np.ndarray, name: str, dithers: np.ndarray) -> np.ndarray:
    """Return the float32 values that come back when `values` are stored in bfloat16."""
    x = np.minimum(np.abs(values.astype(np.float64)), (2 - 2.0**-7) * 2.0**127)
    step = _step(x, 8, -126)
    y = step * np.floor(x / step + (dithers >> np.uint32(16)) / 2.0**16)
    if name == "exp_avg_sq":
        return np.where(x > 0, np.maximum(y, 2.0**-126), 0).astype(f32)
    return np.copysign(y, values).astype(f32)


def weights(values: np.ndarray, half: str, bits: int, dithers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 weights in `bits` bits, and their 16-bit half of dtype `half`, both as float32.

    With 16 bits the dithers round the weights.
    """
    x = np.abs(values.astype(np.float64))
    if bits == 16:
        kept = {"bfloat16": 8, "float16": 11}[half]
        step = _step(x, kept, -126)
        dropped = 24 - kept
        x = step * np.floor(x / step + (dithers >> np.uint32(32 - dropped)) / 2.0**dropped)
        with np.errstate(over="ignore"):
            x = np.copysign(x, values).astype(np.float16 if half == "float16" else f32).astype(f32)
        return x, x
    is_tiny = (x < 2047 * 2.0**-25) & (half == "float16")
    step = _step(x, 24, -126)
    step = np.where(is_tiny, 2.0**-40, step)
    x = step * np.floor(x / step)
    if bits == 24:
        step = 256 * step
        x = step * np.floor(x / step + (dithers >> np.uint32(24)) / 256)
        x = np.where(is_tiny, np.minimum(x, 2047 * 2.0**-25 - step), x)
    if half == "float16":
        with np.errstate(over="ignore"):
            near = np.where(is_tiny, 2.0**-24 * np.floor(x * 2**24 + 0.5), x.astype(np.float16))
    else:
        near = _step(x, 8, -126)
        near = near * np.floor(x / near + 0.5)
    return np.copysign(x, values).astype(f32), np.copysign(near, values).astype(f32)
