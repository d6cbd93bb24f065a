"""Passes that make 8-bit operands: of a matrix and its transpose, of experts' rows, and of SwiGLU and its gradients.

Legend: G matrices of one shape (experts, or one), T rows (tokens), D columns, R rows in expert order, F width of an
expert. A bound is what the largest number of a format stands for. Floor, at memory bandwidth: an element read once in
bf16, written once in 8 bits for each of the two layouts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.swiglu import swiglu_gradients, swiglu_of

TILE_ROWS, TILE_COLUMNS = 64, 128
# Of SwiGLU's backward pass; more elements a thread would spill.
GATE_ROWS, GATE_COLUMNS, GATE_WARPS = 64, 128, 16
AMAX_BLOCK, AMAX_BLOCKS = 4096, 8  # elements of a load, and loads of a program


@triton.jit
def _scale(bound, LIMIT: tl.constexpr):
    return tl.where(bound > 0, LIMIT / bound, 1.0)


@triton.jit
def _eight_bits(values, scale, LIMIT: tl.constexpr, out):
    """Saturate; what is not finite becomes NaN, so that a loss tells of it."""
    scaled = values * scale
    clipped = tl.minimum(tl.maximum(scaled, -LIMIT), LIMIT)
    return tl.where(tl.abs(values) < float("inf"), clipped, float("nan")).to(out.dtype.element_ty)


@triton.jit
def _amax_kernel(x, amax, count, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    group = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    most = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(BLOCKS):
        at = start + i * BLOCK + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.abs(tl.load(x + group * count + at, mask=at < count, other=0.0).to(tl.float32)))
    tl.atomic_max(amax + group, tl.max(most, 0))


@triton.jit
def _quantise_kernel(
    x,
    rows_out,
    columns_out,
    bounds,
    amax,
    num_rows,
    num_columns,
    padded_rows,
    x_group,
    x_pitch,
    rows_group,
    rows_pitch,
    columns_group,
    columns_pitch,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AMAX: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    group = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * TILE_R + tl.arange(0, TILE_R)
    column = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    at = group * x_group + row[:, None] * x_pitch + column[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if AMAX:
        tl.atomic_max(amax + group, tl.max(tl.max(tl.abs(values), 1), 0))
    scale = _scale(tl.load(bounds + group), LIMIT)
    written = (row < padded_rows)[:, None] & (column < num_columns)[None, :]
    if ROWS:
        to = group * rows_group + row[:, None] * rows_pitch + column[None, :]
        tl.store(rows_out + to, _eight_bits(values, scale, LIMIT, rows_out), mask=written)
    if COLUMNS:
        to = group * columns_group + column.to(tl.int64)[None, :] * columns_pitch + row[:, None]
        tl.store(columns_out + to, _eight_bits(values, scale, LIMIT, columns_out), mask=written)


@triton.jit
def _gather_columns_kernel(
    x,
    out,
    slots,
    ends,
    num_columns,
    num_rows,
    LAST: tl.constexpr,
    TOPK: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    first = tl.program_id(0) * TILE_R
    if first >= tl.load(ends + LAST):
        return
    row = first + tl.arange(0, TILE_R)
    column = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    inside = (column < num_columns)[None, :] & (row < num_rows)[:, None]
    slot = tl.load(slots + row, mask=row < num_rows, other=-1)
    token = (slot // TOPK).to(tl.int64)
    values = tl.load(x + token[:, None] * num_columns + column[None, :], mask=inside & (slot >= 0)[:, None], other=0)
    tl.store(out + column.to(tl.int64)[None, :] * num_rows + row[:, None], values, mask=inside)


@triton.jit
def _swiglu_kernel(
    hidden, weights, slots, out, bound, ends, width, LIMIT: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    if row >= tl.load(ends + LAST):
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    slot = tl.load(slots + row)
    real = inside & (slot >= 0)
    base = hidden + row.to(tl.int64) * (2 * width)
    gate = tl.load(base + columns, mask=real, other=0.0).to(tl.float32)
    up = tl.load(base + width + columns, mask=real, other=0.0).to(tl.float32)
    weight = tl.load(weights + slot, mask=slot >= 0, other=0.0).to(tl.float32)
    act = swiglu_of(gate, up) * weight
    scaled = _eight_bits(act, _scale(tl.load(bound), LIMIT), LIMIT, out)
    tl.store(out + row.to(tl.int64) * width + columns, scaled, mask=inside)


@triton.jit
def _swiglu_backward_kernel(
    hidden,
    weights,
    slots,
    grad,
    grad_rows,
    grad_columns,
    act_columns,
    dots,
    grad_bound,
    act_bound,
    grad_amax,
    ends,
    width,
    num_rows,
    GRAD_LIMIT: tl.constexpr,
    ACT_LIMIT: tl.constexpr,
    LAST: tl.constexpr,
    WRITE: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_C: tl.constexpr,
):
    """Tiles divide the rows and the width."""
    first = tl.program_id(0) * TILE_R
    if first >= tl.load(ends + LAST):
        return
    row = (first + tl.arange(0, TILE_R)).to(tl.int64)
    column = tl.program_id(1) * TILE_C + tl.arange(0, TILE_C)
    slot = tl.load(slots + row)
    real = (slot >= 0)[:, None] & (column < width)[None, :]  # padding gives zeros
    weight = tl.load(weights + slot, mask=slot >= 0, other=0.0).to(tl.float32)[:, None]
    at = row[:, None] * (2 * width) + column[None, :]
    gate = tl.load(hidden + at, mask=real, other=0.0).to(tl.float32)
    up = tl.load(hidden + width + at, mask=real, other=0.0).to(tl.float32)
    incoming = tl.load(grad + row[:, None] * width + column[None, :], mask=real, other=0.0).to(tl.float32)
    grad_gate, grad_up, act = swiglu_gradients(gate, up, incoming * weight)
    most = tl.maximum(tl.abs(grad_gate), tl.abs(grad_up))
    tl.atomic_max(grad_amax, tl.max(tl.max(most, 1), 0))
    if WRITE:
        tl.store(dots + tl.program_id(1).to(tl.int64) * num_rows + row, tl.sum(incoming * act, 1))
        scale = _scale(tl.load(grad_bound), GRAD_LIMIT)
        tl.store(grad_rows + at, _eight_bits(grad_gate, scale, GRAD_LIMIT, grad_rows))
        tl.store(grad_rows + width + at, _eight_bits(grad_up, scale, GRAD_LIMIT, grad_rows))
        # Rounded anew for the columns, with a scale that the compiler can't know to be the same: where one rounded pair
        # is both packed into a word and split into bytes, ptxas 12.8 for sm_90 splits it before it is there.
        again = _scale(tl.load(grad_bound, volatile=True), GRAD_LIMIT)
        turned = column.to(tl.int64)[None, :] * num_rows + row[:, None]
        tl.store(grad_columns + turned, _eight_bits(grad_gate, again, GRAD_LIMIT, grad_columns))
        up_columns = grad_columns + tl.cast(width, tl.int64) * num_rows
        tl.store(up_columns + turned, _eight_bits(grad_up, again, GRAD_LIMIT, grad_columns))
        act_bits = _eight_bits(act * weight, _scale(tl.load(act_bound), ACT_LIMIT), ACT_LIMIT, act_columns)
        tl.store(act_columns + turned, act_bits)


def largest(dtype: torch.dtype) -> float:
    """Give a format's largest number."""
    return torch.finfo(dtype).max


def amax(x_GTD: Tensor, out_G: Tensor) -> None:
    """Raise each number of `out_G`, fp32, to the largest absolute value of a matrix; one whose rows lie apart is copied."""
    x_GTD = x_GTD.contiguous()
    count = x_GTD[0].numel()
    if count:
        grid = (triton.cdiv(count, AMAX_BLOCK * AMAX_BLOCKS), x_GTD.shape[0])
        _amax_kernel[grid](x_GTD, out_G, count, AMAX_BLOCK, AMAX_BLOCKS, num_warps=8)


def quantise(
    x_GTD: Tensor,
    bounds_G: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    amax_G: Tensor | None = None,
) -> None:
    """Bring matrices to 8 bits, saturating.

    Args:
        x_GTD: [G, T, D], the last dim contiguous.
        bounds_G: [G] fp32.
        rows: [G, P, D] in an 8-bit format, the last dim contiguous; rows from T to P become zero. None: not wanted.
        columns: [G, D, P] likewise.
        amax_G: [G] fp32, raised to the largest absolute values.
    """
    num_groups, num_rows, num_columns = x_GTD.shape
    out = rows if rows is not None else columns
    assert out is not None
    padded = rows.shape[1] if rows is not None else out.shape[2]
    if not padded:
        return
    grid = (triton.cdiv(padded, TILE_ROWS), triton.cdiv(num_columns, TILE_COLUMNS), num_groups)
    args = (x_GTD, out if rows is None else rows, out if columns is None else columns, bounds_G)
    pitches = [0 if t is None else t.stride(dim) for t in (x_GTD, rows, columns) for dim in (0, 1)]
    sizes = (bounds_G if amax_G is None else amax_G, num_rows, num_columns, padded, *pitches)
    kinds = (largest(out.dtype), rows is not None, columns is not None, amax_G is not None)
    _quantise_kernel[grid](*args, *sizes, *kinds, TILE_ROWS, TILE_COLUMNS, num_warps=8)


def gather_columns(x_TD: Tensor, slot_of_row_R: Tensor, offsets_E: Tensor, topk: int) -> Tensor:
    """Transposed rows in expert order.

    Args:
        x_TD: [T, D] 8-bit tokens, contiguous.
        slot_of_row_R: [R] int32 slot of each row, -1 for padding.
        offsets_E: [E] int32 ends of the experts' rows.
        topk: choices of a token.

    Returns:
        [D, R]; padding is zero, columns past the last expert are unwritten.
    """
    num_columns, num_rows = x_TD.shape[1], slot_of_row_R.shape[0]
    out = x_TD.new_empty(num_columns, num_rows)
    if out.numel():
        grid = (triton.cdiv(num_rows, TILE_ROWS), triton.cdiv(num_columns, TILE_COLUMNS))
        bytes_ = (x_TD.view(torch.uint8), out.view(torch.uint8))
        sizes = (num_columns, num_rows, offsets_E.shape[0] - 1, topk)
        _gather_columns_kernel[grid](*bytes_, slot_of_row_R, offsets_E, *sizes, TILE_ROWS, TILE_COLUMNS, num_warps=8)
    return out


def swiglu(hidden_R2F: Tensor, weights_TK: Tensor, slot_of_row_R: Tensor, offsets_E: Tensor, bound: Tensor) -> Tensor:
    """silu(gate) * up * weight in e4m3.

    Args:
        hidden_R2F: [R, 2F] contiguous, gate then up.
        weights_TK: [T, K] contiguous routing weights.
        slot_of_row_R: [R] int32 which weight each row takes, -1 for padding.
        offsets_E: [E] int32 ends of the experts' rows; rows past the last stay unwritten.
        bound: [1] fp32.

    Returns:
        [R, F].
    """
    num_rows, width = hidden_R2F.shape[0], hidden_R2F.shape[1] // 2
    out = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=hidden_R2F.device)
    if num_rows:
        block = min(4096, int(triton.next_power_of_2(width)))
        args = (hidden_R2F, weights_TK, slot_of_row_R, out, bound, offsets_E, width)
        _swiglu_kernel[(num_rows, triton.cdiv(width, block))](*args, largest(out.dtype), offsets_E.shape[0] - 1, block)
    return out


def swiglu_backward(
    hidden_R2F: Tensor,
    weights_TK: Tensor,
    grad_RF: Tensor,
    slot_of_row_R: Tensor,
    offsets_E: Tensor,
    bounds: tuple[Tensor, Tensor] | None,
    grad_dtype: torch.dtype,
    grad_amax: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Gradients of SwiGLU in 8 bits in both layouts, and its output transposed.

    Args:
        hidden_R2F: [R, 2F] contiguous; R a multiple of 128, F too.
        weights_TK: [T, K] contiguous routing weights.
        grad_RF: [R, F] contiguous gradient of the output.
        slot_of_row_R: [R] int32 which weight each row takes, -1 for padding.
        offsets_E: [E] int32 ends of the experts' rows; what is past the last stays unwritten.
        bounds: [1] of the gradient of hidden and of the output; None: only `grad_amax` is wanted.
        grad_dtype: format of the gradient.
        grad_amax: [1] fp32, raised to the largest absolute value of the gradient of hidden.

    Returns:
        The gradient of hidden [R, 2F] and transposed [2F, R], the output transposed [F, R] in e4m3, and [R] dot products
        of gradient and output before the weight, undefined for padding. None without bounds.
    """
    num_rows, width = grad_RF.shape
    device, act_dtype = grad_RF.device, torch.float8_e4m3fn
    grid = (triton.cdiv(num_rows, GATE_ROWS), triton.cdiv(width, GATE_COLUMNS))
    sizes = (width, num_rows, largest(grad_dtype), largest(act_dtype), offsets_E.shape[0] - 1)
    tile = (GATE_ROWS, GATE_COLUMNS)
    inputs = (hidden_R2F, weights_TK, slot_of_row_R, grad_RF)
    if bounds is None:
        unused = (grad_amax,) * 6
        if num_rows:
            _swiglu_backward_kernel[grid](
                *inputs, *unused, grad_amax, offsets_E, *sizes, False, *tile, num_warps=GATE_WARPS
            )
        return None
    rows = torch.empty(num_rows, 2 * width, dtype=grad_dtype, device=device)
    columns = torch.empty(2 * width, num_rows, dtype=grad_dtype, device=device)
    act = torch.empty(width, num_rows, dtype=act_dtype, device=device)
    dots = torch.empty(grid[1], num_rows, dtype=torch.float32, device=device)
    if num_rows:
        outs = (rows, columns, act, dots, *bounds)
        _swiglu_backward_kernel[grid](*inputs, *outs, grad_amax, offsets_E, *sizes, True, *tile, num_warps=GATE_WARPS)
    return rows, columns, act, dots.sum(0)
