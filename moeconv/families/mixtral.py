"""Mixtral: a Llama-like decoder whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

from moeconv.families.base import Alias, Family
from moeconv.families.compute import ComputeRule, Key, RouterRule, WindowRule
from moeconv.families.decoder import BOS_EOS, ENDS, NORMS, PROJECTIONS, SIZES, feed_forward, router
from moeconv.families.rope import RopeRule

_MOE = "model.layers.{layer}.block_sparse_moe."

MIXTRAL = Family(
    name="Mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    sizes={
        **SIZES,
        "ffn": "intermediate_size",
        "experts": "num_local_experts",
        "top_k": "num_experts_per_tok",
    },
    defaults={"head_dim": "hidden//heads"},
    flags={"tied": "tie_word_embeddings"},
    rules=(
        *ENDS,
        *NORMS,
        *PROJECTIONS,
        *router(_MOE + "gate.weight"),
        *feed_forward("expert", _MOE + "experts.{expert}.", "ffn", names=("w1", "w3", "w2")),
    ),
    compute=ComputeRule(
        norm_eps=Key("rms_norm_eps", 1e-5),
        max_positions=Key("max_position_embeddings", 131072),
        rope=RopeRule(theta=1e6),
        window=WindowRule(pattern="all", size=Key("sliding_window", None)),
        # The softmax over all experts, renormalised over the chosen ones.
        router=RouterRule(score="softmax", normalise=True),
    ),
    # transformers 5 keeps experts fused in memory and writes these names with save_original_format=False.
    aliases=(
        Alias("model.layers.{layer}.mlp.gate.weight", (_MOE + "gate.weight",)),
        Alias(
            "model.layers.{layer}.mlp.experts.gate_up_proj",
            (_MOE + "experts.{expert}.w1.weight", _MOE + "experts.{expert}.w3.weight"),
            stack=True,
        ),
        Alias("model.layers.{layer}.mlp.experts.down_proj", (_MOE + "experts.{expert}.w2.weight",), stack=True),
    ),
    tokens=BOS_EOS,
    mergekit="mixtral",
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/mixtral/modeling_mixtral.py",
)
