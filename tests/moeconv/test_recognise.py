"""Folders that are no checkpoint of ours: each is named, with the command that goes on from there."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeconv.checkpoint import open_checkpoint
from moeconv.errors import SourceError
from tests.moeconv.models import Spec, make_folder

FOLDERS: dict[str, tuple[list[str], str]] = {
    "adapter": (["adapter_config.json", "adapter_model.safetensors"], "PEFT adapter.*merge_and_unload"),
    "Megatron torch": (
        ["latest_checkpointed_iteration.txt", "iter_0000010/mp_rank_00_000/model_optim_rng.pt"],
        "Megatron-Core.*moeconv import-megatron",
    ),
    "Megatron torch_dist": (
        ["iter_0000010/common.pt", "iter_0000010/.metadata", "iter_0000010/__0_0.distcp"],
        "torch_dist.*moeconv import-megatron",
    ),
    "ZeRO": (
        ["config.json", "latest", "zero_to_fp32.py", "global_step5/mp_rank_00_model_states.pt"],
        "ZeRO.*zero_to_fp32.py",
    ),
    "FSDP": (["pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"], "FSDP.*accelerate merge-weights"),
    "NeMo": (["model.nemo"], "NeMo"),
    "GGUF": (["config.json", "model-q4.gguf"], "GGUF.*original repository"),
    "consolidated": (["params.json", "consolidated.00.pth", "tokenizer.model"], r"consolidated.*model\*\.safetensors"),
    "a hub cache": (["models--a--b/snapshots/0123/config.json", "models--a--b/refs/main"], "hub cache.*OWNER/NAME"),
    "a repository in it": (["snapshots/0123/config.json", "blobs/00"], "hub's cache.*snapshots/COMMIT"),
    "part of a download": (
        ["config.json", ".cache/huggingface/download/x.safetensors.incomplete"],
        "did not finish.*run the same download again",
    ),
    "another framework": (["config.json", "tf_model.h5"], "another framework"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_each_is_named_with_the_way_on(name: str, tmp_path: Path) -> None:
    files, message = FOLDERS[name]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(SourceError, match=message):
        open_checkpoint(tmp_path)


def test_weights_that_are_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").mkdir()
    (tmp_path / "pytorch_model.bin" / "data.pkl").write_bytes(b"")
    with pytest.raises(SourceError, match="is a folder, and a file of weights is expected"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.model"])
def test_pointers_of_git_lfs(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "hf", Spec())
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    (folder / name).write_text(text)
    with pytest.raises(SourceError, match=rf"{name}: is a Git LFS pointer.*git lfs pull"):
        open_checkpoint(folder)


def test_files_of_others_beside_weights_change_nothing(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "hf", Spec())
    for name in ("adapter_config.json", "adapter_model.safetensors.txt", "model.gguf", "optimizer.bin"):
        (folder / name).write_bytes(b"{}")
    assert open_checkpoint(folder).kind == "hf"
