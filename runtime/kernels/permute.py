"""Kernels that move tokens to rows in expert order and sum rows back.

Legend: T tokens, K choices per token, R rows, D hidden size. Floor: each row moved once, at memory bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 4096


def _block(num_columns: int) -> int:
    return min(MAX_BLOCK, int(triton.next_power_of_2(num_columns)))


@triton.jit
def _gather_kernel(
    x,
    out,
    row_of_slot,
    slots,
    ends,
    num_columns,
    NUM_PADDED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first NUM_PADDED programs zero the padding of one expert each, the others copy a token to its rows."""
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    if program < NUM_PADDED:
        end = tl.load(ends + program)
        start = tl.load(ends + program - 1, mask=program > 0, other=0)
        zeros = tl.zeros((BLOCK,), dtype=out.dtype.element_ty)
        for i in range(1, ALIGNMENT):
            row = end - i
            padding = row >= start
            padding = padding & (tl.load(slots + row, mask=padding, other=0) < 0)
            tl.store(out + row.to(tl.int64) * num_columns + columns, zeros, mask=inside & padding)
    else:
        token = (program - NUM_PADDED).to(tl.int64)
        values = tl.load(x + token * num_columns + columns, mask=inside)
        for k in tl.static_range(TOPK):
            row = tl.load(row_of_slot + token * TOPK + k).to(tl.int64)
            tl.store(out + row * num_columns + columns, values, mask=inside & (row >= 0))


@triton.jit
def _sum_kernel(rows, out, row_of_slot, num_columns, TOPK: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    total = tl.zeros((BLOCK,), dtype=ACC)
    for k in range(TOPK):
        row = tl.load(row_of_slot + token * TOPK + k).to(tl.int64)
        total += tl.load(rows + row * num_columns + columns, mask=inside & (row >= 0), other=0.0).to(ACC)
    tl.store(out + token * num_columns + columns, total.to(out.dtype.element_ty), mask=inside)


def gather_rows(
    x_TD: Tensor, row_of_slot_TK: Tensor, slot_of_row_R: Tensor, offsets_E: Tensor, alignment: int
) -> Tensor:
    """Copy each token to its rows: read once, written K times.

    Args:
        x_TD: [T, D] contiguous.
        row_of_slot_TK: [T, K] int32 row of each choice, -1 where dropped.
        slot_of_row_R: [R] int32 slot of each row, -1 for padding.
        offsets_E: [E] int32 ends of the experts' rows, multiples of `alignment`.
        alignment: 1 for no padding.

    Returns:
        [R, D]; padding rows are zero, rows past the last expert unwritten.
    """
    num_tokens, topk = row_of_slot_TK.shape
    num_columns = x_TD.shape[1]
    out = x_TD.new_empty(slot_of_row_R.shape[0], num_columns)
    num_padded = offsets_E.shape[0] if alignment > 1 else 0
    if num_tokens + num_padded and out.numel():
        block = _block(num_columns)
        grid = (num_padded + num_tokens, triton.cdiv(num_columns, block))
        args = (x_TD.contiguous(), out, row_of_slot_TK, slot_of_row_R, offsets_E, num_columns)
        _gather_kernel[grid](*args, num_padded, alignment, topk, block, num_warps=4)
    return out


def sum_rows(rows_RD: Tensor, row_of_slot_TK: Tensor) -> Tensor:
    """Sum each token's rows in the order of its choices, in fp32 (fp64 for fp64): no atomics, the same bits always.

    Args:
        rows_RD: [R, D] contiguous.
        row_of_slot_TK: [T, K] int32 row of each choice, -1 where dropped.

    Returns:
        [T, D].
    """
    num_tokens, topk = row_of_slot_TK.shape
    num_columns = rows_RD.shape[1]
    out = rows_RD.new_empty(num_tokens, num_columns)
    if num_tokens:
        block = _block(num_columns)
        accumulator = tl.float64 if rows_RD.dtype == torch.float64 else tl.float32
        grid = (num_tokens, triton.cdiv(num_columns, block))
        _sum_kernel[grid](rows_RD.contiguous(), out, row_of_slot_TK, num_columns, topk, block, accumulator, num_warps=4)
    return out
