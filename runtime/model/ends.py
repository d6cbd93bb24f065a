"""The two ends of the model, split over tp along the vocabulary: token embedding and output head.

Legend: S positions, B sequences, D hidden size, V rows of the vocabulary on this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.model.context import ModelContext
from runtime.model.tensor_maps import ColumnMaps
from runtime.ops.context_attention import local_positions
from runtime.ops.embedding import embedding
from runtime.ops.linear import linear


class Embedding(nn.Module):
    """Token embedding: each rank looks up the tokens that it has rows for, and the results are summed."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        self._context = context
        self.weight = context.parameters.take_vocabulary("embedding")

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Look up.

        Args:
            tokens_BS: [B, S] int64 whole sequences.

        Returns:
            [S / cp, B, D] of this rank's positions, split over tp too with sequence parallelism.
        """
        context, mesh = self._context, self._context.mesh
        tokens_SB = take_positions(tokens_BS, context)
        sinks = not context.model.tied
        if mesh.size("tp") == 1:
            return self._scaled(embedding(tokens_SB, self.weight, sinks=sinks))
        begin, end = context.parameters.vocabulary_range()
        mine = (tokens_SB >= begin) & (tokens_SB < end)
        # Another rank's tokens get a row that is no one's.
        ids_SB = torch.where(mine, tokens_SB - begin, self.weight.shape[0])
        return context.leave(self._scaled(embedding(ids_SB, self.weight, sinks=sinks, partial=True)))

    def _scaled(self, x_SBD: Tensor) -> Tensor:
        scale = self._context.model.compute.embedding_scale
        return x_SBD if scale == 1.0 else x_SBD * scale


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
        self.weight = tied if tied is not None else context.parameters.take_vocabulary("head")
        has_bias = context.model.has("head.bias")
        self.bias = context.parameters.take_vocabulary("head.bias") if has_bias else None
        self._map = ColumnMaps(context, "head", self.weight, fp8=False, dense=True)

    def forward(self, x_SBD: Tensor, place: int | None = None) -> Tensor:
        """[S, B, D], split over tp with sequence parallelism, to [S, B, V], V with the padding; or of one place alone."""
        model = self._context.model
        divisor = model.compute.logits_divisor
        if place is None:
            logits = self._map(x_SBD, [self.weight], [self.bias], [None], sinks=not model.tied)[0]
        else:
            logits = linear(self._context.enter(x_SBD)[place : place + 1], self.weight, self.bias, sinks=not model.tied)
        return logits if divisor == 1.0 else logits / divisor
