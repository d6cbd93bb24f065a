"""Rows with their routing weights behind them, so that both travel in one exchange.

A row of D elements is followed by TAIL more, of which the first bytes are its weight. The passes that fill and sum rows
anyway write and read them: there is no further pass over the rows.

Legend: T tokens, K choices per token, R rows, D hidden size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from runtime.moe import passes
from runtime.moe.permutation import RowPlan
from runtime.moe.tail import TAIL


def _weights(packed: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[R, N] the room behind the rows; a row's weight is the first."""
    return packed[:, width:].view(dtype)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, fused: bool) -> Tensor:
        width = x_TD.shape[1]
        ctx.plan, ctx.fused, ctx.width, ctx.dtype = plan, fused, width, weights_TK.dtype
        packed = x_TD.new_empty(plan.num_rows, width + TAIL)
        tails = _weights(packed, width, weights_TK.dtype)
        if fused and x_TD.is_cuda:
            from runtime.kernels.permute import Beside, gather_rows

            args = (x_TD, plan.row_of_slot_TK, plan.slot_of_row_R, plan.offsets_E, plan.alignment)
            gather_rows(*args, out_RD=packed[:, :width], beside=Beside(weights_TK.contiguous(), tails))
            return packed
        packed[:, :width] = passes.gather_rows(x_TD, plan, fused=False)
        tails.zero_()
        tails[:, 0] = passes.slots_to_rows(weights_TK, plan)
        return packed

    @staticmethod
    def backward(ctx: Any, grad_packed: Tensor) -> tuple[Tensor, Tensor, None, None]:
        plan, width = ctx.plan, ctx.width
        rows, tails = grad_packed[:, :width], _weights(grad_packed, width, ctx.dtype)
        if ctx.fused and rows.is_cuda:
            from runtime.kernels.permute import Beside, sum_rows

            weights = tails.new_empty(plan.row_of_slot_TK.shape)
            return sum_rows(rows, plan.row_of_slot_TK, beside=Beside(weights, tails)), weights, None, None
        grad = passes.sum_rows(rows, plan, fused=False)
        return grad, passes.rows_to_slots(tails[:, 0], plan), None, None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.width, ctx.dtype = packed.shape[1] - TAIL, dtype
        return packed[:, : ctx.width], _weights(packed, ctx.width, dtype)[:, 0].contiguous()

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor) -> tuple[Tensor, None]:
        packed = with_room(grad_rows)
        tails = _weights(packed, ctx.width, ctx.dtype)
        if not packed.is_cuda:
            tails.zero_()  # for anomaly detection; nobody reads it
        tails[:, 0] = grad_weights
        return packed, None


def with_room(rows_RD: Tensor, tail: int = TAIL) -> Tensor:
    """The rows with the room behind them; where there is none they move.

    Args:
        rows_RD: [R, D].
        tail: elements of the room behind a row.

    Returns:
        [R, D + tail].
    """
    num_rows, width = rows_RD.shape
    pitch = width + tail
    begins = rows_RD.storage_offset() == 0 and rows_RD.stride() == (pitch, 1)
    if begins and rows_RD.untyped_storage().nbytes() >= num_rows * pitch * rows_RD.element_size():
        return rows_RD.as_strided((num_rows, pitch), (pitch, 1))
    packed = rows_RD.new_empty(num_rows, pitch)
    packed[:, :width] = rows_RD
    return packed


def pack(x_TD: Tensor, weights_TK: Tensor, plan: RowPlan, *, fused: bool) -> Tensor:
    """Rows in expert order with their weights behind them, differentiable in both.

    Args:
        x_TD: [T, D] tokens.
        weights_TK: [T, K] routing weights, of at most 32 bytes each.
        plan: the order.
        fused: use the kernels on a GPU.

    Returns:
        [R, D + TAIL].
    """
    return cast(Tensor, _Pack.apply(x_TD, weights_TK, plan, fused))  # type: ignore[no-untyped-call]


def unpack(packed: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows and weights out of what `pack` made.

    Args:
        packed: [R, D + TAIL].
        dtype: of the weights.

    Returns:
        [R, D], a view whose rows lie apart, and [R]. Where the gradient of the rows has their pitch, it isn't copied.
    """
    return cast("tuple[Tensor, Tensor]", _Unpack.apply(packed, dtype))  # type: ignore[no-untyped-call]
