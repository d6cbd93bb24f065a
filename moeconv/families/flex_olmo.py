"""FlexOlmo: OLMoE whose norms stand after attention and after the experts."""

from __future__ import annotations

from moeconv.families.base import Family, TensorRule
from moeconv.families.compute import ComputeRule, Key, RouterRule
from moeconv.families.decoder import (
    ENDS,
    FUSED_EXPERTS,
    MLP,
    PROJECTIONS,
    SIZES,
    biases,
    feed_forward,
    router,
    wide_head_norms,
)
from moeconv.families.rope import RopeRule

FLEX_OLMO = Family(
    name="FlexOlmo",
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    sizes={
        **SIZES,
        "ffn": "intermediate_size",
        "experts": ("num_experts", "num_local_experts"),
        "top_k": "num_experts_per_tok",
    },
    defaults={"head_dim": "hidden//heads"},
    flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
    rules=(
        *ENDS,
        TensorRule("attention_norm", "model.layers.{layer}.post_attention_layernorm.weight", ("hidden",)),
        TensorRule("mlp_norm", "model.layers.{layer}.post_feedforward_layernorm.weight", ("hidden",)),
        *PROJECTIONS,
        *biases("attention_bias", output=True),
        *wide_head_norms(),
        *router(MLP + "gate.weight"),
        *feed_forward("expert", MLP + "experts.{expert}.", "ffn"),
    ),
    aliases=FUSED_EXPERTS,
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-6),
        max_positions=Key("max_position_embeddings", 4096),
        rope=RopeRule(theta=500000.0),
        router=RouterRule(score="softmax", normalise=Key("norm_topk_prob", False)),
        norm_place="after",
    ),
    tokens={"eos_token_id": 100257, "pad_token_id": 100277},
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/flex_olmo/modeling_flex_olmo.py",
)
