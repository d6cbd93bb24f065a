"""A Megatron checkpoint on disk, opened: what it is, and where each rectangle of the Hugging Face model lies in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeconv.errors import MappingError, SourceError
from moeconv.families.base import Model
from moeconv.layout.degrees import Degrees
from moeconv.layout.rect import Rect, check_cover
from moeconv.megatron.args import RunArgs
from moeconv.pieces import Piece, check_complete

TRACKER = "latest_checkpointed_iteration.txt"


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
    if not root.is_dir():
        raise SourceError(f"{root}: no such folder")
    if is_iteration(root):
        return root.parent, root.name
    if iteration is None:
        try:
            said = (root / TRACKER).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise SourceError(
                f"{root}: holds no readable {TRACKER}; expected the folder that Megatron's --save named, or one of its "
                "iter_* folders"
            ) from None
        if said != "release" and not said.isdecimal():
            raise SourceError(f"{root / TRACKER}: says {said[:40]!r}; expected a number or release")
        name = said if said == "release" else f"iter_{int(said):07d}"
    else:
        name = f"iter_{iteration:07d}"
    if not (root / name).is_dir():
        present = sorted(p.name for p in root.iterdir() if p.is_dir())[:8]
        raise SourceError(f"{root}: has no folder {name}; it has {', '.join(present) or 'none'}")
    return root, name


def is_iteration(folder: Path) -> bool:
    """Say whether a folder is that of one iteration, in either format."""
    return (folder / ".metadata").is_file() or any(folder.glob("mp_rank_*/model_optim_rng.pt"))


def is_megatron(folder: Path) -> bool:
    """Say whether a folder is a Megatron checkpoint: its root, or one iteration."""
    return folder.is_dir() and ((folder / TRACKER).is_file() or is_iteration(folder))


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

    def finish(self, model: Model, where: str) -> list[Piece]:
        """Check that every tensor of the model is there exactly once.

        Returns:
            The pieces, in the order of the model's tensors.

        Raises:
            MappingError: a tensor is missing, or stored as several dtypes.
            IntegrityError: a tensor is there in part, or twice in part.
        """
        found: dict[str, list[Piece]] = {}
        for piece in self._first.values():
            found.setdefault(piece.tensor, []).append(piece)
        check_complete(model, found, where)
        out = []
        for tensor in model.tensors.values():
            pieces = found.get(tensor.name, [])
            if not pieces:
                continue
            check_cover(tensor.name, tensor.shape, [(p.rect, p.file) for p in pieces])
            if len({p.dtype for p in pieces}) != 1:
                raise MappingError(f"{tensor.name}: stored as {', '.join(sorted({p.dtype for p in pieces}))} in parts")
            out += pieces
        return out
