"""The forms that tensors are written in: under the names in which checkpoints of a family are published, or fused as transformers 5 keeps them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from moeconv.errors import LayoutError
from moeconv.families.base import Alias, Model
from moeconv.pieces import NameMap, TensorInfo

Names = Literal["hub", "fused"]


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor as a file holds it, and the model's tensors that it is made of."""

    info: TensorInfo
    members: tuple[str, ...]


def written(model: Model, tensors: Mapping[str, TensorInfo], order: Iterable[str], names: Names) -> list[Written]:
    """Say how tensors are written.

    Args:
        model: the model.
        tensors: its stored tensors by name.
        order: which of them to write, in the order of the files.
        names: `hub` for the names in which checkpoints are published, `fused` for the stacks that transformers 5 keeps in memory.

    Returns:
        What to write, each where the first of its tensors comes in the order.

    Raises:
        LayoutError: the family has no fused form.
    """
    aliases = [alias for alias in NameMap(model).aliases if (alias.hub if names == "hub" else alias.stack)]
    if names == "fused" and not aliases:
        raise LayoutError(f"--names fused: {model.family.name} has no experts that could be fused; give --names hub")
    place: dict[str, Written] = {}
    wanted = set(order)
    for form in _forms(model, tensors, aliases):
        if set(form.members) <= wanted and not any(member in place for member in form.members):
            place |= dict.fromkeys(form.members, form)
    found = (place.get(name, Written(tensors[name], (name,))) for name in order)
    return list(dict.fromkeys(found))


def _forms(model: Model, tensors: Mapping[str, TensorInfo], aliases: list[Alias]) -> Iterator[Written]:
    names = NameMap(model)
    # Where several forms hold the same tensors, the family lists the one that is used first.
    for alias in aliases:
        for layer in range(model.sizes["layers"]):
            groups = names.members(alias, layer)
            members = tuple(tensor.name for group in groups or () for tensor in group)
            kinds = {tensors[name].dtype for name in members if name in tensors}
            if groups is not None and len(kinds) == 1 and all(name in tensors for name in members):
                name = names.alias_name(alias, layer)
                yield Written(TensorInfo(name, kinds.pop(), names.alias_shape(alias, groups)), members)
