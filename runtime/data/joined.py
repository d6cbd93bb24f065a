"""Tokenized units laid end to end, in order, as far as they are done; what is on disk of them is always good to go on with."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from runtime.data.errors import DataError
from runtime.data.indexed import write_index
from runtime.data.parts import PartReport, check_report, part_paths, read_report

MESSAGES = 20
"""Bad lines that are told in words."""
_LONGEST_DOCUMENT = (1 << 31) - 1
_CHECKPOINT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run of `prepare` came to; kept beside the token files."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    """Documents without text, left out."""
    bad: int = 0
    """Lines or rows that were no documents, left out."""
    messages: tuple[str, ...] = ()
    """The first of these, with file and line."""
    text_key: str = "text"
    eod: int | None = None
    """Id at the end of each document."""
    vocab_size: int = 0
    """Tokens of the tokenizer."""


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader sees all of it or nothing."""
    partial = path.with_name(path.name + ".writing")
    partial.write_text(text, encoding="utf8")
    os.replace(partial, path)


class Joined:
    """The ids and lengths of the first units, laid end to end, and how far they are good on disk."""

    def __init__(self, folder: Path, dtype: np.dtype[np.generic], allowed: int) -> None:
        self._folder, self._dtype, self._allowed = folder, dtype, allowed
        self._result = Prepared()
        self.next, self._open, self.nbytes = 0, 0, 0
        self._clean = 0  # parts before this one are removed
        self._saved = time.monotonic()
        self._files: list[IO[bytes]] = []

    def __enter__(self) -> Joined:
        state = self._folder / "state.json"
        if state.is_file():
            values = json.loads(state.read_text(encoding="utf8"))
            self.next, self._open, self.nbytes = values["next"], values["open"], values["nbytes"]
            self._result = Prepared(**{**values["result"], "messages": tuple(values["result"]["messages"])})
            self._clean = self.next
        sizes = (self._result.tokens * self._dtype.itemsize, self._result.documents * 4)
        for name, size in zip(("tokens.bin", "lengths.bin"), sizes, strict=True):
            file = open(self._folder / name, "ab")
            self._files.append(file)
            if file.tell() < size:
                raise DataError(
                    f"{self._folder / name}: {file.tell()} bytes, expected {size}: remove {self._folder} to start anew"
                )
            file.truncate(size)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for file in self._files:
            file.close()

    def join(self, done: set[int]) -> None:
        """Lay the units that are due to the others; their parts are removed when that is on disk."""
        while self.next in done:
            part = read_report(self._folder, self.next)
            if part is None:
                raise DataError(f"{part_paths(self._folder, self.next)[0]}: vanished; start again to make it anew")
            check_report(part, self._allowed, self._result.bad)
            self._add(part)
            done.discard(part.index)
            self.next += 1
            if time.monotonic() - self._saved > _CHECKPOINT_SECONDS:
                self._save()

    def _add(self, part: PartReport) -> None:
        tokens, lengths = self._files
        with open(part_paths(self._folder, part.index)[0], "rb") as ids:
            shutil.copyfileobj(ids, tokens, 1 << 20)
        sizes = list(part.lengths)
        if part.joined and sizes and self._open + sizes[0] <= _LONGEST_DOCUMENT:
            sizes[0] += self._open
        elif self._open:
            sizes.insert(0, self._open)
        self._open = sizes.pop() if part.open and sizes else 0
        lengths.write(np.array(sizes, np.int32).tobytes())
        old = self._result
        self._result = replace(
            old,
            documents=old.documents + len(sizes),
            tokens=old.tokens + sum(part.lengths),
            empty=old.empty + part.empty,
            bad=old.bad + part.bad,
            messages=(*old.messages, *part.messages)[:MESSAGES],
        )
        self.nbytes += part.nbytes

    def _save(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        state = {"next": self.next, "open": self._open, "nbytes": self.nbytes, "result": asdict(self._result)}
        write_whole(self._folder / "state.json", json.dumps(state))
        for index in range(self._clean, self.next):
            for path in part_paths(self._folder, index):
                path.unlink(missing_ok=True)
        self._clean, self._saved = self.next, time.monotonic()

    def finish(self, out: Path) -> Prepared:
        """Write the index; the output still has no name.

        Args:
            out: the .bin file, for messages.

        Returns:
            What it all came to.
        """
        if self._open:  # a file's last part always closes it
            raise DataError(f"{out}: its last document doesn't end; a file changed while it was read: start again")
        self._save()
        lengths = self._folder / "lengths.bin"
        if self._result.documents:
            write_index(self._folder / "index.idx", np.memmap(lengths, np.int32, "r"), self._dtype)
        return self._result
