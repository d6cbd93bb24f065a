"""Qwen3: Llama with a norm on each query and key head."""

from __future__ import annotations

from moeconv.families.base import Family
from moeconv.families.compute import ComputeRule, Key, WindowRule
from moeconv.families.decoder import ENDS, MLP, NORMS, PROJECTIONS, SIZES, biases, feed_forward, head_norms
from moeconv.families.rope import RopeRule

QWEN3 = Family(
    name="Qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    sizes={**SIZES, "ffn": "intermediate_size"},
    defaults={"head_dim": "128"},
    flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
    rules=(
        *ENDS,
        *NORMS,
        *PROJECTIONS,
        *biases("attention_bias", output=True),
        *head_norms(),
        *feed_forward("mlp", MLP, "ffn"),
    ),
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-6),
        max_positions=Key("max_position_embeddings", 32768),
        rope=RopeRule(),
        window=WindowRule(
            pattern="from",
            size=Key("sliding_window", 4096),
            switch=Key("use_sliding_window", False),
            bound=Key("max_window_layers", 28),
        ),
    ),
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/qwen3/modeling_qwen3.py",
)
