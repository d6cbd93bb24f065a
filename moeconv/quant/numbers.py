"""The arithmetic of quantised weights, with numpy alone: rows of bytes in, rows of bytes out.

Letters: R rows, C columns of a matrix [out, in].
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]
FP8_MAX = 448.0
# E2M1: a sign, two bits of exponent, one of fraction.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@cache
def _mxfp4_pairs() -> Array:
    """[256 exponents, 256 bytes] the two bf16 numbers of a byte under an exponent, the low half-byte's first, as one uint32."""
    values = np.array(_E2M1 + tuple(-v for v in _E2M1), np.float32)
    with np.errstate(over="ignore"):  # past the largest exponent numbers are infinite, as they are for others
        scaled = np.ldexp(values[None], np.arange(256, dtype=np.int32)[:, None] - 127)
    bf16 = scaled.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    return bf16[:, byte & 15] | bf16[:, byte >> 4] << 16


def mxfp4_to_bf16(blocks: Array, scales: Array) -> Array:
    """Multiply MXFP4 numbers with their exponents: exact, since bf16 has more bits and the same exponents.

    Args:
        blocks: [R, C / 32, 16] uint8, two numbers a byte, the low half-byte first.
        scales: [R, C / 32] uint8, exponents with a bias of 127.

    Returns:
        [R, C] bfloat16.

    Source: https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/integrations/mxfp4.py
    """
    index = scales.view(np.uint8).astype(np.intp)[..., None] << 8 | blocks.view(np.uint8)
    pairs = np.take(_mxfp4_pairs().reshape(-1), index, mode="clip")
    out: Array = pairs.view(ml_dtypes.bfloat16).reshape(blocks.shape[0], -1)
    return out


@cache
def _fp4_values() -> Array:
    """[256, 2] the two numbers of a byte, the low half-byte's first."""
    values = np.array(_E2M1 + tuple(-v for v in _E2M1), np.float32)
    byte = np.arange(256)
    return np.stack([values[byte & 15], values[byte >> 4]], axis=1)


def fp4_to_float(packed: Array) -> Array:
    """Give FP4 numbers (E2M1), two a byte, as fp32, exactly.

    Args:
        packed: [R, C / 2] uint8, the low half-byte first.

    Returns:
        [R, C] fp32.
    """
    out: Array = _fp4_values()[packed.view(np.uint8)].reshape(packed.shape[0], -1)
    return out


# Where AWQ puts the numbers of a word: the one in bits 4k to 4k + 3 is that of column AWQ_ORDER[k] of eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_words(words: Array, bits: int, axis: int, order: tuple[int, ...] | None = None) -> Array:
    """Take words of 32 bits apart.

    Args:
        words: [R, C] int32.
        bits: of each number.
        axis: the dimension along which the numbers of a word follow each other.
        order: which of them the word's lowest bits hold, then the next; in turn by default.

    Returns:
        uint8, 32 / bits times as long along `axis`.
    """
    per = 32 // bits
    shifts = np.arange(per, dtype=np.uint32)[np.argsort(order) if order is not None else slice(None)] * np.uint32(bits)
    mask = np.uint32((1 << bits) - 1)
    inside = words.view(np.uint32)[..., None] >> shifts & mask
    numbers = inside.astype(np.uint8)
    rows, columns = words.shape
    out: Array = numbers.transpose(0, 2, 1).reshape(rows * per, columns) if axis == 0 else numbers.reshape(rows, -1)
    return out


@cache
def _fp8_values() -> Array:
    out: Array = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return out


def fp8_to_float(numbers: Array) -> Array:
    """Give FP8 numbers (E4M3) as fp32, exactly."""
    out: Array = np.take(_fp8_values(), numbers.view(np.uint8), mode="clip")
    return out


def times_scales(values: Array, scales: Array, block: tuple[int, int], first: int) -> Array:
    """Multiply rows with the scales of their blocks, in place.

    Args:
        values: [R, C] fp32.
        scales: [rows of blocks, columns of blocks] fp32, from the block of row `first` on.
        block: rows and columns of a block.
        first: number of the first row in the matrix.

    Returns:
        The values.
    """
    row = 0
    for scale in scales:
        end = min(((first + row) // block[0] + 1) * block[0] - first, values.shape[0])
        values[row:end] *= np.repeat(scale, block[1])[: values.shape[1]]
        row = end
    return values


def spread(scales: Array, block: tuple[int, int], first: int, shape: tuple[int, int]) -> Array:
    """Give every element of some rows its block's scale.

    Args:
        scales: [rows of blocks, columns of blocks] fp32, from the block of row `first` on.
        block: rows and columns of a block.
        first: number of the first row in the matrix.
        shape: rows and columns wanted.

    Returns:
        [R, C] fp32.
    """
    rows = (np.arange(first, first + shape[0]) // block[0]) - first // block[0]
    out: Array = scales[rows[:, None], np.arange(shape[1]) // block[1]]
    return out


def scale_values(scales: Array) -> Array:
    """Give scales as fp32, exponents (E8M0) included."""
    return scales.astype(np.float32)


def fp8_blocks(weight: Array, block: tuple[int, int], *, exponents: bool) -> tuple[Array, Array]:
    """Quantise whole rows of blocks to FP8.

    Args:
        weight: [R, C] fp32, R whole rows of blocks but for the last.
        block: rows and columns of a block.
        exponents: whether scales are powers of two.

    Returns:
        [R, C] float8_e4m3fn, and [rows of blocks, columns of blocks] fp32: what to multiply with.

    Source: https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/integrations/finegrained_fp8.py (Fp8Quantize)
    """
    rows, columns = (-(-size // per) for size, per in zip(weight.shape, block, strict=True))
    padded = np.zeros((rows * block[0], columns * block[1]), np.float32)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    top = np.abs(padded.reshape(rows, block[0], columns, block[1])).max(axis=(1, 3))
    # In this order: torch divides a number by a tensor as the number times the inverse, and the last bit should be its own.
    forward = np.where(
        top > 0, np.float32(1) / np.where(top > 0, top, np.float32(1)) * np.float32(FP8_MAX), np.float32(1)
    )
    inverse = (np.float32(1) / forward).astype(np.float32)
    if exponents:
        inverse = np.exp2(np.ceil(np.log2(np.maximum(inverse, np.finfo(np.float32).tiny)))).astype(np.float32)
        forward = (np.float32(1) / inverse).astype(np.float32)
    scaled = weight * spread(forward, block, 0, (weight.shape[0], weight.shape[1]))
    return np.clip(scaled, -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn), inverse
