"""Flags that say what a model is: each is compared with the checkpoint, which alone decides."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moeconv.families.base import Model
from runtime.errors import require

# Flag -> what the checkpoint says of it; None where it doesn't apply.
_SAYS: Mapping[str, Callable[[Model], Any]] = {
    "num_layers": lambda m: m.sizes["layers"],
    "hidden_size": lambda m: m.sizes["hidden"],
    "ffn_hidden_size": lambda m: m.sizes.get("dense_ffn", m.sizes["ffn"]),
    "moe_ffn_hidden_size": lambda m: m.sizes["ffn"] if m.moe_layers else None,
    "num_attention_heads": lambda m: m.sizes["heads"],
    "num_query_groups": lambda m: m.sizes["kv_heads"],
    "kv_channels": lambda m: m.sizes["head_dim"],
    "vocab_size": lambda m: m.sizes["vocab"],
    "max_position_embeddings": lambda m: m.compute.max_positions,
    "num_experts": lambda m: m.sizes.get("experts", 0),
    "moe_router_topk": lambda m: m.sizes.get("top_k", 0),
    "rotary_base": lambda m: m.compute.rope.theta,
    "norm_epsilon": lambda m: m.compute.norm_eps,
    "moe_shared_expert_intermediate_size": lambda m: (
        m.tensor("shared.gate", min(m.moe_layers)).shape[0] if m.has("shared.gate") else 0
    ),
    "moe_router_score_function": lambda m: m.compute.router.score if m.compute.router else None,
    "moe_router_topk_scaling_factor": lambda m: m.compute.router.scale if m.compute.router else None,
    "moe_router_num_groups": lambda m: m.compute.router.groups if m.compute.router else None,
    "moe_router_group_topk": lambda m: m.compute.router.group_top_k if m.compute.router else None,
}


def check_architecture(flags: argparse.Namespace, model: Model, where: Path) -> None:
    """Compare the architecture flags that were given with the checkpoint.

    Args:
        flags: what `parse_flags` returned; None where a flag was left out.
        model: the checkpoint's architecture.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: they disagree; names the flag and both values.
    """
    for flag, says in _SAYS.items():
        given = getattr(flags, flag)
        found = says(model) if given is not None else None
        require(
            given is None or given == found,
            f"--{flag.replace('_', '-')} is {given}; the checkpoint {where} has {found}: "
            "give that, or leave the flag out",
        )
    router = model.compute.router
    require(
        not flags.moe_router_pre_softmax or (router is not None and router.score == "softmax" and not router.normalise),
        f"--moe-router-pre-softmax: the router of the checkpoint {where} gives weights that sum to 1; leave the flag out",
    )
    require(
        not (flags.untie_embeddings_and_output_weights and model.tied),
        f"--untie-embeddings-and-output-weights: the checkpoint {where} has tied embeddings; leave the flag out",
    )
