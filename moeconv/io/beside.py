"""What lies beside the weights of a Hugging Face folder: files that go along, and files that stay behind, each of them known by name."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from moeconv.errors import SourceError
from moeconv.io.paths import check_inside

# Weights in other forms: never carried, and (consolidated.*) never read, since they repeat the same weights.
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".npz",
    ".tflite",
    ".ot",
    ".distcp",
)
# The state of a run, logs and backups: stale in every copy of the model.
_STATE = re.compile(r"events\.out\.tfevents\..*|.*~|.*\.(bak|orig|tmp|swp|incomplete)")
_STATE_FOLDERS = re.compile(r"checkpoint-\d+|global_step\d+|wandb|runs")
# What hubs, git and desktops put into any folder.
_NO_PART = frozenset(
    {".git", ".gitattributes", ".gitignore", ".cache", ".huggingface", ".DS_Store", ".ipynb_checkpoints"}
)
_INDEX_SUFFIX = ".index.json"


@dataclass(frozen=True, slots=True)
class Beside:
    """Names of files, relative to the folder: those that go along unchanged, and those that stay behind, with their sizes in bytes."""

    carried: tuple[str, ...]
    left: tuple[tuple[str, int], ...]


def files_beside(root: Path, weights: Collection[str]) -> Beside:
    """Sort the files beside a folder's weights.

    Args:
        root: the folder.
        weights: names of the files that are read as weights, and of their index.

    Returns:
        What goes along, and what stays behind: weights in other formats, the state of runs, logs, backups, hidden files.

    Raises:
        SourceError: a folder is a link or unreadable, or a file that would go along is a link to elsewhere.
    """
    carried, left = [], []
    for name, goes_along in _walk(root):
        if name in weights:
            continue
        if goes_along and not name.endswith((*WEIGHT_SUFFIXES, _INDEX_SUFFIX)):
            check_inside(root, name)
            carried.append(name)
        else:
            left.append((name, os.lstat(root / name).st_size))
    return Beside(tuple(carried), tuple(left))


def _walk(root: Path) -> Iterator[tuple[str, bool]]:
    """Give the files' names, and whether their folders and names are such that go along."""
    state: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=_refuse):
        inner = os.path.relpath(folder, root)
        hidden = sorted(name for name in folders if name.startswith(".") and name not in _NO_PART)
        yield from ((os.path.normpath(os.path.join(inner, name)), False) for name in hidden)
        folders[:] = sorted(name for name in folders if name not in _NO_PART and name not in hidden)
        if inner in state or any(name.endswith(".distcp") for name in files):
            state |= {inner, *(os.path.normpath(os.path.join(inner, name)) for name in folders)}
        for name in folders:
            path = os.path.join(folder, name)
            if _STATE_FOLDERS.fullmatch(name):
                state.add(os.path.normpath(os.path.join(inner, name)))
            elif os.path.islink(path):
                raise SourceError(
                    f"{path}: is a link to a folder, whose files would be left out; copy the folder here, or remove the link"
                )
        for name in sorted(set(files) - _NO_PART):
            plain = (Path(folder) / name).relative_to(root).as_posix()
            yield plain, inner not in state and not name.startswith(".") and not _STATE.fullmatch(name)


def _refuse(error: OSError) -> None:
    raise SourceError(
        f"{error.filename}: can't be read: {error.strerror}; its files would be left out. Make it readable, or move it away"
    )
