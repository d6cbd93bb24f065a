"""Logits layer by layer, of every family and from any layout: transformers' whole model is the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_sharded
from moeconv.forward import fixed_tokens, logits, logits_difference, relative_difference, transformers_logits
from moeconv.layout.degrees import Degrees
from tests.upcycle.hub import FAMILIES, make_folder

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in FAMILIES} | {
    "windows from a layer on": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "every second window": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "special tokens": ("mixtral", {"pad_token_id": 100, "bos_token_id": 99, "eos_token_id": [98, 99]}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_whole_model(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    checkpoint = open_checkpoint(make_folder(tmp_path / "hf", family, **options))
    tokens = fixed_tokens(checkpoint.model.sizes["vocab"])
    assert relative_difference(logits(checkpoint, tokens), transformers_logits(tmp_path / "hf", tokens)) < 1e-5


def test_layouts_have_equal_logits(tmp_path: Path) -> None:
    source = open_checkpoint(make_folder(tmp_path / "hf", "glm4_moe"))
    write_sharded(source, tmp_path / "shards", Degrees(tp=2, ep=2, pp=2), Options())
    assert logits_difference(open_checkpoint(tmp_path / "shards"), source) == 0
