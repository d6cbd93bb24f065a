"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from moeconv.families.base import Family
from moeconv.families.compute import ComputeRule, Key, WindowRule
from moeconv.families.decoder import ENDS, MLP, NORMS, PROJECTIONS, SIZES, biases, feed_forward
from moeconv.families.rope import RopeRule

QWEN2 = Family(
    name="Qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    sizes={**SIZES, "ffn": "intermediate_size"},
    defaults={"head_dim": "hidden//heads"},
    flags={"tied": "tie_word_embeddings"},
    rules=(*ENDS, *NORMS, *PROJECTIONS, *biases(None), *feed_forward("mlp", MLP, "ffn")),
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
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/qwen2/modeling_qwen2.py",
)
