"""The folder that a run saves to: one checkpoint an iteration, and links: `latest` to the last complete one, `best` to the best."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from moeconv.errors import MoeconvError, SourceError, WriteError
from moeconv.io.manifest import MANIFEST
from moeconv.io.staging import sync_path

LATEST, BEST = "latest", "best"
PARTIAL = ".partial"
OLD = ".old"
TRIAL = ".trial-"
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


def at_step(root: Path, iteration: int) -> Path:
    """Find the checkpoint of an iteration.

    Args:
        root: the save folder.
        iteration: its iteration.

    Returns:
        The checkpoint.

    Raises:
        SourceError: the folder has no complete checkpoint of it; names those that it has.
    """
    found = complete(root)
    if iteration in found:
        return found[iteration]
    have = f"it has those of {', '.join(map(str, found))}" if found else "it has none"
    raise SourceError(f"--ckpt-step {iteration}: {root} has no complete checkpoint of iteration {iteration}; {have}")


def way_back(path: Path, opens: Callable[[Path], object]) -> str:
    """Say how to go on where a checkpoint is damaged: from the newest older one that opens.

    Args:
        path: the damaged checkpoint.
        opens: opens a checkpoint, or raises a MoeconvError.

    Returns:
        The end of a message; empty where the checkpoint is no run's save.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        return ""
    for iteration, older in reversed(complete(path.parent).items()):
        if iteration < int(match[1]):
            with contextlib.suppress(MoeconvError):
                opens(older)
                return f". The newest older save that opens is {older.name}: --ckpt-step {iteration} goes on from it"
    return f". No older save in {path.parent} opens"


class Claim:
    """The right to save to a folder, which one run has at a time; it ends with the process."""

    def __init__(self, root: Path) -> None:
        """Take the folder, and remove what killed saves have left in it.

        Args:
            root: the save folder; it is made if it isn't there.

        Raises:
            WriteError: another run saves to it, or it can't be written.
        """
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
            self._lock(root)
            clean(root)
        except OSError as error:
            raise WriteError(f"--save {root}: can't be written: {error.strerror} ({error.filename})") from None

    def _lock(self, root: Path) -> None:
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise WriteError(
                f"--save {root}: another run is saving to this folder; end it first, or give another folder"
            ) from None
        except OSError:
            return  # a file system without locks: nothing tells whether there is another run

    def release(self) -> None:
        """Give the folder back."""
        os.close(self._folder)


def clean(root: Path) -> None:
    """Remove what killed saves and removals have left in a save folder; complete checkpoints never have such names.

    Args:
        root: the save folder.

    Raises:
        OSError: something can't be removed.
    """
    for path in root.iterdir():
        suffix = next((s for s in (PARTIAL, OLD) if path.name.endswith(s)), None)
        if suffix is None or path.is_symlink():
            continue
        if _NAME.fullmatch(path.name.removesuffix(suffix)):
            shutil.rmtree(path)
    for path in (root / (LATEST + PARTIAL), root / (BEST + PARTIAL), *root.glob(f"{TRIAL}*")):
        path.unlink(missing_ok=True)


def incomplete(root: Path) -> list[Path]:
    """List folders under checkpoints' names that are none: earlier versions left such behind where they were killed.

    Nothing removes them, since other programs use these names, too.

    Args:
        root: the save folder.
    """
    return sorted(p for p in root.glob("iter_*") if _NAME.fullmatch(p.name) and not (p / MANIFEST).is_file())


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
        clean(root)
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
    trial = root / f"{TRIAL}{secrets.token_hex(8)}"
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
    """Give a written checkpoint its name, and point `latest` at it: nothing has the name before it is whole.

    Args:
        partial: what `prepare` made, with everything in it on disk.

    Returns:
        The checkpoint.
    """
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    old = final.with_name(final.name + OLD)
    sync_path(partial)
    if final.exists():
        os.replace(final, old)
    os.replace(partial, final)
    point_latest(final)
    shutil.rmtree(old, ignore_errors=True)
    return final


def point_latest(checkpoint: Path) -> None:
    """Make a checkpoint of a save folder the one that runs go on from.

    Args:
        checkpoint: a complete checkpoint.
    """
    point(LATEST, checkpoint)


def point_best(root: Path, iteration: int) -> None:
    """Let `best` name the checkpoint of an iteration; nothing where that is not complete, as after going back before it.

    Args:
        root: the save folder.
        iteration: of the best evaluation.
    """
    found = complete(root).get(iteration)
    if found is not None:
        point(BEST, found)
    else:
        (root / BEST).unlink(missing_ok=True)


def point(name: str, checkpoint: Path) -> None:
    """Let a link of a save folder name a checkpoint.

    Args:
        name: LATEST or BEST.
        checkpoint: a complete checkpoint.
    """
    root = checkpoint.parent
    link = root / (name + PARTIAL)
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.name)
    os.replace(link, root / name)
    sync_path(root)


def prune(root: Path, keep_last: int) -> None:
    """Remove all but the newest checkpoints up to the latest one, and the best one.

    Those of later iterations are of a run that this one went back before (--ckpt-step): they stay until they are
    saved again, and don't count.

    Args:
        root: the save folder.
        keep_last: how many stay; 0 keeps all.
    """
    current = latest(root)
    if keep_last < 1 or current is None:
        return
    found = complete(root)
    last = next((iteration for iteration, path in found.items() if path.resolve() == current), max(found))
    best = (root / BEST).resolve()
    for path in [path for iteration, path in found.items() if iteration <= last][:-keep_last]:
        if path.resolve() == best:
            continue
        # Renamed first: a reader must never meet half a checkpoint, and the next save finishes what is begun here.
        doomed = path.with_name(path.name + OLD)
        os.replace(path, doomed)
        shutil.rmtree(doomed)
