"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from moeconv.families.base import Family
from moeconv.families.decoder import ENDS, MLP, NORMS, PROJECTIONS, SIZES, biases, feed_forward, roles

QWEN2 = Family(
    name="Qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    sizes={**SIZES, "ffn": "intermediate_size"},
    defaults={"head_dim": "hidden//heads"},
    flags={"tied": "tie_word_embeddings"},
    rules=(*ENDS, *NORMS, *PROJECTIONS, *biases(None), *feed_forward(MLP, "ffn")),
    roles=roles(mlp=MLP),
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/qwen2/modeling_qwen2.py",
)
