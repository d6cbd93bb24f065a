"""GLM-4.5: experts that a sigmoid router chooses, beside shared experts; the first layers may be dense."""

from __future__ import annotations

from moeconv.families.base import Family
from moeconv.families.compute import ComputeRule, Key
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

GLM4_MOE = Family(
    name="GLM-4-MoE",
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
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
    flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias", "qk_norm": "use_qk_norm"},
    dense_layers="first",
    rules=(
        *ENDS,
        *NORMS,
        *PROJECTIONS,
        *biases("attention_bias"),
        *head_norms("qk_norm"),
        *feed_forward("mlp", MLP, "dense_ffn", layers="dense"),
        *router(MLP + "gate.weight", bias=MLP + "gate.e_score_correction_bias", layers="moe"),
        *feed_forward("expert", MLP + "experts.{expert}.", "ffn", layers="moe"),
        *feed_forward("shared", MLP + "shared_experts.", "shared*ffn", layers="moe"),
    ),
    aliases=FUSED_EXPERTS,
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-5),
        max_positions=Key("max_position_embeddings", 131072),
        rope=RopeRule(share=0.5),
        router=group_limited(normalise=True),
    ),
    mtp=("num_nextn_predict_layers", "num_mtp_layers"),
    stated={"num_nextn_predict_layers": 0},
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/glm4_moe/modeling_glm4_moe.py",
)
