"""The two ends of the model, split over tp along the vocabulary: token embedding, output head, cross entropy.

Legend: S positions, B sequences, T tokens (S * B), D hidden size, V rows of the vocabulary on this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeconv.layout.shard import split_ceil
from runtime.model.context import ModelContext, rows
from runtime.ops.embedding import embedding
from runtime.ops.linear import linear
from runtime.parallel.context_attention import local_positions
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
        sinks = not context.model.tie_embeddings
        if mesh.size("tp") == 1:
            return embedding(tokens_SB, self.weight, sinks=sinks)
        begin, end = vocabulary_range(context)
        mine = (tokens_SB >= begin) & (tokens_SB < end)
        # Another rank's tokens get a row that is no one's.
        ids_SB = torch.where(mine, tokens_SB - begin, self.weight.shape[0])
        return context.leave(embedding(ids_SB, self.weight, sinks=sinks))


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
        return linear(self._context.enter(x_SBD), self.weight, sinks=not self._context.model.tie_embeddings)
