"""Passes that make 8-bit operands whose blocks have scales: of a matrix and its transpose, of weights, and of experts' rows.

A program has 128 x 128 elements, or for one layout a part of them. For two layouts it goes through them twice: for the rows,
and a few columns at a time, which have whole blocks, and whole lines of memory, for the transpose; what is read again is still
in the cache.

Legend: G matrices of one shape (experts, or one), T rows (tokens), D columns, R rows in expert order; D and R are multiples of
128. A pair is what `runtime.fp8.operands.Operand` has: numbers in 8 bits [R, D], and what one stands for in each 128 of a row
[D / 128, R]. Floor, at memory bandwidth: an element read once in bf16, written once in 8 bits for each layout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.fp8 import largest

BLOCK = 128
SIDE = tl.constexpr(BLOCK)
MOST = tl.constexpr(100)  # the exponent of the largest factor, as in `runtime.fp8.blocks`
LIMIT_EXPONENT_E4M3, LIMIT_EXPONENT_E5M2 = tl.constexpr(127 + 8), tl.constexpr(127 + 15)
PIECE = 64  # columns that a program holds at a time for the transpose
Pair = tuple[Tensor, Tensor]


@triton.jit
def scales_of(amax, LIMIT: tl.constexpr):
    """The power of two that a block is multiplied with, and its inverse; NaN for a block that isn't finite.

    Both formats' largest numbers are 1.75 times a power of two, so that the factor's exponent is that power's less that of the
    largest value, and one less where its mantissa is above 1.75.
    """
    bits = amax.to(tl.int32, bitcast=True)
    exponent = LIMIT_EXPONENT_E4M3 if LIMIT == 448.0 else LIMIT_EXPONENT_E5M2
    power = exponent - (bits >> 23) - tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0)
    power = tl.where(amax > 0, tl.minimum(power, MOST), 0)
    finite = amax < float("inf")
    factor = ((power + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - power) << 23).to(tl.float32, bitcast=True)
    return tl.where(finite, factor, float("nan")), tl.where(finite, inverse, float("nan"))


@triton.jit
def to_bits(values, factor, out):
    """In 8 bits: nothing saturates."""
    return (values * factor).to(out.dtype.element_ty)


@triton.jit
def store_columns(values, out, scales, row, column, num_rows, LIMIT: tl.constexpr):
    """Write the transpose of 128 rows and some columns, and the columns' scales."""
    factor, scale = scales_of(tl.max(tl.abs(values), 0), LIMIT)
    turned = column.to(tl.int64)[None, :] * num_rows + row[:, None]
    tl.store(out + turned, to_bits(values, factor[None, :], out))
    tl.store(scales + column, scale)


@triton.jit
def _quantise_kernel(
    x,
    rows_out,
    rows_scales,
    columns_out,
    columns_scales,
    num_rows,
    padded_rows,
    x_pitch,
    rows_pitch,
    rows_scales_pitch,
    columns_pitch,
    columns_scales_pitch,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    inside, written = (row < num_rows)[:, None], row < padded_rows
    if ROWS:
        column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
        values = tl.load(x + row[:, None] * x_pitch + column[None, :], mask=inside, other=0.0).to(tl.float32)
        factor, scale = scales_of(tl.max(tl.abs(values), 1), LIMIT)
        bits = to_bits(values, factor[:, None], rows_out)
        tl.store(rows_out + row[:, None] * rows_pitch + column[None, :], bits, mask=written[:, None])
        tl.store(rows_scales + tl.program_id(1).to(tl.int64) * rows_scales_pitch + row, scale, mask=written)
    if COLUMNS:
        for start in range(0, SIDE, TILE_C):
            some = tl.program_id(1) * SIDE + start + tl.arange(0, TILE_C)
            piece = tl.load(x + row[:, None] * x_pitch + some[None, :], mask=inside, other=0.0).to(tl.float32)
            of_column, column_scale = scales_of(tl.max(tl.abs(piece), 0), LIMIT)
            turned = some.to(tl.int64)[None, :] * columns_pitch + row[:, None]
            tl.store(columns_out + turned, to_bits(piece, of_column[None, :], columns_out), mask=written[:, None])
            tl.store(columns_scales + tl.program_id(0).to(tl.int64) * columns_scales_pitch + some, column_scale)


@triton.jit
def _matrices_kernel(
    x,
    rows_out,
    rows_scales,
    columns_out,
    columns_scales,
    x_group,
    depth,
    rows_group,
    rows_scales_group,
    columns_group,
    columns_pitch,
    columns_scales_group,
    columns_scales_pitch,
    LIMIT: tl.constexpr,
    TILE_C: tl.constexpr,
):
    group = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    at = row[:, None] * depth + column[None, :]
    values = tl.load(x + group * x_group + at).to(tl.float32)
    factor, scale = scales_of(tl.max(tl.max(tl.abs(values), 1), 0), LIMIT)
    tl.store(rows_out + group * rows_group + at, to_bits(values, factor, rows_out))
    place = group * rows_scales_group + tl.program_id(0) * (depth // SIDE) + tl.program_id(1)
    tl.store(rows_scales + place, scale)
    place = group * columns_scales_group + tl.program_id(1).to(tl.int64) * columns_scales_pitch + tl.program_id(0)
    tl.store(columns_scales + place, scale)
    # Read again, not only for whole lines: where one rounded pair is both packed into a word and split into bytes, ptxas
    # 12.8 for sm_90 splits it before it is there.
    for start in range(0, SIDE, TILE_C):
        some = tl.program_id(1) * SIDE + start + tl.arange(0, TILE_C)
        piece = tl.load(x + group * x_group + row[:, None] * depth + some[None, :]).to(tl.float32)
        turned = group * columns_group + some.to(tl.int64)[None, :] * columns_pitch + row[:, None]
        tl.store(columns_out + turned, to_bits(piece, factor, columns_out))


@triton.jit
def _gather_scales_kernel(scales, out, slots, ends, num_tokens, num_rows, LAST: tl.constexpr, TOPK: tl.constexpr):
    first = tl.program_id(0) * SIDE
    if first >= tl.load(ends + LAST):
        return
    row = first + tl.arange(0, SIDE)
    slot = tl.load(slots + row)
    block = tl.program_id(1).to(tl.int64)
    values = tl.load(scales + block * num_tokens + slot // TOPK, mask=slot >= 0, other=1.0)
    tl.store(out + block * num_rows + row, values)


@triton.jit
def _gather_columns_kernel(
    x,
    out,
    scales,
    slots,
    ends,
    x_pitch,
    num_columns,
    num_rows,
    LIMIT: tl.constexpr,
    LAST: tl.constexpr,
    TOPK: tl.constexpr,
    TILE_C: tl.constexpr,
):
    first = tl.program_id(0) * SIDE
    if first >= tl.load(ends + LAST):
        return
    row = first + tl.arange(0, SIDE)
    column = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    slot = tl.load(slots + row)
    token = (slot // TOPK).to(tl.int64)
    values = tl.load(x + token[:, None] * x_pitch + column[None, :], mask=(slot >= 0)[:, None], other=0.0)
    values = values.to(tl.float32)
    scales += tl.program_id(0).to(tl.int64) * num_columns
    store_columns(values, out, scales, row, column, num_rows, LIMIT)


def quantise(x_TD: Tensor, rows: Pair | None, columns: Pair | None) -> None:
    """Bring a matrix to 8 bits.

    Args:
        x_TD: [T, D], the last dim contiguous.
        rows: [P, D] and [D / 128, P], P at least T, the last dims contiguous; rows from T to P become zero. None: not wanted.
        columns: [D, P] and [P / 128, D], likewise.
    """
    num_rows, num_columns = x_TD.shape
    out = rows or columns
    assert out is not None
    padded = rows[0].shape[0] if rows is not None else out[0].shape[1]
    if not padded:
        return
    tensors = (*(rows or out), *(columns or out))
    pitches = (x_TD.stride(0), *(tensor.stride(0) for tensor in tensors))
    kinds = (largest(out[0].dtype), rows is not None, columns is not None, PIECE)
    grid = (triton.cdiv(padded, BLOCK), num_columns // BLOCK)
    _quantise_kernel[grid](x_TD, *tensors, num_rows, padded, *pitches, *kinds, num_warps=16)


def quantise_matrices(x_GNK: Tensor, rows: Pair, columns: Pair) -> None:
    """Bring matrices and their transposes to 8 bits, each 128 x 128 elements by themselves.

    Args:
        x_GNK: [G, N, K], contiguous.
        rows: [G, N, K] e4m3 and [G, N / 128, K / 128], the last two dims contiguous.
        columns: [G, K, N] and [G, K / 128, N / 128], the last dim contiguous.
    """
    num_groups, height, depth = x_GNK.shape
    pitches = (x_GNK.stride(0), depth, *(tensor.stride(0) for tensor in rows))
    pitches += (*columns[0].stride()[:2], *columns[1].stride()[:2])
    grid = (height // BLOCK, depth // BLOCK, num_groups)
    _matrices_kernel[grid](x_GNK, *rows, *columns, *pitches, largest(rows[0].dtype), PIECE, num_warps=16)


def gather_scales(scale: Tensor, slot_of_row_R: Tensor, offsets_E: Tensor, topk: int) -> Tensor:
    """The scales of tokens' rows in expert order.

    Args:
        scale: [D / 128, T] of tokens.
        slot_of_row_R: [R] int32 slot of each row, -1 for padding.
        offsets_E: [E] int32 ends of the experts' rows.
        topk: choices of a token.

    Returns:
        [D / 128, R]; what is past the last expert is unwritten.
    """
    num_blocks, num_rows = scale.shape[0], slot_of_row_R.shape[0]
    out = scale.new_empty(num_blocks, num_rows)
    if out.numel():
        grid = (num_rows // BLOCK, num_blocks)
        sizes = (scale.shape[1], num_rows, offsets_E.shape[0] - 1, topk)
        _gather_scales_kernel[grid](scale, out, slot_of_row_R, offsets_E, *sizes, num_warps=4)
    return out


def gather_columns(x_TD: Tensor, dtype: torch.dtype, slot_of_row_R: Tensor, offsets_E: Tensor, topk: int) -> Pair:
    """Rows in expert order, transposed and in 8 bits.

    Args:
        x_TD: [T, D] tokens, the last dim contiguous.
        dtype: the format.
        slot_of_row_R: [R] int32 slot of each row, -1 for padding.
        offsets_E: [E] int32 ends of the experts' rows.
        topk: choices of a token.

    Returns:
        [D, R] and [R / 128, D]; padding is zero, what is past the last expert is unwritten.
    """
    num_columns, num_rows = x_TD.shape[1], slot_of_row_R.shape[0]
    out = empty_rows(num_columns, num_rows, dtype, x_TD.device)
    if num_rows:
        grid = (num_rows // BLOCK, num_columns // PIECE)
        sizes = (x_TD.stride(0), num_columns, num_rows, largest(dtype), offsets_E.shape[0] - 1, topk, PIECE)
        _gather_columns_kernel[grid](x_TD, *out, slot_of_row_R, offsets_E, *sizes, num_warps=8)
    return out


def empty_rows(rows: int, depth: int, dtype: torch.dtype, device: torch.device) -> Pair:
    """Make room for rows in 8 bits [R, D] and their scales [D / 128, R]."""
    bits = torch.empty(rows, depth, dtype=dtype, device=device)
    return bits, torch.empty(depth // BLOCK, rows, dtype=torch.float32, device=device)
