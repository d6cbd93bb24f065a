"""Qwen3.5 and 3.6 MoE, the language model: Qwen3-Next with the projections of DeltaNet apart."""

from __future__ import annotations

from moeconv.families.base import Family, Split, TensorRule
from moeconv.families.compute import ComputeRule, Key, RouterRule
from moeconv.families.decoder import FUSED_EXPERTS
from moeconv.families.qwen3_next import SHARED_RULES, SHARED_SIZES
from moeconv.families.rope import RopeRule

_LINEAR = "model.layers.{layer}.linear_attn."
_VALUE_HEADS = Split("tp", 0, "lin_v_heads")

QWEN3_5_MOE_TEXT = Family(
    name="Qwen3.5-MoE",
    model_type="qwen3_5_moe_text",
    architecture="Qwen3_5MoeForCausalLM",
    sizes=SHARED_SIZES,
    defaults={"head_dim": "256"},
    flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
    linear_layers="types",
    rules=(
        *(rule for rule in SHARED_RULES if rule.layers != "dense"),
        TensorRule(
            "linear.in_qkv",
            _LINEAR + "in_proj_qkv.weight",
            ("2*lin_k_heads*lin_k_dim+lin_v_heads*lin_v_dim", "hidden"),
            layers="linear",
        ),
        TensorRule(
            "linear.in_z",
            _LINEAR + "in_proj_z.weight",
            ("lin_v_heads*lin_v_dim", "hidden"),
            _VALUE_HEADS,
            layers="linear",
        ),
        TensorRule(
            "linear.in_b", _LINEAR + "in_proj_b.weight", ("lin_v_heads", "hidden"), _VALUE_HEADS, layers="linear"
        ),
        TensorRule(
            "linear.in_a", _LINEAR + "in_proj_a.weight", ("lin_v_heads", "hidden"), _VALUE_HEADS, layers="linear"
        ),
    ),
    aliases=FUSED_EXPERTS,
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-6),
        max_positions=Key("max_position_embeddings", 32768),
        rope=RopeRule(share=0.25),
        router=RouterRule(score="softmax", normalise=True),
        lacks="gated DeltaNet and gated attention",
    ),
    carried=("mtp.*",),
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/qwen3_5_moe/modeling_qwen3_5_moe.py",
)
