"""The two ends of the model, split over tp along the vocabulary: token embedding, output head, cross entropy.

Legend: S positions, B sequences, D hidden size, V rows of the vocabulary on this rank.
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
from runtime.parallel.context import local_positions
from runtime.parallel.topology import Topology, tag

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
# Rows are padded to this multiple in memory: matrix products with odd widths are slow on GPUs.
_ROW_MULTIPLE = 8


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


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits as they came and one number a token; the probabilities are computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, group: Group) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        rows = logits.shape[-1]
        top = wide.amax(-1) if rows else wide.new_full(labels.shape, float("-inf"))
        if group_size(group) > 1:
            dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        total = torch.exp(wide - top.unsqueeze(-1)).sum(-1)
        local = labels - first
        mine = (local >= 0) & (local < rows)
        index = torch.where(mine, local, 0)
        picked = wide.gather(-1, index.unsqueeze(-1)).squeeze(-1) if rows else torch.zeros_like(total)
        picked = torch.where(mine, picked, 0)
        if group_size(group) > 1:
            both = torch.stack([total, picked])
            dist.all_reduce(both, group=group)
            total, picked = both.unbind()
        lse = total.log() + top
        valid = labels != IGNORED_LABEL
        ctx.save_for_backward(logits, lse, index, mine, valid)
        return torch.where(valid, lse - picked, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, lse, index, mine, valid = ctx.saved_tensors
        wide = logits if logits.dtype == torch.float64 else logits.float()
        probs = torch.exp(wide - lse.unsqueeze(-1))
        if logits.shape[-1]:
            probs.scatter_add_(-1, index.unsqueeze(-1), -mine.to(probs.dtype).unsqueeze(-1))
        return probs.mul_(torch.where(valid, grad, 0).unsqueeze(-1)).to(logits.dtype), None, None, None


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
    args = (logits_SBV, labels_SB, first, group)
    return cast(Tensor, _CrossEntropy.apply(*args))  # type: ignore[no-untyped-call]
