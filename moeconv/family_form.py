"""Which form of a family a checkpoint is in: the published one, or one that transformers writes when it saves the model anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moeconv.families.base import Model
from moeconv.pieces import NameMap


def in_form(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> Model:
    """Give the model with the tensors of the form that a checkpoint is in.

    Args:
        model: as published.
        shapes: the stored tensors' shapes, by name.

    Returns:
        The model of whichever form of the family knows most of the tensors, with their shapes; of the published one where forms are equal.
    """
    if not model.family.forms:
        return model
    forms = [model, *(replace(model, family=family) for family in model.family.forms)]
    return max(forms, key=lambda form: _known(form, shapes))


def _known(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count the tensors that a form has, in the shapes that it has them in."""
    names, count = NameMap(model), 0
    for name, shape in shapes.items():
        tensor = model.plain.get(name)
        found = names.alias(name) if tensor is None else None
        expected = tensor.shape if tensor is not None else names.alias_shape(*found) if found is not None else None
        count += expected == shape
    return count
