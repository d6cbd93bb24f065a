"""What a family computes with its tensors, as data: each value a constant, or a key of config.json with what transformers takes where it is silent."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log
from typing import Any, Literal

from moeconv.errors import MappingError
from moeconv.families.rope import Rope, RopeRule

Score = Literal["softmax", "sigmoid", "sparsemixer"]
Norm = Literal["rms", "layer"]
NormPlace = Literal["before", "after"]
HeadNorms = Literal["before rotation", "after rotation"]
WINDOWED, FULL = "sliding_attention", "full_attention"  # a layer's kind of attention in `layer_types`


# Keys that transformers reads in every family: masks that look ahead, and layers with configs of their own.
FIXED: Mapping[str, Any] = {"is_causal": True, "per_layer_config": None}
GATE = ("alpha", "limit")
GROUP_BEST = 2  # experts of a group that its value is the sum of, in most families
SCALES = ("embedding_scale", "residual_scale", "logits_divisor")
CONSTANT = ("norm", "norm_place", "head_norms", "latent_norm_eps", "lacks")


@dataclass(frozen=True, slots=True)
class Key:
    """Where config.json states a value, and the value that transformers takes where it doesn't."""

    name: str
    silent: Any

    def of(self, config: Mapping[str, Any]) -> Any:
        """Read the value; a key that is there counts even if it is null."""
        return config.get(self.name, self.silent)

    def flag(self, config: Mapping[str, Any]) -> bool:
        """Read a value that is true or false.

        Raises:
            MappingError: it is neither.
        """
        value = self.of(config)
        if not isinstance(value, bool):
            raise MappingError(f"config.json: {self.name} is {value!r}; expected true or false")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRule:
    """Which layers attend through a sliding window: all of them, those from a layer on, every second one below a layer, or every second one.

    With "all unless listed" it is all of them too where the config doesn't list the kinds of layers.

    `size` counts positions, the token's own included. With `switch` there is a window only where that key is true; `bound` is the layer
    of "from" and "even below". All patterns but "all" yield to `layer_types` where the config lists them.
    """

    pattern: Literal["all", "all unless listed", "from", "even below", "alternate"]
    size: Key
    switch: Key | None = None
    bound: Key | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRule:
    """How a router turns logits into weights; see `Router` for the fields."""

    score: Score
    normalise: Key | bool
    scale: Key | float = 1.0
    groups: Key | int = 1
    group_top_k: Key | int = 1
    group_best: int = GROUP_BEST
    grouped: tuple[Key, Any] | None = None
    "Where there are groups only if a key has a value: the two."
    jitter: Key | float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRule:
    """A gated activation that is clamped: gate * sigmoid(alpha * gate) * (up + 1), with gate at most `limit` and up between -limit and limit."""

    alpha: Key
    limit: Key


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The parameters of a clamped gated activation; see `GateRule`."""

    alpha: float
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """What a router computes.

    The scores of all experts are a softmax or sigmoids of the logits, which a bias of the projection (role `router.linear.bias`) is part of
    with `linear_bias`. The `top_k` best are chosen, among those of the `group_top_k` best of `groups` equal groups, whose value is the sum of
    their `group_best` best scores; with `bias` a stored one (role `router.bias`) counts in the choice alone. The chosen scores, divided by their
    sum where `normalise` is set and multiplied by `scale`, are the weights.

    A `sparsemixer` chooses two experts one after the other; the weight of each is its softmax over those logits that are within 2 * `jitter`
    of the best one, relative to the larger of the two.
    """

    experts: int
    top_k: int
    score: Score
    normalise: bool
    scale: float = 1.0
    groups: int = 1
    group_top_k: int = 1
    group_best: int = GROUP_BEST
    bias: bool = False
    linear_bias: bool = False
    jitter: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeRule:
    """What a family computes; see `Compute` for the fields that both have.

    `fixed` names keys of config.json that everyone who computes needs to have the given value, besides `FIXED`; `same` those that, where they
    are stated, need to be a size, by the size's name. With `yarn_scale` positions that are stretched by
    yarn also scale the attention. `lacks` names what no rule here describes, where a family computes something of the kind, and `undescribed` the
    keys of that.
    """

    norm_eps: Key
    max_positions: Key
    rope: RopeRule
    act: Key = Key("hidden_act", "silu")
    init_std: Key = Key("initializer_range", 0.02)
    window: WindowRule | None = None
    router: RouterRule | None = None
    gate: GateRule | None = None
    norm: Norm = "rms"
    norm_place: NormPlace = "before"
    head_norms: HeadNorms = "before rotation"
    latent_norm_eps: float = 1e-6
    yarn_scale: bool = False
    attention_scale: Key | None = None
    embedding_scale: Key | float = 1.0
    residual_scale: Key | float = 1.0
    logits_divisor: Key | float = 1.0
    lacks: str | None = None
    undescribed: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"attention_dropout": 0.0})
    same: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """What a model computes: a family's rules with the values of a config.

    `windows` has the sliding window of each layer in positions, the token's own included; None attends to everything before.
    `router` is None for a dense model. `gate` is the experts' clamped activation; None for silu(gate) * up. Norms are root-mean-square ones, or layer
    norms with a bias; they stand before attention and feed-forward part, or after each. Norms of heads come before or after the rotation.
    `latent_norm_eps` is that of the norms of latent queries, keys and values. `attention_scale` multiplies queries times keys; None: one over the
    root of a head's elements. `embedding_scale` multiplies embeddings, `residual_scale` what is added to the residual; logits are divided by
    `logits_divisor`. `lacks` names, in words, something that no rule describes. `others` holds keys under which the model computes
    something that no rule describes, with their values.
    """

    norm_eps: float
    max_positions: int
    rope: Rope
    act: str
    init_std: float
    windows: tuple[int | None, ...]
    router: Router | None
    others: Mapping[str, Any]
    gate: Gate | None = None
    norm: Norm = "rms"
    norm_place: NormPlace = "before"
    head_norms: HeadNorms = "before rotation"
    latent_norm_eps: float = 1e-6
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    lacks: str | None = None


def resolve(
    rule: ComputeRule,
    config: Mapping[str, Any],
    sizes: Mapping[str, int],
    *,
    bias: bool,
    linear_bias: bool = False,
    top_k: str = "",
) -> Compute:
    """Read from a config what a family's model computes.

    Args:
        rule: the family's rules.
        config: config.json as parsed.
        sizes: the model's sizes.
        bias: whether the model has a stored bias of the router's choice.
        linear_bias: whether the router's projection has a bias.
        top_k: the key of the experts of a token, for messages.

    Returns:
        What is computed.

    Raises:
        MappingError: a value is of the wrong type, or no value that transformers computes with.
    """
    fixed = {**FIXED, **rule.fixed}
    others = {key: config[key] for key, value in fixed.items() if key in config and not _alike(config[key], value)}
    for key, value in others.items():
        if isinstance(fixed[key], float) and not _is_number(value):
            raise MappingError(f"config.json: {key} is {value!r}; expected a number")
    stated = {key: config[key] for key in rule.same if config.get(key) is not None}
    others |= {key: v for key, v in stated.items() if type(v) is not int or v != sizes[rule.same[key]]}
    if config.get("quantization_config") is not None:
        others["quantization_config"] = config["quantization_config"].get("quant_method", "?")
    rope = rule.rope.resolve(config, sizes["head_dim"], number(rule.max_positions, config, int))
    return Compute(
        norm_eps=number(rule.norm_eps, config, float),
        max_positions=number(rule.max_positions, config, int),
        rope=rope,
        act=str(rule.act.of(config)),
        init_std=number(rule.init_std, config, float, most=1.0),
        windows=_windows(rule.window, config, sizes["layers"]),
        router=_router(rule.router, config, sizes, bias, linear_bias, top_k) if rule.router is not None else None,
        others=others,
        gate=Gate(**{name: number(getattr(rule.gate, name), config, float) for name in GATE}) if rule.gate else None,
        **{name: getattr(rule, name) for name in CONSTANT},
        **{name: _value(getattr(rule, name), config, float) for name in SCALES},
        attention_scale=_attention_scale(rule, config, rope, sizes),
    )


def _attention_scale(
    rule: ComputeRule, config: Mapping[str, Any], rope: Rope, sizes: Mapping[str, int]
) -> float | None:
    """Read the factor on queries times keys; None where it is the usual one.

    Source: https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/deepseek_v3/modeling_deepseek_v3.py
    """
    if rule.attention_scale is not None:
        return float(number(rule.attention_scale, config, float))
    weight = rule.rope.table(config).get("mscale_all_dim") if rule.yarn_scale and rope.kind != "default" else None
    if not weight:
        return None
    factor = rope.parameters.get("factor")
    if rope.kind != "yarn" or factor is None:
        raise MappingError(
            f"config.json: mscale_all_dim is {weight!r} in rotary positions of the kind {rope.kind} with a factor of {factor}; "
            "expected yarn with a factor"
        )
    return yarn_scale(rope, sizes["qk_dim"])


def yarn_scale(rope: Rope, dim: int) -> float | None:
    """Give the factor on queries times keys of `dim` elements where yarn scales the attention too; None where it is the usual one."""
    weight, factor = rope.parameters.get("mscale_all_dim"), rope.parameters.get("factor", 1.0)
    if rope.kind != "yarn" or not weight or factor <= 1:
        return None
    return float(dim**-0.5 * (0.1 * weight * log(factor) + 1.0) ** 2)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _alike(value: Any, other: Any) -> bool:
    """Say whether two values are equal; 0 and 0.0 are, 0 and false are not."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _value(source: Any, config: Mapping[str, Any], kind: type[int] | type[float]) -> Any:
    return number(source, config, kind) if isinstance(source, Key) else source


def number(key: Key, config: Mapping[str, Any], kind: type[int] | type[float], most: float = sys.float_info.max) -> Any:
    """Read a number that is at least 0 and at most `most`.

    Raises:
        MappingError: the value is none.
    """
    value = key.of(config)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (kind is float and isinstance(value, float))) or not 0 <= value <= most:
        what = "a whole number" if kind is int else "a number"
        bound = f" and at most {most:g}" if most < sys.float_info.max else ""
        raise MappingError(
            f"config.json: {key.name} is {str(value)[:80] if isinstance(value, int) else repr(value)}; expected {what} of at least 0{bound}"
        )
    return kind(value)


def _windows(rule: WindowRule | None, config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    if rule is None:
        return (None,) * layers
    on = rule.switch is None or rule.switch.flag(config)
    size = rule.size.of(config)
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 0):
        raise MappingError(f"config.json: {rule.size.name} is {size!r}; expected null or a whole number of at least 1")
    size = size if on else None
    bound = number(rule.bound, config, int) if rule.bound is not None else layers
    kinds = config.get("layer_types") if rule.pattern != "all" else None
    if kinds is None:
        has = [_has_window(rule, layer, bound, on=on, sized=size is not None) for layer in range(layers)]
    elif not isinstance(kinds, list) or len(kinds) != layers or not all(kind in (WINDOWED, FULL) for kind in kinds):
        raise MappingError(
            f"config.json: layer_types is {str(kinds)[:80]}; expected {layers} of {WINDOWED!r} and {FULL!r}"
        )
    else:
        has = [kind == WINDOWED for kind in kinds]
    if any(has) and not size:
        off = "" if on or rule.switch is None else f" and {rule.switch.name} false"
        raise MappingError(
            f"config.json: {rule.size.name} is {rule.size.of(config)!r}{off}, but layers {[i for i, w in enumerate(has) if w]} "
            f"attend through a window{'' if kinds is None else ' (layer_types)'}; expected a whole number of at least 1"
        )
    return tuple(size if windowed else None for windowed in has)


def _has_window(rule: WindowRule, layer: int, bound: int, *, on: bool, sized: bool) -> bool:
    """Say whether a layer has a window where the config doesn't list the kinds of layers."""
    if rule.pattern in ("all", "all unless listed"):
        return sized
    if rule.pattern == "from":
        return sized and layer >= bound
    return on and layer % 2 == 0 and layer < bound


def _router(
    rule: RouterRule,
    config: Mapping[str, Any],
    sizes: Mapping[str, int],
    bias: bool,
    linear_bias: bool,
    top_k: str,
) -> Router:
    grouped = rule.grouped is None or rule.grouped[0].of(config) == rule.grouped[1]
    if rule.grouped is not None and not grouped and rule.grouped[0].of(config) != rule.grouped[0].silent:
        key, value = rule.grouped
        raise MappingError(
            f"config.json: {key.name} is {key.of(config)!r}; transformers computes {key.silent!r} and {value!r}"
        )
    groups, chosen = (_value(key, config, int) if grouped else 1 for key in (rule.groups, rule.group_top_k))
    router = Router(
        experts=sizes["experts"],
        top_k=sizes["top_k"],
        score=rule.score,
        normalise=rule.normalise.flag(config) if isinstance(rule.normalise, Key) else rule.normalise,
        scale=float(_value(rule.scale, config, float)),
        groups=groups,
        group_top_k=chosen,
        group_best=rule.group_best if groups > 1 else GROUP_BEST,  # of one group no value is asked
        bias=bias,
        linear_bias=linear_bias,
        jitter=float(_value(rule.jitter, config, float)),
    )
    _check_router(rule, router, top_k)
    return router


def _check_router(rule: RouterRule, router: Router, top_k: str) -> None:
    """Refuse choices of experts that can't be made."""
    groups, chosen = (key.name if isinstance(key, Key) else "groups" for key in (rule.groups, rule.group_top_k))
    if rule.score == "sparsemixer" and router.top_k != 2:
        raise MappingError(f"config.json: {top_k} is {router.top_k}; a sparsemixer chooses 2")
    if router.top_k > router.experts:
        raise MappingError(f"config.json: {top_k} is {router.top_k} of {router.experts} experts; expected at most all")
    per_group = router.experts // max(router.groups, 1)
    if router.groups < 1 or router.experts % router.groups or not 1 <= router.group_top_k <= router.groups:
        raise MappingError(
            f"config.json: {groups} is {router.groups} and {chosen} {router.group_top_k} for {router.experts} experts; "
            "groups must be equal, and no more chosen than there are"
        )
    if router.groups > 1 and (per_group < router.group_best or router.top_k > router.group_top_k * per_group):
        raise MappingError(
            f"config.json: {groups} is {router.groups} and {chosen} {router.group_top_k}: groups of {per_group} experts; a group needs "
            f"{router.group_best} and all groups of a token {router.top_k} ({top_k})"
        )
