"""Tiny transformers models, and their weights and gradients under hub names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moeconv.layout.rect import Rect

SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama": {},
    "mistral": {},
    "qwen2": {},
}


def make_model(model_type: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """Build a tiny model with random weights in fp32.

    Args:
        model_type: as in config.json.
        seed: of the weights.
        **options: fields of the config.

    Returns:
        The model, with biases and norms that are not at their trivial starting values.
    """
    sizes: dict[str, Any] = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": None, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, **(sizes | SIZES[model_type] | options))
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.data.mul_(4)
    return model


def hub_tensors(model: PreTrainedModel, value: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """Split fused tensors into those of the hub.

    Args:
        model: a transformers model.
        value: what to take of a parameter: itself, or its gradient.

    Returns:
        Hub name -> tensor.
    """
    out: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensor = value(parameter)
        assert tensor is not None, name
        prefix = name.replace(".mlp.", ".block_sparse_moe.").rsplit(".", 1)[0]
        if name.endswith("experts.gate_up_proj"):
            for expert, w13 in enumerate(tensor):
                out[f"{prefix}.{expert}.w1.weight"], out[f"{prefix}.{expert}.w3.weight"] = w13.chunk(2)
        elif name.endswith("experts.down_proj"):
            for expert, w2 in enumerate(tensor):
                out[f"{prefix}.{expert}.w2.weight"] = w2
        else:
            out[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tensor
    return {name: tensor.detach() for name, tensor in out.items()}


def reader(tensors: dict[str, Tensor]) -> Callable[[str, Rect], Any]:
    """Give rectangles of tensors in memory, as a checkpoint does.

    Args:
        tensors: hub name -> global tensor.

    Returns:
        What `Engine.load_state` reads with.
    """
    return lambda name, rect: tensors[name][rect.slices()].contiguous().numpy()
