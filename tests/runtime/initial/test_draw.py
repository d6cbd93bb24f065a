"""Drawn weights: the same whoever draws which part, of the spread that Megatron gives each kind, in bounded memory."""

from __future__ import annotations

import math
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeconv.families.base import Model
from moeconv.layout.rect import Rect
from runtime.initial.config import InitConfig
from runtime.initial.draw import DrawnCheckpoint, drawn_checkpoint, spread_of
from tests.support.configs import tiny_model, trained_families


def drawn(model: Model, dtype: str = "float32", seed: int = 1234, **init: Any) -> DrawnCheckpoint:
    return drawn_checkpoint(Path("new"), model, dtype, seed, InitConfig(**init), {"config.json": b"{}"})


def test_every_part_is_the_part_of_the_whole() -> None:
    model = tiny_model("gpt_oss", hidden_size=96, intermediate_size=1100, vocab_size=2300)
    checkpoint = drawn(model, "bfloat16")
    random = np.random.default_rng(0)
    for name, info in checkpoint.tensors.items():
        whole = checkpoint.read(name)
        assert whole.shape == info.shape
        assert whole.dtype.name == "bfloat16"
        for _ in range(6):
            begin = [int(random.integers(size)) for size in info.shape]
            shape = [int(random.integers(1, size - low + 1)) for low, size in zip(begin, info.shape, strict=True)]
            rect = Rect(tuple(begin), tuple(shape))
            part = checkpoint.read(name, rect)
            assert part.shape == rect.shape
            assert np.array_equal(part.view(np.uint16), whole[rect.slices()].view(np.uint16))


# What is normal is written down once more here, by name: the code says it by role.
FLAT = {".bias": 0.0, "_bias": 0.0, "norm": 1.0}
SCALED = ("o_proj.weight", "down_proj.weight", "w2.weight", "down_proj", "output_linear.weight")


@pytest.mark.parametrize("family", trained_families())
@pytest.mark.parametrize(
    "options", [{}, {"embedding_init_method_std": 1.0}, {"use_scaled_init_method": False}], ids=str
)
def test_each_kind_has_its_spread(family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family, hidden_size=64, vocab_size=128, initializer_range=0.03)
    checkpoint = drawn(model, **options)
    pooled: dict[float, list[np.ndarray[Any, Any]]] = {}
    for name in checkpoint.tensors:
        values = checkpoint.read(name).astype(np.float64).ravel()
        flat = next((value for end, value in FLAT.items() if end in name.rsplit("layers.")[-1]), None)
        if name.endswith("router.bias"):  # gpt-oss': of the projection, not of the choice
            flat = None
        if flat is not None:
            assert (values == flat).all(), name
            continue
        std = options.get("embedding_init_method_std", 0.03) if "embed_tokens" in name else 0.03
        if name.endswith(SCALED) and options.get("use_scaled_init_method", True):
            std /= math.sqrt(2 * 4)
        pooled.setdefault(std, []).append(values)
    assert len(pooled) == (3 if "embedding_init_method_std" in options else 1 if options else 2)
    for std, arrays in pooled.items():
        for values in (*arrays, np.concatenate(arrays)):
            count = len(values)
            # Six standard errors: of some ten thousand numbers none is further away by chance.
            assert abs(values.mean()) < 6 * std / math.sqrt(count)
            assert abs(values.std() / std - 1) < 6 / math.sqrt(2 * max(count - 1, 1)) + 1 / count
        together = np.concatenate(arrays) / std
        assert abs((together**4).mean() - 3) < 6 * math.sqrt(96 / len(together))
        assert abs((together**3).mean()) < 6 * math.sqrt(15 / len(together))


def test_the_spread_is_megatron_cores() -> None:
    with warnings.catch_warnings():  # of parts that are not installed, and of its own defaults
        warnings.simplefilter("ignore")
        from megatron.core.transformer.transformer_config import TransformerConfig

        config = TransformerConfig(
            num_layers=4, hidden_size=64, num_attention_heads=4, init_method_std=0.03, embedding_init_method_std=0.5
        )
    model = tiny_model(initializer_range=0.03)
    init = InitConfig(embedding_init_method_std=0.5)
    for role, method in (
        ("embedding", config.embedding_init_method),
        ("attention.q", config.init_method),
        ("attention.o", config.output_layer_init_method),
        ("expert.down", config.output_layer_init_method),
    ):
        tensor = model.find(role, None if role == "embedding" else 0, 0 if role.startswith("expert") else None)
        assert tensor is not None
        assert method.keywords == {"mean": 0.0, "std": pytest.approx(spread_of(tensor, model, init).std, rel=1e-12)}


def test_names_and_seeds_share_nothing() -> None:
    model = tiny_model(hidden_size=64)
    first, same, other = drawn(model), drawn(model), drawn(model, seed=1235)
    layers = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    draws = [first.read(layers[0]), first.read(layers[1]), other.read(layers[0])]
    assert np.array_equal(draws[0], same.read(layers[0]))
    correlation = np.corrcoef([values.ravel() for values in draws]) - np.eye(3)
    assert np.abs(correlation).max() < 6 / math.sqrt(draws[0].size)
    assert len(np.unique(draws[0])) > 0.99 * draws[0].size


def test_a_tied_head_is_not_drawn() -> None:
    assert "lm_head.weight" not in drawn(tiny_model(tie_word_embeddings=True)).tensors


def test_memory_is_that_of_the_part() -> None:
    model = tiny_model(vocab_size=120_000, hidden_size=512)
    checkpoint = drawn(model, "bfloat16")
    tracemalloc.start()
    part = checkpoint.read("model.embed_tokens.weight", Rect((0, 0), (60_000, 512)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert part.nbytes == 60_000 * 512 * 2
    assert peak < part.nbytes + 40e6
