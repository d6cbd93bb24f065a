"""The safetensors container: strict reading and exact writing of headers, without touching the data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from moeconv.dtypes import dtype
from moeconv.errors import SourceError

# Source: https://github.com/huggingface/safetensors/blob/24b0b28/safetensors/src/tensor.rs (MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
_PREFIX = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: its data are the bytes `begin` to `end` of the file, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A file's header: its raw bytes (length prefix included), tensors in the order of their data, metadata, and the file's size in bytes."""

    raw: bytes
    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    file_size: int


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        path: the file.

    Returns:
        The header; every entry lies inside the file, and the entries fill it without a gap or an overlap.

    Raises:
        SourceError: the file is missing, truncated or malformed; the message names the file and the tensor.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(_PREFIX)
            if len(prefix) < _PREFIX:
                raise SourceError(f"{path}: {size} bytes are too few for a safetensors file; download it again")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES or length > size - _PREFIX:
                raise SourceError(
                    f"{path}: header length {length} in a file of {size} bytes; the file is truncated or no safetensors file"
                )
            raw = file.read(length)
    except OSError as error:
        raise SourceError(f"{path}: can't be read: {error.strerror or error}") from None
    return parse_header(prefix + raw, size, str(path))


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Check the header of a safetensors file.

    Args:
        raw: length prefix and header, as in the file.
        file_size: the whole file's size in bytes.
        where: the file's name, for messages.

    Returns:
        The header.

    Raises:
        SourceError: the header is malformed, or its tensors don't fill the file exactly.
    """
    try:
        table = json.loads(raw[_PREFIX:], object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        raise SourceError(f"{where}: the header names {error} twice") from None
    except (ValueError, RecursionError):
        raise SourceError(f"{where}: the header is no JSON; the file is damaged or no safetensors file") from None
    if not isinstance(table, dict):
        raise SourceError(f"{where}: the header is no JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise SourceError(f"{where}: __metadata__ must map strings to strings")
    entries = sorted(
        (_entry(name, value, len(raw), where) for name, value in table.items()), key=lambda e: (e.begin, e.end)
    )
    position = len(raw)
    for entry in entries:
        if entry.begin != position:
            kind = (
                "overlaps the tensor before it"
                if entry.begin < position
                else f"leaves a gap of {entry.begin - position} bytes before it"
            )
            raise SourceError(f"{where}: {entry.name} {kind}; the header's data_offsets are wrong")
        position = entry.end
    if position != file_size:
        problem = "truncated" if position > file_size else "longer than its header says"
        raise SourceError(
            f"{where}: {file_size} bytes, the header needs {position}: the file is {problem}; download it again"
        )
    return Header(raw, tuple(entries), metadata, file_size)


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Header:
    """Make the header of a file that holds these tensors in this order.

    Args:
        tensors: name, safetensors dtype and shape of each; larger element types first keep every tensor aligned.
        metadata: string pairs for `__metadata__`.

    Returns:
        The header, padded with spaces so that data begins at a multiple of 8 bytes, with the size of the whole file.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, kind, shape in tensors:
        end = position + prod(shape) * dtype(kind).itemsize
        table[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(_PREFIX, "little") + text
    return parse_header(raw, len(raw) + position, "a new file")


class _DuplicateKeyError(Exception):
    """A JSON object names a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKeyError(next(repr(key) for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return table


def _entry(name: str, value: Any, data_begin: int, where: str) -> Entry:
    try:
        kind, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, end]
        valid = set(value) == {"dtype", "shape", "data_offsets"} and isinstance(kind, str)
        valid = valid and all(type(n) is int and n >= 0 for n in numbers)
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise SourceError(f"{where}: the header's entry for {name!r} is malformed: {str(value)[:200]}")
    try:
        expected = prod(shape) * dtype(kind).itemsize
    except SourceError as error:
        raise SourceError(f"{where}: {name}: {error}") from None
    if end - begin != expected:
        raise SourceError(
            f"{where}: {name} is {kind} {shape}, {expected} bytes, but its data_offsets [{begin}, {end}] hold {end - begin}"
        )
    return Entry(name, kind, tuple(shape), data_begin + begin, data_begin + end)
