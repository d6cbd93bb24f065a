"""A checkpoint's function in fp32, layer by layer through transformers, so that one layer's weights are in memory at a time. Loads torch.

Letters: B sequences, S tokens of each, D hidden size, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig
from transformers.utils import logging

from moeconv.checkpoint import Checkpoint
from moeconv.layout.rect import Rect
from moeconv.upcycle.draws import Floats
from moeconv.upcycle.recipe import Recipe

_VOCABULARY_ROWS = 8192
_PREFIX = "model.layers."


def fixed_tokens(checkpoint: Checkpoint, count: int = 64) -> torch.Tensor:
    """Give tokens [1, count], int64, spread over the vocabulary."""
    return (torch.arange(count) * 1_000_003 % checkpoint.model.sizes["vocab"])[None]


def layer_bytes(checkpoint: Checkpoint) -> int:
    """Give the memory that the largest layer takes in fp32 while it is loaded, in bytes."""
    sizes: dict[int, int] = {}
    for name, info in checkpoint.tensors.items():
        layer = checkpoint.model.tensors[name].layer
        if layer is not None:
            sizes[layer] = sizes.get(layer, 0) + prod(info.shape)
    return 8 * max(sizes.values())  # stored tensors, and those that transformers fuses them into


def logits(checkpoint: Checkpoint, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Compute logits.

    Args:
        checkpoint: a dense model or a mixture, on disk or planned.
        tokens_BS: token numbers, int64.

    Returns:
        Logits [B, S, V], fp32.
    """
    *_, (final_BSD,) = hidden_states(checkpoint, [tokens_BS])
    return torch.cat([final_BSD @ head.T for head in _head(checkpoint)], -1)


def loss(checkpoint: Checkpoint, tokens_BS: torch.Tensor) -> float:
    """Compute the mean loss, in nats a token, of predicting each token but the first from those before it."""
    logits_BSV = logits(checkpoint, tokens_BS)
    return float(F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten()))


def relative_error(a: Checkpoint, b: Checkpoint) -> float:
    """Compare the logits of two checkpoints on 64 fixed tokens.

    Args:
        a: the reference.
        b: the other, of the same vocabulary.

    Returns:
        The largest absolute difference over the largest absolute logit of `a`; nan where either has a nan.
    """
    tokens = fixed_tokens(a)
    x, y = logits(a, tokens), logits(b, tokens)
    return float((x - y).abs().max() / x.abs().max().clamp(min=1e-30))


def hidden_states(
    checkpoint: Checkpoint, tokens: list[torch.Tensor], watch: Callable[[int, int, torch.Tensor], None] | None = None
) -> Iterator[list[torch.Tensor]]:
    """Run layer after layer.

    Args:
        checkpoint: the model.
        tokens: batches of token numbers, each [B, S], int64.
        watch: called with the layer, the number of the batch, and what goes into the layer's feed-forward part, [B, S, D].

    Yields:
        After each layer the hidden states of each batch, [B, S, D], fp32; after the last one with the final norm.
    """
    states = [_embed(checkpoint, batch) for batch in tokens]
    num_layers = checkpoint.model.sizes["layers"]
    for layer in range(num_layers):
        model = _layer_model(checkpoint, layer)
        block = model.model.layers[0]
        seen: dict[str, torch.Tensor] = {}
        block.post_attention_layernorm.register_forward_hook(lambda m, i, o, seen=seen: seen.update(feed=o))
        block.register_forward_hook(lambda m, i, o, seen=seen: seen.update(out=o[0] if isinstance(o, tuple) else o))
        for number, state in enumerate(states):
            with torch.no_grad():
                last = model.model(inputs_embeds=state, use_cache=False).last_hidden_state
            states[number] = last if layer == num_layers - 1 else seen["out"]
            if watch is not None:
                watch(layer, number, seen["feed"])
        yield states


def _layer_model(checkpoint: Checkpoint, layer: int) -> Any:
    """Make a model of one layer, with the final norm and a vocabulary of one token."""
    moe = layer in checkpoint.model.moe_layers
    table = checkpoint.config | {"num_hidden_layers": 1, "vocab_size": 1, "tie_word_embeddings": False}
    table |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if table.get("layer_types"):
        table["layer_types"] = table["layer_types"][layer : layer + 1]
    if checkpoint.family.dense_layers == "listed":
        table |= {"mlp_only_layers": [] if moe else [0], "decoder_sparse_step": 1}
    if checkpoint.family.dense_layers == "first":
        table |= {"first_k_dense_replace": 0 if moe else 1}
    prefix = f"{_PREFIX}{layer}."
    state = {
        name.replace(prefix, f"{_PREFIX}0."): tensor(checkpoint, name)
        for name in checkpoint.tensors
        if name.startswith(prefix)
    }
    hidden = checkpoint.model.sizes["hidden"]
    state |= {"model.norm.weight": tensor(checkpoint, "model.norm.weight")}
    state |= {name: torch.zeros(1, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    config = AutoConfig.for_model(**table)
    architecture = getattr(transformers, checkpoint.family.architecture)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # a shared expert of width 0
        model = architecture.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return model.train(False)


def tensor(checkpoint: Checkpoint, name: str, rect: Rect | None = None) -> torch.Tensor:
    """Read a tensor, or a part of it, as fp32."""
    return torch.from_numpy(checkpoint.read(name, rect).astype("float32"))


def _embed(checkpoint: Checkpoint, tokens_BS: torch.Tensor) -> torch.Tensor:
    name, hidden = "model.embed_tokens.weight", checkpoint.model.sizes["hidden"]
    wanted, where = tokens_BS.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    rows = torch.cat([tensor(checkpoint, name, Rect((int(token), 0), (1, hidden))) for token in wanted])
    return rows[where]


def _head(checkpoint: Checkpoint) -> Iterator[torch.Tensor]:
    tied = checkpoint.model.flags.get("tied", False)
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    vocab, hidden = checkpoint.tensors[name].shape
    for first in range(0, vocab, _VOCABULARY_ROWS):
        yield tensor(checkpoint, name, Rect((first, 0), (min(_VOCABULARY_ROWS, vocab - first), hidden)))


def text_tokens(folder: Path, text: str) -> torch.Tensor:
    """Tokenize a text with the tokenizer in a folder. Returns token numbers [S], int64."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokens: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids[0]
    return tokens


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
