"""MoE options for tests, the router's among them."""

from __future__ import annotations

from typing import Any

from moeconv.families.compute import Router, Score
from runtime.moe.config import MoEConfig


def moe_config(
    num_experts: int = 8,
    topk: int = 2,
    *,
    score: Score = "softmax",
    normalise: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    group_top_k: int = 1,
    group_best: int = 2,
    **options: Any,
) -> MoEConfig:
    """Give a layer's options; arguments as the fields of `Router` and `MoEConfig`."""
    router = Router(
        experts=num_experts,
        top_k=topk,
        score=score,
        normalise=normalise,
        scale=scale,
        groups=groups,
        group_top_k=group_top_k,
        group_best=group_best,
    )
    return MoEConfig(router=router, **options)
