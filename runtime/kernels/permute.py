"""Kernels that move tokens to rows in expert order and sum rows back.

Legend: T tokens, K choices per token, R rows, D hidden size. Floor: each row moved once, at memory bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    weights,
    tails,
    num_columns,
    x_pitch,
    out_pitch,
    tail_pitch,
    NUM_PADDED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The first NUM_PADDED programs zero the padding of one expert each, the others copy a token to its rows.

    With TAIL, so many numbers behind each row become its weight and zeros.
    """
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
            tl.store(out + row.to(tl.int64) * out_pitch + columns, zeros, mask=inside & padding)
    else:
        token = (program - NUM_PADDED).to(tl.int64)
        values = tl.load(x + token * x_pitch + columns, mask=inside)
        for k in tl.static_range(TOPK):
            row = tl.load(row_of_slot + token * TOPK + k).to(tl.int64)
            tl.store(out + row * out_pitch + columns, values, mask=inside & (row >= 0))
            if TAIL > 0:  # noqa: SIM102 - decided when the kernel is compiled
                if tl.program_id(1) == 0:
                    places = tl.arange(0, TAIL)
                    tail = tl.where(places == 0, tl.load(weights + token * TOPK + k), 0)
                    tl.store(tails + row * tail_pitch + places, tail, mask=row >= 0)


@triton.jit
def _sum_kernel(
    rows,
    out,
    row_of_slot,
    tails,
    weights,
    num_columns,
    rows_pitch,
    out_pitch,
    tail_pitch,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Sum each token's rows; with TAIL, also bring the first number behind each row to its slot."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    total = tl.zeros((BLOCK,), dtype=ACC)
    for k in range(TOPK):
        row = tl.load(row_of_slot + token * TOPK + k).to(tl.int64)
        total += tl.load(rows + row * rows_pitch + columns, mask=inside & (row >= 0), other=0.0).to(ACC)
        if TAIL > 0:  # noqa: SIM102 - likewise
            if tl.program_id(1) == 0:
                tl.store(weights + token * TOPK + k, tl.load(tails + row * tail_pitch, mask=row >= 0, other=0.0))
    tl.store(out + token * out_pitch + columns, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class Beside:
    """Numbers of slots that travel behind their rows."""

    values_TK: Tensor
    """[T, K] contiguous."""
    tails_RN: Tensor
    """[R, N] the same dtype, a view of the room behind each row; N is a power of 2."""


def _rows(x: Tensor) -> Tensor:
    """The tensor with elements of a row next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def gather_rows(
    x_TD: Tensor,
    row_of_slot_TK: Tensor,
    slot_of_row_R: Tensor,
    offsets_E: Tensor,
    alignment: int,
    *,
    out_RD: Tensor | None = None,
    beside: Beside | None = None,
) -> Tensor:
    """Copy each token to its rows: read once, written K times.

    Args:
        x_TD: [T, D]; rows may lie apart.
        row_of_slot_TK: [T, K] int32 row of each choice, -1 where dropped.
        slot_of_row_R: [R] int32 slot of each row, -1 for padding.
        offsets_E: [E] int32 ends of the experts' rows, multiples of `alignment`.
        alignment: 1 for no padding.
        out_RD: [R, D] where the rows go, which may lie apart; None for new memory.
        beside: what is written behind the rows, with zeros behind it.

    Returns:
        [R, D]; padding rows are zero, rows past the last expert unwritten.
    """
    num_tokens, topk = row_of_slot_TK.shape
    num_columns = x_TD.shape[1]
    out = x_TD.new_empty(slot_of_row_R.shape[0], num_columns) if out_RD is None else out_RD
    num_padded = offsets_E.shape[0] if alignment > 1 else 0
    if num_tokens + num_padded and out.numel():
        block = _block(num_columns)
        grid = (num_padded + num_tokens, triton.cdiv(num_columns, block))
        x = _rows(x_TD)
        weights, tails, tail_pitch, tail = _beside(beside, out)
        args = (x, out, row_of_slot_TK, slot_of_row_R, offsets_E, weights, tails, num_columns)
        pitches = (x.stride(0), out.stride(0), tail_pitch)
        _gather_kernel[grid](*args, *pitches, num_padded, alignment, topk, block, tail, num_warps=4)
    return out


def sum_rows(
    rows_RD: Tensor, row_of_slot_TK: Tensor, *, out_TD: Tensor | None = None, beside: Beside | None = None
) -> Tensor:
    """Sum each token's rows in the order of its choices, in fp32 (fp64 for fp64): no atomics, the same bits always.

    Args:
        rows_RD: [R, D]; rows may lie apart.
        row_of_slot_TK: [T, K] int32 row of each choice, -1 where dropped.
        out_TD: [T, D] where the sums go, which may lie apart; None for new memory.
        beside: what lies behind the rows, and where it goes; 0 where dropped.

    Returns:
        [T, D].
    """
    num_tokens, topk = row_of_slot_TK.shape
    num_columns = rows_RD.shape[1]
    out = rows_RD.new_empty(num_tokens, num_columns) if out_TD is None else out_TD
    if num_tokens:
        block = _block(num_columns)
        accumulator = tl.float64 if rows_RD.dtype == torch.float64 else tl.float32
        grid = (num_tokens, triton.cdiv(num_columns, block))
        rows = _rows(rows_RD)
        weights, tails, tail_pitch, tail = _beside(beside, out)
        args = (rows, out, row_of_slot_TK, tails, weights, num_columns, rows.stride(0), out.stride(0), tail_pitch)
        _sum_kernel[grid](*args, topk, block, accumulator, tail, num_warps=4)
    return out


def _beside(beside: Beside | None, stand_in: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """What a kernel takes for it: values, tails, their pitch, and numbers of a tail; 0 of them for none."""
    if beside is None:
        return stand_in, stand_in, 0, 0
    return beside.values_TK, beside.tails_RN, beside.tails_RN.stride(0), beside.tails_RN.shape[1]
