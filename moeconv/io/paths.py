"""Names from checkpoints as paths: plain, relative, inside their folder, at reading and again at writing."""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from moeconv.errors import SourceError, WriteError

# What a file system takes, less what unfinished files carry behind their names.
MAX_PART_BYTES = 240
MAX_NAME_BYTES = 1024
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
        SourceError: the name is none, or the file is missing, a link to elsewhere, or no regular file.
    """
    path = root / check_name(name, str(root))
    try:
        real, base = Path(os.path.realpath(path)), Path(os.path.realpath(root))
        allowed = [base]
        if base.parent.name == "snapshots":
            allowed.append(base.parent.parent / "blobs")
        if not any(real.is_relative_to(folder) for folder in allowed):
            raise SourceError(f"{path}: is a link to {real}, outside the folder; copy the file into it")
        mode = os.stat(real).st_mode
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file; the download is incomplete") from None
    except OSError as error:
        raise SourceError(f"{path}: can't be read: {error.strerror or error}") from None
    if not stat.S_ISREG(mode):
        raise SourceError(f"{path}: is no regular file")
    return path


def read_inside(root: Path, name: str) -> bytes:
    """Read a small file of a checkpoint.

    Raises:
        SourceError: as `check_inside`, or it can't be read.
    """
    path = check_inside(root, name)
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: can't be read: {error.strerror or error}") from None


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
