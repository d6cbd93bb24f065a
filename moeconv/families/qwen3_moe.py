"""Qwen3-MoE: Qwen3 with experts, none of them shared."""

from __future__ import annotations

from moeconv.families.base import Family
from moeconv.families.compute import ComputeRule, Key, RouterRule, WindowRule
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
    router,
)
from moeconv.families.rope import RopeRule

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
        *feed_forward("mlp", MLP, "dense_ffn", layers="dense"),
        *router(MLP + "gate.weight", layers="moe"),
        *feed_forward("expert", MLP + "experts.{expert}.", "ffn", layers="moe"),
    ),
    aliases=FUSED_EXPERTS,
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-6),
        max_positions=Key("max_position_embeddings", 32768),
        rope=RopeRule(),
        window=WindowRule(pattern="all", size=Key("sliding_window", 4096), switch=Key("use_sliding_window", False)),
        router=RouterRule(score="softmax", normalise=Key("norm_topk_prob", False)),
    ),
    mergekit="qwen3",
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/qwen3_moe/modeling_qwen3_moe.py",
)
