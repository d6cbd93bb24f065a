"""The manifest of a sharded checkpoint: which file holds which rectangle, every checksum, and the source's own files."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeconv.errors import IntegrityError, SourceError
from moeconv.io.checksum import checksum, combined
from moeconv.io.hf_folder import WEIGHT_SUFFIXES, parse_json
from moeconv.io.paths import check_name

MANIFEST = "moeconv.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A rectangle in a file: its tensor's hub name, dtype and whole shape, where the rectangle is in it, and its checksum."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    extent: tuple[int, ...]
    checksum: str


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of shards: its size in bytes, the checksum of its header, and its rectangles in the order of their data."""

    name: str
    size: int
    header: str
    tensors: tuple[TensorRecord, ...]

    @property
    def checksum(self) -> str:
        """The checksum of the whole file, from its header's and its tensors'."""
        return combined([self.header, *(t.checksum for t in self.tensors)])


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of the source: its size in bytes and its header as it was, so that export writes the same file."""

    size: int
    header: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What `moeconv.json` says. `degrees` is the JSON form of the layout's degrees; `source` is empty where no Hugging Face files were imported."""

    family: str
    degrees: dict[str, Any]
    stages: list[list[int]]
    files: dict[str, FileRecord]
    carried: dict[str, tuple[int, str]]
    source: dict[str, SourceFile]
    index: bytes | None = None

    def encode(self) -> bytes:
        """Give the manifest as the bytes of `moeconv.json`; the same manifest gives the same bytes."""
        files = {
            f.name: {
                "size": f.size,
                "checksum": f.checksum,
                "header": f.header,
                "tensors": [
                    {
                        "name": t.name,
                        "dtype": t.dtype,
                        "shape": t.shape,
                        "offsets": t.offsets,
                        "extent": t.extent,
                        "checksum": t.checksum,
                    }
                    for t in f.tensors
                ],
            }
            for f in self.files.values()
        }
        value = {
            "format": "moeconv",
            "format_version": FORMAT_VERSION,
            "checksums": "xxh3-128",
            "family": self.family,
            "degrees": self.degrees,
            "stages": self.stages,
            "files": files,
            "carried": {name: {"size": size, "checksum": digest} for name, (size, digest) in self.carried.items()},
            "source": {name: {"size": s.size, "header": _pack(s.header)} for name, s in self.source.items()},
            "source_index": _pack(self.index) if self.index is not None else None,
        }
        return (json.dumps(value | {"manifest_checksum": _digest(value)}, indent=1) + "\n").encode()

    @classmethod
    def decode(cls, raw: bytes, where: str) -> Manifest:
        """Read a manifest.

        Args:
            raw: the bytes of `moeconv.json`.
            where: the file's name, for messages.

        Returns:
            The manifest.

        Raises:
            SourceError: it is no manifest, or of a later version.
            IntegrityError: the manifest was changed since it was written.
        """
        value = parse_json(raw, where)
        if value.get("format") != "moeconv":
            raise SourceError(f"{where}: is no manifest of a sharded checkpoint")
        if value.get("format_version") != FORMAT_VERSION:
            raise SourceError(
                f"{where}: format version {value.get('format_version')!r}; this program reads {FORMAT_VERSION}. Use the version that wrote it"
            )
        recorded = value.pop("manifest_checksum", None)
        if recorded != _digest(value):
            raise IntegrityError(
                f"{where}: differs from the checksum that it ends with; the manifest was changed, restore it"
            )
        try:
            files = {name: _file(name, entry) for name, entry in value["files"].items()}
            _check_names(value, where)
            manifest = cls(
                family=value["family"],
                degrees=value["degrees"],
                stages=value["stages"],
                files=files,
                carried={name: (int(c["size"]), c["checksum"]) for name, c in value["carried"].items()},
                source={name: SourceFile(int(s["size"]), _unpack(s["header"])) for name, s in value["source"].items()},
                index=_unpack(value["source_index"]) if value["source_index"] is not None else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
            raise SourceError(f"{where}: is damaged: {error!r}") from None
        return manifest


def _check_names(value: Mapping[str, Any], where: str) -> None:
    """Check every name that becomes a path: where a checkpoint is read, and where its export is written."""
    for group in ("files", "source"):
        for name in value[group]:
            if not check_name(name, where).endswith(".safetensors"):
                raise SourceError(
                    f"{where}: {group} names {name!r}, which is no safetensors file; the manifest is damaged"
                )
    for name in value["carried"]:
        if check_name(name, where).endswith((*WEIGHT_SUFFIXES, ".index.json")) or name == MANIFEST:
            raise SourceError(
                f"{where}: carries {name!r} along, a name that weights have: it would stand in for them; the manifest is damaged"
            )


def _file(name: str, value: Mapping[str, Any]) -> FileRecord:
    tensors = tuple(
        TensorRecord(t["name"], t["dtype"], tuple(t["shape"]), tuple(t["offsets"]), tuple(t["extent"]), t["checksum"])
        for t in value["tensors"]
    )
    return FileRecord(name, int(value["size"]), value["header"], tensors)


def _digest(value: dict[str, Any]) -> str:
    return checksum(json.dumps(value, separators=(",", ":")).encode())


def _pack(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw, 9)).decode()


def _unpack(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text, validate=True))
