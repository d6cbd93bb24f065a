"""Filling the parameters of somebody's own torch module with a rank's part of a checkpoint. Loads torch.

A parameter is a list of `Part`s: rectangles of the checkpoint's tensors, and where they lie in it. Names and shapes of all
parameters are compared before the first of them is written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moeconv.as_torch import to_tensor
from moeconv.errors import LayoutError, MappingError
from moeconv.families.base import CARRIED, GlobalTensor, Model
from moeconv.layout.degrees import Degrees, chunk_layers
from moeconv.layout.rect import Rect
from moeconv.megatron.rank_parts import RankForm, check_rank
from moeconv.megatron.tensors import Part
from moeconv.pieces import NameMap, TensorInfo
from moeconv.placement import Placement
from moeconv.quant import require_plain

Naming = Literal["hub", "megatron"] | Mapping[str, str] | Callable[[str], str]
Read = Callable[[str, Rect], npt.NDArray[Any]]
# What torch's own wrappers put into parameters' names: torch.compile, activation checkpointing; DDP puts it in front.
_INSIDE, _IN_FRONT = ("_orig_mod.", "_checkpoint_wrapped_module."), "module."
_SHOWN = 4


class Source(Protocol):
    """A checkpoint, as far as filling a module goes."""

    @property
    def root(self) -> Path:
        """Its folder, for messages."""

    @property
    def model(self) -> Model:
        """Its model."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Its tensors by name."""


@dataclass(frozen=True, slots=True)
class Filling:
    """What a parameter must be: its shape (the whole one of a DTensor), and the parts that fill it.

    Before each part stands its place in the parameter's first dimensions, where these stack tensors.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[tuple[int, ...], Part], ...]


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter or buffer of a module, and the name that the checkpoint knows it by."""

    name: str
    known: str
    value: Tensor


def load_into(
    source: Source,
    read: Read,
    module: nn.Module,
    *,
    degrees: Degrees,
    rank: Mapping[str, int] | None,
    names: Naming,
    skip: Sequence[str],
) -> int:
    """Fill a module; see `Checkpoint.load_into`.

    Args:
        source: the checkpoint.
        read: reads a rectangle of one of its tensors.
        module: the module.
        degrees: the layout that `rank` belongs to.
        rank: coordinates by axis; None for parameters that are whole, or DTensors.
        names: what the module calls its parameters.
        skip: shell-style patterns of parameters that stay as they are, and of tensors that go nowhere.

    Returns:
        Bytes that were read.

    Raises:
        MappingError: names or shapes don't fit; the module is as it was.
        LayoutError: there is no such rank; the module is as it was.
        SourceError, IntegrityError: a file can't be read or is damaged; parameters are filled in part.
    """
    require_plain(source.model, source.root, "filling a module")
    check_rank(degrees, rank or {})
    places = list(_places(module, names, skip))
    if names == "megatron":
        fillings, wanted = _megatron(source, degrees, rank or {}, places)
    else:
        held = dict(_held(source, degrees, rank))
        known = _HubNames(source, held)
        fillings = {p.known: filling for p in places if (filling := known.filling(p.known)) is not None}
        wanted = list(held)
    wanted = [name for name in wanted if not _matches(name, skip)]
    _check(source, places, fillings, wanted)
    done, nbytes = set[int](), 0
    with torch.no_grad():
        for place in places:
            if id(place.value) not in done:
                nbytes += _fill(place, fillings[place.known], read)
                done.add(id(place.value))
    return nbytes


def _places(module: nn.Module, names: Naming, skip: Sequence[str]) -> Iterator[Place]:
    """List what of a module a checkpoint has: parameters, and the buffers that are saved with them."""
    saved = module.state_dict(keep_vars=True)
    buffers = [(name, value) for name, value in module.named_buffers(remove_duplicate=False) if name in saved]
    for name, value in (*module.named_parameters(remove_duplicate=False), *buffers):
        plain = name
        while plain.startswith(_IN_FRONT):
            plain = plain.removeprefix(_IN_FRONT)
        for word in _INSIDE:
            plain = plain.replace(word, "")
        if not _matches(plain, skip):
            yield Place(name, _renamed(plain, names), value)


def _renamed(name: str, names: Naming) -> str:
    if isinstance(names, str):
        return name
    return names(name) if callable(names) else names.get(name, name)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _held(source: Source, degrees: Degrees, rank: Mapping[str, int] | None) -> Iterator[tuple[str, Rect]]:
    """The part of each tensor that the module must hold."""
    model = source.model
    if rank is None:
        held: Iterator[tuple[GlobalTensor, Rect]] = ((t, Rect.whole(t.shape)) for t in model.tensors.values())
    else:
        held = Placement(model, degrees).held(**{axis: n for axis, n in rank.items() if axis != "vpp"})
    chunk = (rank or {}).get("vpp")
    layers = chunk_layers(model.sizes["layers"], degrees)
    for tensor, rect in held:
        if tensor.name not in source.tensors or not rect.size or tensor.rule.role == CARRIED:
            continue
        if chunk is not None and not _in_chunk(
            tensor, chunk, degrees, layers[chunk * degrees.pp + (rank or {}).get("pp", 0)]
        ):
            continue
        yield tensor.name, rect


def _megatron(
    source: Source, degrees: Degrees, rank: Mapping[str, int], places: Sequence[Place]
) -> tuple[dict[str, Filling], list[str]]:
    """What fills the parameters of a Megatron-Core model that are known, and the names of what it must hold."""
    if degrees.vpp > 1 and "vpp" not in rank:
        raise LayoutError(f"rank: {degrees} has a module for each virtual stage; say which one with vpp")
    form = RankForm(source.model, degrees, rank, [place.known for place in places])
    fillings = {}
    for place in places:
        found = form.parts(place.known, place.value.shape[0] if place.value.dim() else 0)
        if found is not None:
            fillings[place.known] = Filling(found[0], tuple(((), part) for part in found[1]))
    return fillings, sorted(form.wanted() & source.tensors.keys())


def _in_chunk(tensor: GlobalTensor, chunk: int, degrees: Degrees, layers: range) -> bool:
    """Whether a virtual stage has a tensor of its rank; the last one has a tied embedding's copy, too."""
    if tensor.layer is not None:
        return tensor.layer in layers
    return chunk == 0 if tensor.rule.where == "first" else chunk == degrees.vpp - 1


class _HubNames:
    """The fillings of parameters that are called as checkpoints on the hub have them, or as transformers keeps them in memory."""

    def __init__(self, source: Source, wanted: Mapping[str, Rect]) -> None:
        self._source, self._wanted, self._names = source, wanted, NameMap(source.model)

    def filling(self, name: str) -> Filling | None:
        model = self._source.model
        if name in model.tensors and name not in self._source.tensors and model.tied:
            name = model.tensor("embedding").name if model.tensors[name].rule.role == "head" else name
        rect = self._wanted.get(name)
        if rect is not None:
            return Filling(rect.shape, (((), Part(name, rect, (0,) * len(rect.shape))),))
        found = self._names.alias(name)
        if found is None:
            return None
        alias, groups = found
        groups = [group for group in groups if all(tensor.name in self._wanted for tensor in group)]
        if not groups:
            return None
        parts, inner = [], list[int]()
        for number, group in enumerate(groups):
            offset = 0
            for tensor in group:
                rect = self._wanted[tensor.name]
                at = [0] * len(rect.shape)
                at[alias.dim] = offset
                parts.append(((number,) if alias.stack else (), Part(tensor.name, rect, tuple(at))))
                offset += rect.shape[alias.dim]
                inner = list(rect.shape)
            inner[alias.dim] = offset
        return Filling(((len(groups),) if alias.stack else ()) + tuple(inner), tuple(parts))


def _check(source: Source, places: Sequence[Place], fillings: Mapping[str, Filling], wanted: Sequence[str]) -> None:
    """Compare a module with a checkpoint.

    Raises:
        MappingError: they don't fit; names what of the module is unexpected, missing, misshapen or tied.
    """
    problems = []
    unexpected = [place.name for place in places if place.known not in fillings]
    if unexpected:
        like = any(".linear_qkv." in name for name in unexpected)
        advice = (
            "give names='megatron'"
            if like
            else "say with names= what it is called there, or leave it as it is with skip="
        )
        problems.append(f"the checkpoint has nothing for {_few(unexpected)}: {advice}")
    fitting = [place for place in places if place.known in fillings]
    for place in fitting:
        expected = fillings[place.known].shape
        if tuple(place.value.shape) != expected:
            problems.append(
                f"{place.name} has shape {list(place.value.shape)}, and {list(expected)} is this rank's part of it"
            )
    filled = {part.tensor for place in fitting for _, part in fillings[place.known].parts}
    missing = [name for name in wanted if name not in filled]
    if missing and not unexpected:
        problems.append(f"the module has no parameter for {_few(missing)}: leave tensors out with skip=")
    elif missing:
        problems.append(f"the module has no parameter for {_few(missing)}")
    for place in fitting:
        if isinstance(place.value, DTensor):
            _window(place.name, place.value)
    meta = [place.name for place in places if place.value.is_meta]
    if meta:
        problems.append(f"{_few(meta)} are on the device meta: call the module's to_empty(device=...) first")
    owners: dict[int, Place] = {}
    for place in fitting:
        other = owners.setdefault(id(place.value), place)
        if fillings[other.known] != fillings[place.known] and not source.model.tied:
            problems.append(f"{other.name} and {place.name} are one parameter, and two tensors of the checkpoint")
    if problems:
        shown = problems[:_SHOWN] + ([f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else [])
        raise MappingError(f"{source.root}: does not fit the module, which is as it was: {'; '.join(shown)}")


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _fill(place: Place, filling: Filling, read: Read) -> int:
    """Write a parameter's part, which for a DTensor is that of this rank; give the bytes that were read."""
    local, window, nbytes = place.value, Rect.whole(filling.shape), 0
    if isinstance(place.value, DTensor):
        local, window = place.value.to_local(), _window(place.name, place.value)
    for lead, part in filling.parts:
        lies = Rect(lead + part.place.offsets, (1,) * len(lead) + part.place.shape)
        inside = lies.intersect(window)
        if inside is None:
            continue
        inner = Rect(inside.offsets[len(lead) :], inside.shape[len(lead) :])
        array = _values(part.cut(inner, inner.offsets), read)
        target = local[inside.within(window).slices()]
        target.copy_(to_tensor(array).reshape(target.shape))
        nbytes += array.nbytes
    return nbytes


def _values(part: Part, read: Read) -> npt.NDArray[Any]:
    """Read a part, in the order of the dimensions of what it fills."""
    offsets, shape = part.rect.offsets, part.rect.shape
    if part.view is None:
        array = read(part.tensor, part.rect)
    else:  # every second element, as of two matrices that take turns
        together = part.view[-1]
        around = Rect((*offsets[:-2], offsets[-2] * together), (*shape[:-2], shape[-2] * together))
        seen = read(part.tensor, around).reshape(*shape[:-1], together)
        array = seen[..., offsets[-1] : offsets[-1] + shape[-1]]
    if part.axes is None:
        return array
    rest = (axis for axis in range(array.ndim) if axis not in part.axes)  # of size 1
    return array.transpose(*part.axes, *rest).reshape(part.place.shape)


def _window(name: str, value: DTensor) -> Rect:
    """The rectangle of a DTensor that this rank holds, by the same protocol that torch.distributed.checkpoint asks."""
    local = value.to_local()
    if not local.numel():  # of fewer rows than ranks
        return Rect((0,) * local.dim(), (0,) * local.dim())
    chunks = value.__create_chunk_list__()  # type: ignore[no-untyped-call]
    sizes = [tuple(chunk.sizes) for chunk in chunks]
    if any(placement.is_partial() for placement in value.placements) or sizes != [tuple(local.shape)]:
        raise MappingError(
            f"{name}: a DTensor of {value.placements} is no rectangle; redistribute it to Shard or Replicate"
        )
    return Rect(tuple(chunks[0].offsets), sizes[0])
