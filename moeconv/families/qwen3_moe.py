"""Qwen3-MoE: Qwen3 with experts, none of them shared."""

from __future__ import annotations

from moeconv.families.base import Family, TensorRule
from moeconv.families.decoder import (
    ENDS,
    FUSED_EXPERTS,
    MLP,
    NORMS,
    PROJECTIONS,
    SIZES,
    biases,
    feed_forward,
    head_norms,
    roles,
)

QWEN3_MOE = Family(
    name="Qwen3-MoE",
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    sizes={
        **SIZES,
        "ffn": "moe_intermediate_size",
        "dense_ffn": "intermediate_size",
        "experts": ("num_experts", "num_local_experts"),
        "top_k": "num_experts_per_tok",
    },
    defaults={"head_dim": "hidden//heads"},
    flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
    dense_layers="listed",
    rules=(
        *ENDS,
        *NORMS,
        *PROJECTIONS,
        *biases("attention_bias", output=True),
        *head_norms(),
        *feed_forward(MLP, "dense_ffn", layers="dense"),
        TensorRule(MLP + "gate.weight", ("experts", "hidden"), layers="moe"),
        *feed_forward(MLP + "experts.{expert}.", "ffn", layers="moe"),
    ),
    roles={**roles(mlp=MLP, expert=MLP + "experts.{expert}."), "router": MLP + "gate.weight"},
    aliases=FUSED_EXPERTS,
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/qwen3_moe/modeling_qwen3_moe.py",
)
