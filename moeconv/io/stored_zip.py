"""Zip archives of stored records, read strictly: where each record's bytes lie, each byte in one record, no name twice."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, cast

from zlib_ng import zlib_ng

from moeconv.errors import SourceError
from moeconv.io.decode import MAX_NAME_CHARS, brief
from moeconv.io.paths import open_regular

LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class ZipRecord:
    """A record: its name, the CRC-32 of its bytes, and where they are in the file, in bytes."""

    name: str
    crc: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class StoredZip:
    """An open archive and its records by name."""

    path: Path
    records: dict[str, ZipRecord]
    _file: BinaryIO

    def read(self, record: ZipRecord, limit: int) -> bytes:
        """Read a small record.

        Args:
            record: the record.
            limit: the most bytes that such a record has.

        Returns:
            Its bytes.

        Raises:
            SourceError: it is larger.
        """
        if record.end - record.begin > limit:
            raise SourceError(
                f"{self.path}: {record.name} has {record.end - record.begin:,} bytes; such records have at most {limit:,}"
            )
        self._file.seek(record.begin)
        return self._file.read(record.end - record.begin)

    def crc32(self, record: ZipRecord) -> int:
        """Compute the CRC-32 of a record's bytes, in pieces."""
        self._file.seek(record.begin)
        crc, left = 0, record.end - record.begin
        while left and (data := self._file.read(min(left, _PIECE))):
            crc, left = zlib_ng.crc32(data, crc), left - len(data)
        return crc


@contextmanager
def open_zip(path: Path, offset: int = 0, length: int | None = None) -> Iterator[StoredZip]:
    """Open an archive.

    Args:
        path: the file.
        offset: where the archive begins in it, in bytes.
        length: the archive's length in bytes; by default to the end of the file.

    Yields:
        The archive.

    Raises:
        SourceError: the file is missing, cut off or no archive; a record is compressed, encrypted, named twice, or not
            where the directory says.
    """
    with open_regular(path) as raw:
        size = os.fstat(raw.fileno()).st_size
        length = size - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > size:
            raise SourceError(f"{path}: {size} bytes, but bytes {offset} to {offset + length} are needed: truncated")
        yield StoredZip(path, _records(path, raw, offset, length), raw)


def _records(path: Path, raw: BinaryIO, offset: int, length: int) -> dict[str, ZipRecord]:
    try:
        with zipfile.ZipFile(cast(BinaryIO, _Window(raw, offset, length))) as archive:
            infos = archive.infolist()
    # What zipfile raises for damaged directories, besides its own error: it reads them field by field.
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        struct.error,
        ValueError,
        RuntimeError,
        KeyError,
        EOFError,
    ) as error:
        raise SourceError(
            f"{path}: is no archive that torch.save writes ({str(error)[:200]}); it is truncated, damaged, or of the form "
            "before torch 1.6, which torch.save(torch.load(FILE, weights_only=True), FILE) renews"
        ) from None
    found: dict[str, ZipRecord] = {}
    spans = []
    for info in infos:
        name = info.orig_filename
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise SourceError(f"{path}: {brief(name)} is compressed or encrypted; torch.save stores records plainly")
        if name in found or len(name) > MAX_NAME_CHARS or "\0" in name:
            raise SourceError(
                f"{path}: its directory names {brief(name)} twice, or what is no name; the file is damaged"
            )
        header = offset + info.header_offset
        if not 0 <= info.header_offset < length:
            raise SourceError(f"{path}: {brief(name)} begins outside the archive; the file is damaged")
        begin = _data_begin(path, raw, header, name)
        spans.append((header, begin + info.file_size, name))
        found[name] = ZipRecord(name, info.CRC, begin, begin + info.file_size)
    spans.sort()
    for (_, end, name), (after, _, _) in pairwise([*spans, (offset + length, 0, "")]):
        if end > after:
            raise SourceError(f"{path}: {brief(name)} reaches into what comes after it; the file is damaged")
    return found


def _data_begin(path: Path, raw: BinaryIO, header: int, name: str) -> int:
    """Find where a record's bytes begin, after its own header, which must be of the same record as the directory's entry."""
    raw.seek(header)
    fixed = raw.read(LOCAL.size)
    fields = LOCAL.unpack(fixed) if len(fixed) == LOCAL.size else (b"",)
    if fields[0] != b"PK\x03\x04" or fields[2] & 1 or fields[3] != 0:
        raise SourceError(f"{path}: no record where the archive's directory says one is; the file is damaged")
    own = raw.read(fields[-2])
    if own != name.encode("utf-8" if fields[2] & 0x800 else "cp437", "replace"):
        raise SourceError(
            f"{path}: its directory says {brief(name)} where a record of another name is; the file is damaged"
        )
    return header + LOCAL.size + int(fields[-2]) + int(fields[-1])


class _Window:
    """A part of a file as a file of its own, for zipfile."""

    def __init__(self, raw: BinaryIO, begin: int, length: int) -> None:
        self._raw, self._begin, self._length, self._position = raw, begin, length, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._position, self._length)[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._position, 0)
        size = left if size < 0 else min(size, left)
        self._raw.seek(self._begin + self._position)
        data = self._raw.read(size)
        self._position += len(data)
        return data
