"""DeepSeek-V3, R1 and Kimi-K2: latent attention, and experts that a sigmoid router with a stored bias chooses from the best groups."""

from __future__ import annotations

from moeconv.families.base import Family
from moeconv.families.compute import ComputeRule, Key
from moeconv.families.decoder import FUSED_EXPERTS, group_limited
from moeconv.families.latent import LATENT_DEFAULTS, LATENT_SAME, LATENT_SIZES, latent_mixture
from moeconv.families.rope import RopeRule

DEEPSEEK_V3 = Family(
    name="DeepSeek-V3",
    model_type="deepseek_v3",
    also=("kimi_k2",),
    architecture="DeepseekV3ForCausalLM",
    sizes=LATENT_SIZES,
    defaults=LATENT_DEFAULTS,
    may_be_zero=("q_rank", "shared"),
    null=("q_rank",),
    flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
    dense_layers="first",
    rules=latent_mixture(router_bias=True),
    aliases=FUSED_EXPERTS,
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-6),
        max_positions=Key("max_position_embeddings", 4096),
        rope=RopeRule(interleaved=("rope_interleave", True)),
        router=group_limited(normalise=True, scale=2.5, groups=8, group_top_k=4),
        yarn_scale=True,
        same=LATENT_SAME,
    ),
    mtp=("num_nextn_predict_layers", "num_mtp_layers"),
    tokens={"bos_token_id": 0, "eos_token_id": 1},
    stated={"num_nextn_predict_layers": 0},
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/deepseek_v3/modeling_deepseek_v3.py",
)
