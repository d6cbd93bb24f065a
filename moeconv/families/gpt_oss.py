"""gpt-oss: attention with sinks, every second layer through a window, and experts with biases whose gate and up rows take turns."""

from __future__ import annotations

from moeconv.families.base import Alias, Family, Split, TensorRule
from moeconv.families.compute import ComputeRule, GateRule, Key, RouterRule, WindowRule
from moeconv.families.decoder import (
    ATTENTION,
    ENDS,
    MLP,
    NORMS,
    PROJECTIONS,
    SIZES,
    biases,
    router,
)
from moeconv.families.rope import RopeRule

_EXPERTS = MLP + "experts.{expert}."
_SPLIT, _COLUMNS = Split("etp", 0), Split("etp", 1)

GPT_OSS = Family(
    name="gpt-oss",
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    sizes={
        **SIZES,
        "ffn": "intermediate_size",
        "experts": ("num_local_experts", "num_experts"),
        "top_k": ("num_experts_per_tok", "experts_per_token"),
    },
    defaults={"head_dim": "64"},
    flags={"tied": "tie_word_embeddings", "attention_bias": ("attention_bias", True)},
    rules=(
        *ENDS,
        *NORMS,
        *PROJECTIONS,
        *biases("attention_bias", output=True),
        TensorRule("attention.sinks", ATTENTION + "sinks", ("heads",), Split("tp", 0, "heads")),
        *router(MLP + "router.weight"),
        TensorRule("router.linear.bias", MLP + "router.bias", ("experts",)),
        # As stored: [in, out], with gate and up columns in turns, so that a share of the neurons is a range of columns.
        TensorRule("expert.gate_up", _EXPERTS + "gate_up_proj", ("hidden", "2*ffn"), _COLUMNS, transposed=True),
        TensorRule("expert.gate_up.bias", _EXPERTS + "gate_up_proj_bias", ("2*ffn",), _SPLIT),
        TensorRule("expert.down", _EXPERTS + "down_proj", ("ffn", "hidden"), _SPLIT, transposed=True),
        TensorRule("expert.down.bias", _EXPERTS + "down_proj_bias", ("hidden",)),
    ),
    aliases=tuple(
        Alias(MLP + "experts." + name, (_EXPERTS + name,), stack=True, hub=True)
        for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    ),
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-5),
        max_positions=Key("max_position_embeddings", 131072),
        rope=RopeRule(
            theta=150000.0,
            silent={
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        ),
        window=WindowRule(pattern="alternate", size=Key("sliding_window", 128)),
        # The softmax over the chosen experts' logits is that over all, renormalised over the chosen.
        router=RouterRule(score="softmax", normalise=True),
        gate=GateRule(alpha=Key("swiglu_alpha", 1.702), limit=Key("swiglu_limit", 7.0)),
    ),
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/gpt_oss/modeling_gpt_oss.py",
)
