"""The memory-bound steps around the grouped GEMMs: in plain torch, or fused on a GPU.

Legend: T tokens, K choices per token, R rows in expert order, D hidden size, F width of an expert.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.moe.permutation import RowPlan


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_rows(x_TD: Tensor, plan: RowPlan, *, fused: bool) -> Tensor:
    """Copy each row's token.

    Args:
        x_TD: [T, D].
        plan: which token fills which row.
        fused: use the kernel on a GPU.

    Returns:
        [R, D] in the dtype of x.
    """
    if fused and x_TD.is_cuda:
        from runtime.kernels.permute import gather_rows as kernel

        return kernel(x_TD, plan.row_of_slot_TK, plan.slot_of_row_R, plan.offsets_E, plan.alignment)
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros(plan.num_rows, x_TD.shape[1])
    rows = x_TD.index_select(0, plan.slot_of_row_R.clamp(min=0) // plan.topk)
    return rows.masked_fill_((plan.slot_of_row_R < 0).unsqueeze(1), 0)


def sum_rows(rows_RD: Tensor, plan: RowPlan, *, fused: bool, pitch: int | None = None) -> Tensor:
    """Sum each token's rows in the order of its choices: the same bits in every run.

    Args:
        rows_RD: [R, D].
        plan: which rows belong to which token.
        fused: use the kernel on a GPU.
        pitch: elements from one row of the result to the next, with room between them; None: D.

    Returns:
        [T, D] in the dtype of the rows, summed in fp32 (fp64 for fp64).
    """
    num_tokens, width = plan.row_of_slot_TK.shape[0], rows_RD.shape[1]
    room = None if pitch is None or pitch <= width else rows_RD.new_empty(num_tokens, pitch)[:, :width]
    if fused and rows_RD.is_cuda:
        from runtime.kernels.permute import sum_rows as kernel

        return kernel(rows_RD, plan.row_of_slot_TK, out_TD=room)
    total = _sum_rows(rows_RD, plan)
    return total if room is None else room.copy_(total)


def _sum_rows(rows_RD: Tensor, plan: RowPlan) -> Tensor:
    num_tokens, topk = plan.row_of_slot_TK.shape
    total = rows_RD.new_zeros(num_tokens, rows_RD.shape[1], dtype=_accumulator(rows_RD.dtype))
    if rows_RD.shape[0] == 0:
        return total.to(rows_RD.dtype)
    for k in range(topk):
        index = plan.row_of_slot_TK[:, k]
        part = rows_RD.index_select(0, index.clamp(min=0)).to(total.dtype)
        # where, not a product: a dropped slot's stand-in row may hold anything
        total += torch.where((index >= 0).unsqueeze(1), part, 0)
    return total.to(rows_RD.dtype)


def slots_to_rows(values_TK: Tensor, plan: RowPlan) -> Tensor:
    """[R] the value of each row's slot, 0 for padding."""
    if values_TK.numel() == 0:
        return values_TK.new_zeros(plan.num_rows)
    values = values_TK.reshape(-1).index_select(0, plan.slot_of_row_R.clamp(min=0))
    return torch.where(plan.slot_of_row_R >= 0, values, 0)


def rows_to_slots(values_R: Tensor, plan: RowPlan) -> Tensor:
    """[T, K] the value of each slot's row, 0 where dropped."""
    index = plan.row_of_slot_TK
    if values_R.shape[0] == 0:
        return values_R.new_zeros(index.shape)
    values = values_R.index_select(0, index.clamp(min=0).reshape(-1)).view(index.shape)
    return torch.where(index >= 0, values, 0)


def swiglu(hidden_R2F: Tensor, weights_TK: Tensor, plan: RowPlan, *, fused: bool) -> Tensor:
    """silu(gate) * up * weight.

    Args:
        hidden_R2F: [R, 2F], gate in the first half, up in the second.
        weights_TK: [T, K] routing weights.
        plan: which row takes which weight.
        fused: use the kernel on a GPU.

    Returns:
        [R, F] in the dtype of hidden, computed in fp32 (fp64 for fp64).
    """
    if fused and hidden_R2F.is_cuda:
        from runtime.kernels.swiglu import swiglu_forward as kernel

        return kernel(hidden_R2F, weights_TK, plan.slot_of_row_R, plan.offsets_E)
    gate, up = hidden_R2F.to(_accumulator(hidden_R2F.dtype)).chunk(2, dim=1)
    weights = slots_to_rows(weights_TK, plan).to(gate.dtype).unsqueeze(1)
    return (F.silu(gate) * up * weights).to(hidden_R2F.dtype)


def swiglu_backward(
    hidden_R2F: Tensor, weights_TK: Tensor, grad_RF: Tensor, plan: RowPlan, *, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `swiglu`, with its output computed again.

    On a GPU the gradient of hidden replaces hidden, and the output replaces the incoming gradient: both buffers end
    here, and two fewer are alive at the peak.

    Args:
        hidden_R2F: [R, 2F] input of swiglu.
        weights_TK: [T, K] routing weights.
        grad_RF: [R, F] gradient of the output.
        plan: which row takes which weight.
        fused: use the kernel on a GPU.

    Returns:
        Gradient of hidden [R, 2F], of the weights [T, K] (in their dtype), and the output [R, F].
    """
    if fused and hidden_R2F.is_cuda:
        from runtime.kernels.swiglu import swiglu_backward as kernel

        return kernel(hidden_R2F, weights_TK, grad_RF, plan.slot_of_row_R, plan.offsets_E)
    gate, up = hidden_R2F.to(_accumulator(hidden_R2F.dtype)).chunk(2, dim=1)
    weights = slots_to_rows(weights_TK, plan).to(gate.dtype).unsqueeze(1)
    grad = grad_RF.to(gate.dtype)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    plain = silu * up
    grad_gate = grad * weights * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_up = grad * weights * silu
    grad_hidden = torch.cat([grad_gate, grad_up], dim=1).to(hidden_R2F.dtype)
    grad_weights = rows_to_slots((grad * plain).sum(1).to(weights_TK.dtype), plan)
    return grad_hidden, grad_weights, (plain * weights).to(hidden_R2F.dtype)


class _PermuteTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, plan: RowPlan, fused: bool) -> Tensor:
        ctx.plan, ctx.fused, ctx.pitch = plan, fused, x_TD.stride(0)
        return gather_rows(x_TD, plan, fused=fused)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        return sum_rows(grad_RD.contiguous(), ctx.plan, fused=ctx.fused, pitch=ctx.pitch), None, None


class _SwiGLURows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_R2F: Tensor, weights_TK: Tensor, plan: RowPlan, fused: bool) -> Tensor:
        ctx.save_for_backward(hidden_R2F, weights_TK)
        ctx.plan, ctx.fused = plan, fused
        return swiglu(hidden_R2F, weights_TK, plan, fused=fused)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weights = ctx.saved_tensors
        # Copies: autograd may still want both tensors, and the kernel writes over what it is given.
        args = (hidden.clone(), weights, grad_RF.clone(), ctx.plan)
        grad_hidden, grad_weights, _ = swiglu_backward(*args, fused=ctx.fused)
        return grad_hidden, grad_weights, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, plan: RowPlan, fused: bool) -> Tensor:
        ctx.plan, ctx.fused, ctx.num_rows = plan, fused, rows_RD.shape[0]
        return sum_rows(rows_RD, plan, fused=fused)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        # The plan may have rows at its end that no choice fills, and the input may lack them.
        return gather_rows(grad_TD.contiguous(), ctx.plan, fused=ctx.fused)[: ctx.num_rows], None, None


def unpermute(rows_RD: Tensor, plan: RowPlan, *, fused: bool) -> Tensor:
    """Sum of each token's rows, differentiable; see `sum_rows`."""
    return cast(Tensor, _Unpermute.apply(rows_RD, plan, fused))  # type: ignore[no-untyped-call]


def permute_tokens(x_TD: Tensor, plan: RowPlan, *, fused: bool) -> Tensor:
    """Rows in expert order, differentiable; see `gather_rows`."""
    return cast(Tensor, _PermuteTokens.apply(x_TD, plan, fused))  # type: ignore[no-untyped-call]


def swiglu_rows(hidden_R2F: Tensor, weights_TK: Tensor, plan: RowPlan, *, fused: bool) -> Tensor:
    """Weighted SwiGLU of the rows, differentiable; see `swiglu`."""
    return cast(Tensor, _SwiGLURows.apply(hidden_R2F, weights_TK, plan, fused))  # type: ignore[no-untyped-call]
