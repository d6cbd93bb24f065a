"""dots.llm1: Qwen3's attention, and experts that a sigmoid router chooses beside shared experts."""

from __future__ import annotations

from moeconv.families.base import Family
from moeconv.families.compute import ComputeRule, Key, WindowRule
from moeconv.families.decoder import (
    ENDS,
    FUSED_EXPERTS,
    MLP,
    NORMS,
    PROJECTIONS,
    SIZES,
    biases,
    feed_forward,
    group_limited,
    head_norms,
    router,
)
from moeconv.families.rope import RopeRule

DOTS1 = Family(
    name="dots.llm1",
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    sizes={
        **SIZES,
        "ffn": "moe_intermediate_size",
        "dense_ffn": "intermediate_size",
        "shared": "n_shared_experts",
        "experts": ("n_routed_experts", "num_local_experts"),
        "top_k": "num_experts_per_tok",
    },
    defaults={"head_dim": "hidden//heads"},
    may_be_zero=("shared",),
    flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
    dense_layers="first",
    rules=(
        *ENDS,
        *NORMS,
        *PROJECTIONS,
        *biases("attention_bias", output=True),
        *head_norms(),
        *feed_forward("mlp", MLP, "dense_ffn", layers="dense"),
        *router(MLP + "gate.weight", bias=MLP + "gate.e_score_correction_bias", layers="moe"),
        *feed_forward("expert", MLP + "experts.{expert}.", "ffn", layers="moe"),
        *feed_forward("shared", MLP + "shared_experts.", "shared*ffn", layers="moe"),
    ),
    aliases=FUSED_EXPERTS,
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-6),
        max_positions=Key("max_position_embeddings", 2048),
        rope=RopeRule(),
        window=WindowRule(pattern="from", size=Key("sliding_window", 4096), bound=Key("max_window_layers", 62)),
        router=group_limited(normalise=False),
    ),
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/dots1/modeling_dots1.py",
)
