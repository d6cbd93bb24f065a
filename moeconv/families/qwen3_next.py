"""Qwen3-Next: three layers of gated DeltaNet for each of gated attention, and many small experts beside a gated shared one."""

from __future__ import annotations

from moeconv.families.base import Family, Split, TensorRule
from moeconv.families.compute import ComputeRule, Key, RouterRule
from moeconv.families.decoder import (
    ATTENTION,
    ENDS,
    FUSED_EXPERTS,
    MLP,
    NORMS,
    PROJECTIONS,
    SIZES,
    biases,
    feed_forward,
    head_norms,
    only,
    router,
)
from moeconv.families.rope import RopeRule

_LINEAR = "model.layers.{layer}.linear_attn."
_CHANNELS = "2*lin_k_heads*lin_k_dim+lin_v_heads*lin_v_dim"
_KEY_HEADS = Split("tp", 0, "lin_k_heads")

# The sizes that Qwen3.5 has too.
SHARED_SIZES: dict[str, str | tuple[str, ...]] = {
    **SIZES,
    "lin_k_heads": "linear_num_key_heads",
    "lin_v_heads": "linear_num_value_heads",
    "lin_k_dim": "linear_key_head_dim",
    "lin_v_dim": "linear_value_head_dim",
    "lin_conv": "linear_conv_kernel_dim",
    "ffn": "moe_intermediate_size",
    "shared_ffn": "shared_expert_intermediate_size",
    "experts": ("num_experts", "num_local_experts"),
    "top_k": "num_experts_per_tok",
}

# The rules that Qwen3.5 has too: gated attention, with a gate beside each query head, and what both write into the linear state.
SHARED_RULES = (
    *ENDS,
    *NORMS,
    TensorRule(
        "attention.q",
        ATTENTION + "q_proj.weight",
        ("2*heads*head_dim", "hidden"),
        Split("tp", 0, "heads"),
        layers="full",
    ),
    *only("full", (*PROJECTIONS[1:], *biases("attention_bias", output=True), *head_norms())),
    # Queries, keys and values of all heads follow each other in these, so no range of them is one rank's.
    TensorRule("linear.conv", _LINEAR + "conv1d.weight", (_CHANNELS, "1", "lin_conv"), layers="linear"),
    TensorRule("linear.dt.bias", _LINEAR + "dt_bias", ("lin_v_heads",), layers="linear"),
    TensorRule("linear.a", _LINEAR + "A_log", ("lin_v_heads",), layers="linear"),
    TensorRule("linear.norm", _LINEAR + "norm.weight", ("lin_v_dim",), layers="linear"),
    TensorRule(
        "linear.out",
        _LINEAR + "out_proj.weight",
        ("hidden", "lin_v_heads*lin_v_dim"),
        Split("tp", 1, "lin_k_heads"),
        layers="linear",
    ),
    *feed_forward("mlp", MLP, "dense_ffn", layers="dense"),
    *router(MLP + "gate.weight", layers="moe"),
    *feed_forward("expert", MLP + "experts.{expert}.", "ffn", layers="moe"),
    *feed_forward("shared", MLP + "shared_expert.", "shared_ffn", layers="moe"),
    TensorRule("shared.router", MLP + "shared_expert_gate.weight", ("1", "hidden"), layers="moe"),
)

QWEN3_NEXT = Family(
    name="Qwen3-Next",
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    sizes={
        **SHARED_SIZES,
        "dense_ffn": "intermediate_size",
    },
    defaults={"head_dim": "256"},
    flags={"tied": "tie_word_embeddings", "attention_bias": "attention_bias"},
    dense_layers="listed",
    linear_layers="types",
    rules=(
        *SHARED_RULES,
        TensorRule(
            "linear.in",
            _LINEAR + "in_proj_qkvz.weight",
            ("2*lin_k_heads*lin_k_dim+2*lin_v_heads*lin_v_dim", "hidden"),
            _KEY_HEADS,
            layers="linear",
        ),
        TensorRule(
            "linear.in_ba", _LINEAR + "in_proj_ba.weight", ("2*lin_v_heads", "hidden"), _KEY_HEADS, layers="linear"
        ),
    ),
    aliases=FUSED_EXPERTS,
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-6),
        max_positions=Key("max_position_embeddings", 32768),
        rope=RopeRule(share=0.25),
        router=RouterRule(score="softmax", normalise=Key("norm_topk_prob", True)),
        lacks="gated DeltaNet and gated attention",
    ),
    carried=("mtp.*",),
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/qwen3_next/modeling_qwen3_next.py",
)
