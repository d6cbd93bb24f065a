"""A plan is total: whatever does not fit is refused by name before a byte is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.errors import LayoutError, MappingError, MoeconvError, SourceError
from moeconv.layout.degrees import Degrees
from tests.moeconv.models import Spec, config, digests, make_folder, shapes, write_tensors

SPEC = Spec(layers=3)
FUSED = Spec(layers=3, fused=True)
W1 = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
GATE_UP = "model.layers.2.mlp.experts.gate_up_proj"
Held = dict[str, tuple[str, tuple[int, ...]]]


def refuse(root: Path, folder: Path, kind: type[MoeconvError], *words: str) -> None:
    """Check that an import fails with this error, that names these words, and leaves nothing."""
    before = digests(folder)
    with pytest.raises(kind) as caught:
        write_sharded(open_checkpoint(folder), root / "out", Degrees(tp=2), Options())
    for word in words:
        assert word in str(caught.value)
    assert sorted(p.name for p in root.iterdir()) == [folder.name]
    assert digests(folder) == before


def held(spec: Spec) -> Held:
    return {name: (spec.dtype, shape) for name, shape in shapes(spec).items()}


def folder_of(root: Path, spec: Spec, change: Callable[[Held], Any], **fields: Any) -> Path:
    """Make a folder whose tensors, or config fields, were changed."""
    folder = make_folder(root / "source", spec)
    tensors = held(spec)
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors, np.random.default_rng(0))
    (folder / "config.json").write_text(json.dumps(config(spec) | fields))
    return folder


def same(tensors: Held) -> None:
    """Change nothing."""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.self_attn.q_norm.weight", ["q_norm.weight", "no tensor of Mixtral"]),
        ("lm_head.wieght", ["lm_head.wieght", "nearest known name is lm_head.weight"]),
        ("model.layers.01.input_layernorm.weight", ["layers.01.input_layernorm"]),
        ("model.layers.3.input_layernorm.weight", ["layers.3.input", "num_hidden_layers 3"]),
        ("model.layers.0.block_sparse_moe.experts.4.w1.weight", ["experts.4.w1", "4 experts"]),
        ("model.layers.7.mlp.experts.down_proj", ["model.layers.7.mlp.experts.down_proj", "num_hidden_layers 3"]),
    ],
)
def test_unknown_tensor(tmp_path: Path, name: str, words: list[str]) -> None:
    folder = folder_of(tmp_path, SPEC, lambda t: t.update({name: ("BF16", (SPEC.hidden,))}))
    refuse(tmp_path, folder, MappingError, "model.safetensors", *words)


@pytest.mark.parametrize("name", sorted({re.sub(r"\d+", "1", n) for n in [*shapes(SPEC), *shapes(FUSED)]}))
def test_each_kind_of_tensor_missing_or_misshapen(tmp_path: Path, name: str) -> None:
    spec = SPEC if name in shapes(SPEC) else FUSED
    folder = folder_of(tmp_path, spec, lambda t: t.pop(name))
    stem = name.split(".mlp.")[0]  # a fused tensor is missing as the hub's tensors that it stands for
    refuse(tmp_path, folder, MappingError, stem, "lacks", str(folder))

    shape = shapes(spec)[name]
    for wrong in ((shape[0] + 1, *shape[1:]), (*shape, 1), shape[::-1] if len(set(shape)) > 1 else (1, *shape)):
        other = tmp_path / str(wrong)
        folder = folder_of(other, spec, lambda t, wrong=wrong: t.update({name: (spec.dtype, wrong)}))
        refuse(other, folder, MappingError, name, str(list(wrong)), str(list(shape)))
        for path in sorted(other.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        other.rmdir()


def test_tensor_in_two_files(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "source", SPEC)
    write_tensors(folder / "more.safetensors", {W1: held(SPEC)[W1]}, np.random.default_rng(0))
    refuse(tmp_path, folder, SourceError, W1, "stored twice", "more.safetensors", "model.safetensors")


def test_tensor_under_its_own_name_and_fused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, FUSED, lambda t: t.update({W1: held(SPEC)[W1]}))
    refuse(tmp_path, folder, MappingError, W1, "twice", "fused")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_hidden_layers", 2, ["model.layers.2.", "num_hidden_layers 2"]),
        ("num_hidden_layers", 4, ["model.layers.3.", "lacks", "4 layers"]),
        ("num_local_experts", 2, ["experts"]),
        ("num_local_experts", 8, ["experts"]),
        ("hidden_size", 32, ["hidden=32", "config.json"]),
        ("intermediate_size", 24, ["ffn=24"]),
        ("num_attention_heads", 8, ["heads=8"]),
        ("num_key_value_heads", 4, ["kv_heads=4"]),
        ("head_dim", 8, ["head_dim=8"]),
        ("vocab_size", 38, ["vocab=38", "[38, 16]", "[37, 16]"]),
        ("vocab_size", "37", ["vocab_size", "'37'"]),
        ("num_hidden_layers", 0, ["num_hidden_layers", "0"]),
        ("num_hidden_layers", True, ["num_hidden_layers", "True"]),
        ("num_local_experts", None, ["num_local_experts"]),
        ("model_type", "mamba", ["model_type", "mamba", "mixtral"]),
        ("model_type", None, ["model_type", "mixtral"]),
    ],
)
@pytest.mark.parametrize("spec", [SPEC, FUSED], ids=["hub", "fused"])
def test_config_that_disagrees(tmp_path: Path, spec: Spec, field: str, value: object, words: list[str]) -> None:
    refuse(tmp_path, folder_of(tmp_path, spec, same, **{field: value}), MappingError, *words)


@pytest.mark.parametrize("tied", [False, True])
def test_only_a_tied_head_may_be_absent(tmp_path: Path, tied: bool) -> None:
    folder = folder_of(tmp_path, SPEC, lambda t: t.pop("lm_head.weight"), tie_word_embeddings=tied)
    if not tied:
        refuse(tmp_path, folder, MappingError, "lm_head.weight", "lacks")
        return
    write_sharded(open_checkpoint(folder), tmp_path / "shards", Degrees(tp=2), Options())
    write_hf(open_checkpoint(tmp_path / "shards"), tmp_path / "export", None, Options())
    assert digests(tmp_path / "export") == digests(folder)


def test_tied_head_that_is_stored_is_kept(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, SPEC, same, tie_word_embeddings=True)
    write_sharded(open_checkpoint(folder), tmp_path / "shards", Degrees(tp=2, pp=3), Options())
    write_hf(open_checkpoint(tmp_path / "shards"), tmp_path / "export", None, Options())
    assert digests(tmp_path / "export") == digests(folder)


@pytest.mark.parametrize(
    ("degrees", "words"),
    [
        ({"tp": 3}, ["--tp 3", "4 attention heads", "2 key/value heads", "1, 2, 4"]),
        ({"tp": 8}, ["--tp 8", "fit: 1, 2, 4"]),
        ({"ep": 3}, ["--ep 3", "4 experts", "1, 2, 4"]),
        ({"ep": 8}, ["--ep 8", "4 experts", "1, 2, 4"]),
        ({"etp": 5}, ["--etp 5", "12", "1, 2, 3, 4, 6, 12"]),
        ({"pp": 2}, ["3 layers", "pp 2", "--pp-layers", "2,1"]),
        ({"pp": 4}, ["3 layers", "pp 4", "at most 3"]),
        ({"pp": 2, "pp_layers": (2, 2)}, ["--pp-layers 2,2", "4", "3 layers"]),
        ({"pp": 2, "pp_layers": (3,)}, ["--pp-layers 3", "2 numbers"]),
        ({"pp": 2, "pp_layers": (3, 0)}, ["--pp-layers 3,0", "at least 1"]),
        ({"vpp": 2}, ["--vpp 2", "--pp"]),
        ({"tp": -1}, ["--tp -1", "at least 1"]),
    ],
)
def test_degrees_that_do_not_fit(tmp_path: Path, degrees: dict[str, Any], words: list[str]) -> None:
    source = open_checkpoint(make_folder(tmp_path / "source", SPEC))
    with pytest.raises(LayoutError) as caught:
        write_sharded(source, tmp_path / "out", Degrees(**degrees), Options())
    assert [word for word in words if word not in str(caught.value)] == []
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
