"""A Hugging Face folder: which files hold the weights, which are carried along, and nothing from outside it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeconv.errors import SourceError
from moeconv.io.beside import Beside, files_beside
from moeconv.io.decode import parse_json
from moeconv.io.paths import check_folder, check_inside, check_name, read_inside
from moeconv.io.recognise import recognise
from moeconv.io.safetensors import Header, read_header
from moeconv.io.torch_bin import BIN_INDEX, bin_names, read_bin

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_CODE_OF_TRAINERS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


@dataclass(frozen=True, slots=True)
class HFFolder:
    """A Hugging Face checkpoint on disk: weight files with their headers, the index, config.json, and what lies beside them.

    `computed` names tensors of old files that are left out, since readers compute them from the config.
    """

    root: Path
    headers: dict[str, Header]
    index: bytes | None
    config_bytes: bytes
    config: dict[str, Any]
    beside: Beside
    computed: tuple[str, ...] = ()


def read_hf_folder(root: Path) -> HFFolder:
    """Read a folder's index, headers and config, and check that they agree.

    Args:
        root: the folder.

    Returns:
        What the folder holds; no weight has been read.

    Raises:
        SourceError: config or weights are missing, malformed, disagree, or lie outside the folder.
    """
    check_folder(root)
    present = sorted(p.name for p in root.glob("*.safetensors") if not p.name.startswith("consolidated"))
    weights = [*present, *bin_names(root), *(n for n in (INDEX, BIN_INDEX) if (root / n).exists())]
    if not (root / CONFIG).exists() or not weights or any((root / name).is_dir() for name in weights):
        what = recognise(root)
        if what is not None:
            raise SourceError(what)
    config_bytes = read_inside(root, CONFIG)
    config = parse_json(config_bytes, f"{root / CONFIG}")
    old = not present and not (root / INDEX).exists()  # a folder from before safetensors
    present, index_name = (bin_names(root), BIN_INDEX) if old else (present, INDEX)
    index = read_inside(root, index_name) if (root / index_name).exists() else None
    weight_map = _weight_map(root, index, index_name) if index is not None else None
    names = sorted(set(weight_map.values())) if weight_map is not None else present
    if not names:
        raise SourceError(_no_weights(root))
    _check_cut(root, names, present, index_name)
    for name in names:
        check_inside(root, name)
    extra = sorted(set(present) - set(names))
    if extra:
        raise SourceError(
            f"{root}: {', '.join(extra)} is not in {index_name}, so its tensors would be lost; move it away, or correct the index"
        )
    headers, computed = {}, list[str]()
    for name in names:
        if old:
            headers[name], left_out = read_bin(root / name)
            computed += left_out
        else:
            headers[name] = read_header(root / name)
    listed = {n: f for n, f in weight_map.items() if n not in computed} if weight_map is not None else None
    _check_index(root, headers, listed)
    return HFFolder(
        root, headers, index, config_bytes, config, files_beside(root, {*names, index_name}), tuple(computed)
    )


def _weight_map(root: Path, raw: bytes, index: str) -> dict[str, str]:
    where, kind = f"{root / index}", ".bin" if index == BIN_INDEX else ".safetensors"
    weight_map = parse_json(raw, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise SourceError(f"{where}: weight_map must map tensor names to file names")
    for name in set(weight_map.values()):
        check_name(name, where)
        if not name.endswith(kind):
            raise SourceError(f"{where}: weight_map names {name!r}, which is no {kind[1:]} file")
    return weight_map


def _check_cut(root: Path, names: list[str], present: list[str], index_name: str) -> None:
    """Tell an index that belongs to other files from a download that lacks some."""
    gone = [name for name in names if not os.path.lexists(root / name)]
    if gone and present and set(present).isdisjoint(names):
        raise SourceError(
            f"{root / index_name}: belongs to other files than those here: it names {', '.join(gone[:2])}"
            + (f" and {len(gone) - 2} more" if len(gone) > 2 else "")
            + f", the folder holds {', '.join(present[:3])}. If these are whole, move the index away: names are then read from the files"
        )


def _check_index(root: Path, headers: dict[str, Header], weight_map: dict[str, str] | None) -> None:
    seen: dict[str, str] = {}
    for file, header in headers.items():
        for entry in header.entries:
            if entry.name in seen:
                raise SourceError(
                    f"{root}: {entry.name} is stored twice, in {seen[entry.name]} and in {file}; remove one"
                )
            seen[entry.name] = file
            if weight_map is not None and weight_map.get(entry.name) != file:
                listed = weight_map.get(entry.name)
                says = f"puts it in {listed}" if listed else "does not list it"
                raise SourceError(f"{root}: {entry.name} is in {file}, but {INDEX} {says}; correct the index")
    for name, file in (weight_map or {}).items():
        if name not in seen:
            raise SourceError(f"{root}: {INDEX} puts {name} in {file}, which doesn't hold it; download {file} again")


def _no_weights(root: Path) -> str:
    pickles = sorted(p.name for p in root.iterdir() if p.name.endswith(_PICKLES) and p.name not in _CODE_OF_TRAINERS)
    if pickles:
        return (
            f"{root}: only pickle weights ({pickles[0]}), which can run code when read, and are refused; "
            "save the model with transformers' save_pretrained, which writes safetensors"
        )
    return f"{root}: no *.safetensors file; expected a Hugging Face checkpoint"
