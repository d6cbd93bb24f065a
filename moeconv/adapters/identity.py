"""Which model adapters belong to: a fingerprint that resharding and exporting don't change."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from moeconv.checkpoint import Checkpoint
from moeconv.errors import IntegrityError
from moeconv.io.checksum import checksum
from moeconv.layout.rect import Rect
from moeconv.placement import split_optimizer_name

_COLUMNS = 4096
_READERS = 8


def fingerprint(checkpoint: Checkpoint) -> str:
    """Compute what tells a model's weights from those of another one.

    Args:
        checkpoint: a model in any layout, sharded or not.

    Returns:
        The checksum of each weight's name, type and shape, and of a row of it that its name chooses: equal in all layouts of the same weights.
    """
    names = sorted(name for name in checkpoint.tensors if split_optimizer_name(name)[0] is None)
    with ThreadPoolExecutor(_READERS) as pool:
        digests = list(pool.map(lambda name: _digest(checkpoint, name), names))
    return checksum("\n".join(digests).encode())


def check_base(root: Path, found: str, adapter: Checkpoint) -> None:
    """Refuse a model that adapters were not trained on.

    Args:
        root: where the model is, for the message.
        found: its fingerprint.
        adapter: a save of adapters.

    Raises:
        IntegrityError: it is another one.
    """
    record = adapter.adapter
    assert record is not None
    if found != record.base:
        raise IntegrityError(
            f"{adapter.root}: holds adapters of the model {record.base_path} (fingerprint {record.base}); {root} holds other "
            f"weights (fingerprint {found}). Give the model that they were trained on, in any layout"
        )


def _digest(checkpoint: Checkpoint, name: str) -> str:
    info = checkpoint.tensors[name]
    rect = Rect.whole(info.shape)
    if rect.size and len(info.shape) == 1:
        rect = Rect((0,), (min(info.shape[0], _COLUMNS),))
    elif rect.size and info.shape:
        row = zlib.crc32(name.encode()) % info.shape[0]
        width = min(info.shape[1], _COLUMNS)
        rect = Rect((row, *(0 for _ in info.shape[1:])), (1, width, *info.shape[2:]))
    sample = np.ascontiguousarray(checkpoint.read(name, rect)) if rect.size else np.empty(0)
    return f"{name} {info.dtype} {list(info.shape)} {checksum(sample.tobytes())}"
