"""Stacks of all experts' weights, in whose form transformers 5 keeps them and PEFT adapts them (`target_parameters`).

Source: https://github.com/huggingface/peft/blob/v0.21.0/src/peft/tuners/lora/layer.py (ParamWrapper)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moeconv.families.adapted import ADAPTABLE
from moeconv.families.base import GlobalTensor, Model
from moeconv.pieces import NameMap


@dataclass(frozen=True, slots=True)
class Stack:
    """A parameter of a module that holds all experts' matrices of one or several kinds, one behind the other along their outputs."""

    module: str
    parameter: str
    groups: tuple[tuple[GlobalTensor, ...], ...]
    """For each expert its matrices."""

    @property
    def name(self) -> str:
        """The parameter's whole name."""
        return f"{self.module}.{self.parameter}"

    def key(self, depth: int) -> str:
        """Give what the names of its adapter begin with, where so many adapted parameters of the module come after it."""
        return self.module + ".base_layer" * depth


def matrix_sizes(tensor: GlobalTensor) -> tuple[int, int]:
    """Give the inputs and outputs of a weight."""
    first, second = tensor.shape
    return (first, second) if tensor.rule.transposed else (second, first)


def stacks(model: Model, *, published: bool = False) -> Iterator[Stack]:
    """List the stacks of a model, layer by layer, those of a module in the order in which it has them.

    Args:
        model: the model.
        published: also those in which checkpoints are published and that transformers keeps in another form.

    Yields:
        Each stack whose matrices can have adapters.
    """
    names = NameMap(model)
    # Where a family has a form besides the published one, it is that of transformers' memory.
    aliases = sorted((alias for alias in names.aliases if alias.stack), key=lambda alias: alias.hub)
    for layer in range(model.sizes["layers"]):
        seen: set[str] = set()
        for alias in aliases:
            groups = names.members(alias, layer)
            members = [tensor for group in groups or () for tensor in group]
            if groups is None or not all(tensor.rule.role in ADAPTABLE for tensor in members):
                continue
            outward = all(alias.dim == (1 if t.rule.transposed else 0) or len(g) == 1 for g in groups for t in g)
            if outward and (published or not seen.intersection(tensor.name for tensor in members)):
                seen |= {tensor.name for tensor in members}
                module, _, parameter = names.alias_name(alias, layer).rpartition(".")
                yield Stack(module, parameter, tuple(tuple(group) for group in groups))


def by_module(model: Model) -> dict[str, list[Stack]]:
    """Give the stacks of each module that has some."""
    out: dict[str, list[Stack]] = {}
    for stack in stacks(model, published=True):
        out.setdefault(stack.module, []).append(stack)
    return out
