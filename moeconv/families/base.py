"""What a model family is: the tensors of a model as data, with their names, symbolic shapes and how they shard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import Any, Literal

from moeconv.errors import MappingError
from moeconv.families.compute import Compute, ComputeRule, Key, resolve
from moeconv.families.layers import LinearLayers, MoELayers, linear_layers, moe_layers
from moeconv.families.names import EXPERT, evaluate, fill, layer_of
from moeconv.families.quantised import Part, Scheme, scheme_of
from moeconv.families.sizes import read_size, read_sizes

Axis = Literal["tp", "etp"]
Where = Literal["first", "layers", "last"]
Layers = Literal["all", "moe", "dense", "linear", "full"]
# What a tensor can do. A part has `gate`, `up`, `down` where it is a gated feed-forward network, `gate_up` where a matrix holds the two in turns.
ROLES = frozenset(
    (
        *("embedding", "final_norm", "head", "attention_norm", "mlp_norm", "router", "router.bias", "shared.router"),
        *("final_norm.bias", "head.bias", "attention_norm.bias", "mlp_norm.bias", "router.linear.bias"),
        *(f"attention.{name}" for name in ("q", "k", "v", "o", "q_norm", "k_norm", "sinks")),
        *(f"attention.{name}" for name in ("q_a", "q_a_norm", "q_b", "kv_a", "kv_a_norm", "kv_b")),
        *(f"attention.{name}.bias" for name in ("q", "k", "v", "o", "q_a", "kv_a")),
        *(f"{part}.{name}" for part in ("mlp", "expert", "shared") for name in ("gate", "up", "down")),
        *(f"{part}.{name}.bias" for part in ("mlp", "shared") for name in ("gate", "up", "down")),
        *("expert.gate_up", "expert.gate_up.bias", "expert.down.bias"),
        *(f"linear.{name}" for name in ("in", "in_qkv", "in_z", "in_ba", "in_b", "in_a", "conv", "conv.bias", "out")),
        *(f"linear.{name}" for name in ("x", "dt", "dt.bias", "a", "d", "norm", "dt_norm", "b_norm", "c_norm")),
    )
)
CARRIED = "carried"  # the role of tensors that go along unread


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
    `absent_if` names a flag of the config (`tied`) under which the tensor need not be stored; `only_if` a flag, or a size, without which it does
    not exist (`!flag`: with which; `a&b`: both). `layers` says whether every layer has it, or only those whose feed-forward part is a mixture of experts or
    dense, or whose attention is linear or full. A `buffer` is no parameter. A `transposed` matrix is stored as [in, out].
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
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Alias:
    """Another stored form of some tensors: the named tensors, concatenated along `dim`, stacked over experts where `stack` is set.

    With `hub` it is the form in which checkpoints are published; the names of the parts then exist only inside this program's checkpoints.
    """

    name: str
    parts: tuple[str, ...]
    stack: bool = False
    dim: int = 0
    hub: bool = False


@dataclass(frozen=True, slots=True)
class GlobalTensor:
    """One tensor of a model, whole, under its name on the hub. A `part` of a quantised weight has that weight as `base`."""

    name: str
    shape: tuple[int, ...]
    rule: TensorRule
    units: int | None = None
    layer: int | None = None
    expert: int | None = None
    part: Part | None = None
    base: GlobalTensor | None = None

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def parameters(self) -> int:
        """The number of the model's parameters that it stands for: packed numbers for all they hold, scales for none."""
        if self.part is None or self.base is None:
            return 0 if self.rule.buffer or self.rule.role == CARRIED else self.size
        return self.base.size if self.part.role == "weight" else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model family as data.

    `sizes` says which config key gives each size; a tuple gives other names of it, which must say the same, and a size that no key gives is a
    default sum of products of others (there are as many key and value heads as heads). `flags` says which config key gives each flag, with the
    value where the config is silent. `may_be_zero` names the sizes that need not be at least 1, `null` those whose 0 a config states as null.
    `dense_layers` says how a config names layers without experts, `linear_layers` those with linear attention. `compute` says what is computed
    with the tensors. `also` has further values of `model_type`. `carried` are shell-style patterns of tensors that are no part of this
    (`mtp.*`), `mtp` the keys of a number of further layers for predicting more tokens: they go along unread. `tokens` has the special tokens
    that transformers takes where a config is silent, `stated` what a config made for this family says besides, `harmless` the keys of this
    family alone that change nothing that is computed. `text` is the key of the language model's own config, in one of a model with other parts,
    `forms` the same family with the names and shapes of models saved anew. With `sentencepiece` a `tokenizer.model` alone is a tokenizer as
    Llama's. `mergekit` is what mergekit-moe calls an output of this family.
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
    null: tuple[str, ...] = ()
    dense_layers: MoELayers = "none"
    linear_layers: LinearLayers = "none"
    aliases: tuple[Alias, ...] = ()
    also: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    mtp: tuple[str, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    stated: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    forms: tuple[Family, ...] = ()
    harmless: tuple[str, ...] = ()
    mergekit: str | None = None
    sentencepiece: bool = False
    source: str = ""

    def template(self, role: str) -> str | None:
        """Give the name, with `{layer}` and `{expert}`, of the tensors with a role; None where the family has none."""
        return next((rule.name for rule in self.rules if rule.role == role), None)

    def flag_key(self, flag: str) -> str:
        """Give the config key of a flag."""
        key = self.flags[flag]
        return key if isinstance(key, str) else key[0]

    def language_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Give what a config says of the language model: all of it, or the part under `text` with what holds for the whole.

        Raises:
            MappingError: there is no such part.
        """
        if self.text is None:
            return config
        inner = config.get(self.text)
        if not isinstance(inner, Mapping):
            raise MappingError(f"config.json has no {self.text}, which describes the language model of {self.name}")
        whole = {key: config[key] for key in ("tie_word_embeddings", "quantization_config") if key in config}
        return {**inner, **whole}

    def key_of(self, size: str) -> str:
        """Name the key of config.json that says a size, or those that it is the sum of."""
        keys = self.sizes.get(size)
        if keys is None:
            return " + ".join(self.key_of(term) for term in self.defaults[size].split("+"))
        return keys if isinstance(keys, str) else keys[0]

    def width(self, part: str) -> str | None:
        """Give the formula of the neurons of a feed-forward part (`mlp`, `expert`, `shared`), as `shared*ffn`; None where the family has no such part."""
        down = next((rule for rule in self.rules if rule.role == f"{part}.down"), None)
        return down.shape[0 if down.transposed else 1] if down is not None else None


@dataclass(frozen=True)
class Model:
    """A family with its sizes filled in from a config: every tensor that a checkpoint of the model must hold.

    What a config can't say comes from a checkpoint's names (`stored_as`): the weights that are `quantised`, and the shapes of `carried` tensors.
    """

    family: Family
    sizes: dict[str, int]
    flags: dict[str, bool]
    moe_layers: frozenset[int]
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    linear_layers: frozenset[int] = frozenset()
    quantised: frozenset[str] = field(default=frozenset(), repr=False)
    carried: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

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
        config = family.language_config(config)
        sizes = read_sizes(family.name, config, family.sizes, family.defaults, family.may_be_zero)
        read_size(family.mtp, config, 0)
        named = {flag: (key, False) if isinstance(key, str) else key for flag, key in family.flags.items()}
        flags = {flag: Key(key, silent).flag(config) for flag, (key, silent) in named.items()}
        moe = moe_layers(family.dense_layers, config, sizes["layers"]) if "experts" in sizes else frozenset[int]()
        return cls(family, sizes, flags, moe, config, linear_layers(family.linear_layers, config, sizes["layers"]))

    def stored_as(self, quantised: Iterable[str], carried: Mapping[str, tuple[int, ...]]) -> Model:
        """Give the model with what a checkpoint's names say of it.

        Args:
            quantised: names of weights that are stored quantised.
            carried: the shapes of tensors that go along unread, by name.

        Returns:
            The model whose `tensors` are those of the checkpoint.
        """
        return replace(self, quantised=frozenset(quantised), carried=dict(carried))

    @cached_property
    def scheme(self) -> Scheme | None:
        """How quantised weights are stored, if the config says so in a way that is known.

        Raises:
            MappingError: the parameters of the method mean nothing.
        """
        return scheme_of(self.config)

    def kinds(self, layer: int) -> tuple[Layers, ...]:
        """Give the kinds that a layer is of, as `TensorRule.layers` names them."""
        return (
            "all",
            "moe" if layer in self.moe_layers else "dense",
            "linear" if layer in self.linear_layers else "full",
        )

    def carries(self, name: str) -> bool:
        """Say whether the family marks a tensor that is none of the model's as one to carry along."""
        if any(fnmatchcase(name, pattern) for pattern in self.family.carried):
            return True
        further = self._layer_of(name)
        first, count = self.sizes["layers"], read_size(self.family.mtp, self.config, 0) or 0
        return further is not None and first <= further < first + count

    @cached_property
    def compute(self) -> Compute:
        """What the model computes.

        Raises:
            MappingError: the config states something that transformers doesn't compute.
        """
        return resolve(
            self.family.compute,
            self.config,
            self.sizes,
            bias=self.has("router.bias"),
            linear_bias=self.has("router.linear.bias"),
            top_k=self.family.key_of("top_k") if "top_k" in self.sizes else "",
        )

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
    def plain(self) -> dict[str, GlobalTensor]:
        """Every tensor by its hub name as if nothing were quantised, in the order of the model; tensors that a flag makes optional included."""
        return {t.name: t for t in self._expand()}

    @cached_property
    def tensors(self) -> dict[str, GlobalTensor]:
        """Every tensor by its hub name, in the order of the model: `plain`, with quantised weights as their parts, and the carried ones."""
        if not self.quantised and not self.carried:
            return self.plain
        out: dict[str, GlobalTensor] = {}
        for tensor in self.plain.values():
            stored = self.parts(tensor) if tensor.name in self.quantised else [tensor]
            out |= {t.name: t for t in stored}
        return out | {name: self.carried_tensor(name, shape) for name, shape in self.carried.items()}

    def parts(self, weight: GlobalTensor) -> list[GlobalTensor]:
        """Give the tensors that a weight is stored as where it is quantised; those of its scheme that need not be there included."""
        out = []
        for part in self.scheme.parts if self.scheme is not None else ():
            name, template = part.rename(weight.name), part.rename(weight.rule.name)
            if name is not None and template is not None:
                rule = replace(weight.rule, role=f"{weight.rule.role}: {part.role}", name=template, split=None)
                shape = part.shape(weight.shape, transposed=weight.rule.transposed)
                out.append(
                    GlobalTensor(name, shape, rule, layer=weight.layer, expert=weight.expert, part=part, base=weight)
                )
        return out

    def _layer_of(self, name: str) -> int | None:
        return layer_of(name, self.family.template("attention_norm") or "")

    def carried_tensor(self, name: str, shape: tuple[int, ...]) -> GlobalTensor:
        """Make a carried tensor: one of a layer is stored with it, of layers past the last with the last one, another with the first."""
        layer = self._layer_of(name)
        here = layer if layer is not None and layer < self.sizes["layers"] else None
        late = "mtp" in name.lower() or (layer is not None and here is None)
        where: Where = "layers" if here is not None else "last" if late else "first"
        return GlobalTensor(name, shape, TensorRule(CARRIED, name, (), where=where), layer=here)

    @cached_property
    def rules(self) -> tuple[TensorRule, ...]:
        """The rules of the tensors that the model has."""
        kinds = {kind for layer in range(self.sizes["layers"]) for kind in self.kinds(layer)}
        return tuple(r for r in self.family.rules if r.layers in kinds and self._given(r.only_if))

    def _given(self, condition: str | None) -> bool:
        """Say whether a flag is set, or a size not 0; the opposite after `!`, all of several between `&`."""
        return condition is None or all(
            (bool(self.flags.get(name := term.removeprefix("!"))) or self.sizes.get(name, 0) > 0)
            != term.startswith("!")
            for term in condition.split("&")
        )

    def optional(self, tensor: GlobalTensor) -> bool:
        """Say whether a checkpoint may lack the tensor (an output head tied to the embedding, a scale that not every writer stores)."""
        flag = tensor.rule.absent_if
        return (tensor.part is not None and tensor.part.optional) or (flag is not None and self.flags.get(flag, False))

    def _expand(self) -> Iterator[GlobalTensor]:
        for where in ("first", "layers", "last"):
            for layer in range(self.sizes["layers"]) if where == "layers" else (None,):
                kinds = self.kinds(layer) if layer is not None else ()
                rules = [r for r in self.rules if r.where == where and (layer is None or r.layers in kinds)]
                yield from (self._tensor(r, layer, None) for r in rules if EXPERT not in r.name)
                for expert in range(self.sizes.get("experts", 0)) if where == "layers" else ():
                    yield from (self._tensor(r, layer, expert) for r in rules if EXPERT in r.name)

    def _tensor(self, rule: TensorRule, layer: int | None, expert: int | None) -> GlobalTensor:
        units = self.sizes[rule.split.units] if rule.split and rule.split.units else None
        return GlobalTensor(fill(rule.name, layer, expert), self._shapes[rule.role], rule, units, layer, expert)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {rule.role: self.shape(rule) for rule in self.rules}

    def shape(self, rule: TensorRule) -> tuple[int, ...]:
        """Give the shape, in elements, of the tensors of a rule."""
        return tuple(evaluate(term, self.sizes) for term in rule.shape)
