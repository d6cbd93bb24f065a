"""A tiny Mixtral in a Hugging Face folder with its tokenizer, and real text to train it on."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from tests.runtime.words import VOCAB_SIZE, make_tokenizer, real_text


def make_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a Mixtral of 2 layers, 4 experts, 8 heads and 2 key/value heads with random weights.

    Args:
        folder: where to.
        dtype: of the weights.

    Returns:
        The folder.
    """
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
        sliding_window=None, bos_token_id=0, eos_token_id=1, initializer_range=0.05,
    )  # fmt: skip
    MixtralForCausalLM(config).to(dtype).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_text(path: Path) -> Path:
    """Write real text to a file.

    Args:
        path: the file.

    Returns:
        The file.
    """
    path.write_text(real_text())
    return path
