"""Names from checkpoints as paths: plain, relative, inside their folder, at reading and again at writing."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from moeconv.errors import SourceError, WriteError

# What a file system takes, less what unfinished files carry behind their names.
MAX_PART_BYTES = 240
MAX_NAME_BYTES = 1024
MAX_READ_BYTES = 64 << 20  # what is read whole and parsed
# What git leaves in place of a file that Git LFS didn't fetch.
# Source: https://github.com/git-lfs/git-lfs/blob/v3.5.1/docs/spec.md
_POINTER, _MAX_POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")


def fault_of(name: object) -> str | None:
    """Say what keeps a name from being that of a file inside a folder.

    Args:
        name: a name from a manifest, an index, an archive, a journal or a hub's list.

    Returns:
        What is wrong in words; None for plain relative names such as `a.json` and `folder/a.json`.
    """
    if not isinstance(name, str) or not name:
        return "no name"
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return "no valid Unicode"
    if not name.isprintable() or "\\" in name:
        return "has characters that no file name should have"
    if len(encoded) > MAX_NAME_BYTES:
        return f"longer than {MAX_NAME_BYTES} bytes"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return "no plain relative name"
        if len(part.encode()) > MAX_PART_BYTES:
            return f"longer than {MAX_PART_BYTES} bytes"
        if ":" in part or _DEVICES.fullmatch(part):
            return "a device's name"
    return None


def check_name(name: object, where: str) -> str:
    """Check a name that a checkpoint gives for one of its files.

    Args:
        name: the name as read.
        where: what it was read from, for the message.

    Returns:
        The name.

    Raises:
        SourceError: it is absolute, climbs out, is hidden, or is no name that every file system takes.
    """
    fault = fault_of(name)
    if fault is None and any(part.startswith(".") for part in str(name).split("/")):
        fault = "a hidden file's name"
    if fault is not None:
        shown = repr(name)
        shown = shown if len(shown) <= 200 else shown[:200] + "..."
        raise SourceError(
            f"{where}: refers to {shown} ({fault}); a checkpoint names only files inside its own folder. "
            "Don't use it unless you trust who made it"
        )
    assert isinstance(name, str)
    return name


def check_inside(root: Path, name: str) -> Path:
    """Check that a file named by a checkpoint lies inside its folder.

    A symbolic link may lead into the `blobs` of the same repository in the hub's cache, where huggingface_hub keeps its files.

    Args:
        root: the checkpoint's folder.
        name: the file's name relative to it.

    Returns:
        The file's path.

    Raises:
        SourceError: the name is none, or the file is missing, a link to elsewhere, no regular file, or a Git LFS pointer.
    """
    return check_file(root, check_name(name, str(root)))


def check_file(root: Path, name: str) -> Path:
    """Check a file inside a folder, as `check_inside`, whose name is a format's own and may begin with a dot.

    Raises:
        SourceError: the file is missing, a link to elsewhere, no regular file, or a Git LFS pointer.
    """
    path = root / name
    try:
        real, base = Path(os.path.realpath(path)), Path(os.path.realpath(root))
        allowed = [base]
        if base.parent.name == "snapshots":
            allowed.append(base.parent.parent / "blobs")
        if not any(real.is_relative_to(folder) for folder in allowed):
            raise SourceError(
                f"{path}: is a link to {real}, outside the folder; copy the files themselves, as with `cp -rL`"
            )
        status = os.stat(real)
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file; the download is incomplete") from None
    except OSError as error:
        raise SourceError(f"{path}: can't be read: {error.strerror or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{path}: is no regular file")
    if len(_POINTER) < status.st_size < _MAX_POINTER_BYTES and read_whole(real).startswith(_POINTER):
        raise SourceError(f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
    return path


def read_inside(root: Path, name: str, max_bytes: int = MAX_READ_BYTES) -> bytes:
    """Read a small file of a checkpoint.

    Args:
        root: the checkpoint's folder.
        name: the file's name relative to it.
        max_bytes: the most bytes that such a file has.

    Returns:
        Its bytes.

    Raises:
        SourceError: as `check_inside`, or it can't be read, or is larger.
    """
    return read_whole(check_inside(root, name), max_bytes)


def read_whole(path: Path, max_bytes: int = MAX_READ_BYTES) -> bytes:
    """Read a small file.

    Args:
        path: the file.
        max_bytes: the most bytes that such a file has.

    Returns:
        Its bytes.

    Raises:
        SourceError: it is missing, no regular file, larger, or can't be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise SourceError(f"{path}: {size:,} bytes; such files have at most {max_bytes:,}")
        return file.read(size)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, without waiting for what is no file (a pipe waits for its writer).

    Args:
        path: the file.

    Yields:
        The open file.

    Raises:
        SourceError: it is missing, no regular file, or can't be opened or read.
    """
    try:
        with open(open_to_read(path), "rb") as file:
            yield file
    except OSError as error:
        raise SourceError(f"{path}: can't be read: {error.strerror or error}") from None


def open_to_read(path: Path) -> int:
    """Open a regular file for reading, as `open_regular`; the caller closes the file descriptor.

    Raises:
        SourceError: it is no regular file.
        OSError: the system refuses.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:
        raise SourceError(f"{brief_path(path)}: is no path") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SourceError(f"{path}: is no regular file")
    return fd


def check_folder(path: Path) -> None:
    """Check that a path is a folder that can be listed.

    Raises:
        SourceError: it is not.
    """
    try:
        os.scandir(path).close()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise SourceError(f"{brief_path(path)}: no such folder") from None
    except OSError as error:
        raise SourceError(f"{brief_path(path)}: can't be read: {error.strerror or error}") from None


def brief_path(path: Path) -> str:
    """Show a path in a message, cut where no one would read on."""
    text = str(path)
    return text if len(text) <= 300 else text[:150] + "..." + text[-100:]


def open_beneath(root: Path, name: str, flags: int, *, suffix: str = "") -> int:
    """Open a file to be written beneath a folder, and make the folders on the way; no link is followed, whoever made it.

    Args:
        root: the folder.
        name: the file's name relative to it.
        flags: how to open it, as os.open takes it.
        suffix: what the file carries behind its name while it is written.

    Returns:
        The file descriptor; the caller closes it.

    Raises:
        WriteError: the name leads out of the folder, or a link is in the way.
        OSError: the system refuses.
    """
    fault = fault_of(name)
    if fault is not None:
        raise WriteError(f"{root}: refuses to write {name!r} ({fault}): it would not be a file inside this folder")
    *folders, last = name.split("/")
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for part in folders:
            with suppress(FileExistsError):
                os.mkdir(part, dir_fd=fd)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = inner
        return os.open(last + suffix, flags | os.O_NOFOLLOW, 0o666, dir_fd=fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):  # a link or a file where a folder is expected
            raise WriteError(f"{root / name}: a link is in the way; remove {root} and start again") from None
        raise
    finally:
        os.close(fd)
