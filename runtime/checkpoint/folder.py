"""The folder that a run saves to: one checkpoint an iteration, and `latest`, a link to the last complete one."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

from moeconv.errors import WriteError
from moeconv.io.manifest import MANIFEST
from moeconv.io.staging import sync_path

LATEST = "latest"
PARTIAL = ".partial"
_OLD = ".old"
_NAME = re.compile(r"iter_(\d{7,})")


def folder_name(iteration: int) -> str:
    """Name the checkpoint of an iteration."""
    return f"iter_{iteration:07d}"


def complete(root: Path) -> dict[int, Path]:
    """List the complete checkpoints of a save folder.

    Args:
        root: the folder; it need not exist.

    Returns:
        Iteration -> checkpoint, rising; a folder without a manifest is not complete.
    """
    found = {}
    for path in sorted(root.glob("iter_*")):
        match = _NAME.fullmatch(path.name)
        if match and (path / MANIFEST).is_file():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def latest(root: Path) -> Path | None:
    """Find the checkpoint that a run goes on from.

    Args:
        root: the save folder; it need not exist.

    Returns:
        Where `latest` points if that is complete, else the newest complete checkpoint, else None.
    """
    link = root / LATEST
    if (link / MANIFEST).is_file():
        return link.resolve()
    return next(reversed(complete(root).values()), None)


def resolve(path: Path) -> Path:
    """Find the checkpoint that a path names: a save folder stands for its latest one."""
    return latest(path) or path


def prepare(root: Path, iteration: int) -> Path:
    """Make the empty folder that a checkpoint is written into; what a killed save left behind is removed.

    Args:
        root: the save folder.
        iteration: the checkpoint's iteration.

    Returns:
        The folder, under a name that no reader accepts.

    Raises:
        WriteError: the folder can't be made.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for stale in (*root.glob(f"iter_*{PARTIAL}"), *root.glob(f"iter_*{_OLD}")):
            shutil.rmtree(stale)
        partial = root / (folder_name(iteration) + PARTIAL)
        partial.mkdir()
    except OSError as error:
        raise WriteError(f"--save {root}: can't be written: {error.strerror} ({error.filename})") from None
    return partial


def try_writing(root: Path, size: int) -> None:
    """Find out whether a checkpoint can be written, before anything is trained for it.

    Args:
        root: the save folder; it is made if it isn't there.
        size: bytes of a checkpoint.

    Raises:
        WriteError: the folder can't be written to, or has no room for one checkpoint.
    """
    trial = root / f".trial-{secrets.token_hex(8)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        trial.write_bytes(b"moeconv")
        trial.unlink()
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise WriteError(f"--save {root}: can't be written: {error.strerror} ({error.filename})") from None
    if free < size:
        raise WriteError(
            f"--save {root}: a checkpoint takes {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free: make room, give "
            "another folder, or save less with --no-save-optim"
        )


def publish(partial: Path) -> Path:
    """Give a written checkpoint its name, and point `latest` at it.

    Args:
        partial: what `prepare` made, with everything in it on disk.

    Returns:
        The checkpoint.
    """
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    old = final.with_name(final.name + _OLD)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    link = final.parent / (LATEST + PARTIAL)
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, final.parent / LATEST)
    sync_path(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    return final


def prune(root: Path, keep_last: int) -> None:
    """Remove all but the newest checkpoints.

    Args:
        root: the save folder.
        keep_last: how many stay; 0 keeps all.
    """
    if keep_last < 1:
        return
    current = latest(root)
    for path in list(complete(root).values())[:-keep_last]:
        if path.resolve() != current:
            (path / MANIFEST).unlink()  # first: a reader must never meet half a checkpoint
            shutil.rmtree(path)
