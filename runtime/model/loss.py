"""Cross entropy over a vocabulary that ranks share.

Legend: S positions, B sequences, T tokens (S * B), V rows of the vocabulary on this rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.data.batch import IGNORED_LABEL
from runtime.parallel.collectives import Group, group_size
from runtime.parallel.shards import wide_dtype

_CHUNK_ELEMENTS = 2**26


def _chunks(logits_TV: Tensor) -> list[slice]:
    """Ranges of tokens whose logits are widened at a time, so that fp32 copies of all logits never exist."""
    step = max(1, _CHUNK_ELEMENTS // max(1, logits_TV.shape[1]))
    return [slice(begin, begin + step) for begin in range(0, logits_TV.shape[0], step)]


def _widen(logits_TV: Tensor) -> Tensor:
    return logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits as they came and one number a token; the probabilities are computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, first: int, group: Group) -> Tensor:
        num_rows = logits_TV.shape[1]
        local_T = labels_T - first
        mine_T = (local_T >= 0) & (local_T < num_rows)
        index_T = torch.where(mine_T, local_T, 0)
        top_T = logits_TV.new_full(labels_T.shape, float("-inf"), dtype=wide_dtype(logits_TV.dtype))
        if num_rows:
            top_T = logits_TV.amax(-1).to(top_T.dtype)
        if group_size(group) > 1:
            dist.all_reduce(top_T, op=dist.ReduceOp.MAX, group=group)
        sums_2T = torch.zeros(2, *labels_T.shape, dtype=top_T.dtype, device=top_T.device)
        for chunk in _chunks(logits_TV) if num_rows else ():
            wide = _widen(logits_TV[chunk])
            sums_2T[1, chunk] = wide.gather(1, index_T[chunk].unsqueeze(1)).squeeze(1).masked_fill(~mine_T[chunk], 0)
            sums_2T[0, chunk] = (wide - top_T[chunk].unsqueeze(1)).exp_().sum(1)
        if group_size(group) > 1:
            dist.all_reduce(sums_2T, group=group)
        lse_T = sums_2T[0].log() + top_T
        valid_T = labels_T != IGNORED_LABEL
        ctx.save_for_backward(logits_TV, lse_T, index_T, mine_T, valid_T)
        return torch.where(valid_T, lse_T - sums_2T[1], 0)

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None]:
        logits_TV, lse_T, index_T, mine_T, valid_T = ctx.saved_tensors
        grad_T = torch.where(valid_T, grad_T, 0)
        out_TV = torch.empty_like(logits_TV, memory_format=torch.contiguous_format)
        for chunk in _chunks(logits_TV) if logits_TV.shape[1] else ():
            probs = (_widen(logits_TV[chunk]) - lse_T[chunk].unsqueeze(1)).exp_()
            probs.scatter_add_(1, index_T[chunk].unsqueeze(1), -mine_T[chunk].to(probs.dtype).unsqueeze(1))
            out_TV[chunk] = probs.mul_(grad_T[chunk].unsqueeze(1))
        return out_TV, None, None, None


def cross_entropy(logits_SBV: Tensor, labels_SB: Tensor, first: int, group: Group) -> Tensor:
    """Cross entropy of each position, over a vocabulary that the ranks of a group share.

    Args:
        logits_SBV: [S, B, V] this rank's columns, any float dtype; V may be 0.
        labels_SB: [S, B] int64 global token ids; IGNORED_LABEL gives 0.
        first: global id of this rank's first column.
        group: the ranks that share the vocabulary; None for one.

    Returns:
        [S, B] nats in fp32 (fp64 for fp64), equal on every rank of the group.
    """
    args = (logits_SBV.flatten(0, 1), labels_SB.flatten(), first, group)
    return cast(Tensor, _CrossEntropy.apply(*args)).view_as(labels_SB)  # type: ignore[no-untyped-call]
