"""Which activations are computed again in the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

RecomputeGranularity = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputeConfig:
    """Which activations are computed again in the backward pass instead of being kept."""

    granularity: RecomputeGranularity = "none"
    modules: tuple[str, ...] = ("moe_act", "layernorm", "core_attn")
    """selective only: the parts that are computed again."""
    num_layers: int = 0
    """full only: layers of each stage that are computed again, from the first; 0 is all of them."""
