"""docs/format.md says all that a reader needs: the one that was written from it reads every kind of checkpoint, and refuses damage."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors import deserialize

from moeconv import dtypes
from moeconv.checkpoint import open_checkpoint
from moeconv.convert import Options, write_sharded
from moeconv.io import adapter, decode, manifest, trainer_file
from moeconv.layout.degrees import Degrees
from tests.docs.reader import SIZES, read
from tests.moeconv.models import Spec, make_folder

PAGE = Path(__file__).parents[2] / "docs" / "format.md"
LAYOUTS = (
    Degrees(),
    Degrees(tp=4, ep=2, etp=3),  # more ranks than key/value heads, words that don't divide
    Degrees(tp=2, pp=2, vpp=2, ep=4, etp=1, pp_layers=(2, 1, 1, 1)),
)


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Read a Hugging Face folder with the safetensors library: name -> dtype, shape, bytes."""
    found = {}
    for path in folder.glob("*.safetensors"):
        for name, value in deserialize(path.read_bytes()):
            found[name] = value["dtype"], tuple(value["shape"]), bytes(value["data"])
    return found


def as_stored(tensors: dict[str, tuple[str, np.ndarray[Any, Any]]]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (kind, array.shape, array.tobytes()) for name, (kind, array) in tensors.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = Spec(layers=5, files=3, index=True, router="F32")
    return make_folder(tmp_path_factory.mktemp("format") / "hf", spec)


def shard(source: Path, out: Path, degrees: Degrees) -> Path:
    write_sharded(open_checkpoint(source), out, degrees, Options(sync=False))
    return out


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
def test_every_layout_is_read(tmp_path: Path, source: Path, degrees: Degrees) -> None:
    expected = stored(source)
    assert expected
    assert as_stored(read(shard(source, tmp_path / "ckpt", degrees))) == expected


def test_quantised_and_carried_tensors_are_read(tmp_path: Path) -> None:
    import torch

    from tests.moeconv.quantised import quantise_folder

    further = {"model.layers.2.enorm.weight": torch.randn(256).to(torch.bfloat16)}
    sizes: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 512, "head_dim": 64}
    latent = {"q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
    source = quantise_folder(
        tmp_path / "hf", "deepseek_v3", "fp8", lambda name: ".experts." in name, further,
        **sizes, **latent, num_nextn_predict_layers=1,
    )  # fmt: skip
    out = shard(source, tmp_path / "ckpt", Degrees(pp=2, ep=2, etp=2))
    assert (out / "carried-pp1.safetensors").exists()
    found = as_stored(read(out))
    assert {kind for kind, _, _ in found.values()} >= {"F8_E4M3", "BF16", "F32"}
    assert found == stored(source)


def change(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def edit(folder: Path, action: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "moeconv.json"
    value = json.loads(path.read_text())
    action(value)
    path.write_text(json.dumps(value, indent=1))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a byte of a tensor": lambda f: change(f / "experts-ep1-etp2-pp0.safetensors", -1),
    "a byte of a header": lambda f: change(f / "dense-tp0-pp0.safetensors", 300),
    "a byte of a carried file": lambda f: change(f / "tokenizer.json", 3),
    "another place": lambda f: edit(f, lambda m: m["files"]["dense-tp1-pp0.safetensors"]["tensors"][0].update(offsets=[0, 0])),
    "a version": lambda f: edit(f, lambda m: m.update(format_version=2)),
    "a file too many": lambda f: shutil.copy(f / "dense-tp0-pp0.safetensors", f / "more.safetensors"),
    "a file too few": lambda f: (f / "dense-tp0-pp0.safetensors").unlink(),
    "a file cut off": lambda f: (f / "dense-tp0-pp0.safetensors").write_bytes(
        (f / "dense-tp0-pp0.safetensors").read_bytes()[:-1]
    ),
}  # fmt: skip


def refuses(folder: Path) -> bool:
    try:
        read(folder)
    except (ValueError, OSError):
        return True
    return False


def test_damage_is_refused(tmp_path: Path, source: Path) -> None:
    whole = shard(source, tmp_path / "ckpt", LAYOUTS[1])
    for number, (what, damage) in enumerate(DAMAGE.items()):
        folder = shutil.copytree(whole, tmp_path / str(number))
        damage(folder)
        assert refuses(folder), what


def table(heading: str) -> list[str]:
    """Give the code words in the first column of the tables below a heading of the page."""
    text = PAGE.read_text(encoding="utf8")
    section = text[text.index(f"\n## {heading}\n") + 5 :].split("\n## ")[0]
    return [
        word for line in section.splitlines() if line.startswith("| `")
        for word in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]  # fmt: skip


def fields(*kinds: type) -> Iterator[str]:
    for kind in kinds:
        yield from (field.encode_name for field in msgspec.structs.fields(kind))


def test_the_page_names_every_field_and_bound() -> None:
    named = fields(manifest._Manifest, manifest._File, manifest._Tensor)
    assert sorted(set(table("moeconv.json")) - {"manifest_checksum"}) == sorted(set(named))
    assert sorted(table("trainer.json")) == sorted(fields(trainer_file._Trainer))
    assert set(SIZES) == set(dtypes._TABLE) <= set(table("A tensor file"))
    text = PAGE.read_text(encoding="utf8")
    for name in (*fields(adapter.AdapterRecord), *fields(trainer_file._Optimizer)):
        assert f"`{name}`" in text, name
    assert f"format version {manifest.FORMAT_VERSION}" in text
    for number in (manifest.MAX_MANIFEST_VALUES, decode.MAX_DIMS, decode.MAX_NAME_CHARS, manifest.MAX_HEADER_BYTES + 8):
        assert f"{number:,}" in text or str(number) in text, number
    assert manifest.MAX_MANIFEST_BYTES == 2**30
    assert manifest.MAX_STORED_BYTES == 256 * 2**20
