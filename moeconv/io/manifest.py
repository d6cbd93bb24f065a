"""The manifest of a sharded checkpoint: which file holds which rectangle, every checksum, and the source's own files."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from moeconv.dtypes import dtype
from moeconv.errors import IntegrityError, MoeconvError, SourceError
from moeconv.io.adapter import AdapterRecord
from moeconv.io.beside import WEIGHT_SUFFIXES
from moeconv.io.checksum import checksum, combined
from moeconv.io.decode import Digest, Name, Shape, Size, parse_json, typed
from moeconv.io.hf_folder import CONFIG
from moeconv.io.paths import check_name
from moeconv.io.safetensors import MAX_HEADER_BYTES

MANIFEST = "moeconv.json"
FORMAT_VERSION = 1
# A save of the largest open model by a thousand ranks has some hundred MB; headers of all its files, some tens.
MAX_MANIFEST_BYTES, MAX_MANIFEST_VALUES = 1 << 30, 32_000_000
MAX_STORED_BYTES = 256 << 20


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
    """What `moeconv.json` says. `degrees` is the JSON form of the layout's degrees; `source` is empty where no Hugging Face files were imported.

    `adapter` is there where the files hold what was trained beside a frozen model, and not the model.
    """

    family: str
    degrees: dict[str, Any]
    stages: list[list[int]]
    files: dict[str, FileRecord]
    carried: dict[str, tuple[int, str]]
    source: dict[str, SourceFile]
    index: bytes | None = None
    adapter: AdapterRecord | None = None

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
        if self.adapter is not None:
            value["adapter"] = msgspec.to_builtins(self.adapter)
        text = json.dumps(value | {"manifest_checksum": _digest(value)}).encode()
        return msgspec.json.format(text, indent=1) + b"\n"  # as json would indent it, at five times the speed

    @classmethod
    def decode(cls, raw: bytes, where: str) -> Manifest:
        """Read a manifest.

        Args:
            raw: the bytes of `moeconv.json`.
            where: the file's name, for messages.

        Returns:
            The manifest; it does not contradict itself.

        Raises:
            SourceError: it is no manifest, or of a later version.
            IntegrityError: the manifest was changed since it was written.
        """
        value = parse_json(raw, where, max_bytes=MAX_MANIFEST_BYTES, max_values=MAX_MANIFEST_VALUES, deep=True)
        if value.get("format") != "moeconv":
            raise SourceError(f"{where}: is no manifest of a sharded checkpoint")
        version = value.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise SourceError(
                f"{where}: format version {str(version)[:40]}; this program reads {FORMAT_VERSION}. Use the version that wrote it"
            )
        recorded = value.pop("manifest_checksum", None)
        if recorded != _digest(value, where):
            raise IntegrityError(
                f"{where}: differs from the checksum that it ends with; the manifest was changed, restore it"
            )
        found = typed(value, _Manifest, where)
        _check_names(found, where)
        stored = _Stored(where)
        return cls(
            family=found.family,
            degrees=found.degrees,
            stages=found.stages,
            files={name: _file(name, entry, where) for name, entry in found.files.items()},
            carried={name: (c.size, c.checksum) for name, c in found.carried.items()},
            source={name: SourceFile(s.size, stored.unpack(s.header)) for name, s in found.source.items()},
            index=stored.unpack(found.source_index) if found.source_index is not None else None,
            adapter=found.adapter,
        )


# What the JSON must be, field by field.


class _Tensor(msgspec.Struct, forbid_unknown_fields=True):
    name: Name
    dtype: str
    shape: Shape
    offsets: Shape
    extent: Shape
    checksum: Digest


class _File(msgspec.Struct, forbid_unknown_fields=True):
    size: Size
    checksum: Digest
    header: Digest
    tensors: list[_Tensor]


class _Carried(msgspec.Struct, forbid_unknown_fields=True):
    size: Size
    checksum: Digest


class _Source(msgspec.Struct, forbid_unknown_fields=True):
    size: Size
    header: str


class _Manifest(msgspec.Struct, forbid_unknown_fields=True):
    format: Literal["moeconv"]
    format_version: int
    checksums: Literal["xxh3-128"]
    family: str
    degrees: dict[str, Size | list[Size]]
    stages: list[list[Size]]
    files: dict[str, _File]
    carried: dict[str, _Carried]
    source: dict[str, _Source]
    source_index: str | None
    adapter: AdapterRecord | None = None


def _check_names(found: _Manifest, where: str) -> None:
    """Check every name that becomes a path: where a checkpoint is read, and where its export is written."""
    for group, names in (("files", found.files), ("source", found.source)):
        for name in names:
            if not check_name(name, where).endswith(".safetensors"):
                raise SourceError(
                    f"{where}: {group} names {name!r}, which is no safetensors file; the manifest is damaged"
                )
    for name in found.carried:
        if check_name(name, where).endswith((*WEIGHT_SUFFIXES, ".index.json")) or name == MANIFEST:
            raise SourceError(
                f"{where}: carries {name!r} along, a name that weights have: it would stand in for them; the manifest is damaged"
            )
    if CONFIG not in found.carried:
        raise SourceError(f"{where}: does not carry {CONFIG}; the manifest is damaged")
    for together in (set(found.files), {*found.source, *found.carried}):
        folders = {name[:at] for name in together for at, letter in enumerate(name) if letter == "/"}
        if clash := sorted(folders & together):
            raise SourceError(f"{where}: names {clash[0]!r} both as a file and as a folder; the manifest is damaged")


def _file(name: str, value: _File, where: str) -> FileRecord:
    records = []
    for t in value.tensors:
        if not len(t.shape) == len(t.offsets) == len(t.extent):
            raise SourceError(f"{where}: {name} holds {t.name} with shape, offsets and extent of several lengths")
        try:
            dtype(t.dtype)
        except MoeconvError as error:
            raise SourceError(f"{where}: {name}: {t.name}: {error}") from None
        records.append(TensorRecord(t.name, t.dtype, t.shape, t.offsets, t.extent, t.checksum))
    record = FileRecord(name, value.size, value.header, tuple(records))
    if record.checksum != value.checksum:
        raise IntegrityError(f"{where}: the checksum of {name} is not that of its parts; the manifest is damaged")
    return record


def _digest(value: dict[str, Any], where: str = MANIFEST) -> str:
    try:
        return checksum(json.dumps(value, separators=(",", ":")).encode())
    except (RecursionError, ValueError) as error:
        raise SourceError(f"{where}: is damaged: {error}") from None


def _pack(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw, 9)).decode()


class _Stored:
    """Unpacks the source's headers and index, which together are no larger than those of any real checkpoint."""

    def __init__(self, where: str) -> None:
        self._where, self._left = where, MAX_STORED_BYTES

    def unpack(self, text: str) -> bytes:
        """Inflate one of them.

        Raises:
            SourceError: it is damaged, or too large.
        """
        inflater, limit = zlib.decompressobj(), min(self._left, MAX_HEADER_BYTES + 8)
        try:
            out = inflater.decompress(base64.b64decode(text, validate=True), limit + 1)
        except (ValueError, zlib.error) as error:
            raise SourceError(f"{self._where}: is damaged: {error}") from None
        if len(out) > limit:
            raise SourceError(f"{self._where}: the source's headers take more than {MAX_STORED_BYTES:,} bytes")
        if not inflater.eof or inflater.unused_data or inflater.unconsumed_tail:
            raise SourceError(f"{self._where}: is damaged: a header of the source is cut off, or more follows it")
        self._left -= len(out)
        return out
