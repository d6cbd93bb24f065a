"""Reading parts of tensors from whatever files hold them, and checking on the way what is read whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moeconv.dtypes import numpy_dtype
from moeconv.errors import DamageError, SourceError
from moeconv.io.checksum import new
from moeconv.io.paths import open_regular
from moeconv.layout.rect import Rect
from moeconv.pieces import Piece, TensorInfo, common_shape, seen_as

_SLICE = 1 << 20  # bytes that are read, then hashed while they are in a core's cache

# Told of each piece that was touched, with the checksum of its bytes; None where only a part of it was read.
Touched = Callable[[Piece, str | None], None]


def read_rect(
    root: Path, info: TensorInfo, pieces: Sequence[Piece], rect: Rect | None, touched: Touched | None = None
) -> np.ndarray[Any, Any]:
    """Read a part of a tensor, and only that.

    Args:
        root: the folder that the files are in.
        info: the tensor.
        pieces: where it is.
        rect: the part to read; None for the whole tensor.
        touched: told of each piece that was read; None saves the hashing.

    Returns:
        An array of the part's shape in the tensor's own dtype (ml_dtypes' bfloat16 for BF16).

    Raises:
        SourceError: a file can't be read.
    """
    wanted = rect or Rect.whole(info.shape)
    if (seen := common_shape(info.shape, pieces)) != info.shape:
        viewed = [seen_as(piece, seen) for piece in pieces]
        whole = read_rect(root, TensorInfo(info.name, info.dtype, seen), viewed, None, touched)
        return np.asarray(whole.reshape(info.shape)[wanted.slices()])
    out = np.empty(wanted.shape, numpy_dtype(info.dtype))
    for piece in pieces:
        part = piece.rect.intersect(wanted)
        if part is None:
            continue
        if piece.strides is not None:
            _read_strided(root / piece.file, piece, part, out[part.within(wanted).slices()])
            if touched is not None:
                touched(piece, None)
            continue
        hasher = new() if touched is not None and part == piece.rect else None
        # Rows of dim 0 are contiguous in the file: read just those, and where they are wanted whole, into their place.
        inner = part.within(piece.rect)
        first, rows = (inner.offsets[0], inner.shape[0]) if inner.shape else (0, 1)
        width = piece.rect.size // max(piece.rect.shape[0], 1) if piece.rect.shape else 1
        offset = piece.begin + first * width * out.dtype.itemsize
        place: tuple[Any, ...] = (*part.within(wanted).slices(), ...)  # without the dots, 0 dims give no view
        target = out[place]
        if inner.shape[1:] == piece.rect.shape[1:] and target.flags.c_contiguous:
            _read_into(root / piece.file, offset, target, hasher)
        else:
            whole = np.empty((rows, *piece.rect.shape[1:]), out.dtype)
            _read_into(root / piece.file, offset, whole, hasher)
            target[...] = whole[(slice(None), *inner.slices()[1:])]
        if touched is not None:
            touched(piece, hasher.hexdigest() if hasher is not None else None)
    return out


def _read_into(path: Path, offset: int, target: np.ndarray[Any, Any], hasher: Any) -> None:
    """Fill a contiguous array with a file's bytes from an offset on."""
    left = target.reshape(-1).view(np.uint8).data
    with open_regular(path) as file:
        file.seek(offset)
        while left:
            count = file.readinto(left if hasher is None else left[:_SLICE])  # type: ignore[attr-defined]
            if not count:
                raise SourceError(f"{path}: ends {len(left)} bytes early; it was cut off after it was opened")
            if hasher is not None:
                hasher.update(left[:count])
            left = left[count:]


def _read_strided(path: Path, piece: Piece, part: Rect, target: np.ndarray[Any, Any]) -> None:
    """Fill an array with a part of a piece that is not stored row by row."""
    assert piece.strides is not None
    itemsize = target.dtype.itemsize
    inner = part.within(piece.rect)
    span = 1 + sum((n - 1) * s for n, s in zip(inner.shape, piece.strides, strict=True))
    held = np.empty(span, target.dtype)
    _read_into(
        path,
        piece.begin + itemsize * sum(o * s for o, s in zip(inner.offsets, piece.strides, strict=True)),
        held,
        None,
    )
    target[...] = np.ndarray(inner.shape, target.dtype, held, 0, [s * itemsize for s in piece.strides])


def check_sum(root: Path, piece: Piece, checksums: Mapping[tuple[str, str], str], digest: str | None) -> None:
    """Compare the checksum of what was read of a piece with the recorded one.

    Args:
        root: the folder that the file is in.
        piece: the piece.
        checksums: recorded checksums by file and tensor.
        digest: that of the bytes that were read; None where they were not hashed.

    Raises:
        DamageError: they differ.
    """
    expected = checksums.get((piece.file, piece.tensor))
    if expected is not None and digest is not None and digest != expected:
        raise DamageError(
            f"{root / piece.file}: {piece.tensor} {piece.rect} has checksum {digest}, the manifest says {expected}: "
            "the file was changed or damaged; restore it",
            file=root / piece.file,
            tensor=piece.tensor,
        )


class Stored(Protocol):
    """A checkpoint on disk, as far as reading goes."""

    @property
    def root(self) -> Path:
        """The folder of its files."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Its tensors by name."""

    @property
    def pieces(self) -> Mapping[str, Sequence[Piece]]:
        """Where each tensor is."""

    @property
    def checksums(self) -> Mapping[tuple[str, str], str]:
        """Recorded checksums by file and tensor."""


class VerifiedReader:
    """Reads a checkpoint's tensors and compares each stored piece that is read whole with its checksum, on the way.

    What is read in part can't be compared; `unverified` says which pieces that were. Threads may read at once.
    The hash runs at 20 GB/s, on bytes that a core's cache still holds: on one core, files in the page cache are read at
    3.8 GB/s instead of 4.7 GB/s, and a disk's or a network's speed is not lowered.
    """

    def __init__(self, checkpoint: Stored) -> None:
        self._checkpoint = checkpoint
        self._whole: set[tuple[str, str]] = set()
        self._parts: set[tuple[str, str]] = set()

    def read(self, name: str, rect: Rect | None = None) -> np.ndarray[Any, Any]:
        """Read a part of a tensor; see `Checkpoint.read`.

        Raises:
            DamageError: a piece that was read whole differs from its checksum; it names file and tensor.
            SourceError: there is no such tensor, or a file can't be read.
        """
        found = self._checkpoint
        if name not in found.tensors:
            raise SourceError(f"{found.root}: holds no tensor {name}")
        return read_rect(found.root, found.tensors[name], found.pieces[name], rect, self._touched)

    def _touched(self, piece: Piece, digest: str | None) -> None:
        key = (piece.file, piece.tensor)
        if digest is None or key not in self._checkpoint.checksums:
            self._parts.add(key)
            return
        check_sum(self._checkpoint.root, piece, self._checkpoint.checksums, digest)
        self._whole.add(key)

    @property
    def verified(self) -> list[tuple[str, str]]:
        """The pieces, by file and tensor, that were read whole and are what was written."""
        return sorted(self._whole)

    @property
    def unverified(self) -> list[tuple[str, str]]:
        """The pieces, by file and tensor, of which only parts were read, or which have no checksum."""
        return sorted(self._parts - self._whole)
