"""A checkpoint's function in fp32, layer by layer through transformers, so that one layer's weights are in memory at a time. Loads torch.

Letters: B sequences, S tokens of each, D hidden size, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig
from transformers.utils import logging

from moeconv.checkpoint import Checkpoint
from moeconv.errors import SourceError
from moeconv.families.base import Model
from moeconv.families.inverse import layer_config
from moeconv.families.names import fill
from moeconv.layout.rect import Rect
from moeconv.pieces import NameMap

NUM_TOKENS = 64
_VOCABULARY_ROWS = 8192


def fixed_tokens(vocab_size: int, count: int = NUM_TOKENS) -> torch.Tensor:
    """Give token ids that are always the same and spread over the vocabulary: multiples of a large prime.

    Args:
        vocab_size: ids are below it.
        count: how many.

    Returns:
        A tensor [1, count], int64.
    """
    return (torch.arange(count) * 1_000_003 % vocab_size)[None]


def transformers_logits(path: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Compute logits with the whole model of transformers in fp32; code that comes with a model is never run.

    Args:
        path: a Hugging Face folder.
        tokens_BS: token ids [B, S], int64.

    Returns:
        A tensor [B, S, V], fp32.
    """
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    model.train(False)
    with torch.no_grad():
        out: torch.Tensor = model(tokens_BS).logits
    return out


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Give the largest absolute difference of two tensors over the largest absolute value of the second; nan where either has a nan."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))


def layer_bytes(checkpoint: Checkpoint) -> int:
    """Give the memory that the largest layer takes in fp32 while it is loaded, in bytes."""
    sizes: dict[int, int] = {}
    for tensor in checkpoint.model.tensors.values():
        if tensor.layer is not None:
            sizes[tensor.layer] = sizes.get(tensor.layer, 0) + tensor.size
    return 8 * max(sizes.values())  # stored tensors, and those that transformers fuses them into


def logits(checkpoint: Checkpoint, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Compute logits.

    Args:
        checkpoint: a dense model or a mixture, on disk or planned.
        tokens_BS: token numbers, int64.

    Returns:
        Logits [B, S, V], fp32.

    Raises:
        SourceError: it is a save of adapters, without the model that they belong to.
    """
    if checkpoint.adapter is not None:
        raise SourceError(f"{checkpoint.root}: holds adapters and no model; `moeconv merge` makes one")
    *_, (final_BSD,) = hidden_states(checkpoint, [tokens_BS])
    out_BSV = torch.cat([final_BSD @ head.T for head in _head(checkpoint)], -1)
    bias = checkpoint.model.find("head.bias")
    if bias is not None:
        out_BSV = out_BSV + read_tensor(checkpoint, bias.name)
    return out_BSV / checkpoint.model.compute.logits_divisor


def loss(checkpoint: Checkpoint, tokens_BS: torch.Tensor) -> float:
    """Compute the mean loss, in nats a token, of predicting each token but the first from those before it."""
    logits_BSV = logits(checkpoint, tokens_BS)
    return float(F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten()))


def logits_difference(a: Checkpoint, b: Checkpoint) -> float:
    """Compare the logits of two checkpoints, of any layout or only planned, on 64 fixed tokens.

    Args:
        a: one checkpoint.
        b: the other, of the same vocabulary.

    Returns:
        The largest absolute difference over the largest absolute logit of `b`; nan where either has a nan.
    """
    tokens_BS = fixed_tokens(b.model.sizes["vocab"])
    return relative_difference(logits(a, tokens_BS), logits(b, tokens_BS))


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
        norm = fill(checkpoint.model.rule("mlp_norm").name, 0, None).removesuffix(".weight")
        block = model.get_submodule(norm.rpartition(".")[0])
        seen: dict[str, torch.Tensor] = {}
        model.get_submodule(norm).register_forward_hook(lambda m, i, o, seen=seen: seen.update(feed=o))
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
    held = checkpoint.model
    state = {
        fill(t.rule.name, 0, t.expert): read_tensor(checkpoint, t.name)
        for t in held.tensors.values()
        if t.layer == layer and t.name in checkpoint.tensors
    }
    state = _published(held, layer, state)
    for role in ("final_norm", "final_norm.bias"):
        norm = held.find(role)
        if norm is not None:
            state[norm.name] = read_tensor(checkpoint, norm.name)
    state |= {held.rule(role).name: torch.zeros(1, held.sizes["hidden"]) for role in ("embedding", "head")}
    if held.has("head.bias"):
        state[held.rule("head.bias").name] = torch.zeros(1)
    config = AutoConfig.for_model(**layer_config(held, layer))
    architecture = getattr(transformers, checkpoint.family.architecture)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # a shared expert of width 0
        model = architecture.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return model.train(False)


def _published(model: Model, layer: int, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put a layer's tensors, under the names of layer 0, into the form in which checkpoints of the family are published."""
    names = NameMap(model)
    for alias in model.family.aliases:
        groups = names.members(alias, layer) if alias.hub else None
        if groups is not None:
            fused = [
                torch.cat([state.pop(fill(t.rule.name, 0, t.expert)) for t in group], alias.dim) for group in groups
            ]
            state[fill(alias.name, 0, None)] = torch.stack(fused) if alias.stack else fused[0]
    return state


def read_tensor(checkpoint: Checkpoint, name: str, rect: Rect | None = None) -> torch.Tensor:
    """Read a tensor, or a part of it, as fp32."""
    return torch.from_numpy(checkpoint.read(name, rect).astype("float32"))


def _embed(checkpoint: Checkpoint, tokens_BS: torch.Tensor) -> torch.Tensor:
    name, hidden = checkpoint.model.tensor("embedding").name, checkpoint.model.sizes["hidden"]
    wanted, where = tokens_BS.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    rows = torch.cat([read_tensor(checkpoint, name, Rect((int(token), 0), (1, hidden))) for token in wanted])
    return rows[where]


def _head(checkpoint: Checkpoint) -> Iterator[torch.Tensor]:
    name = checkpoint.model.tensor("embedding" if checkpoint.model.tied else "head").name
    vocab, hidden = checkpoint.tensors[name].shape
    for first in range(0, vocab, _VOCABULARY_ROWS):
        yield read_tensor(checkpoint, name, Rect((first, 0), (min(_VOCABULARY_ROWS, vocab - first), hidden)))
