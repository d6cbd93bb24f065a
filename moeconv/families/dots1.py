"""dots.llm1: Qwen3's attention, and experts that a sigmoid router chooses beside shared experts."""

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

DOTS1 = Family(
    name="dots.llm1",
    model_type="dots1",
    architecture="Dots1ForCausalLM",
    sizes={
        **SIZES,
        "ffn": "moe_intermediate_size",
        "dense_ffn": "intermediate_size",
        "shared": "n_shared_experts",
        "experts": "n_routed_experts",
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
        *feed_forward(MLP, "dense_ffn", layers="dense"),
        TensorRule(MLP + "gate.weight", ("experts", "hidden"), layers="moe"),
        TensorRule(MLP + "gate.e_score_correction_bias", ("experts",), layers="moe", buffer=True),
        *feed_forward(MLP + "experts.{expert}.", "ffn", layers="moe"),
        *feed_forward(MLP + "shared_experts.", "shared*ffn", layers="moe"),
    ),
    roles={
        **roles(mlp=MLP, expert=MLP + "experts.{expert}.", shared=MLP + "shared_experts."),
        "router": MLP + "gate.weight",
        "router.bias": MLP + "gate.e_score_correction_bias",
    },
    aliases=FUSED_EXPERTS,
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/dots1/modeling_dots1.py",
)
