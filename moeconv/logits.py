"""Logits of a checkpoint's transformers model on fixed tokens. The one module of the library that loads torch."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from moeconv.checkpoint import Checkpoint
from moeconv.convert import Options, write_hf

NUM_TOKENS = 64


def logits_difference(a: Checkpoint, b: Checkpoint) -> float:
    """Compare the logits that transformers computes in fp32 from two checkpoints.

    A sharded checkpoint is exported into a temporary folder first, since transformers reads only Hugging Face folders.

    Args:
        a: one checkpoint.
        b: the other, of the same vocabulary.

    Returns:
        The largest absolute difference of the logits of 64 fixed tokens, over their largest absolute value; nan where either has a nan.
    """
    import torch

    x, y = _logits(a), _logits(b)
    return float((x - y).abs().max() / torch.maximum(x.abs().max(), torch.tensor(1e-30)))


def _logits(checkpoint: Checkpoint) -> Any:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]

    with tempfile.TemporaryDirectory(prefix="moeconv-") as folder:
        path = checkpoint.root
        if checkpoint.kind == "sharded":
            path = Path(folder) / "hf"
            write_hf(checkpoint, path, None, Options())
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
        model.train(False)
        # Fixed and spread over the vocabulary: multiples of a large prime.
        tokens = (torch.arange(NUM_TOKENS) * 1_000_003) % checkpoint.model.sizes["vocab"]
        with torch.no_grad():
            return model(tokens[None]).logits[0].double()
