"""Checks of what is on disk: every checksum, exact coverage, and byte for byte against another checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moeconv.checkpoint import Checkpoint
from moeconv.convert import plan_hf
from moeconv.dtypes import numpy_dtype
from moeconv.errors import IntegrityError, MappingError
from moeconv.execute import Progress
from moeconv.io.carried import write_content
from moeconv.io.checksum import new
from moeconv.io.decode import parse_json
from moeconv.io.manifest import MANIFEST, FileRecord
from moeconv.io.safetensors import MAX_HEADER_BYTES, read_header
from moeconv.layout.rect import Rect
from moeconv.pieces import Piece, common_shape, seen_as
from moeconv.placement import split_optimizer_name
from moeconv.reading import check_sum
from moeconv.sweep import Sweep, open_strips, piece_digest


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two checkpoints differ: a tensor or a config field, and what each side has."""

    name: str
    what: str


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """How far the values of a tensor are apart: largest and mean absolute difference, and the number of elements that differ."""

    name: str
    max_abs: float
    mean_abs: float
    count: int


def verify(checkpoint: Checkpoint, *, workers: int | None = None, progress: Progress | None = None) -> int:
    """Check every checksum of a sharded checkpoint, or that a Hugging Face folder can be read to its last byte.

    Opening the checkpoint has already checked headers, names, shapes and exact coverage.

    Args:
        checkpoint: the opened checkpoint.
        workers: threads; by default one a core, at most 8.
        progress: called with the number of bytes checked, from any thread.

    Returns:
        The number of bytes of tensors checked.

    Raises:
        IntegrityError: bytes differ from their checksum, or the folder holds a weight file that the manifest doesn't know.
        SourceError: a file can't be read.
    """
    told = progress or (lambda _: None)
    if checkpoint.manifest is not None:
        _check_folder(checkpoint)

    pieces = [piece for found in checkpoint.pieces.values() for piece in found]
    with ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 8)) as pool:
        return sum(pool.map(lambda piece: check_piece(checkpoint, piece, told), pieces))


def check_piece(checkpoint: Checkpoint, piece: Piece, progress: Progress | None = None) -> int:
    """Read a stored piece once and compare it with its checksum.

    Args:
        checkpoint: the opened checkpoint.
        piece: one of its pieces.
        progress: called with the number of bytes read.

    Returns:
        The piece's size in bytes.

    Raises:
        DamageError: the bytes differ from their checksum.
        SourceError: the file can't be read.
    """
    digest = piece_digest(checkpoint.root, piece, new(), progress or (lambda _: None))
    check_sum(checkpoint.root, piece, checkpoint.checksums, digest)
    return piece.nbytes


def _check_folder(checkpoint: Checkpoint) -> None:
    assert checkpoint.manifest is not None
    known = set(checkpoint.manifest.files)
    for path in sorted(checkpoint.root.glob("*.safetensors")):
        if path.name not in known:
            raise IntegrityError(f"{path}: is not in {MANIFEST}, yet other readers would load it; move it away")
    for name, record in checkpoint.manifest.files.items():
        _check_offsets(checkpoint.root / name, record)
    for content in checkpoint.carried_files.values():
        write_content(content, lambda _: None)  # compared with its checksum on the way
    plan_hf(checkpoint, None)  # the source's headers and index, by which an export is made


def _check_offsets(path: Path, record: FileRecord) -> None:
    """Check that a file says to torch's reader what the manifest says of it: where each rectangle begins in its tensor."""
    said = read_header(path).metadata.get("DCP_SHARDING_INFO")
    expected = {t.name: {"saved_offsets": list(t.offsets)} for t in record.tensors}
    if said is not None and parse_json(said.encode(), str(path), max_bytes=MAX_HEADER_BYTES) != expected:
        raise IntegrityError(
            f"{path}: its header puts rectangles elsewhere in their tensors than the manifest; restore it"
        )


def compare(a: Checkpoint, b: Checkpoint, progress: Progress | None = None) -> Iterator[Difference]:
    """Compare two checkpoints byte for byte, whatever their layouts.

    Args:
        a: one checkpoint.
        b: the other; optimizer state is compared where both have it (`lone_state` says which alone has one).
        progress: called with the number of bytes compared.

    Yields:
        Each difference: a tensor that only one side has, another dtype or shape, or the first differing element with its index and files.
    """
    alone = lone_state(a, b) is not None
    for name in {**a.tensors, **b.tensors}:
        if alone and split_optimizer_name(name)[0] is not None:
            continue
        if name not in a.tensors or name not in b.tensors:
            yield Difference(name, f"only in {(a if name in a.tensors else b).root}")
        elif a.tensors[name] != b.tensors[name]:
            x, y = a.tensors[name], b.tensors[name]
            yield Difference(name, f"{x.dtype} {list(x.shape)} in {a.root}, {y.dtype} {list(y.shape)} in {b.root}")
        else:
            for first, rows_a, rows_b in _bands(a, b, name, progress):
                if not np.array_equal(rows_a, rows_b):
                    yield _first_difference(a, b, name, first, rows_a, rows_b)
                    break


def lone_state(a: Checkpoint, b: Checkpoint) -> Checkpoint | None:
    """Give the one of two checkpoints that alone has optimizer state: a run beside its own export is still the same model."""
    with_state = [c for c in (a, b) if any(split_optimizer_name(name)[0] is not None for name in c.tensors)]
    return with_state[0] if len(with_state) == 1 else None


def check_tied(checkpoint: Checkpoint, doing: str) -> None:
    """Refuse a model that is tied by its config and stores another output head all the same: transformers computes with that.

    Args:
        checkpoint: the opened checkpoint.
        doing: what would compute with the embedding instead, as `training`.

    Raises:
        MappingError: the stored head differs from the embedding.
    """
    model = checkpoint.model
    if not model.tied or not model.has("head"):
        return
    head, embedding = model.tensor("head").name, model.tensor("embedding").name
    if head not in checkpoint.tensors or checkpoint.tensors[head].shape != checkpoint.tensors[embedding].shape:
        return
    same = checkpoint.tensors[head].dtype == checkpoint.tensors[embedding].dtype
    bands = _bands(checkpoint, checkpoint, head, None, embedding) if same else ()
    if not same or any(not np.array_equal(rows_a, rows_b) for _, rows_a, rows_b in bands):
        key = model.family.flag_key("tied")
        raise MappingError(
            f"{checkpoint.root}: config.json says {key}, and {head} differs from {embedding}: transformers then computes with the "
            f"stored head, {doing} would not. Put {key}: false into the source's config.json, and convert it again"
        )


def measure(a: Checkpoint, b: Checkpoint, name: str, progress: Progress | None = None) -> TensorDifference:
    """Measure how far a tensor's values are apart in two checkpoints that hold it with the same dtype and shape.

    Args:
        a: one checkpoint.
        b: the other.
        name: the tensor's hub name.
        progress: called with the number of bytes compared.

    Returns:
        The differences, computed in fp64.
    """
    info, largest, total, count = a.tensors[name], 0.0, 0.0, 0
    kind = numpy_dtype(info.dtype)
    for _, rows_a, rows_b in _bands(a, b, name, progress):
        if np.array_equal(rows_a, rows_b):
            continue
        gap = np.abs(rows_a.view(kind).astype(np.float64) - rows_b.view(kind).astype(np.float64))
        largest, total = max(largest, float(gap.max())), total + float(gap.sum())
        count += int(
            np.count_nonzero(rows_a.view(kind).view(f"u{kind.itemsize}") != rows_b.view(kind).view(f"u{kind.itemsize}"))
        )
    return TensorDifference(name, largest, total / max(Rect.whole(info.shape).size, 1), count)


def config_differences(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """List the config fields that differ.

    Args:
        a: one config.json as parsed.
        b: the other.

    Returns:
        A difference for each field that one side lacks or has with another value.
    """
    missing = object()
    return [
        Difference(key, f"{a.get(key, 'absent')!r} against {b.get(key, 'absent')!r}")
        for key in sorted(a.keys() | b.keys())
        if a.get(key, missing) != b.get(key, missing)
    ]


def _bands(
    a: Checkpoint, b: Checkpoint, name: str, progress: Progress | None, other: str | None = None
) -> Iterator[tuple[int, Any, Any]]:
    """Read a tensor of one checkpoint and one of another (`other`, or of the same name) in bands of rows."""
    mine, theirs = a.pieces[name], b.pieces[other or name]
    sweep = Sweep(a.tensors[name], mine, theirs)
    with open_strips(a.root, mine, sweep.shape) as left, open_strips(b.root, theirs, sweep.shape) as right:
        for first, last in sweep.bands():
            rows_a, rows_b = sweep.read(left, first, last, "band"), sweep.read(right, first, last, "other")
            yield first, rows_a, rows_b
            if progress is not None:
                progress(rows_a.nbytes)


def _first_difference(a: Checkpoint, b: Checkpoint, name: str, first: int, rows_a: Any, rows_b: Any) -> Difference:
    info = a.tensors[name]
    itemsize = numpy_dtype(info.dtype).itemsize
    row, byte = (int(i) for i in np.argwhere(rows_a != rows_b)[0])
    flat = (first + row) * (rows_a.shape[1] // itemsize) + byte // itemsize
    index = tuple(int(i) for i in np.unravel_index(flat, info.shape)) if info.shape else ()
    at = slice(byte // itemsize * itemsize, (byte // itemsize + 1) * itemsize)
    sides = [
        f"{bytes(rows[row, at])[::-1].hex()} in {_holder(side, name, flat)}"
        for side, rows in ((a, rows_a), (b, rows_b))
    ]
    return Difference(name, f"first differs at index {list(index)}: {sides[0]}, {sides[1]}")


def _holder(side: Checkpoint, name: str, flat: int) -> Path:
    """Give the file that holds a tensor's element, by the element's number."""
    shape = common_shape(side.tensors[name].shape, side.pieces[name])
    point = Rect(tuple(int(i) for i in np.unravel_index(flat, shape)), (1,) * len(shape)) if shape else None
    held = (p for p in side.pieces[name] if point is None or seen_as(p, shape).rect.intersect(point))
    return side.root / next(held).file
