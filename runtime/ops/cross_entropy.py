"""Cross entropy over a vocabulary that the ranks of a group share, with the gradient written over the logits.

Legend: T tokens, V columns of this rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.parallel.collectives import Group, group_size

_CHUNK_ELEMENTS = 2**26


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(logits_TV: Tensor) -> list[slice]:
    """Ranges of tokens whose logits are widened at a time, so that fp32 copies of all logits never exist."""
    step = max(1, _CHUNK_ELEMENTS // max(1, logits_TV.shape[1]))
    return [slice(begin, begin + step) for begin in range(0, logits_TV.shape[0], step)]


def _plain_statistics(
    logits_TV: Tensor, labels_T: Tensor, first: int, num_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `runtime.kernels.cross_entropy.token_statistics`."""
    wide = _wide(logits_TV.dtype)
    top_T = logits_TV.new_full(labels_T.shape, float("-inf"), dtype=wide)
    total_T, chosen_T = torch.zeros_like(top_T), torch.zeros_like(top_T)
    if num_columns == 0 or labels_T.numel() == 0:
        return top_T, total_T, chosen_T
    logits = logits_TV[:, :num_columns]
    local_T = labels_T - first
    mine_T = (local_T >= 0) & (local_T < num_columns)
    index_T = torch.where(mine_T, local_T, 0)
    top_T = logits.amax(-1).to(wide)
    for chunk in _chunks(logits):
        values = logits[chunk].to(wide)
        chosen_T[chunk] = values.gather(1, index_T[chunk].unsqueeze(1)).squeeze(1).masked_fill(~mine_T[chunk], 0)
        total_T[chunk] = (values - top_T[chunk].unsqueeze(1)).exp_().sum(1)
    return top_T, total_T, chosen_T


def _plain_gradient(
    logits_TV: Tensor, labels_T: Tensor, lse_T: Tensor, grad_T: Tensor, first: int, num_columns: int
) -> Tensor:
    """As `runtime.kernels.cross_entropy.logits_to_gradient`, into fresh memory."""
    out_TV = torch.zeros_like(logits_TV, memory_format=torch.contiguous_format)
    local_T = labels_T - first
    mine_T = (local_T >= 0) & (local_T < num_columns)
    index_T = torch.where(mine_T, local_T, 0)
    for chunk in _chunks(logits_TV) if num_columns else ():
        probs = (logits_TV[chunk, :num_columns].to(lse_T.dtype) - lse_T[chunk].unsqueeze(1)).exp_()
        probs.scatter_add_(1, index_T[chunk].unsqueeze(1), -mine_T[chunk].to(probs.dtype).unsqueeze(1))
        grad = grad_T[chunk].unsqueeze(1)
        out_TV[chunk, :num_columns] = torch.where(grad != 0, probs.mul_(grad), 0).to(out_TV.dtype)
    return out_TV


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits as they came and one number a token; on a GPU the gradient takes the logits' place."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, labels_T: Tensor, first: int, num_columns: int, ignored: int, group: Group,
        fused: bool,
    ) -> Tensor:  # fmt: skip
        if fused:
            from runtime.kernels.cross_entropy import token_statistics as statistics
        else:
            statistics = _plain_statistics
        top_T, total_T, chosen_T = statistics(logits_TV, labels_T, first, num_columns)
        if group_size(group) > 1:
            highest_T = top_T.clone()
            dist.all_reduce(highest_T, op=dist.ReduceOp.MAX, group=group)
            sums_2T = torch.stack([total_T * (top_T - highest_T).exp(), chosen_T])
            dist.all_reduce(sums_2T, group=group)
            top_T, total_T, chosen_T = highest_T, *sums_2T.unbind(0)
        lse_T = total_T.log() + top_T
        ctx.save_for_backward(logits_TV, labels_T, lse_T)
        ctx.numbers, ctx.ignored, ctx.fused = (first, num_columns), ignored, fused
        return torch.where(labels_T != ignored, lse_T - chosen_T, 0)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, labels_T, lse_T = ctx.saved_tensors
        grad_T = torch.where(labels_T != ctx.ignored, grad_T, 0)
        gradient = _plain_gradient
        if ctx.fused:
            from runtime.kernels.cross_entropy import logits_to_gradient as gradient

            if torch._C._autograd._get_current_graph_task_keep_graph():
                logits_TV = logits_TV.clone()  # it is written over, and this node will run again
        return gradient(logits_TV, labels_T, lse_T, grad_T, *ctx.numbers), None, None, None, None, None, None


def cross_entropy(
    logits_SBV: Tensor,
    labels_SB: Tensor,
    first: int,
    group: Group,
    *,
    num_columns: int | None = None,
    ignored: int = -100,
    fused: bool | None = None,
) -> Tensor:
    """Cross entropy of each position, over a vocabulary that the ranks of a group share.

    Args:
        logits_SBV: [S, B, V] this rank's columns, any float dtype. On a GPU the backward pass writes their gradient in
            their place: nothing else may need them then.
        labels_SB: [S, B] int64 global token ids; `ignored` gives 0.
        first: global id of this rank's first column.
        group: the ranks that share the vocabulary; None for one.
        num_columns: columns that are of the vocabulary, may be 0; those after it are padding. None: all.
        ignored: the label of positions that don't count.
        fused: use the kernels; None: on a GPU.

    Returns:
        [S, B] nats in fp32 (fp64 for fp64), equal on every rank of the group.
    """
    if fused is None:
        fused = logits_SBV.is_cuda
    columns = logits_SBV.shape[-1] if num_columns is None else num_columns
    flat = logits_SBV.reshape(-1, logits_SBV.shape[-1])
    args = (flat, labels_SB.reshape(-1), first, columns, ignored, group, fused)
    return cast(Tensor, _CrossEntropy.apply(*args)).view_as(labels_SB)  # type: ignore[no-untyped-call]
