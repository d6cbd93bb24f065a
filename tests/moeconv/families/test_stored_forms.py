"""Every form that experts are stored in is read, goes through layouts and comes back; what is asked for is written; what is carried comes back unread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cli.main import main
from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.errors import LayoutError, MappingError, SourceError
from moeconv.families import FAMILIES as KNOWN
from moeconv.layout.degrees import Degrees
from tests.moeconv.models import digests
from tests.upcycle.hub import FAMILIES, make_folder, make_model

MIXTURES = [name for name in FAMILIES if "experts" in KNOWN[name].sizes]
DENSE = [name for name in FAMILIES if name not in MIXTURES]
CHAIN = (Degrees(tp=2, ep=2, etp=2, pp=2), Degrees(ep=4, etp=1), Degrees(tp=4, ep=1, etp=2), Degrees(tp=2, etp=4, pp=2))


@pytest.mark.parametrize("model_type", MIXTURES)
def test_names_of_transformers_5_come_back(model_type: str, tmp_path: Path) -> None:
    """The fused names hold the same tensors as the published ones, and both come back through every axis."""
    model = make_model(model_type).to(torch.bfloat16)
    for form, original in (("hub", True), ("fused", False)):
        model.save_pretrained(tmp_path / form, save_original_format=original, max_shard_size="60KB")
    hub, fused = open_checkpoint(tmp_path / "hub"), open_checkpoint(tmp_path / "fused")
    assert hub.tensors == fused.tensors
    for name in hub.tensors:
        assert np.array_equal(hub.read(name).view(np.uint16), fused.read(name).view(np.uint16)), name
    path = tmp_path / "fused"
    for number, degrees in enumerate(CHAIN):
        write_sharded(open_checkpoint(path), tmp_path / str(number), degrees, Options())
        path = tmp_path / str(number)
    write_hf(open_checkpoint(path), tmp_path / "back", None, Options())
    assert digests(tmp_path / "back") == digests(tmp_path / "fused")
    write_hf(open_checkpoint(path), tmp_path / "published", None, Options(), "hub")
    stored = load_file(tmp_path / "published" / "model.safetensors")
    want = {k: v for file in (tmp_path / "hub").glob("*.safetensors") for k, v in load_file(file).items()}
    assert stored.keys() == want.keys()
    assert all(torch.equal(stored[k], want[k]) for k in want)


@pytest.mark.parametrize("model_type", DENSE)
def test_dense_models_come_back(model_type: str, tmp_path: Path) -> None:
    make_model(model_type).to(torch.bfloat16).save_pretrained(tmp_path / "hub", max_shard_size="30KB")
    path = tmp_path / "hub"
    for number, degrees in enumerate((Degrees(tp=2, pp=2), Degrees(tp=4), Degrees(pp=2))):
        write_sharded(open_checkpoint(path), tmp_path / str(number), degrees, Options())
        path = tmp_path / str(number)
    write_hf(open_checkpoint(path), tmp_path / "back", None, Options())
    assert digests(tmp_path / "back") == digests(tmp_path / "hub")


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "granitemoe", "gpt_oss", "llama4_text", "jamba"])
def test_the_form_that_is_asked_for_is_written(model_type: str, tmp_path: Path) -> None:
    source = open_checkpoint(make_folder(tmp_path / "hf", model_type, torch.bfloat16))
    write_sharded(source, tmp_path / "shards", Degrees(tp=2, ep=2), Options())
    write_hf(open_checkpoint(tmp_path / "shards"), tmp_path / "fused", 40_000, Options(), "fused")
    again = open_checkpoint(tmp_path / "fused")
    assert again.tensors == source.tensors
    assert len(again.files) > 1
    stacked = {e.name for h in (again.folder.headers.values() if again.folder else ()) for e in h.entries}
    assert not any(".experts.0." in name for name in stacked)
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_dense_model_has_no_fused_form(tmp_path: Path) -> None:
    write_sharded(open_checkpoint(make_folder(tmp_path / "hf", "llama")), tmp_path / "shards", Degrees(), Options())
    with pytest.raises(LayoutError, match="--names fused"):
        write_hf(open_checkpoint(tmp_path / "shards"), tmp_path / "out", None, Options(), "fused")


def with_tensors(folder: Path, more: dict[str, torch.Tensor]) -> Path:
    """Add tensors to a folder of one file."""
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | more, folder / "model.safetensors", {"format": "pt"})
    return folder


FURTHER: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "further layers of GLM-4.5": ("glm4_moe", {"num_nextn_predict_layers": 1}, ["model.layers.2.eh_proj.weight"]),
    "further layers of DeepSeek-V3": ("deepseek_v3", {"num_nextn_predict_layers": 2}, ["model.layers.3.mlp.up_proj.weight"]),
    "further layers of GLM-4.7-Flash": ("glm4_moe_lite", {"num_nextn_predict_layers": 1}, ["model.layers.2.enorm.weight"]),
    "mtp of Qwen3-Next": ("qwen3_next", {}, ["mtp.layers.0.mlp.experts.7.up_proj.weight", "mtp.fc.weight"]),
    "mtp of ERNIE-4.5": ("ernie4_5_moe", {}, ["model.mtp_block.0.mlp.up_proj.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("case", FURTHER)
def test_what_a_family_marks_is_carried(case: str, tmp_path: Path) -> None:
    model_type, options, names = FURTHER[case]
    model = make_model(model_type, **options)
    model.config.update(options)
    model.save_pretrained(tmp_path / "hf")
    source = with_tensors(tmp_path / "hf", {name: torch.randn(3, 5) for name in names})
    write_sharded(open_checkpoint(source), tmp_path / "a", Degrees(tp=2, pp=2), Options())
    shards = open_checkpoint(tmp_path / "a")
    assert {p.file for name in names for p in shards.pieces[name]} == {"carried-pp1.safetensors"}
    write_sharded(shards, tmp_path / "b", Degrees(ep=2), Options())
    write_hf(open_checkpoint(tmp_path / "b"), tmp_path / "back", None, Options())
    assert digests(tmp_path / "back") == digests(source)


def test_what_the_user_names_is_carried_and_nothing_else(tmp_path: Path) -> None:
    more = {
        "model.visual.patch.weight": torch.randn(4, 3, 2, 2),
        "model.layers.1.indexer.weight": torch.randn(2).to(torch.float8_e4m3fn),
    }
    source = with_tensors(make_folder_of_one_file(tmp_path / "hf"), more)
    with pytest.raises(MappingError, match=r"--carry 'model\.(visual\.patch|layers\.1\.indexer)\.weight'"):
        open_checkpoint(source)
    with pytest.raises(MappingError, match=r"indexer"):
        open_checkpoint(source, ["model.visual.*"])
    found = open_checkpoint(source, ["*visual*", "*.indexer.*", "lm_head*"])
    assert set(found.model.carried) == set(more), "the model's own tensors are never carried"
    write_sharded(found, tmp_path / "shards", Degrees(tp=2, ep=2, pp=2), Options())
    shards = open_checkpoint(tmp_path / "shards")
    places = {name: {p.file for p in shards.pieces[name]} for name in more}
    assert places == {
        "model.visual.patch.weight": {"carried-pp0.safetensors"},
        "model.layers.1.indexer.weight": {"carried-pp1.safetensors"},
    }
    with pytest.raises(SourceError, match="--carry"):
        open_checkpoint(tmp_path / "shards", ["*"])
    write_hf(shards, tmp_path / "back", None, Options())
    assert digests(tmp_path / "back") == digests(source)


def make_folder_of_one_file(folder: Path) -> Path:
    make_model("qwen3_moe").save_pretrained(folder)
    return folder


def test_the_command_carries_and_casts(tmp_path: Path) -> None:
    from tests.moeconv.quantised import mxfp4_folder

    hf = mxfp4_folder(tmp_path / "hf", hidden_size=64, intermediate_size=96, head_dim=16)
    with_tensors(hf, {"extra.weight": torch.randn(2)})
    shards, back = tmp_path / "shards", tmp_path / "back"
    options = ["--tp", "2", "--etp", "1", "--carry", "extra.*", "--dtype", "bfloat16"]
    done = CliRunner().invoke(main, ["import-hf", str(hf), str(shards), *options])
    assert done.exit_code == 0
    assert "MXFP4 become bfloat16: exactly" in done.output
    assert CliRunner().invoke(main, ["export-hf", str(shards), str(back), "--names", "fused"]).exit_code == 0
    stored = load_file(back / "model.safetensors")
    assert stored["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.bfloat16
    assert "extra.weight" in stored
    assert "quantization_config" not in (back / "config.json").read_text()
