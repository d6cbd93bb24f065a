"""What one forward pass takes."""

from __future__ import annotations

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
