"""What one forward pass takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

IGNORED_LABEL = -100
"""Label of a position that has no part in the loss, as in torch's cross entropy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch of one data-parallel rank; context-parallel ranks get whole sequences and take their part."""

    tokens: torch.Tensor
    """[B, S] int64: token ids."""
    labels: torch.Tensor
    """[B, S] int64: the next token at each position, or IGNORED_LABEL."""
    position_ids: torch.Tensor | None = None
    """[B, S] int64: positions that begin at 0 in each document (--reset-position-ids); None: 0 to S - 1 in each row."""
    document_ids: torch.Tensor | None = None
    """[B, S] int32: number of the document in its row, from 0, not falling (--reset-attention-mask): a position attends
    to those of its own document only; None: to all before it. Of one shape whatever the documents, so that ranks and
    pipeline stages can cut and send it; `runtime.ops.documents` gives the other usual forms."""

    def pin_memory(self) -> Batch:
        """Give the batch in page-locked memory, from where a GPU copies it while it computes."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """Give the batch on a device; from page-locked memory the copy goes on in the background."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(
            tokens=change(self.tokens),
            labels=change(self.labels),
            position_ids=None if self.position_ids is None else change(self.position_ids),
            document_ids=None if self.document_ids is None else change(self.document_ids),
        )
