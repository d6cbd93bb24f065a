"""A Megatron checkpoint on disk, opened: what it is, and where each rectangle of the Hugging Face model lies in it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeconv.errors import MappingError, SourceError
from moeconv.families.base import Model
from moeconv.io.paths import check_folder, read_inside
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect
from moeconv.megatron.args import RunArgs
from moeconv.pieces import Piece, check_complete, check_pieces

TRACKER = "latest_checkpointed_iteration.txt"
_MAX_TRACKER_BYTES = 1024


@dataclass(slots=True)
class MegatronSource:
    """An opened checkpoint.

    `pieces` cover each tensor of the model once; a file is named relative to `root`. `replicas` pairs a piece with
    another file's copy of the same rectangle. `dropped` says what is not converted, and why.
    """

    root: Path
    iteration: str
    fmt: str
    spec: str
    experts: str
    args: RunArgs
    degrees: Degrees
    model: Model
    config: Mapping[str, Any]
    pieces: list[Piece] = field(default_factory=list)
    replicas: list[tuple[Piece, Piece]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    archives: list[tuple[str, int, int | None]] = field(default_factory=list)
    "File, offset and length of each archive that holds tensors; None: to the end of the file."
    trainer: dict[str, Any] | None = None
    "The content of trainer.json, where the optimizer's state is among the pieces."

    @property
    def folder(self) -> Path:
        """The folder of the iteration."""
        return self.root / self.iteration


def find_iteration(root: Path, iteration: int | None = None) -> tuple[Path, str]:
    """Find the folder of a checkpoint's iteration.

    Args:
        root: what Megatron's `--save` and `--load` name, or the folder of one iteration itself.
        iteration: the iteration wanted; by default the one that the tracker file names.

    Returns:
        The root, and the folder's name in it.

    Raises:
        SourceError: there is no such folder, or no tracker file to choose one.
    """
    check_folder(root)
    if is_iteration(root):
        real = Path(os.path.realpath(root))
        return real.parent, real.name
    name = f"iter_{iteration:07d}" if iteration is not None else _tracked(root)
    if not os.path.isdir(root / name):
        present = sorted(p.name for p in root.iterdir() if p.is_dir())[:8]
        raise SourceError(f"{root}: has no folder {name}; it has {', '.join(present) or 'none'}")
    if os.path.islink(root / name):
        raise SourceError(f"{root / name}: is a link; name the folder that it leads to instead")
    return root, name


def _tracked(root: Path) -> str:
    """Give the folder that the tracker file names."""
    if not os.path.lexists(root / TRACKER):
        raise SourceError(
            f"{root}: holds no {TRACKER}; expected the folder that Megatron's --save named, or one of its iter_* folders"
        )
    said = read_inside(root, TRACKER, _MAX_TRACKER_BYTES).decode("ascii", "replace").strip()
    if said != "release" and not re.fullmatch(r"[0-9]{1,18}", said):
        raise SourceError(f"{root / TRACKER}: says {said[:40]!r}; expected a number or release")
    return said if said == "release" else f"iter_{int(said):07d}"


def is_iteration(folder: Path) -> bool:
    """Say whether a folder is that of one iteration, in either format."""
    return os.path.isfile(folder / ".metadata") or any(folder.glob("mp_rank_*/model_optim_rng.pt"))


def is_megatron(folder: Path) -> bool:
    """Say whether a folder is a Megatron checkpoint: its root, or one iteration."""
    return os.path.isdir(folder) and (os.path.lexists(folder / TRACKER) or is_iteration(folder))


class Collector:
    """Gathers pieces as files are read, and tells a rectangle's first copy from its replicas."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, Rect], Piece] = {}
        self.replicas: list[tuple[Piece, Piece]] = []

    def add(self, piece: Piece) -> None:
        """Add a piece.

        Raises:
            MappingError: another file holds the same rectangle as another dtype.
        """
        first = self._first.setdefault((piece.tensor, piece.rect), piece)
        if first is piece:
            return
        if first.dtype != piece.dtype:
            raise MappingError(
                f"{piece.tensor} {piece.rect} is {first.dtype} in {first.file} and {piece.dtype} in {piece.file}"
            )
        self.replicas.append((first, piece))

    def finish(self, model: Model, where: str, *, buffers: bool = True) -> list[Piece]:
        """Check that every tensor of the model is there exactly once.

        Args:
            model: the model.
            where: the checkpoint, for messages.
            buffers: whether tensors that are no parameters must be there; an optimizer has no state of them.

        Returns:
            The pieces, in the order of the model's tensors.

        Raises:
            MappingError: a tensor is missing, or stored as several dtypes.
            IntegrityError: a tensor is there in part, or twice in part.
        """
        found: dict[str, list[Piece]] = {}
        for piece in self._first.values():
            found.setdefault(piece.tensor, []).append(piece)
        for tensor in model.tensors.values() if found else ():
            if not tensor.size:  # a part of width 0, which Megatron does not store
                like = next(iter(self._first.values()))
                found[tensor.name] = [Piece(tensor.name, like.dtype, Rect.whole(tensor.shape), like.file, like.begin)]
        spared = () if buffers else (t.name for t in model.tensors.values() if t.rule.buffer)
        check_complete(model, {*found, *spared}, where)
        out = []
        for tensor in model.tensors.values():
            pieces = found.get(tensor.name, [])
            if not pieces:
                continue
            check_pieces(tensor.name, tensor.shape, pieces)
            if len({p.dtype for p in pieces}) != 1:
                raise MappingError(f"{tensor.name}: stored as {', '.join(sorted({p.dtype for p in pieces}))} in parts")
            out += pieces
        return out
