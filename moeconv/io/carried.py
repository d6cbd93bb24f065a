"""Files that go along unchanged: copied in pieces and checked on the way, so that their size never counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moeconv.errors import IntegrityError
from moeconv.io.checksum import checksum, new
from moeconv.io.paths import check_inside, open_regular

_PIECE = 1 << 20
CHAT_TEMPLATE = "chat_template.jinja"
"""What transformers reads before a template in tokenizer_config.json."""


@dataclass(frozen=True, slots=True)
class CarriedFile:
    """A file on disk that goes along: its path, size in bytes, and recorded checksum (None where there is none)."""

    path: Path
    size: int
    digest: str | None = None

    def copy(self, write: Callable[[bytes], object]) -> str:
        """Read it piece by piece.

        Args:
            write: called with each piece, in order.

        Returns:
            Its checksum.

        Raises:
            SourceError: it can't be read.
            IntegrityError: it is not what was recorded; raised after the last piece.
        """
        count, hasher = 0, new()
        with open_regular(self.path) as file:
            while data := file.read(_PIECE):
                count += len(data)
                hasher.update(data)
                write(data)
        if count != self.size or self.digest not in (None, hasher.hexdigest()):
            raise IntegrityError(f"{self.path}: differs from its checksum in the manifest, or was changed; restore it")
        return str(hasher.hexdigest())


# What goes along under a name: a file as it is, or bytes that are made for the output.
Content = CarriedFile | bytes


def carried_files(
    root: Path, recorded: Mapping[str, tuple[int, str]] | None, names: tuple[str, ...]
) -> dict[str, Content]:
    """Find the files that go along with a checkpoint.

    Args:
        root: its folder.
        recorded: size in bytes and checksum of each, where a manifest has them.
        names: the files' names.

    Returns:
        The files by name; nothing has been read.

    Raises:
        SourceError: a file is missing, a link to elsewhere, or no regular file.
        IntegrityError: a file has another size than was recorded.
    """
    out: dict[str, Content] = {}
    for name in names:
        path = check_inside(root, name)
        size, digest = (os.stat(path).st_size, None) if recorded is None else recorded[name]
        if os.stat(path).st_size != size:
            raise IntegrityError(f"{path}: differs from its checksum in the manifest: {size} bytes; restore the file")
        out[name] = CarriedFile(path, size, digest)
    return out


def read_content(content: Content) -> bytes:
    """Give what goes along as bytes; a large file takes as much memory.

    Raises:
        SourceError: it can't be read.
        IntegrityError: it is not what was recorded.
    """
    if isinstance(content, bytes):
        return content
    pieces: list[bytes] = []
    content.copy(pieces.append)
    return b"".join(pieces)


def size_of(content: Content) -> int:
    """Give the bytes of what goes along."""
    return len(content) if isinstance(content, bytes) else content.size


def write_content(content: Content, write: Callable[[bytes], object]) -> tuple[int, str]:
    """Hand what goes along to a writer.

    Args:
        content: a file, or bytes.
        write: called with each piece, in order.

    Returns:
        Its size in bytes, and its checksum.

    Raises:
        SourceError: the file can't be read.
        IntegrityError: it is not what was recorded.
    """
    if isinstance(content, CarriedFile):
        return content.size, content.copy(write)
    write(content)
    return len(content), checksum(content)
