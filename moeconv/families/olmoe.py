"""OLMoE: norms over all query heads and all key heads together, and experts whose weights are not renormalised."""

from __future__ import annotations

from moeconv.families.base import Family
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
    router,
    wide_head_norms,
)
from moeconv.families.rope import RopeRule

OLMOE = Family(
    name="OLMoE",
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
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
        *NORMS,
        *PROJECTIONS,
        *biases("attention_bias", output=True),
        *wide_head_norms(),
        *router(MLP + "gate.weight"),
        *feed_forward("expert", MLP + "experts.{expert}.", "ffn"),
    ),
    aliases=FUSED_EXPERTS,
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-5),
        max_positions=Key("max_position_embeddings", 4096),
        rope=RopeRule(),
        router=RouterRule(score="softmax", normalise=Key("norm_topk_prob", False)),
        fixed={"attention_dropout": 0.0, "clip_qkv": None},
    ),
    tokens={"eos_token_id": 50279, "pad_token_id": 1},
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/olmoe/modeling_olmoe.py",
)
