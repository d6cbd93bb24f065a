"""Llama 4, the language model: experts in stacks of [in, out] beside a shared one, in every layer or every second."""

from __future__ import annotations

from moeconv.families.base import Family, Split, TensorRule
from moeconv.families.compute import ComputeRule, Key, RouterRule
from moeconv.families.decoder import (
    BOS_EOS,
    ENDS,
    NORMS,
    PROJECTIONS,
    SIZES,
    biases,
    feed_forward,
    fused_experts,
    router,
)
from moeconv.families.rope import RopeRule

_MLP = "model.layers.{layer}.feed_forward."
_EXPERT = _MLP + "experts.{expert}."
_NAMES = ("gate_proj", "up_proj", "down_proj")

LLAMA4_TEXT = Family(
    name="Llama-4",
    model_type="llama4_text",
    architecture="Llama4ForCausalLM",
    sizes={
        **SIZES,
        "ffn": "intermediate_size",
        "dense_ffn": "intermediate_size_mlp",
        "experts": ("num_local_experts", "num_experts"),
        "top_k": "num_experts_per_tok",
    },
    defaults={"head_dim": "128"},
    flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
    dense_layers="every",
    rules=(
        *ENDS,
        *NORMS,
        *PROJECTIONS,
        *biases("attention_bias", output=True),
        *feed_forward("mlp", _MLP, "dense_ffn", layers="dense"),
        *router(_MLP + "router.weight", layers="moe"),
        # As stored: [in, out], so that nothing is transposed on the way.
        *(
            TensorRule(
                f"expert.{role}", _EXPERT + name, ("hidden", "ffn"), Split("etp", 1), layers="moe", transposed=True
            )
            for role, name in zip(("gate", "up"), _NAMES[:2], strict=True)
        ),
        TensorRule(
            "expert.down", _EXPERT + _NAMES[2], ("ffn", "hidden"), Split("etp", 0), layers="moe", transposed=True
        ),
        *feed_forward("shared", _MLP + "shared_expert.", "ffn", layers="moe"),
    ),
    aliases=fused_experts(
        (_MLP + "experts.gate_up_proj", _MLP + "experts.down_proj"), _EXPERT, _NAMES, hub=True, dim=1
    ),
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-5),
        max_positions=Key("max_position_embeddings", 131072),
        rope=RopeRule(theta=500000.0, interleaved=True),
        router=RouterRule(score="sigmoid", normalise=False),
        undescribed=(
            *("layer_types", "attention_chunk_size", "no_rope_layers", "no_rope_layer_interval", "use_qk_norm"),
            *("attn_temperature_tuning", "attn_scale", "floor_scale", "router_jitter_noise"),
        ),
        lacks="attention in chunks, layers without positions, and experts whose inputs are scaled",
    ),
    tokens=BOS_EOS,
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/llama4/modeling_llama4.py",
)
