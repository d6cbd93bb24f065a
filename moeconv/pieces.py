"""Pieces: stored bytes as rectangles of a model's global tensors. One description serves reading and writing alike."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

from moeconv.dtypes import dtype
from moeconv.errors import LayoutError, MappingError
from moeconv.families.base import Alias, GlobalTensor, Model
from moeconv.families.names import EXPERT, LAYER, fill, layer_of, match
from moeconv.families.quantised import METHODS, unknown_method
from moeconv.io.torch_bin import is_computed
from moeconv.layout.rect import Rect, check_cover


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

    Its first element is at byte `begin` of `file`; `strides`, in elements, say where the others are (None: row-major, without gaps). Where a file
    holds every second element of a tensor's rows, as of two matrices that take turns, the rectangle is one of the tensor in another shape, `view`,
    in which the last dimension is two.
    """

    tensor: str
    dtype: str
    rect: Rect
    file: str
    begin: int
    strides: tuple[int, ...] | None = None
    view: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of the piece's elements."""
        return self.rect.size * dtype(self.dtype).itemsize

    @property
    def where(self) -> str:
        """The file, for messages."""
        return self.file


def common_shape(shape: tuple[int, ...], pieces: Iterable[Piece]) -> tuple[int, ...]:
    """Give the shape of a tensor in which all of its pieces are rectangles: its own, or the view that one of them has."""
    return next((piece.view for piece in pieces if piece.view is not None), shape)


def seen_as(piece: Piece, shape: tuple[int, ...]) -> Piece:
    """Give a piece as a rectangle of a tensor that is seen in a shape, its own or a view (see `Piece`).

    Raises:
        LayoutError: the piece begins or ends inside what the view keeps together.
    """
    if len(piece.rect.shape) == len(shape):
        return piece
    together, offsets, sizes = shape[-1], piece.rect.offsets, piece.rect.shape
    if offsets[-1] % together or sizes[-1] % together:
        raise LayoutError(
            f"{piece.tensor} {piece.rect} in {piece.file}: cuts between elements that belong together in groups of {together}; reshard the "
            "checkpoint to degrees that divide the width of an expert"
        )
    rect = Rect((*offsets[:-1], offsets[-1] // together, 0), (*sizes[:-1], sizes[-1] // together, together))
    own = piece.strides
    strides = None if own is None else (*own[:-1], own[-1] * together, own[-1])
    return replace(piece, rect=rect, strides=strides, view=shape)


def check_pieces(name: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> None:
    """Check that pieces cover a tensor exactly once.

    Raises:
        IntegrityError: see `check_cover`.
    """
    seen = common_shape(shape, pieces)
    check_cover(name, seen, [(seen_as(piece, seen).rect, piece.file) for piece in pieces])


class NameMap:
    """Finds which rectangles of a model's tensors a stored tensor holds: a hub name is itself whole, an alias several tensors."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.aliases = [*model.family.aliases, *(_part_aliases(model) if model.quantised else ())]
        self._aliases = [(alias, alias.name.split("{", 1)[0]) for alias in self.aliases]

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
        found = self.alias(name)
        if found is None:
            raise self._unknown(name, file)
        return self._alias_pieces(*found, name, kind, tuple(shape), file, begin)

    def alias(self, name: str) -> tuple[Alias, list[list[GlobalTensor]]] | None:
        """Find the stored form that a name is one of.

        Args:
            name: a stored tensor's name.

        Returns:
            The alias, and for each thing that it stacks (one, where it stacks nothing) the tensors that it concatenates; None for no alias.
        """
        for alias, prefix in self._aliases:
            found = match(alias.name, name) if name.startswith(prefix) else None
            if found is not None and found[0] is not None:
                parts = self.members(alias, found[0])
                if parts is not None:
                    return alias, parts
        return None

    def weights(self, name: str) -> list[str]:
        """List the tensors that a name stands for: itself, or what an alias holds; none for an unknown name."""
        if name in self.model.plain:
            return [name]
        found = self.alias(name)
        return [tensor.name for group in found[1] for tensor in group] if found is not None else []

    def members(self, alias: Alias, layer: int) -> list[list[GlobalTensor]] | None:
        """List the tensors of a layer that an alias holds, as `alias` gives them; None where the layer lacks one."""
        experts = range(self.model.sizes.get("experts", 0)) if alias.stack else (None,)
        names = [[fill(part, layer, expert) for part in alias.parts] for expert in experts]
        held = self.model.tensors
        if not names or any(name not in held for group in names for name in group):
            return None
        return [[held[name] for name in group] for group in names]

    @staticmethod
    def alias_name(alias: Alias, layer: int) -> str:
        """Give the name of a stored form of a layer."""
        return fill(alias.name, layer, None)

    def alias_shape(self, alias: Alias, parts: list[list[GlobalTensor]]) -> tuple[int, ...]:
        """Give the shape of a stored form that holds these tensors."""
        first = parts[0]
        inner = list(first[0].shape)
        inner[alias.dim] = sum(t.shape[alias.dim] for t in first)
        return (len(parts), *inner) if alias.stack else tuple(inner)

    def _alias_pieces(
        self,
        alias: Alias,
        parts: list[list[GlobalTensor]],
        name: str,
        kind: str,
        shape: tuple[int, ...],
        file: str,
        begin: int,
    ) -> list[Piece]:
        expected = self.alias_shape(alias, parts)
        self._check_shape(name, shape, expected, file)
        inner = expected[1:] if alias.stack else expected
        strides = tuple(prod(inner[d + 1 :]) for d in range(len(inner)))
        out, itemsize = [], dtype(kind).itemsize
        for group in parts:
            offset = 0
            for tensor in group:
                at = begin + offset * strides[alias.dim] * itemsize
                # Rows of dim 0 follow each other; parts of another dim take turns.
                gaps = strides if alias.dim else None
                out.append(Piece(tensor.name, kind, Rect.whole(tensor.shape), file, at, gaps))
                offset += tensor.shape[alias.dim]
            begin += prod(inner) * itemsize
        return out

    def _check_shape(self, name: str, got: tuple[int, ...], expected: tuple[int, ...], file: str) -> None:
        if got != expected:
            keys = ", ".join(f"{key}={value}" for key, value in self.model.sizes.items())
            if self.model.scheme is not None:
                keys += f"; quantization_config: {self.model.scheme.name}"
            raise MappingError(
                f"{name} in {file} has shape {list(got)}; config.json implies {list(expected)} ({keys}). Correct whichever is wrong"
            )

    def _unknown(self, name: str, file: str) -> MappingError:
        sizes, method = self.model.sizes, unknown_method(self.model.config)
        if method is not None:
            return MappingError(
                f"{name} in {file}: weights are quantised by {method}, as config.json's quantization_config says, in a form that is not "
                f"known here; known are {', '.join(METHODS)}. Convert the original repository, whose weights are plain"
            )
        template = self.model.family.template("attention_norm") or ""
        layer = layer_of(name, template)
        if layer is not None and layer >= sizes["layers"]:
            key = self.model.family.sizes["layers"]
            return MappingError(
                f"{name} in {file}: config.json has {key} {sizes['layers']}, so layers end at {sizes['layers'] - 1}. Correct config.json, "
                f"or have it go along unread with --carry '{template.split(LAYER, 1)[0]}{layer}.*'"
            )
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if expert and int(expert[1]) >= sizes.get("experts", 0):
            return MappingError(
                f"{name} in {file}: config.json has {sizes.get('experts', 0)} experts. Correct config.json"
            )
        near = difflib.get_close_matches(name, [fill(r.name, layer or 0, 0) for r in self.model.family.rules], 1)
        hint = f"; the nearest known name is {near[0]}" if near else ""
        return MappingError(
            f"{name} in {file} is no tensor of {self.model.family.name}{hint}. Nothing is dropped silently: have it go along unread with --carry {name!r} "
            "(a pattern takes several), or remove it from the source if it is not wanted"
        )


def as_stored(model: Model, shapes: Mapping[str, tuple[int, ...]], carry: Iterable[str]) -> Model:
    """Give a model with what the names in a checkpoint say that its config can't: which weights are quantised, and what is carried along.

    Args:
        model: the model that the config describes.
        shapes: the shape of every stored tensor, by its name.
        carry: shell-style patterns of names; tensors that are the model's own are never carried.

    Returns:
        The model.
    """
    names, patterns = NameMap(model), list(carry)
    quantised, carried = set[str](), dict[str, tuple[int, ...]]()
    for name, shape in shapes.items():
        weights = [w for weight in model.scheme.weights(name) for w in names.weights(weight)] if model.scheme else []
        if weights:
            quantised |= set(weights)
        elif (
            name not in model.plain
            and not name.startswith("optimizer.")
            and (is_computed(name) or model.carries(name) or any(fnmatchcase(name, pattern) for pattern in patterns))
            and names.alias(name) is None
        ):
            carried[name] = shape
    return model.stored_as(quantised, carried)


def _part_aliases(model: Model) -> Iterator[Alias]:
    """Give the stored forms of quantised weights' parts, which follow from those of the weights."""
    for alias in model.family.aliases:
        for part in model.scheme.parts if model.scheme is not None else ():
            name, parts = part.rename(alias.name), [part.rename(p) for p in alias.parts]
            if name is not None and name != alias.name and None not in parts:
                yield Alias(name, tuple(p for p in parts if p is not None), alias.stack, alias.dim, alias.hub)


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
            + _remedy(model, missing)
        )


def _remedy(model: Model, missing: Sequence[str]) -> str:
    """Say what to do about missing tensors; of an output head alone, how a config says that it is the embedding."""
    if set(missing) <= {rule.name for rule in model.family.rules if rule.absent_if == "tied"}:
        return f". Put {model.family.flag_key('tied')}: true into config.json if the embedding serves as the output head too; else complete the source"
    return ". Complete the source, or correct config.json"


def check_scaled(model: Model, tensors: Iterable[TensorInfo], where: str) -> None:
    """Check that numbers which mean nothing without a scale have one.

    Args:
        model: the model, as stored.
        tensors: the stored tensors.
        where: the checkpoint's name, for the message.

    Raises:
        MappingError: a weight is FP8 and no scale belongs to it.
    """
    for info in tensors:
        if info.dtype.startswith("F8_E") and info.name in model.plain and info.name not in model.quantised:
            raise MappingError(
                f"{where}: {info.name} is {info.dtype} and no scale belongs to it, without which its numbers are no weights: "
                "take the repository's files whole, with their scales and the quantization_config of its config.json"
            )
