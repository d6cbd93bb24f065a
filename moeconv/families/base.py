"""What a model family is: the tensors of a model as data, with their names, symbolic shapes and how they shard."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

from moeconv.errors import MappingError

Axis = Literal["tp", "etp"]
Where = Literal["first", "layers", "last"]
LAYER, EXPERT = "{layer}", "{expert}"


@dataclass(frozen=True, slots=True)
class Split:
    """How a dimension is shared by the ranks of an axis: in whole units (a size's name), rounded up, or evenly."""

    axis: Axis
    dim: int
    units: str | None = None
    rounded: bool = False


@dataclass(frozen=True, slots=True)
class TensorRule:
    """The tensors of one kind: a name with `{layer}` and `{expert}`, the sizes of its dimensions (`heads*head_dim`), its split.

    `absent_if` names a flag of the config (`tied`) under which the tensor need not be stored; `only_if` one without which it does not exist.
    """

    name: str
    shape: tuple[str, ...]
    split: Split | None = None
    where: Where = "layers"
    absent_if: str | None = None
    only_if: str | None = None


@dataclass(frozen=True, slots=True)
class Alias:
    """Another stored form of some tensors: the named tensors, concatenated along `dim`, stacked over experts where `stack` is set."""

    name: str
    parts: tuple[str, ...]
    stack: bool = False
    dim: int = 0


@dataclass(frozen=True, slots=True)
class GlobalTensor:
    """One tensor of a model, whole, under its name on the hub."""

    name: str
    shape: tuple[int, ...]
    rule: TensorRule
    units: int | None = None
    layer: int | None = None
    expert: int | None = None

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model family as data.

    `sizes` says which config key gives each size; a tuple gives alternatives, and a size that no key gives is a default product of others.
    `flags` says which config key gives each flag. `unsupported` maps a config key to the values that a family's tensors can't express.
    """

    name: str
    model_type: str
    architecture: str
    sizes: Mapping[str, str | tuple[str, ...]]
    rules: tuple[TensorRule, ...]
    defaults: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[Alias, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Model:
    """A family with its sizes filled in from a config: every tensor that a checkpoint of the model must hold."""

    family: Family
    sizes: dict[str, int]
    flags: dict[str, bool]

    @classmethod
    def from_config(cls, family: Family, config: Mapping[str, Any]) -> Model:
        """Fill in a family's sizes.

        Args:
            family: the family that the config's `model_type` names.
            config: config.json as parsed.

        Returns:
            The model.

        Raises:
            MappingError: a size is missing or no whole number of at least 1.
        """
        sizes: dict[str, int] = {}
        for name, keys in family.sizes.items():
            keys = (keys,) if isinstance(keys, str) else keys
            found = next(((key, config[key]) for key in keys if config.get(key) is not None), None)
            if found is None and name in family.defaults:
                continue
            if found is None:
                raise MappingError(f"config.json has no {' or '.join(keys)}, which {family.name} needs")
            key, value = found
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise MappingError(f"config.json: {key} is {value!r}; expected a whole number of at least 1")
            sizes[name] = value
        for name, formula in family.defaults.items():
            if name not in sizes:
                sizes[name] = _default(name, formula, sizes)
        flags = {flag: bool(config.get(key, False)) for flag, key in family.flags.items()}
        return cls(family, sizes, flags)

    @cached_property
    def tensors(self) -> dict[str, GlobalTensor]:
        """Every tensor by its hub name, in the order of the model; tensors that a flag makes optional included."""
        return {t.name: t for t in self._expand()}

    def optional(self, tensor: GlobalTensor) -> bool:
        """Say whether a checkpoint may lack the tensor (an output head tied to the embedding)."""
        return tensor.rule.absent_if is not None and self.flags.get(tensor.rule.absent_if, False)

    def _expand(self) -> Iterator[GlobalTensor]:
        for where in ("first", "layers", "last"):
            rules = [
                r for r in self.family.rules if r.where == where and (r.only_if is None or self.flags.get(r.only_if))
            ]
            for layer in range(self.sizes["layers"]) if where == "layers" else (None,):
                for rule in rules:
                    if EXPERT not in rule.name:
                        yield self._tensor(rule, layer, None)
                for expert in range(self.sizes.get("experts", 0)) if where == "layers" else ():
                    for rule in rules:
                        if EXPERT in rule.name:
                            yield self._tensor(rule, layer, expert)

    def _tensor(self, rule: TensorRule, layer: int | None, expert: int | None) -> GlobalTensor:
        units = self.sizes[rule.split.units] if rule.split and rule.split.units else None
        return GlobalTensor(fill(rule.name, layer, expert), self.shape(rule), rule, units, layer, expert)

    def shape(self, rule: TensorRule) -> tuple[int, ...]:
        """Give the shape, in elements, of the tensors of a rule."""
        return tuple(evaluate(term, self.sizes) for term in rule.shape)


def fill(template: str, layer: int | None, expert: int | None) -> str:
    """Put layer and expert numbers into a name."""
    return template.replace(LAYER, str(layer)).replace(EXPERT, str(expert))


def evaluate(term: str, sizes: Mapping[str, int]) -> int:
    """Give the value of a product of sizes and numbers, such as `heads*head_dim`."""
    return prod(int(factor) if factor.isdigit() else sizes[factor] for factor in term.split("*"))


def match(template: str, name: str) -> tuple[int | None, int | None] | None:
    """Find the layer and expert numbers of a name.

    Args:
        template: a name with `{layer}` and `{expert}`.
        name: a tensor's name.

    Returns:
        `(layer, expert)`, with None for what the template lacks; None where the name is of another kind.
    """
    pattern = (
        re.escape(template)
        .replace(re.escape(LAYER), r"(?P<layer>0|[1-9]\d*)")
        .replace(re.escape(EXPERT), r"(?P<expert>0|[1-9]\d*)")
    )
    found = re.fullmatch(pattern, name)
    if found is None:
        return None
    numbers = found.groupdict()
    return tuple(int(numbers[key]) if key in numbers else None for key in ("layer", "expert"))  # type: ignore[return-value]


def _default(name: str, formula: str, sizes: Mapping[str, int]) -> int:
    if "//" not in formula:
        return evaluate(formula, sizes)
    over, under = (evaluate(term, sizes) for term in formula.split("//"))
    if over % under:
        raise MappingError(f"config.json: {name} is not given and {formula} = {over} / {under} is no whole number")
    return over // under
