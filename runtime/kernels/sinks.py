"""Sinks of attention: a logit of each head that takes a share of the attention and gives nothing.

Legend: S positions, B sequences, H heads, V dim of values. Floor, at memory bandwidth: the attention's output read and written
once forward, its gradient and itself read once backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements
PROGRAMS = 512  # that share the rows of a gradient


@triton.jit
def _forward_kernel(
    out, log_sum, sinks, sequences, out_s, out_b, out_h, sum_s, sum_b, sum_h,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position, sequence = row // sequences, row % sequences
    column = tl.arange(0, BLOCK_V)[None, :]
    for first in tl.static_range(0, HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)
        known = head < HEADS
        at_sum = log_sum + position * sum_s + sequence * sum_b + head * sum_h
        own = tl.load(at_sum, mask=known, other=0.0)
        sink = tl.load(sinks + head, mask=known, other=0.0).to(tl.float32)
        larger = tl.maximum(own, sink)
        total = larger + tl.log(tl.exp(own - larger) + tl.exp(sink - larger))
        tl.store(at_sum, total, mask=known)
        at = out + position * out_s + sequence * out_b + head[:, None] * out_h + column
        inside = known[:, None] & (column < WIDTH)
        scaled = tl.load(at, mask=inside, other=0.0).to(tl.float32) * tl.exp(own - total)[:, None]
        tl.store(at, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad, out, log_sum, sinks, partial, rows, sequences, grad_s, grad_b, grad_h, out_s, out_b, out_h, sum_s, sum_b, sum_h,
    STEPS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_V)[None, :]
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    known = head < HEADS
    inside = known[:, None] & (column < WIDTH)
    sink = tl.load(sinks + head, mask=known, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for step in range(STEPS):
        row = first + step * tl.num_programs(0)
        position, sequence = row // sequences, row % sequences
        here = inside & (row < rows)
        at_grad = grad + position * grad_s + sequence * grad_b + head[:, None] * grad_h + column
        at_out = out + position * out_s + sequence * out_b + head[:, None] * out_h + column
        found = tl.load(at_grad, mask=here, other=0.0).to(tl.float32)
        found *= tl.load(at_out, mask=here, other=0.0).to(tl.float32)
        at_sum = log_sum + position * sum_s + sequence * sum_b + head * sum_h
        share = tl.exp(sink - tl.load(at_sum, mask=known & (row < rows), other=0.0))
        total -= share * tl.sum(found, 1)
    tl.store(partial + tl.program_id(0) * HEADS + head, total, mask=known)


def _blocks(heads: int, width: int) -> tuple[int, int]:
    block_v = int(triton.next_power_of_2(width))
    return min(max(1, TILE // block_v), int(triton.next_power_of_2(heads))), block_v


def add_sinks(out_SBHV: Tensor, log_sum_SBH: Tensor, sinks_H: Tensor) -> None:
    """Give the sinks their share, in place.

    Args:
        out_SBHV: [S, B, H, V] attention, the elements of a head contiguous.
        log_sum_SBH: [S, B, H] fp32 logarithms of the sums of exponentials.
        sinks_H: [H] logits, contiguous.
    """
    positions, sequences, heads, width = out_SBHV.shape
    if positions * sequences:
        _forward_kernel[(positions * sequences,)](
            out_SBHV, log_sum_SBH, sinks_H, sequences, *out_SBHV.stride()[:3], *log_sum_SBH.stride(),
            heads, width, *_blocks(heads, width), num_warps=4,
        )  # fmt: skip


def sinks_gradient(grad_SBHV: Tensor, out_SBHV: Tensor, log_sum_SBH: Tensor, sinks_H: Tensor) -> Tensor:
    """Give the gradient of the sinks, summed in a fixed order.

    Args:
        grad_SBHV: [S, B, H, V], the elements of a head contiguous.
        out_SBHV: attention with sinks, likewise.
        log_sum_SBH: [S, B, H] fp32, the sinks' exponentials included.
        sinks_H: [H] logits, contiguous.

    Returns:
        [H] fp32.
    """
    positions, sequences, heads, width = out_SBHV.shape
    rows = positions * sequences
    block_h, block_v = _blocks(heads, width)
    programs = max(1, min(PROGRAMS, rows))
    partial = torch.empty(programs, heads, dtype=torch.float32, device=out_SBHV.device)
    _backward_kernel[(programs, triton.cdiv(heads, block_h))](
        grad_SBHV, out_SBHV, log_sum_SBH, sinks_H, partial, rows, sequences,
        *grad_SBHV.stride()[:3], *out_SBHV.stride()[:3], *log_sum_SBH.stride(),
        triton.cdiv(rows, programs), heads, width, block_h, block_v, num_warps=4,
    )  # fmt: skip
    return partial.sum(0)
