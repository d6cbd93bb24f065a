"""A quantised release as plain numbers while it is read: each weight is made of its stored parts, and FP8 blocks can be had as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from moeconv.checkpoint import Checkpoint
from moeconv.families.base import Model
from moeconv.layout.rect import Rect
from moeconv.quant.cast import CastCheckpoint, cast
from moeconv.quant.numbers import Array, scale_values

Read = Callable[[str, Rect], Array]
_DTYPE = "bfloat16"  # what `--dtype` makes of releases as they are published
FP8_BLOCK = (128, 128)


@dataclass(frozen=True)
class PlainView(CastCheckpoint):
    """A checkpoint's weights in bf16, as `moeconv import-hf --dtype bfloat16` makes them; nothing is written. It has no checksums: `source` has."""

    source: Checkpoint | None = None
    """What is on disk."""

    @property
    def stored(self) -> Checkpoint:
        """What is on disk."""
        assert self.source is not None
        return self.source

    def through(self, read: Read) -> Read:
        """Read plain numbers by a reader of what is on disk, such as one that compares checksums."""
        made = cast(_Through.of(self.stored, read), _DTYPE)
        return lambda name, rect: made.read(name, rect) if name in made.ops else read(name, rect)


@dataclass(frozen=True)
class _Through(Checkpoint):
    """A checkpoint that something else reads."""

    reader: Read | None = None

    @classmethod
    def of(cls, source: Checkpoint, read: Read) -> _Through:
        values: dict[str, Any] = {f.name: getattr(source, f.name) for f in fields(Checkpoint)}
        return cls(**values, reader=read)

    def read(self, name: str, rect: Rect | None = None) -> Array:
        """As `Checkpoint.read`."""
        assert self.reader is not None
        return self.reader(name, rect or Rect.whole(self.tensors[name].shape))


def plain_view(source: Checkpoint) -> PlainView:
    """Give a quantised checkpoint's weights as plain numbers.

    Args:
        source: sharded or a Hugging Face folder.

    Returns:
        The view; reading its source happens when it is read.

    Raises:
        MappingError: no cast of its numbers is known.
    """
    made = cast(source, _DTYPE)
    values = {f.name: getattr(made, f.name) for f in fields(CastCheckpoint)}
    # Files of its source's own form would hold the weights as they were.
    manifest = None if source.manifest is None else replace(source.manifest, source={}, index=None)
    return PlainView(**(values | {"checksums": {}, "manifest": manifest}), source=source)


def holds_fp8_blocks(model: Model) -> bool:
    """Say whether a checkpoint's quantised weights are FP8 in blocks of 128 x 128, as DeepSeek's releases have them."""
    scheme = model.scheme
    roles = {part.role for part in scheme.parts} if scheme is not None else set()
    return bool(model.quantised) and scheme is not None and scheme.block == FP8_BLOCK and {"weight", "scale"} <= roles


class Fp8Blocks:
    """Reads the numbers and scales of FP8 weights as they are stored."""

    def __init__(self, model: Model, read: Read) -> None:
        """Prepare.

        Args:
            model: the checkpoint's, which `holds_fp8_blocks`.
            read: gives a rectangle of a stored tensor.
        """
        self._model, self._read = model, read

    def __call__(self, name: str, rect: Rect) -> tuple[Array, Array] | None:
        """Read a part of a weight.

        Args:
            name: the weight's.
            rect: the part, of whole blocks.

        Returns:
            Its numbers, float8_e4m3fn, and the scales of its blocks, fp32; None where the weight is stored plain.

        Raises:
            BlockSplitError: the part ends inside a block.
        """
        if name not in self._model.quantised:
            return None
        weight = self._model.plain[name]
        found: dict[str, Array] = {}
        for tensor in self._model.parts(weight):
            part = tensor.part
            if part is not None and part.role in ("weight", "scale"):
                cut = part.cut(weight.shape, rect.offsets, rect.shape, transposed=weight.rule.transposed)
                found[part.role] = self._read(tensor.name, Rect(*cut))
        return found["weight"], scale_values(found["scale"])
