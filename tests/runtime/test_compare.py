"""The trainer's logits beside transformers', from the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_sharded
from moeconv.layout.degrees import Degrees
from runtime.compare import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Mixtral."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_local_experts": 4,
    }
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).save_pretrained(
        tmp_path / "hf"
    )
    return tmp_path / "hf"


def test_equal_models_are_equal_and_changed_ones_are_not(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    write_sharded(open_checkpoint(folder), shards, Degrees(tp=2, ep=2), Options())
    assert main([str(shards), str(folder)]) == 0
    assert "differ by" in capsys.readouterr().out
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.block_sparse_moe.experts.0.w1.weight"] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    assert main([str(shards), str(folder)]) == 3
    assert main([str(tmp_path / "nothing"), str(folder)]) == 1
    assert "no such folder" in capsys.readouterr().err
