"""Writing a folder all or nothing: into `OUT.partial` with a journal, then renamed; a killed run can go on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from moeconv.errors import WriteError
from moeconv.megatron.files import MegatronFile

_JOURNAL = ".journal"


def fingerprint(root: Path, files: Iterable[str], files_to_write: Iterable[MegatronFile]) -> str:
    """Give a digest of what a run reads and writes: source files by size and time, targets by layout.

    Args:
        root: the source's folder.
        files: its files.
        files_to_write: the laid-out targets.

    Returns:
        A hexadecimal digest; a different source or other options give another.
    """
    digest = hashlib.sha256()
    for name in files:
        stat = os.stat(root / name)
        digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    for file in files_to_write:
        digest.update(f"{file.name}\0{file.size}\n".encode())
        for position, data in file.literals:
            digest.update(position.to_bytes(8, "little") + data)
    return digest.hexdigest()


class Staging:
    """The folder that a run writes into, and the names of the files that are done."""

    def __init__(self, out: Path, key: str, *, resume: bool) -> None:
        """Create the folder, or go on with one that a killed run left.

        Args:
            out: the folder to be made.
            key: the run's fingerprint.
            resume: whether a folder left behind is to be continued.

        Raises:
            WriteError: the output exists, a run was left behind and `resume` is not set, or it was of another source.
        """
        self.out, self.folder = out, out.with_name(out.name + ".partial")
        self.done: set[str] = set()
        if out.exists():
            raise WriteError(f"{out}: exists; choose another name, or remove it")
        if not out.parent.is_dir():
            raise WriteError(f"{out.parent}: no such folder to write {out.name} into")
        journal = self.folder / _JOURNAL
        if self.folder.exists():
            if not resume:
                raise WriteError(f"{self.folder}: an unfinished run left it; go on with --resume, or remove it")
            lines = journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []
            if lines and json.loads(lines[0]) != key:
                raise WriteError(f"{self.folder}: was begun from another source or with other options; remove it")
            self.done = {json.loads(line) for line in lines[1:] if line.endswith('"')}
        try:
            self.folder.mkdir(exist_ok=True)
            self._journal = open(journal, "a", encoding="utf-8")  # noqa: SIM115 (kept open for the run)
            if journal.stat().st_size == 0:
                self._record(key)
        except OSError as error:
            raise WriteError(f"{self.folder}: can't be written: {error.strerror or error}") from None

    def finished(self, name: str) -> None:
        """Record that a file is complete on disk."""
        self._record(name)

    def commit(self) -> None:
        """Give the complete folder its name.

        Raises:
            WriteError: it can't be renamed.
        """
        self._journal.close()
        try:
            (self.folder / _JOURNAL).unlink()
            for folder, _, _ in os.walk(self.folder):
                _sync(Path(folder))
            os.rename(self.folder, self.out)
            _sync(self.out.parent)
        except OSError as error:
            raise WriteError(f"{self.out}: can't be written: {error.strerror or error}") from None

    def abandon(self) -> None:
        """Close the journal; what was written stays, to be resumed."""
        self._journal.close()
        if not self.done and not any(p.name != _JOURNAL for p in self.folder.iterdir()):
            shutil.rmtree(self.folder)

    def _record(self, value: str) -> None:
        self._journal.write(json.dumps(value) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
