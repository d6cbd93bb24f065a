"""Quantised weights to the numbers that products take.

Legend: P matrices of N elements, R rows and C columns. Floor, at memory bandwidth: the stored bytes read and the numbers written
once, 0.5 + 4 / 64 (NF4) or 1 (FP8) and 2 bytes an element in bf16.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a program
# A product and a sum are rounded one after the other, as the library does.
_AS_WRITTEN = {"enable_fp_fusion": False}


@triton.jit
def _nf4_kernel(
    codes,
    scales,
    groups,
    offsets,
    numbers,
    scale_numbers,
    out,
    SIZE: tl.constexpr,
    SCALES: tl.constexpr,
    GROUPS: tl.constexpr,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program takes TILE / BLOCK blocks: [blocks, bytes of a block]."""
    matrix = tl.program_id(1).to(tl.int64)
    HALF: tl.constexpr = (SIZE + 1) // 2
    block = tl.program_id(0) * (TILE // BLOCK) + tl.arange(0, TILE // BLOCK)
    inside = block < SCALES
    scale = tl.load(scales + matrix * SCALES + block, mask=inside, other=0)
    if DOUBLE:
        group = tl.load(groups + matrix * GROUPS + block // GROUP, mask=inside, other=0.0)
        scale = tl.load(scale_numbers + scale.to(tl.int32)) * group + tl.load(offsets + matrix)
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    packed = tl.load(codes + matrix * HALF + byte, mask=byte < HALF, other=0).to(tl.int32)
    high = tl.load(numbers + (packed >> 4)) * scale[:, None]
    low = tl.load(numbers + (packed & 15)) * scale[:, None]
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.interleave(high, low).to(out.dtype.element_ty)
    tl.store(out + matrix * SIZE + element, values, mask=element < SIZE)


@triton.jit
def _fp8_kernel(
    codes,
    scales,
    out,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE_R: tl.constexpr,
):
    """A program takes TILE_R rows of a block."""
    matrix = tl.program_id(1).to(tl.int64)
    part, across = tl.program_id(0) // ACROSS, tl.program_id(0) % ACROSS
    row = part * TILE_R + tl.arange(0, TILE_R)
    column = across * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    at = matrix * (ROWS * COLUMNS) + row[:, None] * COLUMNS + column[None, :]
    scale = tl.load(scales + matrix * (DOWN * ACROSS) + part * TILE_R // BLOCK_R * ACROSS + across)
    values = tl.load(codes + at, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)


def dequantise_nf4(
    parts: tuple[Tensor, ...], out: Tensor, code_16: Tensor, scales_code_256: Tensor, blocks: tuple[int, int]
) -> None:
    """Write the numbers of NF4 matrices.

    Args:
        parts: as of `runtime.quantised.nf4.Nf4.dequantise`.
        out: likewise.
        code_16: [16] fp32, what four bits stand for.
        scales_code_256: [256] fp32, what the eight bits of a quantised scale stand for.
        blocks: elements that share a scale, and scales that share a scale of their own.
    """
    codes, scales = parts[:2]
    double = len(parts) > 2
    groups, offsets = parts[2:] if double else (scales, scales)
    size = out[0].numel()
    sizes = (size, scales.shape[1], groups.shape[1] if double else 1, double, *blocks, TILE)
    tables = (code_16, scales_code_256)
    grid = (triton.cdiv(size, TILE), out.shape[0])
    _nf4_kernel[grid](codes, scales, groups, offsets, *tables, out, *sizes, num_warps=4, **_AS_WRITTEN)


def dequantise_fp8(parts: tuple[Tensor, ...], out: Tensor, block: tuple[int, int]) -> None:
    """Write the numbers of FP8 matrices.

    Args:
        parts: as of `runtime.quantised.fp8.Fp8.dequantise`.
        out: likewise.
        block: rows and columns that share a scale.
    """
    codes, scales = parts
    rows, columns = out.shape[1:]
    tile = min(TILE // block[1], block[0])
    grid = (triton.cdiv(rows, tile) * scales.shape[2], out.shape[0])
    sizes = (rows, columns, *scales.shape[1:], *block, tile)
    _fp8_kernel[grid](codes, scales, out, *sizes, num_warps=4)
