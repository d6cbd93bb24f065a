"""Root-mean-square norm over the last dim, with the residual's sum before it, forward and backward.

Legend: R rows (tokens, or tokens times heads), D width of a row. Floor, at memory bandwidth: 2 R D elements forward, 3
backward, and 2 and 1 more with a residual.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a tile of short rows; a longer row is a tile of its own, held in registers
PROGRAMS_PER_PROCESSOR = 4


@triton.jit
def _forward_kernel(
    x,
    delta,
    weight,
    out,
    total,
    rstd,
    num_rows,
    inner,
    outer_stride,
    inner_stride,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    at = (row // inner * outer_stride + row % inner * inner_stride)[:, None] + column[None, :]
    dense = row[:, None] * WIDTH + column[None, :]
    values = tl.load(x + at, mask=inside, other=0.0)
    if ADD:
        sums = values.to(ACC) + tl.load(delta + dense, mask=inside, other=0.0).to(ACC)
        values = sums.to(total.dtype.element_ty)  # the norm is of what is kept
        tl.store(total + dense, values, mask=inside)
    wide = values.to(ACC)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    tl.store(rstd + row, scale, mask=row < num_rows)
    weights = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(ACC)
    tl.store(out + dense, (wide * scale[:, None] * weights[None, :]).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad,
    grad_total,
    x,
    weight,
    rstd,
    grad_x,
    grad_weights,
    num_rows,
    inner,
    outer_stride,
    inner_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    ACC: tl.constexpr,
):
    """Each program takes every so-many-th tile, and keeps its sum of the weight's gradient in registers."""
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    weights = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(ACC)
    sums = tl.zeros((ROWS, BLOCK), dtype=ACC)
    tile = program
    while tile * ROWS < num_rows:
        row = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
        at = (row // inner * outer_stride + row % inner * inner_stride)[:, None] + column[None, :]
        dense = row[:, None] * WIDTH + column[None, :]
        incoming = tl.load(grad + dense, mask=inside, other=0.0).to(ACC)
        scale = tl.load(rstd + row, mask=row < num_rows, other=0.0)[:, None]
        normed = tl.load(x + at, mask=inside, other=0.0).to(ACC) * scale
        sums += incoming * normed
        weighted = incoming * weights[None, :]
        mean = tl.sum(weighted * normed, 1) / WIDTH
        result = (weighted - normed * mean[:, None]) * scale
        if ADD:
            result += tl.load(grad_total + dense, mask=inside, other=0.0).to(ACC)
        tl.store(grad_x + dense, result.to(grad_x.dtype.element_ty), mask=inside)
        tile += num_programs
    tl.store(grad_weights + program.to(tl.int64) * WIDTH + column, tl.sum(sums, 0), mask=column < WIDTH)


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    """Number of rows; how many lie `inner_stride` apart; the stride of such groups; `inner_stride`."""
    width = x.shape[-1]
    if x.is_contiguous():
        return x.numel() // width, max(1, x.numel() // width), 0, width
    grouped = x.view(-1, x.shape[-2], width)
    return x.numel() // width, x.shape[-2], grouped.stride(0), grouped.stride(1)


def _shape(width: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and its warps."""
    block = int(triton.next_power_of_2(width))
    rows = max(1, min(32, TILE // block))
    return rows, block, min(16, max(4, rows * block // 512))


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm_forward(x: Tensor, delta: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise x, or x + delta.

    Args:
        x: [..., D], rows contiguous, with at most the two dims before the last apart in memory.
        delta: contiguous, added to x first; None for nothing.
        weight_D: [D] factor.
        eps: added to the mean square.

    Returns:
        The norm, contiguous; the sum that was normalised (x itself without delta); [R] reciprocal root mean squares in
        fp32 (fp64 for fp64).
    """
    num_rows, inner, outer_stride, inner_stride = _rows(x)
    rows, block, warps = _shape(x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if delta is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(num_rows, dtype=_wide(x.dtype), device=x.device)
    if num_rows:
        args = (x, x if delta is None else delta, weight_D, out, total, rstd)
        sizes = (num_rows, inner, outer_stride, inner_stride, eps, x.shape[-1])
        shape = (rows, block, delta is not None, _accumulator(x.dtype))
        _forward_kernel[(triton.cdiv(num_rows, rows),)](*args, *sizes, *shape, num_warps=warps)
    return out, total, rstd


def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # the interpreter's
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


def rms_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight_D: Tensor, rstd_R: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `rms_norm_forward`.

    Args:
        grad: of the norm, contiguous, in the shape of x.
        grad_total: of the sum, contiguous; None where nothing else used it.
        x: what was normalised, as it was.
        weight_D: [D].
        rstd_R: [R] as the forward pass gave them.

    Returns:
        Gradient of x (and of delta), contiguous; [P, D] whose sum over P is the gradient of the weight, in fp32 (fp64 for
        fp64) and the same in every run.
    """
    num_rows, inner, outer_stride, inner_stride = _rows(x)
    rows, block, warps = _shape(x.shape[-1])
    width = x.shape[-1]
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not num_rows:
        return grad_x, torch.zeros(1, width, dtype=rstd_R.dtype, device=x.device)
    programs = min(_num_programs(x.device), triton.cdiv(num_rows, rows))
    sums = torch.empty(programs, width, dtype=rstd_R.dtype, device=x.device)
    args = (grad, grad if grad_total is None else grad_total, x, weight_D, rstd_R, grad_x, sums)
    sizes = (num_rows, inner, outer_stride, inner_stride, width)
    shape = (rows, block, grad_total is not None, _accumulator(x.dtype))
    _backward_kernel[(programs,)](*args, *sizes, *shape, num_warps=warps)
    return grad_x, sums
