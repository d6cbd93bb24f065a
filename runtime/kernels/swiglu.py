"""SwiGLU, forward and backward: with the routing weight over rows in expert order, and alone over every token's row.

Legend: R rows, F width of an expert or of a gated layer. Floor, at memory bandwidth: 3 F elements a row forward; backward 6 F
over experts' rows, where the output is made again, and 5 F alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 2048


@triton.jit
def swiglu_of(gate, up):
    """silu(gate) * up."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def swiglu_gradients(gate, up, grad):
    """The gradients of gate and up from that of silu(gate) * up, and that product."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    return grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), grad * silu, silu * up


@triton.jit
def _forward_kernel(
    hidden, weights, slots, out, ends, width, NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    row = tl.program_id(0)
    if row >= tl.load(ends + NUM_EXPERTS - 1):
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    base = hidden + row.to(tl.int64) * (2 * width)
    gate = tl.load(base + columns, mask=inside, other=0.0).to(ACC)
    up = tl.load(base + width + columns, mask=inside, other=0.0).to(ACC)
    slot = tl.load(slots + row)
    weight = tl.load(weights + slot, mask=slot >= 0, other=0.0).to(ACC)
    act = swiglu_of(gate, up) * weight
    tl.store(out + row.to(tl.int64) * width + columns, act.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    hidden,
    weights,
    slots,
    grad,
    grad_weights,
    ends,
    WIDTH: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0)
    if row >= tl.load(ends + NUM_EXPERTS - 1):
        return
    base = hidden + row.to(tl.int64) * (2 * WIDTH)
    grad_base = grad + row.to(tl.int64) * WIDTH
    slot = tl.load(slots + row)
    weight = tl.load(weights + slot, mask=slot >= 0, other=0.0).to(ACC)
    dot = tl.zeros((BLOCK,), dtype=ACC)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < WIDTH
        gate = tl.load(base + columns, mask=inside, other=0.0).to(ACC)
        up = tl.load(base + WIDTH + columns, mask=inside, other=0.0).to(ACC)
        incoming = tl.load(grad_base + columns, mask=inside, other=0.0).to(ACC)
        grad_gate, grad_up, act = swiglu_gradients(gate, up, incoming * weight)
        dot += incoming * act
        # In place: every element is read by the thread that writes it, before it does.
        tl.store(base + columns, grad_gate.to(hidden.dtype.element_ty), mask=inside)
        tl.store(base + WIDTH + columns, grad_up.to(hidden.dtype.element_ty), mask=inside)
        tl.store(grad_base + columns, (act * weight).to(grad.dtype.element_ty), mask=inside)
    tl.store(grad_weights + slot, tl.sum(dot, 0).to(grad_weights.dtype.element_ty), mask=slot >= 0)


@triton.jit
def _alone_forward_kernel(hidden, out, width, BLOCK: tl.constexpr, ACC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    base = hidden + row * (2 * width) + columns
    gate = tl.load(base, mask=inside, other=0.0).to(ACC)
    up = tl.load(base + width, mask=inside, other=0.0).to(ACC)
    act = swiglu_of(gate, up)
    tl.store(out + row * width + columns, act.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _alone_backward_kernel(hidden, grad, grad_hidden, width, BLOCK: tl.constexpr, ACC: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    place = row * (2 * width) + columns
    gate = tl.load(hidden + place, mask=inside, other=0.0).to(ACC)
    up = tl.load(hidden + width + place, mask=inside, other=0.0).to(ACC)
    incoming = tl.load(grad + row * width + columns, mask=inside, other=0.0).to(ACC)
    grad_gate, grad_up, _ = swiglu_gradients(gate, up, incoming)
    tl.store(grad_hidden + place, grad_gate.to(grad_hidden.dtype.element_ty), mask=inside)
    tl.store(grad_hidden + width + place, grad_up.to(grad_hidden.dtype.element_ty), mask=inside)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """What is computed in: fp64 for fp64, else fp32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _tiles(num_rows: int, width: int) -> tuple[tuple[int, int], int]:
    """The programs, one for each row and some of its columns, and how many columns."""
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    return (num_rows, triton.cdiv(width, block)), block


def swiglu_forward(hidden_R2F: Tensor, weights_TK: Tensor, slot_of_row_R: Tensor, offsets_E: Tensor) -> Tensor:
    """silu(gate) * up * weight, computed in fp32 (fp64 for fp64).

    Args:
        hidden_R2F: [R, 2F] contiguous, gate then up.
        weights_TK: [T, K] contiguous routing weights.
        slot_of_row_R: [R] int32 which weight each row takes, -1 for padding.
        offsets_E: [E] int32 ends of the experts' rows; rows past the last stay unwritten.

    Returns:
        [R, F].
    """
    num_rows, width = hidden_R2F.shape[0], hidden_R2F.shape[1] // 2
    out = hidden_R2F.new_empty(num_rows, width)
    if num_rows:
        grid, block = _tiles(num_rows, width)
        args = (hidden_R2F, weights_TK, slot_of_row_R, out, offsets_E, width, offsets_E.shape[0])
        _forward_kernel[grid](*args, block, accumulator(hidden_R2F.dtype))
    return out


def swiglu_backward(
    hidden_R2F: Tensor, weights_TK: Tensor, grad_RF: Tensor, slot_of_row_R: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `swiglu_forward` and its output, written over `hidden_R2F` and `grad_RF`.

    Args:
        hidden_R2F: [R, 2F] contiguous; becomes its gradient.
        weights_TK: [T, K] contiguous routing weights.
        grad_RF: [R, F] contiguous gradient of the output; becomes the output.
        slot_of_row_R: [R] int32 which weight each row takes, -1 for padding.
        offsets_E: [E] int32 ends of the experts' rows; rows past the last stay untouched.

    Returns:
        Gradient of hidden, gradient of the weights [T, K] (0 where dropped), the output.
    """
    num_rows, width = grad_RF.shape
    grad_weights = torch.zeros_like(weights_TK)
    if num_rows:
        block = min(MAX_BLOCK, triton.next_power_of_2(width))
        args = (hidden_R2F, weights_TK, slot_of_row_R, grad_RF, grad_weights, offsets_E, width, offsets_E.shape[0])
        _backward_kernel[(num_rows,)](*args, block, accumulator(hidden_R2F.dtype))
        # Whoever still holds the pre-activations for another backward pass must get an error, not our gradient.
        torch.autograd.graph.increment_version(hidden_R2F)
    return hidden_R2F, grad_weights, grad_RF


def swiglu_alone_forward(hidden_R2F: Tensor) -> Tensor:
    """silu(gate) * up, computed in fp32 (fp64 for fp64).

    Args:
        hidden_R2F: [R, 2F] contiguous, gate then up.

    Returns:
        [R, F].
    """
    num_rows, width = hidden_R2F.shape[0], hidden_R2F.shape[1] // 2
    out = hidden_R2F.new_empty(num_rows, width)
    if num_rows:
        grid, block = _tiles(num_rows, width)
        _alone_forward_kernel[grid](hidden_R2F, out, width, block, accumulator(hidden_R2F.dtype))
    return out


def swiglu_alone_backward(hidden_R2F: Tensor, grad_RF: Tensor) -> Tensor:
    """The gradient of `swiglu_alone_forward`'s input.

    Args:
        hidden_R2F: [R, 2F] contiguous, the input.
        grad_RF: [R, F] contiguous gradient of the output.

    Returns:
        [R, 2F].
    """
    num_rows, width = grad_RF.shape
    grad_hidden = torch.empty_like(hidden_R2F)
    if num_rows:
        grid, block = _tiles(num_rows, width)
        _alone_backward_kernel[grid](hidden_R2F, grad_RF, grad_hidden, width, block, accumulator(hidden_R2F.dtype))
    return grad_hidden
