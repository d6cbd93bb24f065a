"""Qwen2-MoE: Qwen2 with experts beside a gated shared expert, whose width may be 0."""

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
    roles,
)

QWEN2_MOE = Family(
    name="Qwen2-MoE",
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    sizes={
        **SIZES,
        "ffn": "moe_intermediate_size",
        "dense_ffn": "intermediate_size",
        "shared_ffn": "shared_expert_intermediate_size",
        "experts": "num_experts",
        "top_k": "num_experts_per_tok",
    },
    defaults={"head_dim": "hidden//heads"},
    may_be_zero=("shared_ffn",),
    flags={"tied": "tie_word_embeddings", "qkv_bias": ("qkv_bias", True)},
    dense_layers="listed",
    rules=(
        *ENDS,
        *NORMS,
        *PROJECTIONS,
        *biases("qkv_bias"),
        *feed_forward(MLP, "dense_ffn", layers="dense"),
        TensorRule(MLP + "gate.weight", ("experts", "hidden"), layers="moe"),
        *feed_forward(MLP + "experts.{expert}.", "ffn", layers="moe"),
        *feed_forward(MLP + "shared_expert.", "shared_ffn", layers="moe"),
        TensorRule(MLP + "shared_expert_gate.weight", ("1", "hidden"), layers="moe"),
    ),
    roles={
        **roles(mlp=MLP, expert=MLP + "experts.{expert}.", shared=MLP + "shared_expert."),
        "router": MLP + "gate.weight",
        "shared.router": MLP + "shared_expert_gate.weight",
    },
    aliases=FUSED_EXPERTS,
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/qwen2_moe/modeling_qwen2_moe.py",
)
