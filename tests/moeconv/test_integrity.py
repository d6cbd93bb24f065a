"""Damaged, hostile and odd files: each is refused with its name, or passes unchanged where nothing is wrong with it."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeconv.checkpoint import Checkpoint, open_checkpoint
from moeconv.convert import Options, write_hf, write_sharded
from moeconv.errors import IntegrityError, MoeconvError, SourceError
from moeconv.io.manifest import MANIFEST
from moeconv.io.safetensors import MAX_HEADER_BYTES, read_header
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect
from tests.moeconv.models import Spec, digests, make_folder

INDEX = "model.safetensors.index.json"
SPEC = Spec(files=3, index=True)
FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "source", SPEC)


@pytest.fixture
def shards(tmp_path: Path, folder: Path) -> Path:
    write_sharded(open_checkpoint(folder), tmp_path / "shards", Degrees(tp=2, ep=2, pp=2), Options())
    return tmp_path / "shards"


def refuse(path: Path, *words: str, kind: type[MoeconvError] = SourceError) -> None:
    with pytest.raises(kind) as caught:
        open_checkpoint(path)
    assert [word for word in words if word not in str(caught.value)] == []


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write a file's header anew after `change`, its data as they were."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    change(table)
    put_header(path, json.dumps(table).encode(), raw[8 + length :])


def put_header(path: Path, text: bytes, data: bytes) -> None:
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def ordered(table: dict[str, Any]) -> list[str]:
    """Give the tensors' names in the order of their data."""
    names = [name for name in table if name != "__metadata__"]
    return sorted(names, key=lambda name: table[name]["data_offsets"])


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_truncated_source_file(folder: Path, kept: int) -> None:
    path = folder / FIRST
    path.write_bytes(path.read_bytes()[:kept])
    refuse(folder, str(path))


def test_bytes_after_the_end(folder: Path) -> None:
    with open(folder / FIRST, "ab") as file:
        file.write(b"\0")
    refuse(folder, FIRST, "longer than its header says")


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**40, 2**64 - 1])
def test_absurd_header_length(folder: Path, length: int) -> None:
    path = folder / FIRST
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refuse(folder, FIRST, f"header length {length}")


def _overlap(table: dict[str, Any]) -> None:
    a, b = ordered(table)[:2]
    size = table[b]["data_offsets"][1] - table[b]["data_offsets"][0]
    begin = table[a]["data_offsets"][0]
    table[b]["data_offsets"] = [begin, begin + size]


def _gap(table: dict[str, Any]) -> None:
    for name in ordered(table)[1:]:
        table[name]["data_offsets"] = [n + 2 for n in table[name]["data_offsets"]]


def _field(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        table[ordered(table)[0]][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_overlap, ["overlaps", "data_offsets"]),
        (_gap, ["gap of 2 bytes"]),
        (_field("data_offsets", [0, 1]), ["data_offsets [0, 1]"]),
        (_field("data_offsets", [-2, 0]), ["malformed"]),
        (_field("data_offsets", [0.0, 2.0]), ["malformed"]),
        (_field("data_offsets", "ab"), ["malformed"]),
        (_field("shape", [2**62, 2**62]), ["data_offsets"]),
        (_field("shape", [True]), ["malformed"]),
        (_field("shape", None), ["malformed"]),
        (_field("dtype", "F7"), ["F7"]),
        (_field("dtype", None), ["malformed"]),
        (_field("dtype", ["BF16"]), ["malformed"]),
        (_field("stride", [1]), ["malformed"]),
        (lambda table: table.update(__metadata__={"a": 1}), ["__metadata__"]),
        (lambda table: table.update(x=3), ["malformed", "'x'"]),
    ],
)
def test_header_that_lies(folder: Path, change: Callable[[dict[str, Any]], Any], words: list[str]) -> None:
    edit_header(folder / FIRST, change)
    refuse(folder, FIRST, *words)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000])
def test_header_that_is_no_object(folder: Path, text: bytes) -> None:
    put_header(folder / FIRST, text, b"")
    refuse(folder, FIRST)


def test_duplicate_keys(folder: Path) -> None:
    raw = (folder / FIRST).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text, data = raw[8 : 8 + length].rstrip(), raw[8 + length :]
    name = ordered(json.loads(text))[0]
    again = json.dumps({name: json.loads(text)[name]}).encode()
    put_header(folder / FIRST, text[:-1] + b"," + again[1:], data)
    refuse(folder, FIRST, name, "twice")
    put_header(folder / FIRST, text, data)
    open_checkpoint(folder)
    for file, key in (("config.json", "vocab_size"), (INDEX, "weight_map")):
        whole = (folder / file).read_text()
        (folder / file).write_text("{" + f'"{key}": {{}},' + whole[1:])
        refuse(folder, file, key, "twice")
        (folder / file).write_text(whole)


@pytest.mark.parametrize("kind", ["climbs", "absolute", "backslash", "link", "folder link", "no weights", "missing"])
def test_weight_map_outside_the_folder(tmp_path: Path, folder: Path, kind: str) -> None:
    outside = tmp_path / "outside" / FIRST
    outside.parent.mkdir()
    shutil.move(folder / FIRST, outside)
    name = {
        "climbs": f"../outside/{FIRST}",
        "absolute": str(outside),
        "backslash": f"..\\outside\\{FIRST}",
        "folder link": f"down/{FIRST}",
        "no weights": "config.json",
    }.get(kind, FIRST)
    if kind == "link":
        (folder / FIRST).symlink_to(outside)
    if kind == "folder link":
        (folder / "down").symlink_to(outside.parent)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {t: name if f == FIRST else f for t, f in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    refuse(folder, repr(name)[1:-1] if kind != "missing" else "no such file")


def test_carried_link_out_of_the_folder(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "secret").write_text("not yours")
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    refuse(folder, "vocab.txt", "outside the folder")


def test_hub_cache_of_links_to_blobs(tmp_path: Path, folder: Path) -> None:
    cached = tmp_path / "models--a--b"
    (cached / "blobs").mkdir(parents=True)
    snapshot = cached / "snapshots" / "0123"
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = cached / "blobs" / str(abs(hash(path)))
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    write_sharded(open_checkpoint(snapshot), tmp_path / "shards", Degrees(tp=2), Options())
    write_hf(open_checkpoint(tmp_path / "shards"), tmp_path / "export", None, Options())
    assert digests(tmp_path / "export") == digests(folder)
    assert not any(p.is_symlink() for p in [*(tmp_path / "shards").rglob("*"), *(tmp_path / "export").rglob("*")])


def test_index_that_disagrees(folder: Path) -> None:
    original = json.loads((folder / INDEX).read_text())
    name = next(t for t, f in original["weight_map"].items() if f == FIRST)
    other = "model-00002-of-00003.safetensors"
    for change, words in (
        (lambda m: m.update({name: other}), [name, FIRST, other]),
        (lambda m: m.pop(name), [name, "does not list it"]),
        (lambda m: m.update(ghost=other), ["ghost", other]),
        (lambda m: [m.pop(t) for t, f in list(m.items()) if f == FIRST], [FIRST, "not in"]),
        (lambda m: m.clear(), ["weight_map"]),
        (lambda m: m.update({name: 3}), ["weight_map"]),
    ):
        index = json.loads(json.dumps(original))
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))
        refuse(folder, *words)


def _convert(shards: Path, out: Path, form: str) -> None:
    source = open_checkpoint(shards)
    if form == "hf":
        write_hf(source, out, None, Options())
    elif form == "cut":
        write_hf(source, out, 1500, Options())
    else:
        write_sharded(source, out, Degrees(tp=1 if form == "merge" else 4, etp=3), Options())


@pytest.mark.parametrize("form", ["hf", "cut", "merge", "split"])
def test_flipped_byte_in_a_shard(tmp_path: Path, shards: Path, form: str) -> None:
    draw = random.Random(form)
    for number, path in enumerate(sorted(shards.glob("*.safetensors"))):
        whole = path.read_bytes()
        header = read_header(path)
        for place in {0, len(header.raw) - 1, len(header.raw), len(whole) - 1, draw.randrange(len(whole))}:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            out = tmp_path / f"out-{number}-{place}"
            with pytest.raises((IntegrityError, SourceError)) as caught:
                _convert(shards, out, form)
            assert path.name in str(caught.value)
            held = next((e.name for e in header.entries if e.begin <= place < e.end), None)
            assert held is None or held in str(caught.value)
            assert not out.exists()
        path.write_bytes(whole)
    _convert(shards, tmp_path / "whole", form)


def test_shards_that_are_cut_off_or_gone_after_opening(shards: Path) -> None:
    checkpoint = open_checkpoint(shards)
    name, pieces = next(iter(checkpoint.pieces.items()))
    path = shards / pieces[-1].file
    os.truncate(path, pieces[-1].begin + 1)
    with pytest.raises(SourceError, match=rf"{path}: ends \d+ bytes early"):
        checkpoint.read(name)
    path.unlink()
    with pytest.raises(SourceError, match=rf"{path}: can't be read: No such file"):
        checkpoint.read(name)


def test_any_part_of_a_tensor_can_be_read(folder: Path, shards: Path) -> None:
    whole, cut, rng = open_checkpoint(folder), open_checkpoint(shards), random.Random(0)
    for name, info in whole.tensors.items():
        everything = whole.read(name)
        assert everything.shape == info.shape
        for _ in range(5):
            ends = [sorted(rng.sample(range(size + 1), 2)) for size in info.shape]
            rect = Rect(tuple(begin for begin, _ in ends), tuple(end - begin for begin, end in ends))
            wanted = everything[rect.slices()].tobytes()
            assert whole.read(name, rect).tobytes() == wanted
            assert cut.read(name, rect).tobytes() == wanted


def test_flipped_byte_in_the_manifest(shards: Path) -> None:
    path = shards / MANIFEST
    whole = path.read_bytes()
    draw = random.Random(0)
    for place in draw.sample(range(len(whole) - 1), 200):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            same = json.loads(damaged) == json.loads(whole)  # white space became other white space
        except ValueError:
            same = False
        if not same:
            with pytest.raises(MoeconvError):
                open_checkpoint(shards)
    path.write_bytes(whole)
    open_checkpoint(shards)


def test_missing_or_exchanged_shards(shards: Path) -> None:
    a, b = sorted(shards.glob("experts-*.safetensors"))[:2]
    first, second = a.read_bytes(), b.read_bytes()
    a.unlink()
    refuse(shards, a.name)
    a.write_bytes(second)
    b.write_bytes(first)
    refuse(shards, a.name, kind=IntegrityError)
    a.write_bytes(first[:-1])
    b.write_bytes(second)
    refuse(shards, a.name)


def test_folder_without_a_manifest(shards: Path) -> None:
    (shards / MANIFEST).unlink()
    refuse(shards, MANIFEST, "did not finish")


def test_changed_config_or_carried_file_of_shards(tmp_path: Path, shards: Path) -> None:
    path = shards / "config.json"
    whole = path.read_text()
    path.write_text(whole.replace('"num_local_experts": 4', '"num_local_experts": 8'))
    with pytest.raises(MoeconvError, match=r"experts|config\.json"):
        open_checkpoint(shards)
    path.write_text(whole)
    (shards / "tokenizer.json").write_text('{"any": "x"}')
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        write_hf(open_checkpoint(shards), tmp_path / "export", None, Options())
    (shards / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        write_sharded(open_checkpoint(shards), tmp_path / "export", Degrees(), Options())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shards", "source"]


def test_nan_bytes_pass_unchanged(tmp_path: Path) -> None:
    patterns = {"BF16": [0x7FC1, 0xFFFF, 0x7F81, 0x8000], "F16": [0x7E01, 0xFFFF, 0x7C01, 0x8000]}
    patterns["F32"] = [0x7FC00001, 0xFFFFFFFF, 0x7F800001, 0x80000000]
    for kind, values in patterns.items():
        word = "<u4" if kind == "F32" else "<u2"
        folder = make_folder(tmp_path / f"source-{kind}", Spec(dtype=kind, router=kind))
        path = folder / "model.safetensors"
        begin = len(read_header(path).raw)
        data = np.resize(np.array(values, word), (path.stat().st_size - begin) // np.dtype(word).itemsize)
        path.write_bytes(path.read_bytes()[:begin] + data.tobytes())
        write_sharded(open_checkpoint(folder), tmp_path / f"s-{kind}", Degrees(tp=4, ep=2), Options())
        write_hf(open_checkpoint(tmp_path / f"s-{kind}"), tmp_path / f"e-{kind}", None, Options())
        assert digests(tmp_path / f"e-{kind}") == digests(folder)


class Bomb:
    """A pickle of it runs a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_never_run(tmp_path: Path, name: str) -> None:
    import torch

    folder = make_folder(tmp_path / "source", Spec())
    (folder / "model.safetensors").unlink()
    for write in (torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))):
        write({"model.norm.weight": Bomb(tmp_path / "ran")}, folder / name)
        refuse(folder, "consolidated" if name.startswith("consolidated") else name)
        assert not (tmp_path / "ran").exists()


def test_pickles_beside_safetensors_are_left_alone(tmp_path: Path, folder: Path) -> None:
    clean = digests(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    (folder / "consolidated.safetensors").write_bytes(b"another form of the weights")
    checkpoint: Checkpoint = open_checkpoint(folder)
    write_sharded(checkpoint, tmp_path / "shards", Degrees(ep=4), Options())
    write_hf(open_checkpoint(tmp_path / "shards"), tmp_path / "export", None, Options())
    assert digests(tmp_path / "export") == clean
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("files", [[], ["config.json"], ["model.safetensors"]])
def test_folder_that_is_no_checkpoint(tmp_path: Path, files: list[str]) -> None:
    folder = make_folder(tmp_path / "source", Spec())
    for path in [p for p in folder.iterdir() if p.name not in files]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    refuse(folder, "source")
    refuse(tmp_path / "nowhere", "no such folder")
