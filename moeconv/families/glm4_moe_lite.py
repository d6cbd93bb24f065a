"""GLM-4.7-Flash: DeepSeek-V3's latent attention and router, with the layers' kinds listed."""

from __future__ import annotations

from moeconv.families.base import Family
from moeconv.families.compute import ComputeRule, Key
from moeconv.families.decoder import FUSED_EXPERTS, group_limited
from moeconv.families.latent import LATENT_DEFAULTS, LATENT_SAME, LATENT_SIZES, latent_mixture
from moeconv.families.rope import RopeRule

GLM4_MOE_LITE = Family(
    name="GLM-4-MoE-Lite",
    model_type="glm4_moe_lite",
    architecture="Glm4MoeLiteForCausalLM",
    sizes=LATENT_SIZES,
    defaults=LATENT_DEFAULTS,
    may_be_zero=("q_rank", "shared"),
    null=("q_rank",),
    flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
    dense_layers="types",
    rules=latent_mixture(router_bias=True),
    aliases=FUSED_EXPERTS,
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-5),
        max_positions=Key("max_position_embeddings", 202752),
        rope=RopeRule(interleaved=("rope_interleave", True)),
        router=group_limited(normalise=True, scale=1.8),
        yarn_scale=True,
        same=LATENT_SAME,
    ),
    mtp=("num_nextn_predict_layers", "num_mtp_layers"),
    tokens={"bos_token_id": 0, "eos_token_id": 1},
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/glm4_moe_lite/modeling_glm4_moe_lite.py",
)
