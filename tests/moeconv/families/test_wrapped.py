"""Models with a language model of a known family in them: through every axis and back, the other parts unread."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.errors import MappingError, MoeconvError
from moeconv.families.wrapped import WRAPPED
from moeconv.layout.degrees import Degrees
from moeconv.quant import require_plain
from runtime.model.support import check_supported
from tests.moeconv.models import digests
from tests.upcycle.hub import FAMILIES, SIZES

_BLOCKS = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 16,
    "out_hidden_size": 32,
    "patch_size": 4,
}
_LAYERS = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 4,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5_moe": ("qwen3_5_moe_text", _BLOCKS | {"num_position_embeddings": 16}),
    "qwen3_vl_moe": ("qwen3_moe", _BLOCKS | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
    "llama4": ("llama4_text", _LAYERS | {"image_size": 8, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}),
    "glm4v_moe": ("glm4_moe", _BLOCKS | {"image_size": 8}),
    "kimi_k25": ("deepseek_v3", _LAYERS | {"pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 2}),
}  # fmt: skip


def make_model(model_type: str) -> PreTrainedModel:
    """Make a tiny model with random weights."""
    family, vision = MODELS[model_type]
    config = AutoConfig.for_model(model_type, text_config=SIZES | FAMILIES[family], vision_config=vision)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
    return model


def make_folder(folder: Path, model_type: str) -> Path:
    """Save a tiny model, in the form in which such models are published."""
    make_model(model_type).save_pretrained(
        folder, save_original_format=True, max_shard_size="60KB" if model_type in _SAVED else "1GB"
    )
    if model_type not in _SAVED:
        file = folder / "model.safetensors"
        save_file(dict(map(_published, *zip(*load_file(file).items(), strict=True))), file, {"format": "pt"})
    return folder


# Of the others transformers saves something else than what is published: it leaves Qwen3-VL's experts as it keeps them
# ([out, in]), and gives Kimi's parts other names.
_SAVED = ("qwen3_5_moe", "llama4", "glm4v_moe")


def _published(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    stack = "experts." in name and tensor.dim() == 3
    name = (
        name.replace("model.blocks.", "model.layers.")
        .replace("model.mm_proj", "mm_proj")
        .replace("model.vision_t", "vision_t")
    )
    return name, tensor.transpose(1, 2).contiguous() if stack else tensor


@pytest.mark.parametrize("model_type", MODELS)
def test_round_trip(model_type: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", model_type)
    source = open_checkpoint(folder)
    stored = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert source.model.carried
    assert source.model.carried.keys() <= stored
    assert not any("vis" not in name and "projector" not in name for name in source.model.carried)
    path = folder
    for number, degrees in enumerate((Degrees(tp=2, ep=2, pp=2), Degrees(ep=4, etp=1), Degrees(tp=2, etp=2))):
        write_sharded(open_checkpoint(path), tmp_path / str(number), degrees, Options())
        path = tmp_path / str(number)
    write_hf(open_checkpoint(path), tmp_path / "back", None, Options())
    assert digests(tmp_path / "back") == digests(folder)
    with pytest.raises(MoeconvError, match="pictures"):
        check_supported(source.model, folder)
    require_plain(source.model, folder, "this")


@pytest.mark.parametrize("original", [True, False], ids=["as published", "as in memory"])
@pytest.mark.parametrize("model_type", MODELS)
def test_what_transformers_itself_saves(model_type: str, original: bool, tmp_path: Path) -> None:
    """Every file of transformers' own save comes back, whichever names and shapes it has; and cut anew transformers loads it."""
    folder = tmp_path / "hf"
    make_model(model_type).save_pretrained(folder, save_original_format=original)
    source = open_checkpoint(folder)
    assert not any("vis" not in name and "projector" not in name for name in source.model.carried)
    write_sharded(source, tmp_path / "0", Degrees(tp=2, ep=2, pp=2), Options())
    write_sharded(open_checkpoint(tmp_path / "0"), tmp_path / "1", Degrees(ep=4, etp=1), Options())
    write_hf(open_checkpoint(tmp_path / "1"), tmp_path / "back", None, Options())
    assert digests(tmp_path / "back") == digests(folder)
    write_hf(open_checkpoint(tmp_path / "1"), tmp_path / "cut", 50_000, Options())
    assert_loads_alike(folder, tmp_path / "cut")


def assert_loads_alike(folder: Path, other: Path) -> None:
    before = AutoModelForImageTextToText.from_pretrained(folder)
    after, report = AutoModelForImageTextToText.from_pretrained(other, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("model_type", sorted(set(MODELS) - {"kimi_k25"}))
def test_files_cut_anew_load_in_transformers(model_type: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", model_type)
    write_sharded(open_checkpoint(folder), tmp_path / "shards", Degrees(tp=2, ep=2), Options())
    write_hf(open_checkpoint(tmp_path / "shards"), tmp_path / "back", 50_000, Options())
    assert_loads_alike(folder, tmp_path / "back")


def test_every_one_is_tested() -> None:
    assert {family.model_type for family in WRAPPED} == MODELS.keys()


def test_a_config_without_its_language_model(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", "llama4")
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"text_config": None}))
    with pytest.raises(MappingError, match="no text_config, which describes the language model of Llama-4"):
        open_checkpoint(folder)
