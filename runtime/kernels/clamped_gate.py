"""The clamped gated activation with bias and routing weight, forward and backward, over rows in expert order.

Legend: R rows, E experts, F width of an expert; gate and up columns are in turns. Floor, at memory bandwidth: 3 F elements
a row forward, 6 F backward. A program has several rows of one expert where rows are aligned to that, of which the next are on
their way while one is computed; backward it sums their gradients for the biases' on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from runtime.kernels.swiglu import accumulator

MAX_BLOCK = 1024
FORWARD_ROWS, ROWS = 8, 32
AHEAD = tl.constexpr(3)
"""Rows whose values are on their way or in use at once."""


@triton.jit
def _load_pairs(hidden, bias, columns, inside, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Gate and up with their biases, which are loaded, before they are clamped."""
    value = tl.load(hidden + columns, mask=inside, other=0.0).to(ACC) + bias
    return tl.split(tl.reshape(value, (BLOCK, 2)))


@triton.jit
def _forward_kernel(
    hidden,
    biases,
    experts,
    weights,
    slots,
    out,
    ends,
    alpha,
    limit,
    WIDTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    if first >= tl.load(ends + NUM_EXPERTS - 1):
        return
    start = tl.program_id(1) * BLOCK
    pairs = 2 * start + tl.arange(0, 2 * BLOCK)
    columns = start + tl.arange(0, BLOCK)
    bias = biases + tl.load(experts + first).to(tl.int64) * (2 * WIDTH)
    inside = pairs < 2 * WIDTH
    beside = tl.load(bias + pairs, mask=inside, other=0.0).to(ACC)
    for place in tl.range(ROWS, num_stages=AHEAD):
        row = (first + place).to(tl.int64)
        gate, up = _load_pairs(hidden + row * (2 * WIDTH), beside, pairs, inside, BLOCK, ACC)
        slot = tl.load(slots + row)
        weight = tl.load(weights + slot, mask=slot >= 0, other=0.0).to(ACC)
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        act = (up + 1.0) * gate / (1.0 + tl.exp(-alpha * gate)) * weight
        tl.store(out + row * WIDTH + columns, act.to(out.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def _backward_kernel(
    hidden,
    biases,
    experts,
    weights,
    slots,
    grad,
    grad_weights,
    sums,
    ends,
    alpha,
    limit,
    WIDTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
    ACC: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    if first >= tl.load(ends + NUM_EXPERTS - 1):
        return
    bias = biases + tl.load(experts + first).to(tl.int64) * (2 * WIDTH)
    places = tl.arange(0, ROWS)
    dots = tl.zeros((ROWS,), dtype=ACC)
    for start in range(0, WIDTH, BLOCK):
        pairs = 2 * start + tl.arange(0, 2 * BLOCK)
        columns = start + tl.arange(0, BLOCK)
        inside, inside_pairs = columns < WIDTH, pairs < 2 * WIDTH
        beside = tl.load(bias + pairs, mask=inside_pairs, other=0.0).to(ACC)
        total = tl.zeros((2 * BLOCK,), dtype=ACC)
        for place in tl.range(ROWS, num_stages=AHEAD):
            row = (first + place).to(tl.int64)
            base, grad_base = hidden + row * (2 * WIDTH), grad + row * WIDTH
            slot = tl.load(slots + row)
            weight = tl.load(weights + slot, mask=slot >= 0, other=0.0).to(ACC)
            gate, up = _load_pairs(base, beside, pairs, inside_pairs, BLOCK, ACC)
            incoming = tl.load(grad_base + columns, mask=inside, other=0.0).to(ACC)
            bounded = tl.minimum(gate, limit)
            linear = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
            sigmoid = 1.0 / (1.0 + tl.exp(-alpha * bounded))
            act = linear * bounded * sigmoid
            dots += tl.where(places == place, tl.sum(incoming * act, 0), 0.0)
            scaled = incoming * weight
            grad_gate = scaled * linear * sigmoid * (1.0 + alpha * bounded * (1.0 - sigmoid))
            grad_gate = tl.where(gate <= limit, grad_gate, 0.0)
            grad_up = tl.where((up >= -limit) & (up <= limit), scaled * bounded * sigmoid, 0.0)
            both = tl.reshape(tl.join(grad_gate, grad_up), (2 * BLOCK,))
            total += both
            # In place: a block is read before any of it is written, and no other program reads it.
            tl.store(base + pairs, both.to(hidden.dtype.element_ty), mask=inside_pairs)
            tl.store(grad_base + columns, (act * weight).to(grad.dtype.element_ty), mask=inside)
        if SUMS:
            tl.store(sums + tl.program_id(0).to(tl.int64) * (2 * WIDTH) + pairs, total, mask=inside_pairs)
    slot = tl.load(slots + first + places)
    tl.store(grad_weights + slot, dots.to(grad_weights.dtype.element_ty), mask=slot >= 0)


@triton.jit
def _sum_kernel(
    sums, ends, out, width, ROWS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """Sum what the programs of an expert's rows found, in their order."""
    expert = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0) // ROWS
    end = tl.load(ends + expert) // ROWS
    total = tl.zeros((AT_ONCE, BLOCK), dtype=ACC)
    while first < end:
        places = first + tl.arange(0, AT_ONCE)[:, None]
        inside = (places < end) & (columns < width)
        total += tl.load(sums + places.to(tl.int64) * width + columns, mask=inside, other=0.0)
        first += AT_ONCE
    result = tl.sum(total, 0)[None, :].to(out.dtype.element_ty)
    tl.store(out + expert.to(tl.int64) * width + columns, result, mask=columns < width)


def clamped_gate_forward(
    hidden_R2F: Tensor,
    bias_E2F: Tensor,
    expert_R: Tensor,
    weights_TK: Tensor,
    slot_of_row_R: Tensor,
    offsets_E: Tensor,
    alpha: float,
    limit: float,
    *,
    alignment: int = 1,
) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate) * weight of what is biased and clamped, in fp32 (fp64 for fp64).

    Args:
        hidden_R2F: [R, 2F] contiguous, gate and up in turns, without their biases.
        bias_E2F: [E, 2F] contiguous.
        expert_R: [R] int32 or int64 the expert of each row.
        weights_TK: [T, K] contiguous routing weights.
        slot_of_row_R: [R] int32 which weight each row takes, -1 for padding.
        offsets_E: [E] int32 ends of the experts' rows; rows past the last stay unwritten.
        alpha: steepness.
        limit: bound of gate from above, and of up from both sides.
        alignment: each expert's rows start at a multiple of it.

    Returns:
        [R, F].
    """
    num_rows, width = hidden_R2F.shape[0], hidden_R2F.shape[1] // 2
    out = hidden_R2F.new_empty(num_rows, width)
    if num_rows:
        rows, block = _rows(FORWARD_ROWS, num_rows, alignment), min(MAX_BLOCK, triton.next_power_of_2(width))
        grid = (num_rows // rows, triton.cdiv(width, block))
        args = (hidden_R2F, bias_E2F, expert_R, weights_TK, slot_of_row_R, out, offsets_E, alpha, limit)
        _forward_kernel[grid](*args, width, offsets_E.shape[0], rows, block, accumulator(hidden_R2F.dtype))
    return out


def _rows(most: int, num_rows: int, alignment: int) -> int:
    """Rows of a program: all of one expert."""
    return most if alignment % most == 0 and num_rows % most == 0 else 1


def clamped_gate_backward(
    hidden_R2F: Tensor,
    bias_E2F: Tensor,
    expert_R: Tensor,
    weights_TK: Tensor,
    grad_RF: Tensor,
    slot_of_row_R: Tensor,
    offsets_E: Tensor,
    alpha: float,
    limit: float,
    *,
    alignment: int = 1,
    sum_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `clamped_gate_forward` and its output, written over `hidden_R2F` and `grad_RF`.

    Args:
        hidden_R2F: [R, 2F] contiguous; becomes its gradient, which is the biases' too before it is summed.
        bias_E2F: [E, 2F] contiguous.
        expert_R: [R] the expert of each row.
        weights_TK: [T, K] contiguous routing weights.
        grad_RF: [R, F] contiguous gradient of the output; becomes the output.
        slot_of_row_R: [R] int32 which weight each row takes, -1 for padding.
        offsets_E: [E] int32 ends of the experts' rows; rows past the last stay untouched.
        alpha: steepness.
        limit: bound.
        alignment: each expert's rows start at a multiple of it.
        sum_bias: sum the biases' gradient, where rows are aligned to ROWS.

    Returns:
        Gradient of hidden, gradient of the weights [T, K] (0 where dropped), the output, and the biases' gradient [E, 2F] in the
        dtype of hidden; None: it has not been summed.
    """
    num_rows, width = grad_RF.shape
    num_experts, acc = offsets_E.shape[0], accumulator(hidden_R2F.dtype)
    grad_weights = torch.zeros_like(weights_TK)
    rows = _rows(ROWS, num_rows, alignment)
    summed = sum_bias and rows == ROWS
    wide = torch.float64 if hidden_R2F.dtype == torch.float64 else torch.float32
    sums = hidden_R2F.new_empty(num_rows // rows if summed else 0, 2 * width, dtype=wide)
    if num_rows:
        block = min(MAX_BLOCK, triton.next_power_of_2(width))
        args = (hidden_R2F, bias_E2F, expert_R, weights_TK, slot_of_row_R, grad_RF, grad_weights, sums, offsets_E)
        sizes = (width, num_experts, rows, block, summed, acc)
        _backward_kernel[(num_rows // rows,)](*args, alpha, limit, *sizes, num_warps=max(1, min(8, block // 128)))
        # Whoever still holds the pre-activations for another backward pass must get an error, not our gradient.
        torch.autograd.graph.increment_version(hidden_R2F)
    grad_bias = None
    if summed:
        grad_bias = hidden_R2F.new_empty(num_experts, 2 * width)
        block = min(128, triton.next_power_of_2(2 * width))
        grid = (num_experts, triton.cdiv(2 * width, block))
        _sum_kernel[grid](sums, offsets_E, grad_bias, 2 * width, ROWS, ROWS, block, acc)
    return hidden_R2F, grad_weights, grad_RF, grad_bias
