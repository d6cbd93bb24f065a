"""Mixtral: a Llama-like decoder whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

from moeconv.families.base import Alias, Family
from moeconv.families.compute import ComputeRule, Key, RouterRule, WindowRule
from moeconv.families.decoder import (
    BOS_EOS,
    ENDS,
    FUSED_W132,
    MLP,
    NORMS,
    PROJECTIONS,
    SIZES,
    SPARSE,
    W132,
    feed_forward,
    router,
)
from moeconv.families.rope import RopeRule

MIXTRAL = Family(
    name="Mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    sizes={
        **SIZES,
        "ffn": "intermediate_size",
        "experts": ("num_local_experts", "num_experts"),
        "top_k": "num_experts_per_tok",
    },
    defaults={"head_dim": "hidden//heads"},
    flags={"tied": "tie_word_embeddings"},
    rules=(
        *ENDS,
        *NORMS,
        *PROJECTIONS,
        *router(SPARSE + "gate.weight"),
        *feed_forward("expert", SPARSE + "experts.{expert}.", "ffn", names=W132),
    ),
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-5),
        max_positions=Key("max_position_embeddings", 131072),
        rope=RopeRule(theta=1e6),
        window=WindowRule(pattern="all", size=Key("sliding_window", None)),
        # The softmax over all experts, renormalised over the chosen ones.
        router=RouterRule(score="softmax", normalise=True),
        fixed={"attention_dropout": 0.0},
    ),
    aliases=(Alias(MLP + "gate.weight", (SPARSE + "gate.weight",)), *FUSED_W132),
    tokens=BOS_EOS,
    mergekit="mixtral",
    sentencepiece=True,
    harmless=("router_jitter_noise",),
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/mixtral/modeling_mixtral.py",
)
