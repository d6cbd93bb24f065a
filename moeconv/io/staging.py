"""Writing a folder all or nothing: into `OUT.partial` with a journal, renamed when complete; a killed run can go on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from moeconv.errors import SourceError, WriteError
from moeconv.io.carried import Content, write_content
from moeconv.io.decode import parse_json
from moeconv.io.paths import brief_path, fault_of, open_beneath

JOURNAL = ".moeconv-journal"
PARTIAL, WRITING = ".partial", ".writing"  # what a folder, a file carries behind its name until it is whole


class Staging:
    """The folder that a run writes into, and what is done of it.

    The journal's first line says what is written from what; each further line records a finished file.
    """

    def __init__(self, out: Path, identity: dict[str, Any], *, resume: bool, sync: bool = True) -> None:
        """Create the folder, or go on with the one that a killed run left.

        Args:
            out: the folder to be made.
            identity: what determines the output (the source's files, the targets); JSON values by name.
            resume: whether a folder left behind is to be continued.
            sync: whether what counts as done is on the disk first: then it outlives a power failure, not only a kill.

        Raises:
            WriteError: the output exists, a run was left behind and `resume` is not set, it was of something else, or it still runs.
        """
        self.out, self.folder = out, out.with_name(out.name + PARTIAL)
        self.done: dict[str, Any] = {}
        self.sync = sync
        self._journal: BinaryIO | None = None
        check_free(out)
        if self.folder.is_symlink():
            raise WriteError(f"{self.folder}: is a link, which is never written through; remove it")
        if self.folder.exists() and not resume:
            raise WriteError(f"{self.folder}: a run that did not finish left this; go on with --resume, or remove it")
        try:
            self.folder.mkdir(exist_ok=True)
            self._journal = self._lock()
            self._read(self._journal, json.loads(json.dumps(identity)))
        except WriteError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise WriteError(f"{self.folder}: can't be written: {error.strerror or error}") from None

    def _lock(self) -> BinaryIO:
        """Open the journal and lock it; another run may take the folder away, finished, at any moment before."""
        fd = open_beneath(self.folder, JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise WriteError(f"{self.folder / JOURNAL}: is no regular file; remove {self.folder} and start again")
        journal = open(fd, "r+b")  # noqa: SIM115  (kept open: it holds the lock)
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            journal.close()
            raise WriteError(f"{self.folder}: another run is writing it") from None
        try:
            here = os.stat(self.folder / JOURNAL)
            same = os.path.samestat(here, os.fstat(fd))
        except FileNotFoundError:
            same = False
        if same and os.path.lexists(self.out) and not here.st_size:  # made after the other run had finished: ours
            (self.folder / JOURNAL).unlink()
            with suppress(OSError):
                self.folder.rmdir()
        if not same or os.path.lexists(self.out):
            journal.close()
            raise WriteError(f"{self.out}: exists; another run has just finished it")
        return journal

    def _read(self, journal: BinaryIO, now: dict[str, Any]) -> None:
        """Take over what a killed run finished; what can't be read of its journal counts as not done."""
        raw = journal.read()
        head, newline, rest = raw.partition(b"\n")
        begun = newline or len(os.listdir(self.folder)) > 1  # the first line comes before any file
        before = _parsed(head, self.folder) if begun else None
        if not begun:
            if raw:  # an empty file is not truncated: ext4 writes one that was to the disk when it is closed
                journal.truncate(0)
            self._append(now)
            return
        if before is None:
            raise WriteError(
                f"{self.folder}: its journal is damaged and does not say what was begun here; remove the folder and start again"
            )
        if before != now:
            changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
            raise WriteError(
                f"{self.folder}: was begun with other {', '.join(changed)[:500]}; remove it and start again, or restore what it was begun with"
            )
        good = len(head) + 1
        for line in rest.split(b"\n")[:-1]:  # what follows the last newline was cut off by a kill
            value = _parsed(line, self.folder)
            name = None if value is None else value.get("file")
            if value is None or set(value) != {"file", "record"} or fault_of(name) is not None:
                break
            good += len(line) + 1
            self.done[str(name)] = value["record"]
        if good < len(raw):
            journal.truncate(good)
        self.done = {name: record for name, record in self.done.items() if _is_file(self.folder / name)}

    def _append(self, value: Any) -> None:
        assert self._journal is not None
        self._journal.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")
        self._journal.flush()
        if self.sync:
            os.fsync(self._journal.fileno())

    def open(self, name: str, flags: int) -> int:
        """Open a file under the name that it has until it is whole; folders on the way are made.

        Args:
            name: the file's name in the folder, as `finish` takes it.
            flags: how to open it, as os.open takes it.

        Returns:
            The file descriptor; the caller closes it.

        Raises:
            WriteError: the name leads out of the folder, or a link is in the way.
            OSError: the system refuses.
        """
        return open_beneath(self.folder, name, flags, suffix=WRITING)

    def finish(self, name: str, record: Any) -> None:
        """Make a written file count: it goes to the disk, gets its name, and the journal records it.

        Args:
            name: the file's name in the folder.
            record: what a resumed run needs to know of it, as JSON.
        """
        path = self.folder / (name + WRITING)
        if self.sync:
            sync_path(path)
        os.replace(path, self.folder / name)
        self._append({"file": name, "record": record})
        self.done[name] = record

    def write(self, name: str, content: Content) -> tuple[int, str]:
        """Write a file that goes along, whole.

        Args:
            name: the file's name in the folder.
            content: its bytes, or the file that it is a copy of.

        Returns:
            Its size in bytes, and its checksum.

        Raises:
            SourceError, IntegrityError: the file can't be read, or is not what was recorded.
        """
        return write_beneath(self.folder, name, content, sync=self.sync)

    def commit(self) -> None:
        """Give the folder its name; from here on readers accept it.

        Raises:
            WriteError: the name was taken meanwhile.
        """
        check_free(self.out)
        for folder, _, _ in os.walk(self.folder) if self.sync else ():
            sync_path(Path(folder))
        os.rename(self.folder, self.out)
        (self.out / JOURNAL).unlink()
        if self.sync:
            sync_path(self.out.parent)
        self.close()

    def close(self) -> None:
        """Let go of the folder; it can be resumed."""
        if self._journal is not None:
            with suppress(OSError):  # on a full disk, closing tries once more to write what is buffered
                self._journal.close()
            self._journal = None


def check_free(out: Path) -> None:
    """Check that an output's name is free, fits with what is added to it until it is whole, and its parent is a folder.

    Raises:
        WriteError: it is not.
    """
    if os.path.lexists(out):
        raise WriteError(f"{out}: exists; choose another name, or remove it")
    if not os.path.isdir(out.parent):
        raise WriteError(
            f"{brief_path(out.parent)}: no such folder to write {brief_path(Path(out.name))} into; create it first"
        )
    try:
        os.lstat(out.with_name(out.name + PARTIAL))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise WriteError(f"{brief_path(out)}: can't be an output: {getattr(error, 'strerror', error)}") from None


def check_space(folder: Path, needed: int) -> None:
    """Check that a file system has room.

    Args:
        folder: a folder on it.
        needed: bytes still to be written.

    Raises:
        WriteError: it has less.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WriteError(
            f"{folder}: {needed:,} bytes are needed and {free:,} are free; make room, or choose another disk"
        )


def write_beneath(root: Path, name: str, content: Content, *, sync: bool = True) -> tuple[int, str]:
    """Write a file of a folder whole or not at all: beside it, to the disk if `sync`, then renamed.

    Args:
        root: the folder.
        name: the file's name relative to it; folders on the way are made.
        content: its bytes, or the file that it is a copy of.
        sync: whether to wait until the bytes are on the disk.

    Returns:
        Its size in bytes, and its checksum.

    Raises:
        WriteError: the name leads out of the folder, or a link is in the way.
        SourceError, IntegrityError: the file can't be read, or is not what was recorded.
        OSError: the system refuses.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with open(open_beneath(root, name, flags, suffix=WRITING), "wb") as file:
        written = write_content(content, file.write)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    os.replace(root / (name + WRITING), root / name)
    return written


def _parsed(line: bytes, folder: Path) -> dict[str, Any] | None:
    """Read a line of the journal; None where it is damaged, as after a power failure."""
    try:
        return parse_json(line, str(folder / JOURNAL))
    except SourceError:
        return None


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def sync_path(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
