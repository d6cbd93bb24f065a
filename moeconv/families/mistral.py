"""Mistral: Llama with a sliding window and without biases."""

from __future__ import annotations

from moeconv.families.base import Family
from moeconv.families.decoder import ENDS, MLP, NORMS, PROJECTIONS, SIZES, feed_forward, roles

MISTRAL = Family(
    name="Mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    sizes={**SIZES, "ffn": "intermediate_size"},
    defaults={"head_dim": "hidden//heads"},
    flags={"tied": "tie_word_embeddings"},
    rules=(*ENDS, *NORMS, *PROJECTIONS, *feed_forward(MLP, "ffn")),
    roles=roles(mlp=MLP),
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/mistral/modeling_mistral.py",
)
