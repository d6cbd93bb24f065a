"""Mistral: Llama with a sliding window and without biases."""

from __future__ import annotations

from moeconv.families.base import Family
from moeconv.families.compute import ComputeRule, Key, WindowRule
from moeconv.families.decoder import BOS_EOS, ENDS, MLP, NORMS, PROJECTIONS, SIZES, feed_forward
from moeconv.families.rope import RopeRule

MISTRAL = Family(
    name="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    sizes={**SIZES, "ffn": "intermediate_size"},
    defaults={"head_dim": "hidden//heads"},
    flags={"tied": "tie_word_embeddings"},
    rules=(*ENDS, *NORMS, *PROJECTIONS, *feed_forward("mlp", MLP, "ffn")),
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-6),
        max_positions=Key("max_position_embeddings", 131072),
        rope=RopeRule(),
        # With layer_types transformers takes it for a Ministral, which differs in nothing else.
        window=WindowRule(pattern="all unless listed", size=Key("sliding_window", 4096)),
    ),
    tokens=BOS_EOS,
    sentencepiece=True,
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/mistral/modeling_mistral.py",
)
