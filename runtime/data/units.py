"""Data files cut into units of work: each is tokenized by one process, and kept when it is done.

Where a file is cut depends on nothing but the file, so that a stopped run goes on with what it has under any number of
processes.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Literal

from runtime.data.errors import DataError, need
from runtime.data.kinds import DataFile, Kind, decompressing, open_bytes

UNIT_BYTES = 4 << 20
_ARROW_BYTES = 8 << 20
_LONGEST = 256 << 20
"""Bytes of a line, characters of an element: what must fit into memory at once."""
LOOK_AHEAD = 1 << 16

Reads = Literal["lines", "text", "elements", "parquet", "arrow"]


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a data file."""

    index: int
    """Place among the units of all files."""
    path: str
    reads: Reads
    begin: int
    """First byte of the range (lines, text), first element, row group, or record batch."""
    end: int
    nbytes: int
    """Bytes of the file that it stands for, for progress."""
    data: Any = field(default=None, repr=False)
    """What a stream gives only once, read by the parent: bytes, or elements; None: the worker reads the file."""
    first: bool = True
    """text: begins the file."""
    last: bool = True
    """text: ends the file."""


def plan_units(files: Sequence[DataFile]) -> Iterator[Unit]:
    """Cut files into units, in order.

    Args:
        files: files of text, not of token ids.

    Yields:
        Units, numbered from 0.

    Raises:
        DataError: a file is damaged, or needs a library that isn't installed.
    """
    index = 0
    for file in files:
        for unit in _units_of(file):
            yield Unit(index, *unit)
            index += 1


def _units_of(file: DataFile) -> Iterator[tuple[Any, ...]]:
    name, size = str(file.path), file.path.stat().st_size
    if file.kind is Kind.PARQUET:
        yield from _parquet(name, size)
    elif file.kind is Kind.ARROW:
        yield from _arrow(name, size)
    elif file.kind is Kind.JSON_ARRAY:
        yield from _array(file)
    elif file.compression is not None:
        yield from _stream(file)
    else:
        reads = "lines" if file.kind is Kind.JSON_LINES else "text"
        for begin in range(0, size, UNIT_BYTES):
            end = min(begin + UNIT_BYTES, size)
            yield name, reads, begin, end, end - begin, None, begin == 0, end == size


def _stream(file: DataFile) -> Iterator[tuple[Any, ...]]:
    """Cut a compressed file of lines or text; only one process can read it, and it is much faster than tokenizing."""
    name = str(file.path)
    reads = "lines" if file.kind is Kind.JSON_LINES else "text"
    begin = done = 0
    ahead = b""
    with open(file.path, "rb") as raw, decompressing(file.path), open_bytes(raw, file) as stream:
        while block := ahead + stream.read(max(0, (begin // UNIT_BYTES + 1) * UNIT_BYTES - begin - len(ahead))):
            if reads == "lines":
                block, ahead = block + rest_of_line(name, stream, block), b""
            else:
                ahead = stream.read(LOOK_AHEAD)
                cut = text_cut(ahead)
                block, ahead = block + ahead[:cut], ahead[cut:]
            at = raw.tell()
            last = not ahead and not (ahead := stream.read(1))
            yield name, reads, begin, begin + len(block), at - done, block, begin == 0, last
            begin, done = begin + len(block), at


def rest_of_line(name: str, stream: IO[bytes], block: bytes) -> bytes:
    """Read on to the end of the line that a block of bytes breaks off in.

    Args:
        name: the file, for the message.
        stream: stands behind the block.
        block: the bytes before.

    Returns:
        The rest, empty where the block ends with its line.

    Raises:
        DataError: the line is too long for any document.
    """
    if block.endswith(b"\n"):
        return b""
    rest = stream.readline(_LONGEST)
    if len(rest) == _LONGEST:
        raise DataError(f"{name}: a line of more than {_LONGEST >> 20} MiB; is this JSON Lines, one object a line?")
    return rest


def text_cut(ahead: bytes) -> int:
    """Choose where to cut a text: behind the next line end if one is near, else between two characters.

    Args:
        ahead: what follows the place, LOOK_AHEAD bytes of it.

    Returns:
        How many bytes behind the place.
    """
    newline = ahead.find(b"\n") + 1
    return newline or next((at for at, byte in enumerate(ahead[:4]) if byte & 0xC0 != 0x80), 0)


def _array(file: DataFile) -> Iterator[tuple[Any, ...]]:
    size = file.path.stat().st_size
    count = 0
    with open(file.path, "rb") as raw, decompressing(file.path), open_bytes(raw, file) as stream:
        elements: list[Any] = []
        read = 0
        for element, length in _elements(file, stream):
            elements.append(element)
            read += length
            if read >= UNIT_BYTES:
                yield str(file.path), "elements", count, count + len(elements), 0, elements
                count, elements, read = count + len(elements), [], 0
        yield str(file.path), "elements", count, count + len(elements), size, elements


def _elements(file: DataFile, stream: IO[bytes]) -> Iterator[tuple[Any, int]]:
    """Parse an array element by element, so that memory is bounded by the longest of them."""
    decoder = json.JSONDecoder()
    text = _text_chunks(file, stream)
    buffer = next(text, "").lstrip("\ufeff \t\r\n")[1:]
    position = number = 0
    reason = "the array doesn't end"
    while True:
        while position < len(buffer) and buffer[position] in " \t\r\n,":
            position += 1
        if position < len(buffer) and buffer[position] == "]":
            return
        try:
            element, end = decoder.raw_decode(buffer, position)
            whole = end < len(buffer)  # a number or word at the buffer's end may go on
        except json.JSONDecodeError as error:
            whole, reason = False, error.msg
        except RecursionError:
            raise DataError(f"{file.path}, element {number + 1}: not JSON (nested too deeply)") from None
        if whole:
            yield element, end - position
            position, number = end, number + 1
            continue
        chunk = next(text, "")
        if not chunk or len(buffer) - position > _LONGEST:
            raise DataError(f"{file.path}, element {number + 1}: not JSON ({reason})")
        buffer, position = buffer[position:] + chunk, 0


def _text_chunks(file: DataFile, stream: IO[bytes]) -> Iterator[str]:
    decode = codecs.getincrementaldecoder("utf-8")()
    position = 0
    while True:
        block = stream.read(1 << 20)
        try:
            yield decode.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise DataError(f"{file.path}: not UTF-8 near byte {position + error.start} ({error.reason})") from None
        if not block:
            return
        position += len(block)


def _parquet(name: str, size: int) -> Iterator[tuple[Any, ...]]:
    with arrow_errors(name):
        import pyarrow.parquet as parquet

        with parquet.ParquetFile(name) as file:
            groups = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    whole = max(sum(groups), 1)
    for group, nbytes in enumerate(groups):
        yield name, "parquet", group, group + 1, size * nbytes // whole


def _arrow(name: str, size: int) -> Iterator[tuple[Any, ...]]:
    with arrow_errors(name):
        begin = nbytes = number = 0
        for number, batch in enumerate(arrow_batches(name), 1):
            nbytes += batch.nbytes
            if nbytes >= _ARROW_BYTES:
                yield name, "arrow", begin, number, nbytes
                begin, nbytes = number, 0
        if number > begin:
            yield name, "arrow", begin, number, nbytes


def arrow_batches(name: str) -> Iterator[Any]:
    """Give the record batches of an Arrow file, of the stream or the file format, mapped from the disk.

    Args:
        name: the file.

    Yields:
        pyarrow.RecordBatch.
    """
    import pyarrow

    source = pyarrow.memory_map(name)
    if source.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(source)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        source.seek(0)
        yield from pyarrow.ipc.open_stream(source)


@contextmanager
def arrow_errors(name: str) -> Iterator[None]:
    """Turn what pyarrow raises, and its absence, into errors that name the file.

    Args:
        name: the file.

    Raises:
        DataError: pyarrow isn't installed, or the file is truncated or damaged.
    """
    try:
        yield
    except ImportError:
        raise need("pyarrow", name) from None
    except Exception as error:
        if type(error).__module__.startswith("pyarrow") or isinstance(error, OSError):
            raise DataError(f"{name}: is truncated or damaged ({error}); copy or download it again") from None
        raise
