"""Texts of the user: their tokens, and router rows of the hidden states that they have. Loads torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

from moeconv.checkpoint import Checkpoint
from moeconv.errors import RecipeError
from moeconv.forward import hidden_states
from moeconv.upcycling.draws import Floats
from moeconv.upcycling.recipe import Recipe

_MOST = (8, 512)  # sequences, and tokens of each


def text_tokens(folder: Path, text: str) -> torch.Tensor:
    """Tokenize a text with the tokenizer in a folder. Returns token numbers [S], int64."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokens: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids[0]
    return tokens


def sequences(folder: Path, path: Path) -> torch.Tensor:
    """Tokenize a text file with the tokenizer in a folder, and cut it up.

    Args:
        folder: a Hugging Face folder.
        path: the text.

    Returns:
        Token numbers [B, S], int64: at most 8 sequences of at most 512 tokens.

    Raises:
        RecipeError: the text can't be read, or is too short.
    """
    try:
        tokens = text_tokens(folder, path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"--text {path}: can't be read: {str(error).splitlines()[0]}") from None
    rows, length = _MOST
    length = min(length, len(tokens))
    rows = min(rows, len(tokens) // max(length, 1))
    if length < 2:
        raise RecipeError(f"--text {path}: {len(tokens)} tokens are too few to predict one from another")
    return tokens[: rows * length].reshape(rows, length)


def rows_from_texts(source: Checkpoint, recipe: Recipe) -> Mapping[int, Floats]:
    """Make router rows of the hidden states that texts have where a layer's router will see them.

    A row is the mean over an expert's positive texts less that over its negative ones, with length 1. Other than mergekit, which takes
    what goes into the whole layer, this takes what goes into its feed-forward part.

    Args:
        source: the dense model, with its tokenizer.
        recipe: its `prompts`, and whether texts count by their mean or their last token.

    Returns:
        By layer, rows [number of prompts, D], fp32.
    """
    signed = [
        (expert, sign / len(texts), text)
        for expert, prompts in enumerate(recipe.prompts)
        for sign, texts in ((1.0, prompts.positive), (-1.0, prompts.negative))
        for text in texts
    ]
    batches = [text_tokens(source.root, text)[None] for _, _, text in signed]
    sizes = source.model.sizes
    rows = {layer: torch.zeros(len(recipe.prompts), sizes["hidden"]) for layer in range(sizes["layers"])}

    def watch(layer: int, number: int, feed_BSD: torch.Tensor) -> None:
        expert, weight, _ = signed[number]
        rows[layer][expert] += weight * (feed_BSD[0].mean(0) if recipe.hidden_average else feed_BSD[0, -1])

    for _ in hidden_states(source, batches, watch):
        pass
    return {layer: F.normalize(row, dim=-1).numpy() for layer, row in rows.items()}
