"""The `.metadata` of torch.distributed.checkpoint: which chunk of which tensor is where, checked against itself.

Source: https://github.com/pytorch/pytorch/blob/v2.10.0/torch/distributed/checkpoint/metadata.py and filesystem.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from moeconv.errors import SourceError
from moeconv.io.decode import MAX_NAME_CHARS, Name, Shape, Size, brief, typed
from moeconv.io.paths import check_file, check_inside, read_whole
from moeconv.io.unpickle import MAX_PICKLE_BYTES, TORCH_DTYPES, Opaque, Symbol, load_pickle
from moeconv.layout.rect import Rect

METADATA = ".metadata"

# What `.metadata` must hold, field by field: the state of torch's MetadataIndex, _StorageInfo and ChunkStorageMetadata.


class _Index(msgspec.Struct):
    fqn: Name
    offset: Shape | None = None


class _Item(msgspec.Struct):
    relative_path: Name
    offset: Size
    length: Size
    transform_descriptors: list[Any] | None = None


class _Rect(msgspec.Struct):
    offsets: Shape
    sizes: Shape


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of a global tensor: its rectangle, and the file, offset and length in bytes of the item that holds it."""

    rect: Rect
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class DistTensor:
    """A global tensor of a `torch_dist` checkpoint: its safetensors dtype, shape and chunks."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Metadata:
    """What `.metadata` says: the tensors by key, and the keys of byte objects."""

    def __init__(self, folder: Path) -> None:
        """Read it.

        Raises:
            SourceError: it is missing, damaged, or contradicts itself.
        """
        self.folder = folder
        where = str(folder / METADATA)
        raw = load_pickle(read_whole(check_file(folder, METADATA), MAX_PICKLE_BYTES), where)
        entries = raw.get("state_dict_metadata") if isinstance(raw, Opaque) else None
        stored = raw.get("storage_data") if isinstance(raw, Opaque) else None
        if not isinstance(entries, dict) or not isinstance(stored, dict):
            raise SourceError(f"{where}: holds no metadata of torch.distributed.checkpoint")
        if not all(isinstance(key, str) and len(key) <= MAX_NAME_CHARS for key in entries):
            raise SourceError(f"{where}: holds something whose key is no name")
        self._items = self._storage(stored, where)
        self.tensors = {k: self._tensor(k, v, where) for k, v in entries.items() if _has_size(v)}
        self.objects = [k for k in entries if k not in self.tensors]

    def _storage(self, stored: dict[Any, Any], where: str) -> dict[tuple[str, tuple[int, ...] | None], _Item]:
        """Check where each item is; no two share a byte, or what one of them holds would be read twice and another never."""
        out = {}
        for index, info in stored.items():
            if not isinstance(index, Opaque) or not isinstance(info, Opaque):
                raise SourceError(f"{where}: an entry of its storage data is malformed")
            key = typed(index.state, _Index, where)
            item = typed(info.state, _Item, where)
            if item.transform_descriptors:
                raise SourceError(f"{self.folder}: {key.fqn} is compressed; save it without a stream transform")
            if (key.fqn, key.offset) in out:
                raise SourceError(f"{where}: says twice where {key.fqn} {key.offset or ''} is stored")
            out[key.fqn, key.offset] = item
        end_of: dict[str, int] = {}
        for item in sorted(out.values(), key=lambda i: (i.relative_path, i.offset)):
            if item.offset < end_of.get(item.relative_path, 0):
                raise SourceError(f"{where}: two items share bytes of {brief(item.relative_path)}; the file is damaged")
            end_of[item.relative_path] = item.offset + item.length
        for name in end_of:
            check_inside(self.folder, name)
        return out

    def chunk(self, key: str, rect: Rect | None) -> Chunk:
        """Say where a chunk of a tensor is, or with None a byte object.

        Raises:
            SourceError: it is listed, but not where it is stored.
        """
        item = self._items.get((key, rect.offsets if rect else None))
        if item is None:
            raise SourceError(f"{self.folder}: {METADATA} lists {key} {rect or ''} but not where it is stored")
        return Chunk(rect or Rect((), ()), item.relative_path, item.offset, item.length)

    def _tensor(self, key: str, entry: Opaque, where: str) -> DistTensor:
        properties, chunks = entry.get("properties"), entry.get("chunks")
        symbol = None
        if isinstance(properties, Opaque):
            first = properties.state[:1] if isinstance(properties.state, tuple) else (properties.get("dtype"),)
            symbol = first[0] if first else None
        known = isinstance(symbol, Symbol) and symbol.module == "torch" and symbol.name in TORCH_DTYPES
        if not known or not isinstance(chunks, list) or not all(isinstance(c, Opaque) for c in chunks):
            raise SourceError(f"{where}: the entry of {key} is malformed")
        assert isinstance(symbol, Symbol)
        size = typed(entry.get("size"), Shape, where)
        rects = []
        for chunk in chunks:
            found = typed(chunk.state, _Rect, where)
            rect = Rect(found.offsets, found.sizes)
            inside = len(rect.offsets) == len(rect.shape) == len(size)
            if not inside or any(end > n for end, n in zip(rect.ends, size, strict=True)):
                raise SourceError(
                    f"{where}: {key} of shape {list(size)} has a chunk outside it, at {list(found.offsets)}"
                )
            rects.append(rect)
        found_chunks = tuple(self.chunk(key, rect) for rect in rects)
        return DistTensor(key, TORCH_DTYPES[symbol.name], size, found_chunks)


def _has_size(entry: Any) -> bool:
    """Tell a tensor's entry from that of a byte object."""
    return isinstance(entry, Opaque) and bool(entry.get("size"))
