"""SwiGLU and its gradients in 8 bits whose blocks have scales.

Legend: R rows in expert order, F width of an expert, both multiples of 128. A program has 128 x 128 elements of the gradients,
which it makes twice: a few rows at a time for the rows, a few columns at a time for the transpose. Floor, at memory bandwidth:
5 F bytes a row forward, 11 F backward; what is read again is still in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.fp8 import largest
from runtime.kernels.fp8_blocks import BLOCK, SIDE, Pair, empty_rows, scales_of, store_columns, to_bits
from runtime.kernels.swiglu import swiglu_gradients, swiglu_of

TILE_ROWS, TILE_COLUMNS = 32, 32  # that a program holds at a time


@triton.jit
def _load(hidden, weights, slots, row, column, width):
    """Gate and up of some rows and columns, and the rows' weights; of padding zeros. And which rows are none."""
    slot = tl.load(slots + row)
    real = (slot >= 0)[:, None]
    weight = tl.load(weights + slot, mask=slot >= 0, other=0.0).to(tl.float32)[:, None]
    at = row[:, None] * (2 * width) + column[None, :]
    gate = tl.load(hidden + at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(hidden + width + at, mask=real, other=0.0).to(tl.float32)
    return gate, up, weight, real


@triton.jit
def _swiglu_kernel(
    hidden,
    weights,
    slots,
    out,
    scales,
    ends,
    width,
    num_rows,
    LIMIT: tl.constexpr,
    LAST: tl.constexpr,
    TILE_R: tl.constexpr,
):
    first = tl.program_id(0) * TILE_R
    if first >= tl.load(ends + LAST):
        return
    row = (first + tl.arange(0, TILE_R)).to(tl.int64)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    gate, up, weight, _ = _load(hidden, weights, slots, row, column, width)
    act = swiglu_of(gate, up) * weight
    factor, scale = scales_of(tl.max(tl.abs(act), 1), LIMIT)
    tl.store(out + row[:, None] * width + column[None, :], to_bits(act, factor[:, None], out))
    tl.store(scales + tl.program_id(1).to(tl.int64) * num_rows + row, scale)


@triton.jit
def _gradients_of(hidden, weights, slots, grad, row, column, width):
    """Gradients of gate and up, the weighted activation, and dot products of gradient and activation, of some rows and columns."""
    gate, up, weight, real = _load(hidden, weights, slots, row, column, width)
    incoming = tl.load(grad + row[:, None] * width + column[None, :], mask=real, other=0.0).to(tl.float32)
    grad_gate, grad_up, act = swiglu_gradients(gate, up, incoming * weight)
    return grad_gate, grad_up, act * weight, tl.sum(incoming * act, 1)


@triton.jit
def _swiglu_backward_kernel(
    hidden,
    weights,
    slots,
    grad,
    grad_rows,
    grad_rows_scales,
    grad_columns,
    grad_columns_scales,
    act_columns,
    act_columns_scales,
    dots,
    ends,
    width,
    num_rows,
    GRAD_LIMIT: tl.constexpr,
    ACT_LIMIT: tl.constexpr,
    LAST: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    first = tl.program_id(0) * SIDE
    if first >= tl.load(ends + LAST):
        return
    block = tl.program_id(1).to(tl.int64)
    column = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    for start in range(0, SIDE, TILE_R):
        row = (first + start + tl.arange(0, TILE_R)).to(tl.int64)
        grad_gate, grad_up, _, dot = _gradients_of(hidden, weights, slots, grad, row, column, width)
        tl.store(dots + block * num_rows + row, dot)
        at = row[:, None] * (2 * width) + column[None, :]
        factor, scale = scales_of(tl.max(tl.abs(grad_gate), 1), GRAD_LIMIT)
        tl.store(grad_rows + at, to_bits(grad_gate, factor[:, None], grad_rows))
        tl.store(grad_rows_scales + block * num_rows + row, scale)
        factor, scale = scales_of(tl.max(tl.abs(grad_up), 1), GRAD_LIMIT)
        tl.store(grad_rows + width + at, to_bits(grad_up, factor[:, None], grad_rows))
        tl.store(grad_rows_scales + (block + width // SIDE) * num_rows + row, scale)
    rows = (first + tl.arange(0, SIDE)).to(tl.int64)
    scales = tl.program_id(0).to(tl.int64) * width
    for start in range(0, SIDE, TILE_C):
        some = tl.program_id(1) * SIDE + start + tl.arange(0, TILE_C)
        grad_gate, grad_up, act, _ = _gradients_of(hidden, weights, slots, grad, rows, some, width)
        store_columns(grad_gate, grad_columns, grad_columns_scales + 2 * scales, rows, some, num_rows, GRAD_LIMIT)
        place = some + width
        store_columns(grad_up, grad_columns, grad_columns_scales + 2 * scales, rows, place, num_rows, GRAD_LIMIT)
        store_columns(act, act_columns, act_columns_scales + scales, rows, some, num_rows, ACT_LIMIT)


def swiglu(hidden_R2F: Tensor, weights_TK: Tensor, slot_of_row_R: Tensor, offsets_E: Tensor) -> Pair:
    """silu(gate) * up * weight in e4m3.

    Args:
        hidden_R2F: [R, 2F] contiguous, gate then up.
        weights_TK: [T, K] contiguous routing weights.
        slot_of_row_R: [R] int32 which weight each row takes, -1 for padding.
        offsets_E: [E] int32 ends of the experts' rows; rows past the last stay unwritten.

    Returns:
        [R, F] and [F / 128, R].
    """
    num_rows, width = hidden_R2F.shape[0], hidden_R2F.shape[1] // 2
    out = empty_rows(num_rows, width, torch.float8_e4m3fn, hidden_R2F.device)
    if num_rows:
        grid = (num_rows // TILE_ROWS, width // BLOCK)
        sizes = (width, num_rows, largest(out[0].dtype), offsets_E.shape[0] - 1, TILE_ROWS)
        _swiglu_kernel[grid](hidden_R2F, weights_TK, slot_of_row_R, *out, offsets_E, *sizes, num_warps=8)
    return out


def swiglu_backward(
    hidden_R2F: Tensor,
    weights_TK: Tensor,
    grad_RF: Tensor,
    slot_of_row_R: Tensor,
    offsets_E: Tensor,
    grad_dtype: torch.dtype,
) -> tuple[Pair, Pair, Pair, Tensor]:
    """Gradients of SwiGLU in 8 bits in both layouts, and its output transposed.

    Args:
        hidden_R2F: [R, 2F] contiguous.
        weights_TK: [T, K] contiguous routing weights.
        grad_RF: [R, F] contiguous gradient of the output.
        slot_of_row_R: [R] int32 which weight each row takes, -1 for padding.
        offsets_E: [E] int32 ends of the experts' rows; what is past the last stays unwritten.
        grad_dtype: format of the gradient.

    Returns:
        The gradient of hidden [R, 2F] and transposed [2F, R], the output transposed [F, R] in e4m3, and [R] dot products
        of gradient and output before the weight, undefined for padding.
    """
    num_rows, width = grad_RF.shape
    device = grad_RF.device
    rows, columns = (empty_rows(*shape, grad_dtype, device) for shape in ((num_rows, 2 * width), (2 * width, num_rows)))
    act = empty_rows(width, num_rows, torch.float8_e4m3fn, device)
    dots = torch.empty(width // BLOCK, num_rows, dtype=torch.float32, device=device)
    if num_rows:
        outs = (*rows, *columns, *act, dots, offsets_E)
        sizes = (
            width,
            num_rows,
            largest(grad_dtype),
            largest(act[0].dtype),
            offsets_E.shape[0] - 1,
            TILE_ROWS,
            TILE_COLUMNS,
        )
        grid = (num_rows // BLOCK, width // BLOCK)
        args = (hidden_R2F, weights_TK, slot_of_row_R, grad_RF)
        _swiglu_backward_kernel[grid](*args, *outs, *sizes, num_warps=8)
    return rows, columns, act, dots.sum(0)
