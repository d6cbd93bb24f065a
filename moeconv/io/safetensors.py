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
from moeconv.io.decode import MAX_DIMS, MAX_NAME_CHARS, brief, parse_json
from moeconv.io.paths import open_regular

# Source: https://github.com/huggingface/safetensors/blob/24b0b28/safetensors/src/tensor.rs (MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
_PREFIX = 8
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_SIZE = 1 << 62


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
    with open_regular(path) as file:
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
    if int.from_bytes(raw[:_PREFIX], "little") != len(raw) - _PREFIX:
        raise SourceError(f"{where}: the header is not as long as it says; the file is damaged")
    if raw[_PREFIX : _PREFIX + 1] != b"{":
        raise SourceError(f"{where}: the header is no JSON object; the file is damaged or no safetensors file")
    table = parse_json(raw[_PREFIX:], f"{where}: its header", max_bytes=MAX_HEADER_BYTES, deep=True)
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


def _entry(name: str, value: Any, data_begin: int, where: str) -> Entry:
    """Check one tensor's entry; by hand, since a header has many, and messages must name the tensor."""
    shown, valid = brief(name), isinstance(value, dict) and value.keys() == _FIELDS and len(name) <= MAX_NAME_CHARS
    if valid:
        kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        valid = isinstance(kind, str) and isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
        valid = valid and len(shape) <= MAX_DIMS and all(type(n) is int and 0 <= n < _MAX_SIZE for n in shape + offsets)
    if not valid:
        raise SourceError(f"{where}: the header's entry for {shown} is malformed: {brief(value)}")
    (begin, end), size = offsets, 1
    for n in shape:
        size *= n
    try:
        expected = size * dtype(kind).itemsize
    except SourceError as error:
        raise SourceError(f"{where}: {shown}: {error}") from None
    if end - begin != expected or size >= _MAX_SIZE:
        raise SourceError(
            f"{where}: {shown} is {kind} {shape}, {expected} bytes, but its data_offsets [{begin}, {end}] hold {end - begin}"
        )
    return Entry(name, kind, tuple(shape), data_begin + begin, data_begin + end)
