"""What a model family is: the tensors of a model as data, with their names, symbolic shapes and how they shard."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal

from moeconv.errors import MappingError
from moeconv.families.compute import Compute, ComputeRule, resolve

Axis = Literal["tp", "etp"]
Where = Literal["first", "layers", "last"]
Layers = Literal["all", "moe", "dense"]
LAYER, EXPERT = "{layer}", "{expert}"
MAX_LAYERS, MAX_EXPERTS = 4096, 16384
# What a tensor can do. A part has `gate`, `up`, `down` where it is a gated feed-forward network.
ROLES = frozenset(
    (
        *("embedding", "final_norm", "head", "attention_norm", "mlp_norm", "router", "router.bias", "shared.router"),
        *(f"attention.{name}" for name in ("q", "k", "v", "o", "q_norm", "k_norm")),
        *(f"attention.{name}.bias" for name in ("q", "k", "v", "o")),
        *(f"{part}.{name}" for part in ("mlp", "expert", "shared") for name in ("gate", "up", "down")),
        *(f"mlp.{name}.bias" for name in ("gate", "up", "down")),
    )
)


@dataclass(frozen=True, slots=True)
class Split:
    """How a dimension is shared by the ranks of an axis: in whole units (a size's name), rounded up, or evenly."""

    axis: Axis
    dim: int
    units: str | None = None
    rounded: bool = False


@dataclass(frozen=True, slots=True)
class TensorRule:
    """The tensors of one kind: what they do, a name with `{layer}` and `{expert}`, the sizes of their dimensions (`heads*head_dim`), their split.

    The `role` is what every room asks by: `attention.k`, `attention.k_norm`, `router.bias`, `expert.gate`, ... (ROLES lists them).
    `absent_if` names a flag of the config (`tied`) under which the tensor need not be stored; `only_if` one without which it does not exist.
    `layers` says whether every layer has it, or only those whose feed-forward part is a mixture of experts, or dense. A `buffer` is no parameter.
    """

    role: str
    name: str
    shape: tuple[str, ...]
    split: Split | None = None
    where: Where = "layers"
    absent_if: str | None = None
    only_if: str | None = None
    layers: Layers = "all"
    buffer: bool = False


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
    `flags` says which config key gives each flag, with the value where the config is silent. `may_be_zero` names the sizes that need not be
    at least 1. `dense_layers` says how a config names layers without experts. `compute` says what is computed with the tensors.
    `tokens` has the special tokens that transformers takes where a config is silent, `stated` what a config made for this family says besides,
    `mergekit` what mergekit-moe calls an output of this family.
    """

    name: str
    model_type: str
    architecture: str
    sizes: Mapping[str, str | tuple[str, ...]]
    rules: tuple[TensorRule, ...]
    compute: ComputeRule
    defaults: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str | tuple[str, bool]] = field(default_factory=dict)
    may_be_zero: tuple[str, ...] = ()
    dense_layers: Literal["none", "listed", "first"] = "none"
    aliases: tuple[Alias, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    stated: Mapping[str, Any] = field(default_factory=dict)
    mergekit: str | None = None
    source: str = ""

    def template(self, role: str) -> str | None:
        """Give the name, with `{layer}` and `{expert}`, of the tensors with a role; None where the family has none."""
        return next((rule.name for rule in self.rules if rule.role == role), None)

    def width(self, part: str) -> str | None:
        """Give the formula of the neurons of a feed-forward part (`mlp`, `expert`, `shared`), as `shared*ffn`; None where the family has no such part."""
        return next((rule.shape[0] for rule in self.rules if rule.role == f"{part}.gate"), None)


@dataclass(frozen=True)
class Model:
    """A family with its sizes filled in from a config: every tensor that a checkpoint of the model must hold."""

    family: Family
    sizes: dict[str, int]
    flags: dict[str, bool]
    moe_layers: frozenset[int]
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

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
            least = 0 if name in family.may_be_zero else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise MappingError(f"config.json: {key} is {value!r}; expected a whole number of at least {least}")
            sizes[name] = value
        for name, formula in family.defaults.items():
            if name not in sizes:
                sizes[name] = _default(name, formula, sizes)
        named = {flag: (key, False) if isinstance(key, str) else key for flag, key in family.flags.items()}
        flags = {flag: bool(config.get(key, silent)) for flag, (key, silent) in named.items()}
        _check_limits(sizes)
        return cls(family, sizes, flags, _moe_layers(family, config, sizes), config)

    @cached_property
    def compute(self) -> Compute:
        """What the model computes.

        Raises:
            MappingError: the config states something that transformers doesn't compute.
        """
        return resolve(self.family.compute, self.config, self.sizes, bias=self.has("router.bias"))

    @cached_property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return self.flags.get("tied", False)

    def has(self, role: str) -> bool:
        """Say whether the model has tensors with a role."""
        return role in self._by_role

    def width(self, part: str) -> int:
        """Give the neurons of a feed-forward part (`mlp`, `expert`, `shared`); 0 where the family has no such part."""
        term = self.family.width(part)
        return evaluate(term, self.sizes) if term is not None else 0

    def rule(self, role: str) -> TensorRule:
        """Give the rule of a role that the model has."""
        return self._by_role[role]

    def find(self, role: str, layer: int | None = None, expert: int | None = None) -> GlobalTensor | None:
        """Find a tensor by what it does.

        Args:
            role: as `TensorRule.role`.
            layer: its layer; None for those outside the layers.
            expert: its expert; None for those of no expert.

        Returns:
            The tensor; None where the model, or this layer, has none.
        """
        rule = self._by_role.get(role)
        return self.tensors.get(fill(rule.name, layer, expert)) if rule is not None else None

    def tensor(self, role: str, layer: int | None = None, expert: int | None = None) -> GlobalTensor:
        """Give a tensor that the model has; see `find`."""
        found = self.find(role, layer, expert)
        assert found is not None, f"{self.family.name} has no {role} in layer {layer}"
        return found

    @cached_property
    def _by_role(self) -> dict[str, TensorRule]:
        return {rule.role: rule for rule in self.rules}

    @cached_property
    def tensors(self) -> dict[str, GlobalTensor]:
        """Every tensor by its hub name, in the order of the model; tensors that a flag makes optional included."""
        return {t.name: t for t in self._expand()}

    @cached_property
    def rules(self) -> tuple[TensorRule, ...]:
        """The rules of the tensors that the model has."""
        absent = {"moe": not self.moe_layers, "dense": len(self.moe_layers) == self.sizes["layers"]}
        return tuple(
            r
            for r in self.family.rules
            if (r.only_if is None or self.flags.get(r.only_if)) and not absent.get(r.layers, False)
        )

    def optional(self, tensor: GlobalTensor) -> bool:
        """Say whether a checkpoint may lack the tensor (an output head tied to the embedding)."""
        return tensor.rule.absent_if is not None and self.flags.get(tensor.rule.absent_if, False)

    def _expand(self) -> Iterator[GlobalTensor]:
        for where in ("first", "layers", "last"):
            for layer in range(self.sizes["layers"]) if where == "layers" else (None,):
                kind = "moe" if layer in self.moe_layers else "dense"
                rules = [r for r in self.rules if r.where == where and (layer is None or r.layers in ("all", kind))]
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


def _check_limits(sizes: Mapping[str, int]) -> None:
    """Refuse sizes that no model has, before anything of that size is made."""
    for name, most in (("layers", MAX_LAYERS), ("experts", MAX_EXPERTS)):
        if sizes.get(name, 0) > most:
            raise MappingError(f"config.json says {sizes[name]} {name}; models have at most {most}")
    if any(size >= 2**40 for size in sizes.values()):
        raise MappingError(
            f"config.json says {max(sizes, key=lambda n: sizes[n])} {max(sizes.values())}; no model is so large"
        )


def _moe_layers(family: Family, config: Mapping[str, Any], sizes: Mapping[str, int]) -> frozenset[int]:
    """Find the layers with experts, as transformers does: `mlp_only_layers` and `decoder_sparse_step`, or `first_k_dense_replace`."""
    layers = range(sizes["layers"] if "experts" in sizes else 0)
    if family.dense_layers == "listed":
        listed, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
        if not isinstance(listed, list) or not all(isinstance(layer, int) for layer in listed):
            raise MappingError(f"config.json: mlp_only_layers is {str(listed)[:80]}; expected a list of layers")
        if not isinstance(step, int) or isinstance(step, bool) or step < 1:
            raise MappingError(f"config.json: decoder_sparse_step is {step!r}; expected a whole number of at least 1")
        return frozenset(layer for layer in layers if layer not in listed and (layer + 1) % step == 0)
    if family.dense_layers == "first":
        first = config.get("first_k_dense_replace")
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise MappingError(
                f"config.json: first_k_dense_replace is {first!r}; {family.name} needs the number of dense layers"
            )
        return frozenset(layers[first:])
    return frozenset(layers)


def _default(name: str, formula: str, sizes: Mapping[str, int]) -> int:
    if "//" not in formula:
        return evaluate(formula, sizes)
    over, under = (evaluate(term, sizes) for term in formula.split("//"))
    if over % under:
        raise MappingError(f"config.json: {name} is not given and {formula} = {over} / {under} is no whole number")
    return over // under
