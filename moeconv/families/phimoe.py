"""Phi-3.5-MoE: layer norms with biases, and a router that chooses two experts one after the other (SparseMixer)."""

from __future__ import annotations

from moeconv.families.base import Alias, Family, Split, TensorRule
from moeconv.families.compute import ComputeRule, Key, RouterRule, WindowRule
from moeconv.families.decoder import (
    BOS_EOS,
    ENDS,
    FUSED_W132,
    MLP,
    NORMS,
    PROJECTIONS,
    SIZES,
    SPARSE,
    W132,
    biases,
    feed_forward,
    router,
)
from moeconv.families.rope import RopeRule

_NORMS = (
    TensorRule("final_norm.bias", "model.norm.bias", ("hidden",), where="last"),
    TensorRule("attention_norm.bias", "model.layers.{layer}.input_layernorm.bias", ("hidden",)),
    TensorRule("mlp_norm.bias", "model.layers.{layer}.post_attention_layernorm.bias", ("hidden",)),
)

PHIMOE = Family(
    name="Phi-MoE",
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    sizes={
        **SIZES,
        "ffn": "intermediate_size",
        "experts": ("num_local_experts", "num_experts"),
        "top_k": "num_experts_per_tok",
    },
    defaults={"head_dim": "hidden//heads"},
    flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias", "head_bias": "lm_head_bias"},
    rules=(
        *ENDS,
        TensorRule("head.bias", "lm_head.bias", ("vocab",), Split("tp", 0, rounded=True), "last", only_if="head_bias"),
        *NORMS,
        *_NORMS,
        *PROJECTIONS,
        *biases("attention_bias", output=True),
        *router(SPARSE + "gate.weight"),
        *feed_forward("expert", SPARSE + "experts.{expert}.", "ffn", names=W132),
    ),
    aliases=(Alias(MLP + "router.weight", (SPARSE + "gate.weight",)), *FUSED_W132),
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-5),
        max_positions=Key("max_position_embeddings", 131072),
        rope=RopeRule(theta=1e6, magnitudes=True),
        window=WindowRule(pattern="all", size=Key("sliding_window", None)),
        router=RouterRule(score="sparsemixer", normalise=False, jitter=Key("router_jitter_noise", 0.01)),
        norm="layer",
        fixed={"attention_dropout": 0.0},
    ),
    tokens=BOS_EOS,
    harmless=("input_jitter_noise",),
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/phimoe/modeling_phimoe.py",
)
