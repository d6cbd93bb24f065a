"""From a unit of a data file to its documents, each line or row checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from runtime.data.errors import DataError
from runtime.data.kinds import open_bytes, recognise
from runtime.data.units import LOOK_AHEAD, Unit, arrow_batches, arrow_errors, rest_of_line, text_cut

LONGEST_PIECE = 1 << 20
"""Characters that are tokenized at once; a longer document is cut at line ends, so that memory stays bounded."""
_ROWS = 256
_NEWLINE_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one."""

    text: str
    first: bool = True
    last: bool = True


@dataclass(frozen=True, slots=True)
class Bad:
    """A line, row or element that is no document."""

    where: Callable[[], str]
    """Names the file and the place; called only for what is reported, because counting lines takes reading the file."""
    what: str


Taken = TypeVar("Taken")
Take = Callable[[Any, Callable[[], str]], Taken | Bad]
"""From a record and the words for its place to what is wanted of it, or to what is wrong with it."""


def read_unit(unit: Unit, text_key: str) -> Iterator[Piece | Bad]:
    """Read a unit's documents.

    Args:
        unit: the unit.
        text_key: the field that holds the text.

    Yields:
        Pieces of documents in order, and what can't be read. An empty text is a piece too.

    Raises:
        DataError: the file changed or is damaged, or has no such column.
    """
    if unit.reads == "text":
        yield from _plain_text(unit)
        return

    def take(record: Any, where: Callable[[], str]) -> str | Bad:
        return _text_of(record, text_key, where)

    yield from _pieces(read_records(unit, take, lambda names: _text_column(unit, text_key, names)))


def read_records(unit: Unit, take: Take[Taken], columns: Callable[[list[str]], list[str]]) -> Iterator[Taken | Bad]:
    """Read a unit's records: objects of JSON, or rows of a table.

    Args:
        unit: the unit, which is no plain text.
        take: what is wanted of each.
        columns: which columns of a table are read, of those that it has.

    Yields:
        What was taken of each record in order, and what can't be read.

    Raises:
        DataError: the file changed or is damaged; what `columns` raises.
    """
    if unit.reads == "lines":
        yield from _json_lines(unit, take)
    elif unit.reads == "elements":
        for number, record in enumerate(unit.data, unit.begin + 1):
            yield take(record, _place(f"{unit.path}, element {number}"))
    else:
        yield from _rows(unit, take, columns)


def _pieces(documents: Iterator[str | Bad]) -> Iterator[Piece | Bad]:
    for document in documents:
        if isinstance(document, Bad) or len(document) <= LONGEST_PIECE:
            yield document if isinstance(document, Bad) else Piece(document)
            continue
        parts = list(_cut(document))
        for place, part in enumerate(parts):
            yield Piece(part, place == 0, place == len(parts) - 1)


def _cut(text: str) -> Iterator[str]:
    """Cut a long text behind a line end, else before a space, else anywhere."""
    begin = 0
    while len(text) - begin > LONGEST_PIECE:
        end = text.rfind("\n", begin, begin + LONGEST_PIECE) + 1
        if end <= begin:
            end = text.rfind(" ", begin + 1, begin + LONGEST_PIECE)
        end = end if end > begin else begin + LONGEST_PIECE
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _lines_of(unit: Unit) -> tuple[int, bytes]:
    """Read the lines that begin in a unit's range of bytes, the last one to its end.

    Returns:
        Where they begin, and the bytes.
    """
    if unit.data is not None:
        return unit.begin, unit.data
    with open(unit.path, "rb") as file:
        begin = unit.begin
        if begin:
            file.seek(begin - 1)
            begin += len(rest_of_line(unit.path, file, file.read(1)))
        if begin >= unit.end:
            return begin, b""
        data = file.read(unit.end - begin)
        return begin, data + rest_of_line(unit.path, file, data)


def _text_of_range(unit: Unit) -> tuple[int, bytes]:
    """Read a unit's part of a text; both its ends move on to where a text may be cut."""
    if unit.data is not None:
        return unit.begin, unit.data
    with open(unit.path, "rb") as file:
        ends = []
        for end in (unit.begin, unit.end):
            file.seek(end)
            ends.append(end + (text_cut(file.read(LOOK_AHEAD)) if end else 0))
        file.seek(ends[0])
        return ends[0], file.read(ends[1] - ends[0])


def _json_lines(unit: Unit, take: Take[Taken]) -> Iterator[Taken | Bad]:
    begin, data = _lines_of(unit)
    if begin == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            yield Bad(_line(unit, begin, number), f"not JSON ({error.msg} at column {error.colno})")
        except UnicodeDecodeError as error:
            yield Bad(_line(unit, begin, number), f"not UTF-8 (byte {error.start + 1} of the line)")
        except RecursionError:
            yield Bad(_line(unit, begin, number), "not JSON (nested too deeply)")
        else:
            yield take(record, _line(unit, begin, number))


def _line(unit: Unit, begin: int, number: int) -> Callable[[], str]:
    def where() -> str:
        return f"{unit.path}, line {_newlines_before(unit, begin) + number}"

    return where


def _newlines_before(unit: Unit, begin: int) -> int:
    count, left = 0, begin
    with open(unit.path, "rb") as raw, open_bytes(raw, recognise(Path(unit.path))) as stream:
        while left and (block := stream.read(min(left, _NEWLINE_BLOCK))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _text_of(record: Any, text_key: str, where: Callable[[], str]) -> str | Bad:
    if isinstance(record, dict):
        text = record.get(text_key)
        if isinstance(text, str):
            # A lone surrogate, which JSON can escape, is no text: it has no UTF-8.
            return text if text.isascii() or not has_surrogate(text) else Bad(where, "its text holds a lone surrogate")
        if text_key in record:
            return Bad(where, f'its "{text_key}" is {type(text).__name__}; expected a string')
        keys = ", ".join(sorted(map(str, record))[:8])
        advice = "; the trainer takes conversations with --finetune-data" if "messages" in record else ""
        return Bad(
            where,
            f'expected an object with a "{text_key}" key that holds a string (--text-key); it has {keys or "none"}{advice}',
        )
    return Bad(where, f'expected an object with a "{text_key}" key that holds a string (--text-key)')


def has_surrogate(text: str) -> bool:
    """Say whether a text holds half of a pair of UTF-16, for which there is no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _place(text: str) -> Callable[[], str]:
    return lambda: text


def _plain_text(unit: Unit) -> Iterator[Piece]:
    """A file is one document, which goes on from unit to unit."""
    begin, data = _text_of_range(unit)
    if begin == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{unit.path}: not UTF-8 at byte {begin + error.start} (0x{data[error.start]:02x}); "
            f"convert it, for example: iconv -f ISO-8859-1 -t UTF-8 {unit.path}"
        ) from None
    if "\0" in text:
        raise DataError(f"{unit.path}: a NUL at byte {begin + data.index(0)}; this is no plain text")
    parts = list(_cut(text))
    for place, part in enumerate(parts):
        yield Piece(part, unit.first and place == 0, unit.last and place == len(parts) - 1)


def _rows(unit: Unit, take: Take[Taken], columns: Callable[[list[str]], list[str]]) -> Iterator[Taken | Bad]:
    with arrow_errors(unit.path):
        row, group = 0, "row group" if unit.reads == "parquet" else "record batch"
        for batch in _parquet_batches(unit, columns) if unit.reads == "parquet" else _arrow_batches(unit):
            for record in batch.select(columns(batch.schema.names)).to_pylist():
                row += 1
                yield take(record, _place(f"{unit.path}, {group} {unit.begin}, row {row}"))


def _parquet_batches(unit: Unit, columns: Callable[[list[str]], list[str]]) -> Iterator[Any]:
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(unit.path) as file:
        names = columns(file.schema_arrow.names)
        groups = list(range(unit.begin, unit.end))
        yield from file.iter_batches(_ROWS, row_groups=groups, columns=names, use_threads=False)


def _arrow_batches(unit: Unit) -> Iterator[Any]:
    for number, batch in enumerate(arrow_batches(unit.path)):
        if number >= unit.end:
            return
        if number >= unit.begin:
            yield from (batch.slice(row, _ROWS) for row in range(0, batch.num_rows, _ROWS))


def _text_column(unit: Unit, text_key: str, names: list[str]) -> list[str]:
    if text_key not in names:
        raise DataError(f"{unit.path}: has no column {text_key!r}; name one of {', '.join(names)} with --text-key")
    return [text_key]
