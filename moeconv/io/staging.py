"""Writing a folder all or nothing: into `OUT.partial` with a journal, renamed when complete; a killed run can go on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from moeconv.errors import WriteError
from moeconv.io.paths import fault_of, open_beneath

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
        self._journal: IO[str] | None = None
        check_free(out)
        if self.folder.is_symlink():
            raise WriteError(f"{self.folder}: is a link, which is never written through; remove it")
        if self.folder.exists() and not resume:
            raise WriteError(f"{self.folder}: a run that did not finish left this; go on with --resume, or remove it")
        try:
            self.folder.mkdir(exist_ok=True)
            self._open(json.loads(json.dumps(identity)))
        except WriteError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise WriteError(f"{self.folder}: can't be written: {error.strerror or error}") from None

    def _open(self, identity: dict[str, Any]) -> None:
        self._journal = open(self.folder / JOURNAL, "a+", encoding="utf8")  # noqa: SIM115  (kept open: it holds the lock)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise WriteError(f"{self.folder}: another run is writing it") from None
        self._journal.seek(0)
        lines = self._journal.read().split("\n")
        complete = lines[:-1]  # what follows the last newline was cut off by a kill
        if not complete:
            if lines[-1]:  # an empty file is not truncated: ext4 writes one that was to the disk when it is closed
                self._journal.truncate(0)
            self._append(identity)
            return
        if lines[-1]:
            self._journal.truncate(sum(len(line.encode()) + 1 for line in complete))
        before = json.loads(complete[0])
        if before != identity:
            changed = sorted(k for k in before.keys() | identity.keys() if before.get(k) != identity.get(k))
            raise WriteError(
                f"{self.folder}: was begun with other {', '.join(changed)}; remove it and start again, or restore what it was begun with"
            )
        for line in complete[1:]:
            entry = json.loads(line)
            if fault_of(entry["file"]) is None and (self.folder / entry["file"]).is_file():
                self.done[entry["file"]] = entry["record"]

    def _append(self, value: Any) -> None:
        assert self._journal is not None
        self._journal.write(json.dumps(value, separators=(",", ":")) + "\n")
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

    def write(self, name: str, data: bytes) -> None:
        """Write a small file whole.

        Args:
            name: the file's name in the folder.
            data: its bytes.
        """
        write_beneath(self.folder, name, data, sync=self.sync)

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
    """Check that an output's name is free and its parent is a folder.

    Raises:
        WriteError: it is not.
    """
    if out.exists() or out.is_symlink():
        raise WriteError(f"{out}: exists; choose another name, or remove it")
    if not out.parent.is_dir():
        raise WriteError(f"{out.parent}: no such folder to write {out.name} into; create it first")


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


def write_beneath(root: Path, name: str, data: bytes, *, sync: bool = True) -> None:
    """Write a small file of a folder whole or not at all: beside it, to the disk if `sync`, then renamed.

    Args:
        root: the folder.
        name: the file's name relative to it; folders on the way are made.
        data: its bytes.
        sync: whether to wait until the bytes are on the disk.

    Raises:
        WriteError: the name leads out of the folder, or a link is in the way.
        OSError: the system refuses.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with open(open_beneath(root, name, flags, suffix=WRITING), "wb") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    os.replace(root / (name + WRITING), root / name)


def sync_path(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
