"""Hunyuan-A13B: norms of heads after the rotation, and experts beside one that every token passes."""

from __future__ import annotations

from moeconv.families.base import Family, TensorRule
from moeconv.families.compute import ComputeRule, Key, RouterRule
from moeconv.families.decoder import (
    ATTENTION,
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

HUNYUAN_V1_MOE = Family(
    name="Hunyuan-MoE",
    model_type="hunyuan_v1_moe",
    architecture="HunYuanMoEV1ForCausalLM",
    sizes={
        **SIZES,
        "ffn": "intermediate_size",
        "experts": ("num_experts", "num_local_experts"),
        "top_k": ("moe_topk", "num_experts_per_tok"),
    },
    defaults={"head_dim": "hidden//heads"},
    flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
    rules=(
        *ENDS,
        *NORMS,
        *PROJECTIONS,
        *biases("attention_bias", output=True),
        TensorRule("attention.q_norm", ATTENTION + "query_layernorm.weight", ("head_dim",)),
        TensorRule("attention.k_norm", ATTENTION + "key_layernorm.weight", ("head_dim",)),
        *router(MLP + "gate.wg.weight"),
        *feed_forward("expert", MLP + "experts.{expert}.", "ffn"),
        *feed_forward("shared", MLP + "shared_mlp.", "ffn"),
    ),
    aliases=FUSED_EXPERTS,
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-5),
        max_positions=Key("max_position_embeddings", 2048),
        rope=RopeRule(alpha=True),
        router=RouterRule(score="softmax", normalise=True),
        head_norms="after rotation",
    ),
    harmless=("eod_token_id",),
    tokens={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/hunyuan_v1_moe/modeling_hunyuan_v1_moe.py",
)
