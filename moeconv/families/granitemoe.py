"""Granite-MoE: factors on embeddings, attention, residual and logits, and experts that are stored as one stack a layer."""

from __future__ import annotations

from moeconv.families.base import Alias, Family
from moeconv.families.compute import ComputeRule, Key, RouterRule
from moeconv.families.decoder import (
    BOS_EOS,
    ENDS,
    NORMS,
    PROJECTIONS,
    SIZES,
    SPARSE,
    biases,
    feed_forward,
    fused_experts,
    router,
)
from moeconv.families.rope import RopeRule

_EXPERT = SPARSE + "experts.{expert}."

GRANITEMOE = Family(
    name="Granite-MoE",
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    sizes={
        **SIZES,
        "ffn": "intermediate_size",
        "experts": ("num_local_experts", "num_experts"),
        "top_k": "num_experts_per_tok",
    },
    defaults={"head_dim": "hidden//heads"},
    flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
    rules=(
        *ENDS,
        *NORMS,
        *PROJECTIONS,
        *biases("attention_bias", output=True),
        *router(SPARSE + "router.layer.weight"),
        *feed_forward("expert", _EXPERT, "ffn"),
    ),
    aliases=(
        *fused_experts((SPARSE + "input_linear.weight", SPARSE + "output_linear.weight"), _EXPERT, hub=True),
        *fused_experts((SPARSE + "experts.gate_up_proj", SPARSE + "experts.down_proj"), _EXPERT),
        Alias(SPARSE + "router.weight", (SPARSE + "router.layer.weight",)),
    ),
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-6),
        max_positions=Key("max_position_embeddings", 2048),
        rope=RopeRule(),
        router=RouterRule(score="softmax", normalise=True),
        attention_scale=Key("attention_multiplier", 1.0),
        embedding_scale=Key("embedding_multiplier", 1.0),
        residual_scale=Key("residual_multiplier", 1.0),
        logits_divisor=Key("logits_scaling", 1.0),
    ),
    tokens=BOS_EOS,
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/granitemoe/modeling_granitemoe.py",
)
