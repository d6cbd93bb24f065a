"""ERNIE 4.5: neighbouring elements of heads turned, and experts that a softmax router with a stored bias chooses beside shared ones."""

from __future__ import annotations

from moeconv.families.base import Alias, Family, Split, TensorRule
from moeconv.families.compute import ComputeRule, Key, RouterRule
from moeconv.families.decoder import (
    ENDS,
    FUSED_EXPERTS,
    MLP,
    NORMS,
    PROJECTIONS,
    SIZES,
    biases,
    feed_forward,
    feed_forward_biases,
    router,
)
from moeconv.families.rope import RopeRule

ERNIE4_5_MOE = Family(
    name="ERNIE-4.5-MoE",
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    sizes={
        **SIZES,
        "ffn": "moe_intermediate_size",
        "dense_ffn": "intermediate_size",
        "shared": "moe_num_shared_experts",
        "experts": ("moe_num_experts", "num_experts"),
        "top_k": ("moe_k", "num_experts_per_tok"),
    },
    defaults={"head_dim": "hidden//heads"},
    may_be_zero=("shared",),
    flags={"tied": ("tie_word_embeddings", True), "bias": "use_bias"},
    dense_layers="between",
    rules=(
        *ENDS,
        TensorRule("head.bias", "lm_head.bias", ("vocab",), Split("tp", 0, rounded=True), "last", only_if="bias"),
        *NORMS,
        *PROJECTIONS,
        *biases("bias", output=True),
        *feed_forward("mlp", MLP, "dense_ffn", layers="dense"),
        *feed_forward_biases("mlp", MLP, "dense_ffn", flag="bias", layers="dense"),
        *router(MLP + "gate.weight", layers="moe"),
        TensorRule(
            "router.bias", MLP + "moe_statics.e_score_correction_bias", ("1", "experts"), layers="moe", buffer=True
        ),
        *feed_forward("expert", MLP + "experts.{expert}.", "ffn", layers="moe"),
        *feed_forward("shared", MLP + "shared_experts.", "shared*ffn", layers="moe"),
        *feed_forward_biases("shared", MLP + "shared_experts.", "shared*ffn", flag="bias&shared", layers="moe"),
    ),
    aliases=(
        Alias(MLP + "gate.moe_statics.e_score_correction_bias", (MLP + "moe_statics.e_score_correction_bias",)),
        *FUSED_EXPERTS,
    ),
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-5),
        max_positions=Key("max_position_embeddings", 131072),
        rope=RopeRule(theta=500000.0, interleaved=True),
        router=RouterRule(score="softmax", normalise=True),
        fixed={"moe_norm_min": 1e-12},
    ),
    carried=("model.mtp_*",),
    tokens={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/ernie4_5_moe/modeling_ernie4_5_moe.py",
)
