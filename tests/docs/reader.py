"""A reader of sharded checkpoints, written from docs/format.md alone: it knows JSON, numpy and XXH3, and nothing of this project."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2}
SIZES |= {"U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8}


def digest(data: bytes) -> str:
    return xxhash.xxh3_128(data, seed=0).digest().hex()


def require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "moeconv.json").read_bytes())
    said = [manifest[key] for key in ("format", "format_version", "checksums")]
    require(said == ["moeconv", 1, "xxh3-128"], f"another format: {said}")
    recorded = manifest.pop("manifest_checksum")
    require(digest(json.dumps(manifest, separators=(",", ":")).encode()) == recorded, "the manifest was changed")
    for name, file in manifest["carried"].items():
        data = (folder / name).read_bytes()
        require((len(data), digest(data)) == (file["size"], file["checksum"]), f"{name} was changed")
    return manifest


def read(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Read every tensor: name -> its dtype, and its elements as an array of unsigned integers of their size."""
    manifest, out, left = read_manifest(folder), {}, {}
    require({p.name for p in folder.glob("*.safetensors")} == set(manifest["files"]), "files and manifest differ")
    for file_name, file in manifest["files"].items():
        raw = (folder / file_name).read_bytes()
        begin = 8 + struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8:begin])
        saved = json.loads(header.pop("__metadata__")["DCP_SHARDING_INFO"])
        require(len(raw) == file["size"] and digest(raw[:begin]) == file["header"], f"{file_name}: its header")
        parts = file["header"] + "".join(rect["checksum"] for rect in file["tensors"])
        require(digest(bytes.fromhex(parts)) == file["checksum"], f"{file_name}: its checksum")
        require(header.keys() == {rect["name"] for rect in file["tensors"]}, f"{file_name}: its tensors")
        position = 0
        for rect in file["tensors"]:
            name, kind, shape = rect["name"], rect["dtype"], tuple(rect["shape"])
            entry = header[name]
            first, last = entry["data_offsets"]
            require((entry["dtype"], entry["shape"]) == (kind, rect["extent"]) and first == position, f"{name}: entry")
            require(saved[name]["saved_offsets"] == rect["offsets"], f"{name}: torch would put it elsewhere")
            data, position = raw[begin + first : begin + last], last
            require(digest(data) == rect["checksum"], f"{file_name}: {name}: its bytes")
            if name not in out:
                out[name] = kind, np.zeros(shape, f"<u{SIZES[kind]}")
                left[name] = np.ones(shape, bool)
            place = tuple(slice(o, o + n) for o, n in zip(rect["offsets"], rect["extent"], strict=True))
            require(out[name][0] == kind and out[name][1].shape == shape, f"{name}: two types or shapes")
            require(left[name][place].shape == tuple(rect["extent"]), f"{name}: outside its tensor")
            require(bool(left[name][place].all()), f"{name}: stored twice")
            out[name][1][place] = np.frombuffer(data, f"<u{SIZES[kind]}").reshape(rect["extent"])
            left[name][place] = False
        require(begin + position == len(raw), f"{file_name}: its length")
    require(not any(missing.any() for missing in left.values()), "elements in no file")
    return out
