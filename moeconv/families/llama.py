"""Llama: a decoder with rotary positions and a gated feed-forward part; biases are options that the published models don't use."""

from __future__ import annotations

from moeconv.families.base import Family
from moeconv.families.compute import ComputeRule, Key
from moeconv.families.decoder import (
    BOS_EOS,
    ENDS,
    MLP,
    NORMS,
    PROJECTIONS,
    SIZES,
    biases,
    feed_forward,
    feed_forward_biases,
)
from moeconv.families.rope import RopeRule

LLAMA = Family(
    name="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    sizes={**SIZES, "ffn": "intermediate_size"},
    defaults={"head_dim": "hidden//heads"},
    flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    rules=(
        *ENDS,
        *NORMS,
        *PROJECTIONS,
        *biases("attention_bias", output=True),
        *feed_forward_biases("mlp", MLP, "ffn", flag="mlp_bias", layers="all"),
        *feed_forward("mlp", MLP, "ffn"),
    ),
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-6), max_positions=Key("max_position_embeddings", 2048), rope=RopeRule()
    ),
    tokens=BOS_EOS,
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/llama/modeling_llama.py",
)
