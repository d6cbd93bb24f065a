"""Files of carried tensors, written one tensor at a time: what a trainer doesn't read goes along into each checkpoint that it saves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.io.checksum import checksum
from moeconv.io.manifest import FileRecord, TensorRecord
from moeconv.io.shards import shard_header
from moeconv.layout.rect import Rect
from moeconv.pieces import TensorInfo
from moeconv.placement import Placement


def write_carried(
    folder: Path, tensors: Iterable[TensorInfo], placement: Placement, read: Callable[[str], np.ndarray[Any, Any]]
) -> list[FileRecord]:
    """Write carried tensors into the files that a layout stores them in.

    Args:
        folder: where to write.
        tensors: the carried tensors.
        placement: the model under its layout.
        read: gives a whole tensor by its name.

    Returns:
        The files' records.

    Raises:
        MoeconvError: a tensor can't be read.
        OSError: a file can't be written.
    """
    files: dict[str, list[TensorInfo]] = {}
    for info in tensors:
        files.setdefault(placement.stored(info.name)[0].file, []).append(info)
    return [_write(folder / name, infos, read) for name, infos in files.items()]


def _write(path: Path, tensors: list[TensorInfo], read: Callable[[str], np.ndarray[Any, Any]]) -> FileRecord:
    header = shard_header([(info.name, info.dtype, Rect.whole(info.shape)) for info in tensors])
    records, shapes = [], {info.name: info.shape for info in tensors}
    with path.open("wb") as file:
        file.write(header.raw)
        for entry in header.entries:
            data = np.ascontiguousarray(read(entry.name)).reshape(-1).view(np.uint8).data
            file.write(data)
            whole = Rect.whole(shapes[entry.name])
            records.append(
                TensorRecord(entry.name, entry.dtype, whole.shape, whole.offsets, whole.shape, checksum(data))
            )
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(path.name, header.file_size, checksum(header.raw), tuple(records))
