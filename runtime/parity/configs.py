"""Tiny configs of every family, as config.json states them."""

from __future__ import annotations

from typing import Any

from moeconv.families import FAMILIES
from moeconv.families.base import Model

# The keys of all families; each config takes those that its family reads.
_KEYS: dict[str, Any] = {
    "num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 32, "moe_intermediate_size": 32, "vocab_size": 64, "rms_norm_eps": 1e-5,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "shared_expert_intermediate_size": 32, "first_k_dense_replace": 0, "norm_topk_prob": True,
    "sliding_window": None, "max_position_embeddings": 128, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8,
    "moe_num_experts": 8, "moe_k": 2, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size_mlp": 32,
    "linear_key_head_dim": 4, "linear_value_head_dim": 6, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4, "mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 3,
}  # fmt: skip
_ALWAYS = {
    "rms_norm_eps", "norm_topk_prob", "sliding_window", "max_position_embeddings", "first_k_dense_replace", "n_group",
    "topk_group",
}  # fmt: skip


# transformers computes no other value of it.
_OWN: dict[str, dict[str, Any]] = {"deepseek_v2": {"norm_topk_prob": False}, "gpt_oss": {"sliding_window": 5}}


def tiny_config(model_type: str = "mixtral", **options: Any) -> dict[str, Any]:
    """Give a config.json of 4 layers of 32.

    Args:
        model_type: the family.
        **options: keys that are other than the usual ones, or beside them.

    Returns:
        The config as parsed.
    """
    family = FAMILIES[model_type]
    read = {key for names in family.sizes.values() for key in ((names,) if isinstance(names, str) else names)}
    keys = {key: value for key, value in _KEYS.items() if key in read | _ALWAYS} | _OWN.get(model_type, {})
    return {"model_type": model_type, "architectures": [family.architecture], **keys, **options}


def tiny_model(model_type: str = "mixtral", **options: Any) -> Model:
    """Give the model of `tiny_config`."""
    return Model.from_config(FAMILIES[model_type], tiny_config(model_type, **options))


def aligned_model() -> Model:
    """Give a Mixtral of 4 layers whose sizes fit the tiles of GPU kernels, and that takes a GPU next to no time."""
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "vocab_size": 512}
    return tiny_model("mixtral", **sizes)
