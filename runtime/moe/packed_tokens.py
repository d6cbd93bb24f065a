"""Tokens that go to a rank once, with all their choices of its experts behind them.

A row of D elements is followed by K numbers of experts, int32, and their K weights: a choice of another rank's expert has
the number behind the last, and weight 0; so have all of a row without a token.

Legend: T tokens, K choices per token, R rows (a token for a rank), D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from runtime.moe import passes
from runtime.moe.packed import with_room
from runtime.moe.permutation import RowPlan
from runtime.moe.tail import TAIL


@dataclass(frozen=True, slots=True)
class Choices:
    """Of experts that lie on ranks, equally many on each."""

    experts_TK: Tensor
    """[T, K] int64; the number of all experts where dropped."""
    num_local: int
    """Experts of a rank."""


def _places(topk: int) -> int:
    """Bytes of the experts' numbers, so that weights of 8 bytes may follow."""
    return -(-4 * topk // 8) * 8


def tail_of(topk: int, dtype: torch.dtype, weights_dtype: torch.dtype) -> int:
    """Elements behind a row, a multiple of TAIL.

    Args:
        topk: K.
        dtype: of the rows.
        weights_dtype: of the weights.
    """
    elements = -(-(_places(topk) + topk * weights_dtype.itemsize) // dtype.itemsize)
    return -(-elements // TAIL) * TAIL


def _experts(tails: Tensor, topk: int) -> Tensor:
    return tails.view(torch.int32)[:, :topk]


def _weights(tails: Tensor, topk: int, dtype: torch.dtype) -> Tensor:
    first = _places(topk) // dtype.itemsize
    return tails.view(dtype)[:, first : first + topk]


def _rooms(tails: Tensor, topk: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The whole rooms of the experts' numbers and of the weights, which fill the tails together."""
    places = _places(topk)
    return tails.view(torch.int32)[:, : places // 4], tails.view(dtype)[:, places // dtype.itemsize :]


class _PackTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, choices: Choices, plan: RowPlan, fused: bool) -> Tensor:
        width, (_, topk) = x_TD.shape[1], weights_TK.shape
        ctx.plan, ctx.fused, ctx.width, ctx.dtype, ctx.choices = plan, fused, width, weights_TK.dtype, choices
        packed = x_TD.new_empty(plan.num_rows, width + tail_of(topk, x_TD.dtype, weights_TK.dtype))
        tails = packed[:, width:]
        if fused and x_TD.is_cuda:
            from runtime.kernels.permute import gather_rows
            from runtime.kernels.sent_tokens import write_tails

            args = (x_TD, plan.row_of_slot_TK, plan.slot_of_row_R, plan.offsets_E, plan.alignment)
            gather_rows(*args, out_RD=packed[:, :width])
            numbers, weights = _rooms(tails, topk, ctx.dtype)
            chosen = (choices.experts_TK.contiguous(), weights_TK.contiguous())
            write_tails(*chosen, plan.slot_of_row_R, choices.num_local, plan.topk, numbers, weights)
            return packed
        packed[:, :width] = passes.gather_rows(x_TD, plan, fused=False)
        tails.zero_()
        if x_TD.shape[0]:
            token_R, rank_R = plan.slot_of_row_R.clamp(min=0) // plan.topk, plan.slot_of_row_R % plan.topk
            experts_RK = choices.experts_TK.index_select(0, token_R)
            here_RK = (experts_RK // choices.num_local == rank_R.unsqueeze(1)) & (plan.slot_of_row_R >= 0).unsqueeze(1)
            _experts(tails, topk).copy_(torch.where(here_RK, experts_RK % choices.num_local, choices.num_local))
            _weights(tails, topk, ctx.dtype).copy_(torch.where(here_RK, weights_TK.index_select(0, token_R), 0))
        return packed

    @staticmethod
    def backward(ctx: Any, grad_packed: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        plan, choices, width = ctx.plan, ctx.choices, ctx.width
        experts_TK = choices.experts_TK
        grad_x = passes.sum_rows(grad_packed[:, :width], plan, fused=ctx.fused)
        if ctx.fused and grad_packed.is_cuda:
            from runtime.kernels.sent_tokens import find_choices

            weights = _rooms(grad_packed[:, width:], experts_TK.shape[1], ctx.dtype)[1]
            found = find_choices(experts_TK.contiguous(), plan.row_of_slot_TK, choices.num_local, weights)
            return grad_x, found, None, None, None
        grad_RK = _weights(grad_packed[:, width:], experts_TK.shape[1], ctx.dtype)
        if not experts_TK.numel():
            return grad_x, grad_RK.new_zeros(experts_TK.shape), None, None, None
        home_TK = experts_TK // choices.num_local
        row_TK = plan.row_of_slot_TK.gather(1, home_TK.clamp(max=plan.topk - 1))
        column_K = torch.arange(experts_TK.shape[1], device=experts_TK.device)
        found_TK = grad_RK[row_TK.clamp(min=0), column_K]
        return grad_x, torch.where((home_TK < plan.topk) & (row_TK >= 0), found_TK, 0), None, None, None


class _UnpackTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, topk: int, dtype: torch.dtype, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
        # The room is known by what fills it: the width by what is left.
        ctx.tail, ctx.topk, ctx.dtype = tail_of(topk, packed.dtype, dtype), topk, dtype
        width = packed.shape[1] - ctx.tail
        tails = packed[:, width:]
        numbers, weights = _experts(tails, topk), _weights(tails, topk, dtype)
        if fused and packed.is_cuda:
            from runtime.kernels.sent_tokens import read_tails

            experts, weights = read_tails(numbers, weights)
        else:
            experts, weights = numbers.long(), weights.contiguous()
        ctx.mark_non_differentiable(experts)
        return packed[:, :width], weights, experts

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        packed = with_room(grad_rows, ctx.tail)
        tails = packed[:, grad_rows.shape[1] :]
        if not packed.is_cuda:
            tails.zero_()  # for anomaly detection; nobody reads it
        _weights(tails, ctx.topk, ctx.dtype).copy_(grad_weights)
        return packed, None, None, None


def pack_tokens(x_TD: Tensor, weights_TK: Tensor, choices: Choices, plan: RowPlan, *, fused: bool) -> Tensor:
    """Tokens in the order of the ranks that they go to, with their choices behind them, differentiable in both.

    Args:
        x_TD: [T, D] tokens.
        weights_TK: [T, K] routing weights.
        choices: what they are the weights of.
        plan: of tokens and ranks: which row is which token for which rank.
        fused: use the kernels on a GPU.

    Returns:
        [R, D + tail].
    """
    return cast(Tensor, _PackTokens.apply(x_TD, weights_TK, choices, plan, fused))  # type: ignore[no-untyped-call]


def unpack_tokens(packed: Tensor, topk: int, dtype: torch.dtype, *, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, weights and experts out of what `pack_tokens` made.

    Args:
        packed: [R, D + tail].
        topk: K.
        dtype: of the weights.
        fused: use the kernel on a GPU.

    Returns:
        [R, D], a view whose rows lie apart; [R, K] weights; [R, K] int64 experts of this rank, the number behind the last for
        those of other ranks.
    """
    out = _UnpackTokens.apply(packed, topk, dtype, fused)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor, Tensor]", out)
