"""What makes a folder of rank files a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf
from moeconv.errors import IntegrityError
from moeconv.finish import finish_checkpoint
from moeconv.io.shards import ShardEntry, write_shard_file
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bf16 Mixtral written by transformers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_local_experts": 2,
    }
    folder = tmp_path_factory.mktemp("finish") / "hf"
    config = MixtralConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)
    MixtralForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


def entries(source: Path, kind: str) -> list[ShardEntry]:
    """Every tensor whole, its values in another dtype."""
    checkpoint = open_checkpoint(source)
    out = []
    for name, info in checkpoint.tensors.items():
        data = checkpoint.read(name).astype(np.dtype(kind))
        out.append(ShardEntry(name, "F32", info.shape, Rect.whole(info.shape), data.reshape(-1).view(np.uint8)))
    return out


def test_weights_trained_in_fp32_load_as_fp32_in_transformers(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "run"
    folder.mkdir()
    record = write_shard_file(folder, "dense-tp0-pp0.safetensors", entries(source, "float32"))
    finish_checkpoint(folder, open_checkpoint(source), Degrees(), [record])
    write_hf(open_checkpoint(folder), tmp_path / "hf", None, Options())
    before, after = AutoModelForCausalLM.from_pretrained(source), AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert str(after.dtype) == "torch.float32"
    for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert (a.float() == b).all(), name
    config = json.loads((source / "config.json").read_bytes())
    assert json.loads((tmp_path / "hf" / "config.json").read_bytes()) == config | {"dtype": "float32"}


def test_a_stored_bias_in_fp32_changes_no_dtype(tmp_path: Path) -> None:
    """A run keeps the router's bias in fp32; that of the weights is what config.json says."""
    import torch

    from tests.upcycle.hub import make_folder

    made = open_checkpoint(make_folder(tmp_path / "hf", "deepseek_v3", torch.bfloat16))
    (tmp_path / "run").mkdir()
    kept = []
    for name, info in made.tensors.items():
        buffer = made.model.tensors[name].rule.buffer
        data, kind = made.read(name), "F32" if buffer else info.dtype
        data = (data.astype(np.float32) if buffer else data).reshape(-1).view(np.uint8)
        kept.append(ShardEntry(name, kind, info.shape, Rect.whole(info.shape), data))
    record = write_shard_file(tmp_path / "run", "dense-tp0-pp0.safetensors", kept)
    finish_checkpoint(tmp_path / "run", made, Degrees(), [record])
    assert json.loads((tmp_path / "run/config.json").read_bytes())["dtype"] == "bfloat16"


def test_a_gap_is_no_checkpoint(source: Path, tmp_path: Path) -> None:
    whole = entries(source, "float32")
    first = whole[0]
    half = Rect.slab(first.shape, 0, 0, 1)
    cut = ShardEntry(first.name, first.dtype, first.shape, half, first.data[: half.size * 4])
    record = write_shard_file(tmp_path, "dense-tp0-pp0.safetensors", [cut, *whole[1:]])
    with pytest.raises(IntegrityError, match=first.name):
        finish_checkpoint(tmp_path, open_checkpoint(source), Degrees(), [record])
    assert not (tmp_path / "moeconv.json").exists()


def test_what_a_run_does_not_read_goes_along(source: Path, tmp_path: Path) -> None:
    """From the source, and once that is gone, from what the run saved before."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    hf = Path(shutil.copytree(source, tmp_path / "hf"))
    more = {"model.visual.weight": torch.randn(3, 4), "mtp.norm.weight": torch.randn(5).to(torch.float8_e4m3fn)}
    save_file(load_file(hf / "model.safetensors") | more, hf / "model.safetensors", {"format": "pt"})
    start = open_checkpoint(hf, ["model.visual.*", "mtp.*"])
    trained = [e for e in entries(source, "float32") if e.name not in more]
    _ = start.carried_bytes
    for step in ("1", "2"):
        folder = tmp_path / "run" / step
        folder.mkdir(parents=True)
        record = write_shard_file(folder, "dense-tp0-pp0.safetensors", trained)
        finish_checkpoint(folder, start, Degrees(), [record])
        found = open_checkpoint(folder)
        assert set(found.model.carried) == set(more)
        for name, tensor in more.items():
            assert found.read(name).tobytes() == tensor.view(torch.uint8).numpy().tobytes()
        shutil.rmtree(hf, ignore_errors=True)
