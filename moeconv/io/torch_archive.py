"""The archive that `torch.save` writes: a zip of stored records, the first a pickle, the others raw storages.

Reading finds where each storage lies and maps nothing; writing lays a file out before its data exist, so that the data
can be written in any order and in bounded buffers, and its checksums afterwards.
Source: https://github.com/pytorch/pytorch/blob/v2.10.0/caffe2/serialize/inline_container.h.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.dtypes import dtype, numpy_dtype
from moeconv.errors import IntegrityError, SourceError
from moeconv.io.paths import open_regular
from moeconv.io.pickling import Call, Persistent, dump_pickle
from moeconv.io.stored_zip import CENTRAL, LOCAL, open_zip
from moeconv.io.unpickle import MAX_PICKLE_BYTES, STORAGE_TYPES, StorageRef, Symbol, TensorRef, load_pickle

ALIGNMENT = 64
_UTF8 = 0x800
_DOS_DATE = 0x21  # 1 January 1980: the same bytes every time


@dataclass(frozen=True, slots=True)
class TorchArchive:
    """What an archive holds: the root of its pickle, and where each storage's bytes are in the file."""

    path: Path
    root: Any
    storages: dict[str, tuple[int, int]]

    def begin(self, tensor: TensorRef) -> int:
        """Give the position of a tensor's first element in the file, in bytes, after checking that it fits its storage.

        Raises:
            SourceError: the storage is missing or shorter than it is said to be, or the tensor reaches outside it.
        """
        where = self.storages.get(tensor.storage.key)
        if where is None:
            raise SourceError(f"{self.path}: storage {tensor.storage.key} is missing; the file is incomplete")
        begin, end = where
        itemsize = dtype(tensor.dtype).itemsize
        last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        fits = 0 in tensor.shape or (last + 1) * itemsize <= end - begin
        if not fits or tensor.storage.numel * dtype(tensor.storage.dtype).itemsize > end - begin:
            raise SourceError(
                f"{self.path}: a tensor of shape {list(tensor.shape)} does not fit its storage of {end - begin} bytes; "
                "the file is damaged"
            )
        return begin + tensor.offset * itemsize


def read_archive(path: Path, offset: int = 0, length: int | None = None) -> TorchArchive:
    """Read the pickle of a `torch.save` file as data and find its storages.

    Args:
        path: the file.
        offset: where the archive begins in it, in bytes (`.distcp` files hold many).
        length: the archive's length in bytes; by default to the end of the file.

    Returns:
        The archive; no storage has been read.

    Raises:
        SourceError: the file is missing, damaged, of the old non-zip form, compressed, or its pickle is no data.
    """
    with open_zip(path, offset, length) as archive:
        pickles = [r for r in archive.records.values() if r.name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise SourceError(f"{path}: holds {len(pickles)} data.pkl records; expected a file that torch.save wrote")
        prefix = pickles[0].name[: -len("data.pkl")]
        order = archive.records.get(prefix + "byteorder")
        if order is not None and archive.read(order, 64) != b"little":
            raise SourceError(f"{path}: was written on a big-endian machine; save it again on a little-endian one")
        storages = {
            r.name[len(prefix) + 5 :]: (r.begin, r.end)
            for r in archive.records.values()
            if r.name.startswith(prefix + "data/")
        }
        root = load_pickle(archive.read(pickles[0], MAX_PICKLE_BYTES), str(path))
    return TorchArchive(path, root, storages)


def with_numbers(archive: TorchArchive) -> Any:
    """Give an archive's root with the tensors of one element in it replaced by their values.

    Args:
        archive: a small archive, such as a run's state; lists, tuples and dicts in it are looked through.

    Returns:
        The root; larger tensors stay references.

    Raises:
        SourceError: a tensor reaches outside its storage.
    """

    done: dict[int, Any] = {}  # what the pickle repeats is looked through once

    def resolve(value: Any) -> Any:
        if isinstance(value, TensorRef) and all(n == 1 for n in value.shape):
            kind = numpy_dtype(value.dtype)
            with open_regular(archive.path) as file:
                file.seek(archive.begin(value))
                return np.frombuffer(file.read(kind.itemsize), kind, 1)[0].item()
        if not isinstance(value, dict | list | tuple):
            return value
        if id(value) not in done:
            if isinstance(value, dict):
                done[id(value)] = {key: resolve(inner) for key, inner in value.items()}
            else:
                done[id(value)] = type(value)(resolve(inner) for inner in value)
        return done[id(value)]

    return resolve(archive.root)


def check_archive(path: Path, offset: int = 0, length: int | None = None) -> None:
    """Check the CRC-32 of every record of an archive.

    Args:
        path: the file.
        offset: where the archive begins in it, in bytes.
        length: its length in bytes; by default to the end of the file.

    Raises:
        IntegrityError: a record was changed.
        SourceError: the file can't be read.
    """
    with open_zip(path, offset, length) as archive:
        for record in archive.records.values():
            if archive.crc32(record) != record.crc:
                raise IntegrityError(
                    f"{path}: {record.name} differs from its CRC-32: the file was changed or damaged; restore it"
                )


@dataclass(frozen=True, slots=True)
class DataRecord:
    """A record whose bytes come later: `size` bytes from `begin`; its CRC-32 goes to both positions `crc_at`."""

    name: str
    begin: int
    size: int
    crc_at: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ArchiveLayout:
    """An archive before its data: its length, the bytes that are known by position, and the records to be filled."""

    size: int
    literals: tuple[tuple[int, bytes], ...]
    records: tuple[DataRecord, ...]


def lay_out_archive(name: str, pickle: bytes, storages: Iterable[tuple[str, int]], base: int = 0) -> ArchiveLayout:
    """Lay out an archive that `torch.load` reads: pickle, version records, then storages aligned to 64 bytes.

    Args:
        name: the archive's name, the folder of all its records.
        pickle: the bytes of `data.pkl`.
        storages: key and size in bytes of each storage.
        base: where the archive begins in its file; all positions in the result count from the start of the file.

    Returns:
        The layout; CRCs of storages are left as zeros.
    """
    small = [("data.pkl", pickle), (".format_version", b"1"), (".storage_alignment", str(ALIGNMENT).encode())]
    small += [("byteorder", b"little"), ("version", b"3\n")]
    literals: list[tuple[int, bytes]] = []
    central: list[tuple[str, int, int, int]] = []  # name, crc, size, header position within the archive
    position = 0
    for record, data in small:
        crc = zlib.crc32(data)
        header = _local_header(f"{name}/{record}", crc, len(data), position)
        literals.append((base + position, header + data))
        central.append((f"{name}/{record}", crc, len(data), position))
        position += len(header) + len(data)
    begins: list[int] = []
    sizes = list(storages)
    for key, size in sizes:
        record = f"{name}/data/{key}"
        header = _local_header(record, 0, size, position)
        literals.append((base + position, header))
        central.append((record, 0, size, position))
        begins.append(position + len(header))
        position += len(header) + size
    tail, crc_at = _central_directory(central, position)
    literals.append((base + position, tail))
    first = len(small)
    records = tuple(
        DataRecord(key, base + begin, size, (base + central[first + i][3] + 14, base + crc_at[first + i]))
        for i, ((key, size), begin) in enumerate(zip(sizes, begins, strict=True))
    )
    return ArchiveLayout(position + len(tail), tuple(literals), records)


def _local_header(name: str, crc: int, size: int, position: int) -> bytes:
    """Make a record's header, padded with an extra field so that its data are aligned within the archive."""
    raw = name.encode()
    zip64 = struct.pack("<2HQQ", 1, 16, size, size) if size >= 0xFFFFFFFF else b""
    begin = position + LOCAL.size + len(raw) + len(zip64) + 4
    padding = -begin % ALIGNMENT
    extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    field = min(size, 0xFFFFFFFF)
    version = 45 if zip64 else 20
    return (
        LOCAL.pack(b"PK\x03\x04", version, _UTF8, 0, 0, _DOS_DATE, crc, field, field, len(raw), len(extra))
        + raw
        + extra
    )


def _central_directory(records: list[tuple[str, int, int, int]], position: int) -> tuple[bytes, list[int]]:
    """Make the directory at the end of an archive; give it with the position of each record's CRC."""
    out, crc_at = bytearray(), []
    for name, crc, size, header in records:
        raw = name.encode()
        wide = ([size, size] if size >= 0xFFFFFFFF else []) + ([header] if header >= 0xFFFFFFFF else [])
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        crc_at.append(position + len(out) + 16)
        field, where = min(size, 0xFFFFFFFF), min(header, 0xFFFFFFFF)
        version = 45 if wide else 20
        fixed = (b"PK\x01\x02", version, version, _UTF8, 0, 0, _DOS_DATE, crc, field, field)
        out += CENTRAL.pack(*fixed, len(raw), len(extra), 0, 0, 0, 0, where) + raw + extra
    size, count = len(out), len(records)
    if position + size >= 0xFFFFFFFF or count >= 0xFFFF:
        out += struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, position)
        out += struct.pack("<4sIQI", b"PK\x06\x07", 0, position + size, 1)
    few, where = min(count, 0xFFFF), min(position, 0xFFFFFFFF)
    out += struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, few, few, min(size, 0xFFFFFFFF), where, 0)
    return bytes(out), crc_at


def tensor_value(tensor: TensorRef) -> Call:
    """Give the value that pickles as a torch tensor: `torch._utils._rebuild_tensor_v2` of a persistent storage."""
    storage = tensor.storage
    kind = next(name for name, known in STORAGE_TYPES.items() if known == storage.dtype)
    pid = ("storage", Symbol("torch", kind), storage.key, "cpu", storage.numel)
    hooks = Call(Symbol("collections", "OrderedDict"))
    args = (Persistent(pid), tensor.offset, tensor.shape, tensor.strides, False, hooks)
    return Call(Symbol("torch._utils", "_rebuild_tensor_v2"), args)


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give the strides, in elements, of a tensor of this shape without gaps."""
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * n)
    return tuple(reversed(strides)) if shape else ()


def whole_tensor(key: str, kind: str, shape: tuple[int, ...]) -> TensorRef:
    """Give the reference to a row-major tensor that fills a storage of its own."""
    strides = row_major(shape)
    numel = shape[0] * strides[0] if shape else 1
    return TensorRef(StorageRef(key, kind, numel), kind, 0, shape, strides)


def small_archive(name: str, value: Any, storages: Mapping[str, bytes] | None = None) -> bytes:
    """Make the whole `torch.save` file of a small value; `storages` gives the bytes of its tensors' storages by key."""
    data = storages or {}
    layout = lay_out_archive(name, dump_pickle(value), ((key, len(raw)) for key, raw in data.items()))
    out = bytearray(layout.size)
    for begin, literal in layout.literals:
        out[begin : begin + len(literal)] = literal
    for record in layout.records:
        out[record.begin : record.begin + record.size] = data[record.name]
        for where in record.crc_at:
            struct.pack_into("<I", out, where, zlib.crc32(data[record.name]))
    return bytes(out)
