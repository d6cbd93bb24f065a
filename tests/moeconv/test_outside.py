"""Other programs read what moeconv writes: torch's distributed checkpoint, transformers and the safetensors library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.layout.degrees import Degrees
from tests.moeconv.models import digests

LAYOUTS = [Degrees(), Degrees(tp=4, ep=2, etp=3), Degrees(tp=2, pp=2, ep=4, etp=1, pp_layers=(2, 1))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral that transformers made and saved; 37 words don't divide by 4, and 2 key/value heads are fewer than 4 ranks."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    folder = tmp_path_factory.mktemp("hf") / "mixtral"
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture(params=LAYOUTS, ids=str)
def shards(request: pytest.FixtureRequest, tmp_path: Path, source: Path) -> Path:
    write_sharded(open_checkpoint(source), tmp_path / "shards", request.param, Options())
    return tmp_path / "shards"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    bits = torch.int16
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n].contiguous().view(bits), b[n].contiguous().view(bits)) for n in a
    )


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_loads_shards(source: Path, shards: Path) -> None:
    expected = weights(source)
    state = {name: torch.full_like(tensor, -1) for name, tensor in expected.items()}
    load(state, storage_reader=HuggingFaceStorageReader(str(shards)), no_dist=True)
    assert same(state, expected)


def test_consolidation_gives_whole_tensors(tmp_path: Path, source: Path, shards: Path) -> None:
    expected = weights(source)
    (tmp_path / "whole").mkdir()
    consolidate_safetensors_files(str(shards), str(tmp_path / "whole"), dict.fromkeys(expected, 1))
    assert same(weights(tmp_path / "whole"), expected)


def test_safetensors_opens_every_shard(source: Path, shards: Path) -> None:
    whole = weights(source)
    ours = open_checkpoint(shards)
    for file in ours.files:
        with safe_open(shards / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (no mapping: it can't be iterated)
                rect = next(p.rect for p in ours.pieces[name] if p.file == file)
                assert torch.equal(opened.get_tensor(name), whole[name][rect.slices()])


@pytest.mark.parametrize("max_shard_size", [None, 9000])
def test_transformers_loads_the_export_with_equal_logits(
    tmp_path: Path, source: Path, shards: Path, max_shard_size: int | None
) -> None:
    write_hf(open_checkpoint(shards), tmp_path / "export", max_shard_size, Options())
    if max_shard_size is None:
        assert digests(tmp_path / "export") == digests(source)
    tokens = torch.randint(0, 37, (2, 11), generator=torch.Generator().manual_seed(1))
    logits = []
    for folder in (source, tmp_path / "export"):
        model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(report.values())
        with torch.no_grad():
            logits.append(model.eval()(tokens).logits)
    assert torch.equal(*logits)


def test_the_fused_names_of_transformers_5(tmp_path: Path, source: Path) -> None:
    model = MixtralForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in weights(tmp_path / "fused")
    fused, hub = open_checkpoint(tmp_path / "fused"), open_checkpoint(source)
    assert fused.tensors == hub.tensors
    assert all(fused.read(name).tobytes() == hub.read(name).tobytes() for name in hub.tensors)
    write_sharded(fused, tmp_path / "shards", LAYOUTS[1], Options())
    write_hf(open_checkpoint(tmp_path / "shards"), tmp_path / "export", None, Options())
    assert digests(tmp_path / "export") == digests(tmp_path / "fused")
