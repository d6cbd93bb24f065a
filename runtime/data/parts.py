"""A unit tokenized: its ids and what else is known of it, two files that are kept until they are laid to the others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.data.chat import ChatEncoder
from runtime.data.conversations import read_conversations
from runtime.data.documents import Bad, Piece, read_unit
from runtime.data.errors import DataError
from runtime.data.indexed import narrow
from runtime.data.tokenizer import Encoder
from runtime.data.units import Unit

_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 1 << 20


@dataclass(frozen=True, slots=True)
class PartReport:
    """What is known of a tokenized unit."""

    index: int
    lengths: list[int]
    """Tokens of each document, or of the part of one that is in this unit."""
    joined: bool = False
    """The first of them goes on with the document that the unit before ends in."""
    open: bool = False
    """The last of them is gone on with in the next unit."""
    empty: int = 0
    """Documents without text, or conversations in which nothing is learned, left out."""
    bad: int = 0
    """Lines or rows that are no documents."""
    messages: tuple[str, ...] = ()
    """Where the first of them are, and what they are."""
    nbytes: int = 0
    """Bytes of the source."""
    ids_bytes: int = 0
    """Size of the file of ids."""


@dataclass(frozen=True, slots=True)
class Tokenizing:
    """How units are tokenized."""

    text_key: str
    dtype: str
    max_messages: int
    """Bad lines of a unit that are told in words."""


def part_paths(folder: Path, index: int) -> tuple[Path, Path]:
    """Give the names of a part's ids and of its report."""
    return folder / f"{index:08d}.ids", folder / f"{index:08d}.json"


def read_report(folder: Path, index: int) -> PartReport | None:
    """Read a finished part's report; None where the part isn't finished, or isn't whole.

    Args:
        folder: the folder of the parts.
        index: the unit's.
    """
    ids, report = part_paths(folder, index)
    try:
        values = json.loads(report.read_text(encoding="utf8"))
        part = PartReport(**{**values, "messages": tuple(values["messages"])})
        size = ids.stat().st_size
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return part if part.index == index and size == part.ids_bytes else None


def tokenize_unit(unit: Unit, encoder: Encoder | ChatEncoder, how: Tokenizing, folder: Path) -> PartReport:
    """Tokenize a unit into a part.

    Args:
        unit: what to read.
        encoder: turns texts, or conversations, into ids.
        how: settings.
        folder: where the part goes.

    Returns:
        The report, which is on disk too.

    Raises:
        DataError: the file is damaged.
        OSError: the part can't be written.
    """
    ids_path, report_path = part_paths(folder, unit.index)
    dtype = np.dtype(how.dtype)
    work = _Work(unit, how.max_messages)
    blocks = _conversations(work, encoder) if isinstance(encoder, ChatEncoder) else _texts(work, encoder, how.text_key)
    with open(ids_path, "wb") as file:
        for block in blocks:
            file.write(narrow(block, dtype, Path(unit.path)).tobytes())
        report = work.report(file.tell())
    partial = report_path.with_suffix(".writing")
    partial.write_text(json.dumps(asdict(report)), encoding="utf8")
    os.replace(partial, report_path)
    return report


def _texts(work: _Work, encoder: Encoder, text_key: str) -> Iterator[npt.NDArray[np.int64]]:
    texts = _Texts(work, encoder)
    for batch in _batches(read_unit(work.unit, text_key), work):
        yield texts.encode(batch)


def _conversations(work: _Work, encoder: ChatEncoder) -> Iterator[npt.NDArray[np.int64]]:
    for item in read_conversations(work.unit):
        if isinstance(item, Bad):
            work.refuse(item)
            continue
        marked = encoder.encode(item)
        if isinstance(marked, str):
            work.refuse(Bad(item.where, marked))
        elif not (marked & 1).any():
            work.empty += 1
        else:
            work.lengths.append(len(marked))
            yield marked


def _batches(items: Iterator[Piece | Bad], work: _Work) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for item in items:
        if isinstance(item, Bad):
            work.refuse(item)
            continue
        batch.append(item)
        characters += len(item.text)
        if len(batch) == _BATCH_DOCUMENTS or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Texts:
    """Texts to ids; a long document comes in pieces."""

    def __init__(self, work: _Work, encoder: Encoder) -> None:
        self._work, self._encoder = work, encoder
        self._frame: tuple[list[int], list[int]] | None = None

    def encode(self, batch: list[Piece]) -> npt.NDArray[np.int64]:
        """Give the ids of a batch, and keep the documents' lengths."""
        work = self._work
        whole = [piece.text for piece in batch if piece.first and piece.last and piece.text]
        ids = iter(self._encoder.encode(whole)) if whole else iter(())
        flat: list[int] = []
        for piece in batch:
            if piece.first and piece.last:
                if not piece.text:
                    work.empty += 1
                    continue
                document = self._encoder.end(next(ids))
            else:
                document = self._part(piece)
            if piece.first:
                if document:
                    work.lengths.append(len(document))
            elif work.lengths:
                work.lengths[-1] += len(document)
            else:
                work.joined = True
                work.lengths.append(len(document))
            work.open = not piece.last
            flat += document
        return np.array(flat, np.int64)

    def _part(self, piece: Piece) -> list[int]:
        """A part of a long document: the special tokens before and behind a text are put once."""
        if self._frame is None:
            self._frame = self._encoder.frame()
        before, behind = self._frame
        [ids] = self._encoder.encode([piece.text], special=False) if piece.text else [[]]
        ids = (before if piece.first else []) + ids
        return self._encoder.end(ids + behind) if piece.last else ids


class _Work:
    """What a unit has come to so far."""

    def __init__(self, unit: Unit, max_messages: int) -> None:
        self.unit, self._max_messages = unit, max_messages
        self.lengths: list[int] = []
        self.joined = self.open = False
        self.empty = self.bad = 0
        self.messages: list[str] = []

    def refuse(self, bad: Bad) -> None:
        """Count what is no document."""
        self.bad += 1
        if len(self.messages) < self._max_messages:
            self.messages.append(f"{bad.where()}: {bad.what}")

    def report(self, ids_bytes: int) -> PartReport:
        """Say what the unit has come to."""
        return PartReport(
            index=self.unit.index,
            lengths=self.lengths,
            joined=self.joined,
            open=self.open,
            empty=self.empty,
            bad=self.bad,
            messages=tuple(self.messages),
            nbytes=self.unit.nbytes,
            ids_bytes=ids_bytes,
        )


def check_report(report: PartReport, allowed: int, before: int) -> None:
    """Refuse more bad lines than are allowed.

    Args:
        report: of a part, in the order of the units.
        allowed: what --skip-bad-lines says.
        before: bad lines of the units before.

    Raises:
        DataError: names the first line that is too much, or the first at all where none is allowed.
    """
    if before + report.bad <= allowed:
        return
    message = report.messages[min(allowed - before, len(report.messages) - 1)]
    limit = (
        f" (bad line {allowed + 1}; --skip-bad-lines is {allowed})"
        if allowed
        else "; --skip-bad-lines N leaves out up to N such lines"
    )
    raise DataError(message + limit)
