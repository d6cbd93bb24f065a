"""Pieces: stored bytes as rectangles of a model's global tensors. One description serves reading and writing alike."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from moeconv.dtypes import dtype
from moeconv.errors import MappingError
from moeconv.families.base import EXPERT, Alias, Model, fill, match
from moeconv.layout.rect import Rect


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A whole tensor of a checkpoint: hub name, safetensors dtype, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        return prod(self.shape) * dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a global tensor in a file.

    Its first element is at byte `begin` of `file`; `strides`, in elements, say where the others are (None: row-major, without gaps).
    """

    tensor: str
    dtype: str
    rect: Rect
    file: str
    begin: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of the piece's elements."""
        return self.rect.size * dtype(self.dtype).itemsize

    @property
    def where(self) -> str:
        """The file, for messages."""
        return self.file


class NameMap:
    """Finds which rectangles of a model's tensors a stored tensor holds: a hub name is itself whole, an alias several tensors."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._aliases = [(alias, alias.name.split("{", 1)[0]) for alias in model.family.aliases]

    def pieces(self, name: str, kind: str, shape: Sequence[int], file: str, begin: int) -> list[Piece]:
        """Describe a stored tensor as pieces of global tensors.

        Args:
            name: the stored tensor's name: a hub name or an alias of the family.
            kind: its safetensors dtype.
            shape: its shape, in elements.
            file: the file that stores it.
            begin: where its data begin in the file, in bytes.

        Returns:
            The pieces; together they are the whole stored tensor.

        Raises:
            MappingError: the name belongs to no tensor of the model, or the shape is not what the config says.
        """
        tensor = self.model.tensors.get(name)
        if tensor is not None:
            self._check_shape(name, tuple(shape), tensor.shape, file)
            return [Piece(name, kind, Rect.whole(tensor.shape), file, begin)]
        for alias, prefix in self._aliases:
            found = match(alias.name, name) if name.startswith(prefix) else None
            if found is not None and found[0] in self.model.moe_layers:
                assert found[0] is not None
                return self._alias_pieces(alias, found[0], name, kind, tuple(shape), file, begin)
        raise self._unknown(name, file)

    def _alias_pieces(
        self, alias: Alias, layer: int, name: str, kind: str, shape: tuple[int, ...], file: str, begin: int
    ) -> list[Piece]:
        experts = range(self.model.sizes["experts"]) if alias.stack else (None,)
        parts = [[self.model.tensors[fill(part, layer, expert)] for part in alias.parts] for expert in experts]
        first = parts[0]
        assert alias.dim == 0, "only the first dimension keeps the parts contiguous"
        inner = (sum(t.shape[0] for t in first), *first[0].shape[1:])
        self._check_shape(name, shape, (len(parts), *inner) if alias.stack else inner, file)
        out, itemsize = [], dtype(kind).itemsize
        for tensor in (t for group in parts for t in group):
            out.append(Piece(tensor.name, kind, Rect.whole(tensor.shape), file, begin))
            begin += tensor.size * itemsize
        return out

    def _check_shape(self, name: str, got: tuple[int, ...], expected: tuple[int, ...], file: str) -> None:
        if got != expected:
            keys = ", ".join(f"{key}={value}" for key, value in self.model.sizes.items())
            raise MappingError(
                f"{name} in {file} has shape {list(got)}; config.json implies {list(expected)} ({keys}). Correct whichever is wrong"
            )

    def _unknown(self, name: str, file: str) -> MappingError:
        sizes = self.model.sizes
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= sizes["layers"]:
            key = self.model.family.sizes["layers"]
            return MappingError(
                f"{name} in {file}: config.json has {key} {sizes['layers']}, so layers end at {sizes['layers'] - 1}. Correct config.json"
            )
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if expert and int(expert[1]) >= sizes.get("experts", 0):
            return MappingError(
                f"{name} in {file}: config.json has {sizes.get('experts', 0)} experts. Correct config.json"
            )
        near = difflib.get_close_matches(
            name, [fill(r.name, int(layer[1]) if layer else 0, 0) for r in self.model.family.rules], 1
        )
        hint = f"; the nearest known name is {near[0]}" if near else ""
        return MappingError(
            f"{name} in {file} is no tensor of {self.model.family.name}{hint}. Nothing is dropped silently: remove it from the source if it is not wanted"
        )


def check_complete(model: Model, present: Iterable[str], where: str) -> None:
    """Check that every tensor that the model needs is present.

    Args:
        model: the model.
        present: hub names of the tensors that were found.
        where: the checkpoint's name, for the message.

    Raises:
        MappingError: tensors are missing; the message names the first ones and counts them.
    """
    found = set(present)
    missing = [t.name for t in model.tensors.values() if t.name not in found and not model.optional(t)]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise MappingError(
            f"{where} lacks {shown}; config.json says {model.sizes['layers']} layers"
            + (f" and {model.sizes['experts']} experts" if EXPERT in missing[0] or "experts" in model.sizes else "")
            + ". Complete the source, or correct config.json"
        )
