"""Qwen2-MoE: Qwen2 with experts beside a gated shared expert, whose width may be 0."""

from __future__ import annotations

from moeconv.families.base import Family, TensorRule
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
    router,
)
from moeconv.families.rope import RopeRule

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
        *feed_forward("mlp", MLP, "dense_ffn", layers="dense"),
        *router(MLP + "gate.weight", layers="moe"),
        *feed_forward("expert", MLP + "experts.{expert}.", "ffn", layers="moe"),
        *feed_forward("shared", MLP + "shared_expert.", "shared_ffn", layers="moe"),
        TensorRule("shared.router", MLP + "shared_expert_gate.weight", ("1", "hidden"), layers="moe"),
    ),
    aliases=FUSED_EXPERTS,
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-6),
        max_positions=Key("max_position_embeddings", 32768),
        rope=RopeRule(),
        window=WindowRule(
            pattern="even below",
            size=Key("sliding_window", 4096),
            switch=Key("use_sliding_window", False),
            bound=Key("max_window_layers", 28),
        ),
        router=RouterRule(score="softmax", normalise=Key("norm_topk_prob", False)),
    ),
    mergekit="qwen",
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/qwen2_moe/modeling_qwen2_moe.py",
)
