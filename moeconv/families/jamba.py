"""Jamba: state-space layers with an attention layer among each few, and experts in every second layer."""

from __future__ import annotations

from moeconv.families.base import Family, Split, TensorRule
from moeconv.families.compute import ComputeRule, Key, RouterRule
from moeconv.families.decoder import (
    ENDS,
    PROJECTIONS,
    SIZES,
    feed_forward,
    fused_experts,
    only,
    router,
)
from moeconv.families.rope import RopeRule

_MLP = "model.layers.{layer}.feed_forward."
_MAMBA = "model.layers.{layer}.mamba."

JAMBA = Family(
    name="Jamba",
    model_type="jamba",
    architecture="JambaForCausalLM",
    sizes={
        **SIZES,
        "ffn": "intermediate_size",
        "experts": ("num_experts", "num_local_experts"),
        "top_k": "num_experts_per_tok",
        "state": "mamba_d_state",
        "conv": "mamba_d_conv",
        "expand": "mamba_expand",
        "dt_rank": "mamba_dt_rank",
    },
    defaults={"head_dim": "hidden//heads", "inner": "expand*hidden"},
    flags={"tied": "tie_word_embeddings", "conv_bias": ("mamba_conv_bias", True)},
    dense_layers="period",
    linear_layers="period",
    rules=(
        ENDS[0],
        TensorRule("final_norm", "model.final_layernorm.weight", ("hidden",), where="last"),
        ENDS[2],
        TensorRule("attention_norm", "model.layers.{layer}.input_layernorm.weight", ("hidden",)),
        TensorRule("mlp_norm", "model.layers.{layer}.pre_ff_layernorm.weight", ("hidden",)),
        *only("full", PROJECTIONS),
        # The two halves of the first projection follow each other, so no range of it is one rank's; the rest follows the channels.
        *only(
            "linear",
            (
                TensorRule("linear.in", _MAMBA + "in_proj.weight", ("2*inner", "hidden")),
                TensorRule("linear.conv", _MAMBA + "conv1d.weight", ("inner", "1", "conv"), Split("tp", 0)),
                TensorRule("linear.conv.bias", _MAMBA + "conv1d.bias", ("inner",), Split("tp", 0), only_if="conv_bias"),
                TensorRule("linear.x", _MAMBA + "x_proj.weight", ("dt_rank+2*state", "inner"), Split("tp", 1)),
                TensorRule("linear.dt", _MAMBA + "dt_proj.weight", ("inner", "dt_rank"), Split("tp", 0)),
                TensorRule("linear.dt.bias", _MAMBA + "dt_proj.bias", ("inner",), Split("tp", 0)),
                TensorRule("linear.a", _MAMBA + "A_log", ("inner", "state"), Split("tp", 0)),
                TensorRule("linear.d", _MAMBA + "D", ("inner",), Split("tp", 0)),
                TensorRule("linear.out", _MAMBA + "out_proj.weight", ("hidden", "inner"), Split("tp", 1)),
                TensorRule("linear.dt_norm", _MAMBA + "dt_layernorm.weight", ("dt_rank",)),
                TensorRule("linear.b_norm", _MAMBA + "b_layernorm.weight", ("state",)),
                TensorRule("linear.c_norm", _MAMBA + "c_layernorm.weight", ("state",)),
            ),
        ),
        *feed_forward("mlp", _MLP, "ffn", layers="dense"),
        *router(_MLP + "router.weight", layers="moe"),
        *feed_forward("expert", _MLP + "experts.{expert}.", "ffn", layers="moe"),
    ),
    aliases=fused_experts((_MLP + "experts.gate_up_proj", _MLP + "experts.down_proj"), _MLP + "experts.{expert}."),
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-6),
        max_positions=Key("max_position_embeddings", 262144),
        rope=RopeRule(),
        router=RouterRule(score="softmax", normalise=False),
        fixed={"attention_dropout": 0.0, "mamba_proj_bias": False},
        lacks="state-space layers and attention without positions",
    ),
    harmless=("use_associative_scan", "use_mamba_kernels", "use_mambapy"),
    tokens={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/jamba/modeling_jamba.py",
)
