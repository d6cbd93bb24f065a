"""Mixtral: a Llama-like decoder whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

from moeconv.families.base import Alias, Family, Split, TensorRule

_ATTENTION = "model.layers.{layer}.self_attn."
_MOE = "model.layers.{layer}.block_sparse_moe."

MIXTRAL = Family(
    name="Mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    sizes={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "ffn": "intermediate_size",
        "heads": "num_attention_heads",
        "kv_heads": ("num_key_value_heads", "num_attention_heads"),
        "head_dim": "head_dim",
        "vocab": "vocab_size",
        "experts": "num_local_experts",
        "top_k": "num_experts_per_tok",
    },
    defaults={"head_dim": "hidden//heads"},
    flags={"tied": "tie_word_embeddings"},
    rules=(
        TensorRule("model.embed_tokens.weight", ("vocab", "hidden"), Split("tp", 0, rounded=True), "first"),
        TensorRule("model.layers.{layer}.input_layernorm.weight", ("hidden",)),
        TensorRule(_ATTENTION + "q_proj.weight", ("heads*head_dim", "hidden"), Split("tp", 0, "heads")),
        TensorRule(_ATTENTION + "k_proj.weight", ("kv_heads*head_dim", "hidden"), Split("tp", 0, "kv_heads")),
        TensorRule(_ATTENTION + "v_proj.weight", ("kv_heads*head_dim", "hidden"), Split("tp", 0, "kv_heads")),
        TensorRule(_ATTENTION + "o_proj.weight", ("hidden", "heads*head_dim"), Split("tp", 1, "heads")),
        TensorRule("model.layers.{layer}.post_attention_layernorm.weight", ("hidden",)),
        TensorRule(_MOE + "gate.weight", ("experts", "hidden")),
        TensorRule(_MOE + "experts.{expert}.w1.weight", ("ffn", "hidden"), Split("etp", 0)),
        TensorRule(_MOE + "experts.{expert}.w2.weight", ("hidden", "ffn"), Split("etp", 1)),
        TensorRule(_MOE + "experts.{expert}.w3.weight", ("ffn", "hidden"), Split("etp", 0)),
        TensorRule("model.norm.weight", ("hidden",), where="last"),
        TensorRule("lm_head.weight", ("vocab", "hidden"), Split("tp", 0, rounded=True), "last", absent_if="tied"),
    ),
    roles={
        "router": _MOE + "gate.weight",
        "expert.gate": _MOE + "experts.{expert}.w1.weight",
        "expert.up": _MOE + "experts.{expert}.w3.weight",
        "expert.down": _MOE + "experts.{expert}.w2.weight",
    },
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
    source="https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/mixtral/modeling_mixtral.py",
)
