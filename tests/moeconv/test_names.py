"""Names that become paths: whatever a manifest, an index or a journal says, nothing outside the folder is read or written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.errors import MoeconvError, SourceError, WriteError
from moeconv.io.checksum import checksum
from moeconv.io.hf_folder import INDEX
from moeconv.io.manifest import MANIFEST
from moeconv.io.paths import fault_of
from moeconv.io.staging import JOURNAL, Staging, write_beneath
from moeconv.layout.degrees import Degrees
from tests.moeconv.models import Spec, make_folder

HOSTILE = [
    "/tmp/moeconv-outside.safetensors",
    "../outside.safetensors",
    "a/../../outside.safetensors",
    "./model.safetensors",
    "a//b.safetensors",
    "",
    "nul\0byte.safetensors",
    "back\\slash.safetensors",
    "C:outside.safetensors",
    "CON.safetensors",
    "line\nbreak.safetensors",
    "surrogate\udc80.safetensors",
    "x" * 300 + ".safetensors",
    "a/" * 600 + "b.safetensors",
    ".hidden.safetensors",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("names")
    folder = make_folder(root / "source", Spec(files=2, index=True))
    write_sharded(open_checkpoint(folder), root / "shards", Degrees(tp=2, ep=2), Options())
    return root / "shards"


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "inner" / "shards"))


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a manifest and give it the checksum that the edited one has."""
    value = json.loads((folder / MANIFEST).read_text())
    value.pop("manifest_checksum")
    edit(value)
    digest = checksum(json.dumps(value, separators=(",", ":")).encode())
    (folder / MANIFEST).write_text(json.dumps(value | {"manifest_checksum": digest}))


def everything(root: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("group", ["files", "source", "carried"])
def test_no_name_of_a_manifest_leads_outside(copy: Path, tmp_path: Path, group: str, name: str) -> None:
    change(copy, lambda v: v[group].update({name: v[group].pop(next(iter(v[group])))}))
    before = everything(tmp_path)
    with pytest.raises(SourceError, match=r"files inside its own folder|half a character"):
        write_hf(open_checkpoint(copy), tmp_path / "out", None, Options())
    assert everything(tmp_path) == before
    assert not os.path.lexists("/tmp/moeconv-outside.safetensors")


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", INDEX, MANIFEST, "pytorch_model.bin", "x.gguf"])
def test_no_carried_file_stands_in_for_weights(copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"EVIL") if name != MANIFEST else None
    change(copy, lambda v: v["carried"].update({name: {"size": 4, "checksum": checksum(b"EVIL")}}))
    with pytest.raises(SourceError, match="stand in for them"):
        open_checkpoint(copy)


@pytest.mark.parametrize("name", ["config.json", JOURNAL, "weights"])
def test_no_weights_bear_another_files_name(copy: Path, name: str) -> None:
    change(copy, lambda v: v["source"].update({name: v["source"].pop(next(iter(v["source"])))}))
    with pytest.raises(SourceError, match=r"is damaged|its own folder"):
        open_checkpoint(copy)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_of_an_index_leads_outside(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "source", Spec(files=2, index=True))
    table = json.loads((folder / INDEX).read_text())
    table["weight_map"][next(iter(table["weight_map"]))] = name
    (folder / INDEX).write_text(json.dumps(table))
    with pytest.raises(MoeconvError, match=r"outside|own folder|no safetensors file|half a character"):
        open_checkpoint(folder)


@pytest.mark.parametrize("where", ["shard", "config", "carried"])
@pytest.mark.parametrize("what", ["link", "fifo"])
def test_files_are_regular_and_inside(copy: Path, tmp_path: Path, where: str, what: str) -> None:
    name = {"shard": "dense-tp0-pp0.safetensors", "config": "config.json", "carried": "tokenizer.json"}[where]
    path = copy / name
    path.rename(tmp_path / "elsewhere")
    if what == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(path)
    with pytest.raises(SourceError, match=r"outside the folder|no regular file"):
        _ = open_checkpoint(copy).carried_bytes


@pytest.mark.parametrize("name", [n for n in HOSTILE if n != ".hidden.safetensors"])
def test_writing_stays_beneath_whoever_asks(tmp_path: Path, name: str) -> None:
    staging = Staging(tmp_path / "inner", {}, resume=False)
    for write in (lambda: staging.write(name, b"x"), lambda: staging.open(name, os.O_WRONLY | os.O_CREAT)):
        with pytest.raises(WriteError):
            write()
    staging.close()
    assert set(everything(tmp_path)) == {tmp_path / "inner.partial" / JOURNAL}


def test_writing_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    root = tmp_path / "root"
    root.mkdir()
    (root / "folder").symlink_to(tmp_path)
    (root / "file.writing").symlink_to(tmp_path / "victim")
    for name in ("folder/victim", "file"):
        with pytest.raises(WriteError, match="a link is in the way"):
            write_beneath(root, name, b"theirs")
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_partial_output_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WriteError, match="never written through"):
        Staging(tmp_path / "out", {}, resume=True)


def test_plain_names_pass() -> None:
    assert [
        n for n in ("config.json", "a/b c.txt", "model-00001-of-00002.safetensors", "Größe.md") if fault_of(n)
    ] == []
