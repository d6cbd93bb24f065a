"""A tiny random Mixtral, saved by transformers, for the tests of Megatron's formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

SIZES = {
    "vocab_size": 250,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def make_model(folder: Path, dtype: torch.dtype, **changes: Any) -> Path:
    """Save a random Mixtral with separate experts, as on the hub."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**{**SIZES, **changes})).to(dtype)
    model.save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Load all tensors of a Hugging Face folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same(got: Path, expected: Path) -> None:
    """Compare two Hugging Face folders, every byte of every tensor."""
    left, right = tensors_of(got), tensors_of(expected)
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert left[name].dtype == value.dtype, name
        assert torch.equal(left[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.fixture(scope="session")
def hf_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("hf_fp32") / "model", torch.float32)


@pytest.fixture(scope="session")
def hf_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("hf_bf16") / "model", torch.bfloat16)


@pytest.fixture(scope="session")
def config(hf_fp32: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((hf_fp32 / "config.json").read_text())
    return parsed
