"""The mean of a run's weights (`optimizer.ema.*`) in the place of the weights, rounded to their type. Nothing is written here."""

from __future__ import annotations

from moeconv.checking import check_piece
from moeconv.checkpoint import Checkpoint
from moeconv.dtypes import numpy_dtype
from moeconv.errors import MappingError
from moeconv.layout.rect import Rect
from moeconv.plan import RowOp
from moeconv.quant.cast import CastCheckpoint, Rounded, as_cast
from moeconv.quant.dequantise import Rows
from moeconv.quant.numbers import Array

EMA = "optimizer.ema."


def with_mean(source: Checkpoint) -> CastCheckpoint:
    """Plan a checkpoint with the mean of its weights instead of the weights; what has none (frozen tensors) stays.

    Args:
        source: a checkpoint that a run with --ema-decay has saved.

    Returns:
        The checkpoint, of weights only; each mean's checksums are compared when it is written.

    Raises:
        MappingError: it holds no mean.
    """
    names = [name for name in source.model.tensors if EMA + name in source.tensors]
    if not names:
        raise MappingError(
            f"{source.root}: --weights ema: holds no mean of the weights; train with --ema-decay to keep one"
        )
    kinds = {name: source.tensors[name].dtype for name in names}
    ops: dict[str, RowOp] = {name: Rounded(_rows(source, name), numpy_dtype(kinds[name])) for name in names}
    note = f"{len(names)} weights are their exponential means, rounded once"
    return as_cast(source, source.model, source.config, {name: source.tensors[name] for name in names}, ops, note)


def _rows(source: Checkpoint, name: str) -> Rows:
    mean = source.tensors[EMA + name]

    def rows(first: int, last: int) -> Array:
        if not first:
            for piece in source.pieces[mean.name]:
                check_piece(source, piece)
        return source.read(mean.name, Rect.slab(mean.shape, 0, first, last))

    return rows
