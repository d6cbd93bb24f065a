"""MiniMax-M2: norms over all query heads and all key heads, part of each head turned, and a sigmoid router with a stored bias."""

from __future__ import annotations

from moeconv.families.base import Alias, Family
from moeconv.families.compute import ComputeRule, Key, RouterRule
from moeconv.families.decoder import (
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
    wide_head_norms,
)
from moeconv.families.rope import RopeRule

MINIMAX_M2 = Family(
    name="MiniMax-M2",
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    sizes={
        **SIZES,
        "ffn": "intermediate_size",
        "experts": ("num_local_experts", "num_experts"),
        "top_k": "num_experts_per_tok",
    },
    defaults={"head_dim": "128"},
    flags={"tied": "tie_word_embeddings"},
    rules=(
        *ENDS,
        *NORMS,
        *PROJECTIONS,
        *wide_head_norms(),
        *router(SPARSE + "gate.weight", bias=SPARSE + "e_score_correction_bias"),
        *feed_forward("expert", SPARSE + "experts.{expert}.", "ffn", names=W132),
    ),
    aliases=(
        Alias(MLP + "gate.weight", (SPARSE + "gate.weight",)),
        Alias(MLP + "e_score_correction_bias", (SPARSE + "e_score_correction_bias",)),
        *FUSED_W132,
    ),
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-6),
        max_positions=Key("max_position_embeddings", 196608),
        rope=RopeRule(theta=5e6, share=1.0, turned="rotary_dim"),
        router=RouterRule(score="sigmoid", normalise=True),
        fixed={"attention_dropout": 0.0},
    ),
    tokens={"bos_token_id": 200034, "eos_token_id": 200020},
    harmless=("router_jitter_noise",),
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/minimax_m2/modeling_minimax_m2.py",
)
