"""Logits of a checkpoint's transformers model on fixed tokens. The one module of the library that loads torch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from moeconv.checkpoint import Checkpoint
from moeconv.convert import Options, write_hf

NUM_TOKENS = 64


def fixed_tokens(vocab_size: int, count: int = NUM_TOKENS) -> Any:
    """Give token ids that are always the same and spread over the vocabulary: multiples of a large prime.

    Args:
        vocab_size: ids are below it.
        count: how many.

    Returns:
        A tensor [1, count], int64.
    """
    import torch

    return ((torch.arange(count) * 1_000_003) % vocab_size)[None]


def transformers_logits(path: Path, tokens_BS: Any) -> Any:
    """Compute logits with transformers in fp32; code that comes with a model is never run.

    Args:
        path: a Hugging Face folder.
        tokens_BS: token ids [B, S], int64.

    Returns:
        A tensor [B, S, V], fp32.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    model.train(False)
    with torch.no_grad():
        return model(tokens_BS).logits


def relative_difference(a: Any, b: Any) -> float:
    """Give the largest absolute difference of two tensors over the largest absolute value of the second; nan where either has a nan."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))


def logits_difference(a: Checkpoint, b: Checkpoint) -> float:
    """Compare the logits that transformers computes in fp32 from two checkpoints.

    A sharded checkpoint is exported into a temporary folder first, since transformers reads only Hugging Face folders.

    Args:
        a: one checkpoint.
        b: the other, of the same vocabulary.

    Returns:
        The largest absolute difference of the logits of 64 fixed tokens, over the largest absolute value of `b`'s.
    """
    return relative_difference(_logits(a), _logits(b))


def _logits(checkpoint: Checkpoint) -> Any:
    tokens_BS = fixed_tokens(checkpoint.model.sizes["vocab"])
    if checkpoint.kind == "hf":
        return transformers_logits(checkpoint.root, tokens_BS)
    with tempfile.TemporaryDirectory(prefix="moeconv-") as folder:
        write_hf(checkpoint, Path(folder) / "hf", None, Options())
        return transformers_logits(Path(folder) / "hf", tokens_BS)
