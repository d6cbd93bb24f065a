"""The two ends of the model, split over tp along the vocabulary: token embedding, output head, cross entropy.

Legend: S positions, B sequences, T tokens (S * B), D hidden size, V rows of the vocabulary on this rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moeconv.layout.shard import split_ceil
from runtime.data.batch import IGNORED_LABEL
from runtime.model.context import ModelContext, rows
from runtime.parallel.collectives import Group, group_size
from runtime.parallel.context_attention import local_positions
from runtime.parallel.shards import wide_dtype
from runtime.parallel.topology import Topology, tag

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Rows are padded to this multiple in memory: matrix products with odd widths are slow on GPUs.
_ROW_MULTIPLE = 8
_CHUNK_ELEMENTS = 2**26


def vocabulary_range(context: ModelContext) -> tuple[int, int]:
    """The rows of the vocabulary that this rank holds; the last ranks may hold fewer or none."""
    mesh = context.mesh
    return split_ceil(context.model.vocab_size, mesh.size("tp"))[mesh.rank("tp")]


def vocabulary_weight(context: ModelContext, name: str) -> nn.Parameter:
    """Make this rank's rows of an embedding or head, padded in memory only.

    Args:
        context: the model's context.
        name: the tensor's name on the hub.

    Returns:
        [V padded, D], equally many rows on every rank of tp.
    """
    model = context.model
    shape = (model.vocab_size, model.hidden_size)
    begin, end = vocabulary_range(context)
    per_rank = -(-model.vocab_size // context.mesh.size("tp"))
    padded = -(-per_rank // _ROW_MULTIPLE) * _ROW_MULTIPLE
    weight = context.parameter(padded, model.hidden_size)
    pieces = (rows(name, shape, begin, end),) if end > begin else ()
    # First and last stage each hold tied embeddings, and each have a part of their gradient.
    ends = ("ends",) if model.tie_embeddings and context.mesh.size("pp") > 1 else ()
    tag(weight, Topology(pieces=pieces, sharded=("tp",), replicated=ends, partial=ends))
    return weight


class Embedding(nn.Module):
    """Token embedding: each rank looks up the tokens that it has rows for, and the results are summed."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        self._context = context
        self.weight = vocabulary_weight(context, EMBEDDING)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Look up.

        Args:
            tokens_BS: [B, S] int64 whole sequences.

        Returns:
            [S / cp, B, D] of this rank's positions, split over tp too with sequence parallelism.
        """
        context, mesh = self._context, self._context.mesh
        tokens_SB = take_positions(tokens_BS, context)
        if mesh.size("tp") == 1:
            return F.embedding(tokens_SB, self.weight)
        begin, end = vocabulary_range(context)
        mine = (tokens_SB >= begin) & (tokens_SB < end)
        x_SBD = F.embedding(torch.where(mine, tokens_SB - begin, 0), self.weight)
        return context.leave(torch.where(mine.unsqueeze(-1), x_SBD, 0))


def take_positions(values_BS: Tensor, context: ModelContext) -> Tensor:
    """This context-parallel rank's positions of whole sequences, position-major: [B, S] to [S / cp, B]."""
    mesh = context.mesh
    if mesh.size("cp") > 1:
        positions = local_positions(values_BS.shape[1], mesh.rank("cp"), mesh.size("cp"), values_BS.device)
        values_BS = values_BS[:, positions]
    return values_BS.t().contiguous()


class Head(nn.Module):
    """Output head: logits of this rank's rows of the vocabulary."""

    def __init__(self, context: ModelContext, tied: nn.Parameter | None) -> None:
        super().__init__()
        self._context = context
        name = EMBEDDING if context.model.tie_embeddings else HEAD
        self.weight = tied if tied is not None else vocabulary_weight(context, name)

    def forward(self, x_SBD: Tensor) -> Tensor:
        """[S, B, D], split over tp with sequence parallelism, to [S, B, V], V with the padding."""
        return F.linear(self._context.enter(x_SBD), self.weight)


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
