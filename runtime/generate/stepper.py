"""The trainer's model one token after another, over the ranks that share it: what was computed before is kept.

Legend: S positions of a pass, D hidden size, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.engine import Engine
from runtime.model.decoder import DecoderStage
from runtime.model.past import Past
from runtime.parallel.collectives import reduce_from


class Stepper:
    """Gives the logits of what follows a text; of texts that begin alike, what they share is computed once.

    All data-parallel ranks compute the same text: their experts may lie on each other.
    """

    def __init__(self, engine: Engine) -> None:
        """Take a model.

        Args:
            engine: has the weights; its context-parallel degree is 1.
        """
        self._context, self._mesh, self._device = engine.context, engine.mesh, engine.device
        self._stages = [cast(DecoderStage, stage) for stage in engine.module.eval()]
        self._past, self._ids = Past(), list[int]()

    @property
    def is_last(self) -> bool:
        """Whether this rank has the logits: it computes the model's last stage."""
        return self._mesh.rank("pp") == self._mesh.size("pp") - 1

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Tensor | None:
        """Compute the logits of the token that follows. Collective; every rank gives the same ids.

        Args:
            ids: the text, at least one token.

        Returns:
            [V] fp32 without the vocabulary's padding, on the ranks of the last stage; None on others.
        """
        self._past.forget(self._shared(ids))
        new = list(ids[self._past.length :])
        # Ranks of tp share positions out among them: those behind the last one are nobody's.
        more = -len(new) % self._mesh.size("tp")
        tokens = torch.tensor([[*new, *([0] * more)]], dtype=torch.int64, device=self._device)
        self._past.begin(len(new))
        out = self._through_stages(tokens)
        self._past.end()
        self._ids = list(ids)
        return None if out is None else self._whole(out)

    def _shared(self, ids: Sequence[int]) -> int:
        """How many positions of the text before this one has, too; the last one has to be computed."""
        border = self._stages[0].rotary.changes_at()
        if border is not None and (len(ids) > border) != (len(self._ids) > border):
            return 0  # longer texts turn all of their positions otherwise
        pairs = enumerate(zip(ids[:-1], self._ids, strict=False))
        return next((n for n, (a, b) in pairs if a != b), min(len(ids) - 1, len(self._ids)))

    def _through_stages(self, tokens_BS: Tensor) -> Tensor | None:
        """The stages of the pipeline one after another, each on the rank that has it."""
        context, mesh = self._context, self._mesh
        size, rank, ranks, group = mesh.size("pp"), mesh.rank("pp"), mesh.ranks("pp"), mesh.group("pp")
        count, out = size * len(self._stages), None
        parts = mesh.size("tp") if context.sp else 1
        shape = (tokens_BS.shape[1] // parts, 1, context.model.sizes["hidden"])
        for place in range(rank, count, size):
            x = tokens_BS
            if place:
                x = torch.empty(shape, dtype=context.dtype, device=self._device)
                dist.recv(x, ranks[(place - 1) % size], group=group)
            out = self._stages[place // size](x, None, None, self._past)
            if place < count - 1:
                dist.send(out.contiguous(), ranks[(place + 1) % size], group=group)
        return out if self.is_last else None

    def _whole(self, logits_1BV: Tensor) -> Tensor:
        """Put the parts of the vocabulary together that ranks of tp have, without their padding."""
        begin, end = self._context.parameters.vocabulary_range()
        logits_V = torch.zeros(self._context.model.sizes["vocab"], device=self._device)
        logits_V[begin:end] = logits_1BV.flatten()[: end - begin]
        return reduce_from(logits_V, self._mesh.group("tp"))
