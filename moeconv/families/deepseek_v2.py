"""DeepSeek-V2: latent attention, and experts that a softmax router chooses, in the larger models from the best groups."""

from __future__ import annotations

from moeconv.families.base import Family
from moeconv.families.compute import ComputeRule, Key, RouterRule
from moeconv.families.decoder import FUSED_EXPERTS
from moeconv.families.latent import LATENT_DEFAULTS, LATENT_SAME, LATENT_SIZES, latent_mixture
from moeconv.families.rope import RopeRule

DEEPSEEK_V2 = Family(
    name="DeepSeek-V2",
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    sizes=LATENT_SIZES,
    defaults=LATENT_DEFAULTS,
    may_be_zero=("q_rank", "shared"),
    null=("q_rank",),
    flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
    dense_layers="first",
    rules=latent_mixture(router_bias=False),
    aliases=FUSED_EXPERTS,
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-6),
        max_positions=Key("max_position_embeddings", 2048),
        rope=RopeRule(interleaved=True),
        router=RouterRule(
            score="softmax",
            normalise=False,
            scale=Key("routed_scaling_factor", 1.0),
            groups=Key("n_group", None),
            group_top_k=Key("topk_group", None),
            group_best=1,
            grouped=(Key("topk_method", "greedy"), "group_limited_greedy"),
        ),
        yarn_scale=True,
        # transformers doesn't read norm_topk_prob, with which others compute something else.
        fixed={"attention_dropout": 0.0, "mlp_bias": False, "norm_topk_prob": False},
        same=LATENT_SAME,
    ),
    tokens={"bos_token_id": 1, "eos_token_id": 2},
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/deepseek_v2/modeling_deepseek_v2.py",
)
