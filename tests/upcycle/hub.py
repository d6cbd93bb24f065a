"""Tiny models of each family, made and saved by transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ROUTED = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_SHARED = {"n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1, "norm_topk_prob": True}
_CHOSEN = {"num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8, "num_key_value_heads": 4,
    "n_group": 2, "topk_group": 1,
}  # fmt: skip
_DELTA = {"linear_key_head_dim": 4, "linear_value_head_dim": 6, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _ROUTED | {"num_experts": 4, "shared_expert_intermediate_size": 32, "mlp_only_layers": [0]},
    "qwen3_moe": _ROUTED | {"num_experts": 4, "norm_topk_prob": True},
    "glm4_moe": _ROUTED | _SHARED | {"num_nextn_predict_layers": 0},
    "dots1": _ROUTED | _SHARED | {"sliding_window": None},
    "olmoe": _CHOSEN,
    "deepseek_v2": _ROUTED | _SHARED | _LATENT | {"topk_method": "group_limited_greedy", "norm_topk_prob": False},
    "deepseek_v3": _ROUTED | _SHARED | _LATENT | {"num_nextn_predict_layers": 0},
    "glm4_moe_lite": _ROUTED | _SHARED | _LATENT,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 2, "pad_token_id": 0},
    "granitemoe": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "embedding_multiplier": 3.0, "attention_multiplier": 0.3,
        "residual_multiplier": 0.7, "logits_scaling": 2.0,
    },
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "pad_token_id": 0},
    "flex_olmo": _CHOSEN | {"pad_token_id": 0},
    "qwen3_next": _ROUTED | _DELTA | {"num_hidden_layers": 4, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3_5_moe_text": _ROUTED | _DELTA | {"num_hidden_layers": 4, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 40, "moe_layers": [1]},
    "jamba": _CHOSEN | {"mamba_d_state": 4, "mamba_dt_rank": 3, "attn_layer_period": 2, "attn_layer_offset": 1, "pad_token_id": 0},
}  # fmt: skip


def make_model(model_type: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """Build a tiny model with random weights.

    Args:
        model_type: as in config.json.
        seed: of the weights.
        **options: fields of the config.

    Returns:
        The model in fp32; biases and norms are not at their trivial starting values.
    """
    config = AutoConfig.for_model(model_type, **(SIZES | FAMILIES[model_type] | options))
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # a shared expert of width 0
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn_like(buffer) * 0.3)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.data.copy_(torch.randn_like(parameter) * 0.15)
    return model


def make_folder(
    folder: Path, model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> Path:
    """Save a tiny model; arguments as for `make_model`. Returns the folder."""
    make_model(model_type, seed, **options).to(dtype).save_pretrained(folder, max_shard_size="60KB")
    return folder


def logits(folder: Path) -> torch.Tensor:
    """Give the fp32 logits [sequence, vocabulary], in fp64, that transformers computes from a folder."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    assert not report["mismatched_keys"], report
    tokens = torch.arange(40) * 37 % model.config.vocab_size
    with torch.no_grad():
        return model.eval()(tokens[None]).logits[0].double()


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Give the largest difference of logits, relative to the largest logit."""
    return float((a - b).abs().max() / a.abs().max())
