"""A file of shards: plain safetensors whose header also says where each rectangle lies in its tensor, as torch's DCP reads it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from moeconv.dtypes import Bytes, dtype
from moeconv.errors import WriteError
from moeconv.io.checksum import checksum, new
from moeconv.io.manifest import FileRecord, TensorRecord
from moeconv.io.safetensors import Header, encode_header
from moeconv.layout.rect import Rect


class PiecedBytes(Protocol):
    """Bytes that come piece by piece when they are written."""

    @property
    def nbytes(self) -> int:
        """How many."""

    def pieces(self) -> Iterator[Bytes]:
        """[N] uint8 each, in order; a piece is valid until the next one."""


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """A rectangle to write: hub name, safetensors dtype, whole tensor's shape, rectangle, and its row-major bytes as uint8."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rect: Rect
    data: Bytes | PiecedBytes


def shard_header(tensors: Sequence[tuple[str, str, Rect]]) -> Header:
    """Make the header of a file that holds these rectangles.

    Args:
        tensors: hub name, safetensors dtype and rectangle of each, at most one a tensor.

    Returns:
        The header; data are in the given order, larger element types first.

    Source: https://github.com/pytorch/pytorch/blob/v2.10.0/torch/distributed/checkpoint/_hf_utils.py (DCP_SHARDING_INFO).
    """
    ordered = sorted(tensors, key=lambda t: -dtype(t[1]).itemsize)
    info = {name: {"saved_offsets": list(rect.offsets)} for name, _, rect in ordered}
    metadata = {"DCP_SHARDING_INFO": json.dumps(info, separators=(",", ":")), "DCP_VERSION": "1.0", "format": "pt"}
    return encode_header([(name, kind, rect.shape) for name, kind, rect in ordered], metadata)


def write_shard_file(folder: Path, name: str, entries: Sequence[ShardEntry]) -> FileRecord:
    """Write one file of shards, to the disk and renamed when it is whole.

    Args:
        folder: where to write.
        name: the file's name.
        entries: its rectangles.

    Returns:
        The file's record for the manifest.

    Raises:
        WriteError: the file can't be written.
    """
    header = shard_header([(e.name, e.dtype, e.rect) for e in entries])
    by_name = {e.name: e for e in entries}
    records = []
    path = Path(folder) / name
    beside = path.with_name(name + ".writing")
    try:
        with open(beside, "wb") as file:
            file.write(header.raw)
            for stored in header.entries:
                entry = by_name[stored.name]
                size = stored.end - stored.begin
                assert entry.data.nbytes == size, f"{entry.name}: {entry.data.nbytes} bytes for {entry.rect}"
                running, end = new(), file.tell() + size
                for piece in _pieces(entry.data):
                    file.write(piece)
                    running.update(piece)
                assert file.tell() == end, f"{entry.name}: {file.tell() - end + size} bytes came, not {size}"
                records.append(
                    TensorRecord(
                        entry.name, entry.dtype, entry.shape, entry.rect.offsets, entry.rect.shape, running.hexdigest()
                    )
                )
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise WriteError(f"{path}: can't be written: {error.strerror or error}") from error
    return FileRecord(name, header.file_size, checksum(header.raw), tuple(records))


def _pieces(data: Bytes | PiecedBytes) -> Iterator[memoryview]:
    if isinstance(data, np.ndarray):
        yield np.ascontiguousarray(data).reshape(-1).data
    else:
        for piece in data.pieces():
            yield piece.data
