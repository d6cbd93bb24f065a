"""Multi-head latent attention as data, with experts in all but some layers: queries, keys and values of all heads come from small latent vectors.

A rank of tp holds whole heads of what leads from the latent vectors to the heads; what leads to the latent vectors, and their norms, are the same on
every rank. Of each query and key `nope_dim` elements have no position; `head_dim` elements, of a key the same in all heads, are turned.
"""

from __future__ import annotations

from moeconv.families.base import Split, TensorRule
from moeconv.families.decoder import ATTENTION, ENDS, MLP, NORMS, feed_forward, router

LATENT_SIZES: dict[str, str | tuple[str, ...]] = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_attention_heads",
    "head_dim": "qk_rope_head_dim",
    "nope_dim": "qk_nope_head_dim",
    "v_dim": "v_head_dim",
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "vocab": "vocab_size",
    "ffn": "moe_intermediate_size",
    "dense_ffn": "intermediate_size",
    "shared": "n_shared_experts",
    "experts": ("n_routed_experts", "num_local_experts", "num_experts"),
    "top_k": "num_experts_per_tok",
}
LATENT_DEFAULTS = {
    "q_rank": "0",
    "qk_dim": "nope_dim+head_dim",
}  # without a rank of queries they come from the hidden state

# Keys of attention of the usual kind, which transformers reads nevertheless.
LATENT_SAME = {"num_key_value_heads": "heads", "head_dim": "head_dim", "qk_head_dim": "qk_dim"}

_HEADS, _COLUMNS = Split("tp", 0, "heads"), Split("tp", 1, "heads")
_ATTENTION = (
    TensorRule("attention.q", ATTENTION + "q_proj.weight", ("heads*qk_dim", "hidden"), _HEADS, only_if="!q_rank"),
    TensorRule("attention.q_a", ATTENTION + "q_a_proj.weight", ("q_rank", "hidden"), only_if="q_rank"),
    TensorRule("attention.q_a.bias", ATTENTION + "q_a_proj.bias", ("q_rank",), only_if="q_rank&attention_bias"),
    TensorRule("attention.q_a_norm", ATTENTION + "q_a_layernorm.weight", ("q_rank",), only_if="q_rank"),
    TensorRule("attention.q_b", ATTENTION + "q_b_proj.weight", ("heads*qk_dim", "q_rank"), _HEADS, only_if="q_rank"),
    TensorRule("attention.kv_a", ATTENTION + "kv_a_proj_with_mqa.weight", ("kv_rank+head_dim", "hidden")),
    TensorRule(
        "attention.kv_a.bias", ATTENTION + "kv_a_proj_with_mqa.bias", ("kv_rank+head_dim",), only_if="attention_bias"
    ),
    TensorRule("attention.kv_a_norm", ATTENTION + "kv_a_layernorm.weight", ("kv_rank",)),
    TensorRule("attention.kv_b", ATTENTION + "kv_b_proj.weight", ("heads*nope_dim+heads*v_dim", "kv_rank"), _HEADS),
    TensorRule("attention.o", ATTENTION + "o_proj.weight", ("hidden", "heads*v_dim"), _COLUMNS),
    TensorRule("attention.o.bias", ATTENTION + "o_proj.bias", ("hidden",), only_if="attention_bias"),
)


def latent_mixture(*, router_bias: bool) -> tuple[TensorRule, ...]:
    """Give the tensors of a model with latent attention and shared experts.

    Args:
        router_bias: whether the router has a stored bias of the choice.

    Returns:
        The rules of all tensors.
    """
    bias = MLP + "gate.e_score_correction_bias" if router_bias else None
    return (
        *ENDS,
        *NORMS,
        *_ATTENTION,
        *feed_forward("mlp", MLP, "dense_ffn", layers="dense"),
        *router(MLP + "gate.weight", bias=bias, layers="moe"),
        *feed_forward("expert", MLP + "experts.{expert}.", "ffn", layers="moe"),
        *feed_forward("shared", MLP + "shared_experts.", "shared*ffn", layers="moe"),
    )
