"""What a family computes with its tensors, as data: each value a constant, or a key of config.json with what transformers takes where it is silent."""

from __future__ import annotations

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


GATE = ("alpha", "limit")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRule:
    """Which layers attend through a sliding window: all of them, those from a layer on, every second one below a layer, or every second one.

    `size` counts positions, the token's own included. With `switch` there is a window only where that key is true; `bound` is the layer
    of "from" and "even below". All patterns but "all" yield to `layer_types` where the config lists them.
    """

    pattern: Literal["all", "from", "even below", "alternate"]
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
    group_best: int = 2
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
    group_best: int = 2
    bias: bool = False
    linear_bias: bool = False
    jitter: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeRule:
    """What a family computes; see `Compute` for the fields that both have.

    `fixed` names keys of config.json that everyone who computes needs to have the given value. With `yarn_scale` positions that are stretched by
    yarn also scale the attention. `lacks` names what no rule here describes, where a family computes something of the kind.
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
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"attention_dropout": 0.0})


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
    rule: ComputeRule, config: Mapping[str, Any], sizes: Mapping[str, int], *, bias: bool, linear_bias: bool = False
) -> Compute:
    """Read from a config what a family's model computes.

    Args:
        rule: the family's rules.
        config: config.json as parsed.
        sizes: the model's sizes.
        bias: whether the model has a stored bias of the router's choice.
        linear_bias: whether the router's projection has a bias.

    Returns:
        What is computed.

    Raises:
        MappingError: a value is of the wrong type, or no value that transformers computes with.
    """
    others = {key: config[key] for key, value in rule.fixed.items() if config.get(key) not in (None, value)}
    if config.get("quantization_config") is not None:
        others["quantization_config"] = config["quantization_config"].get("quant_method", "?")
    rope = rule.rope.resolve(config, sizes["head_dim"], number(rule.max_positions, config, int))
    return Compute(
        norm_eps=number(rule.norm_eps, config, float),
        max_positions=number(rule.max_positions, config, int),
        rope=rope,
        act=str(rule.act.of(config)),
        init_std=number(rule.init_std, config, float),
        windows=_windows(rule.window, config, sizes["layers"]),
        router=_router(rule.router, config, sizes, bias, linear_bias) if rule.router is not None else None,
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
    factor, weight = rope.parameters.get("factor"), rope.parameters.get("mscale_all_dim")
    if not rule.yarn_scale or not factor or not weight or factor <= 1:
        return None
    return float(sizes["qk_dim"] ** -0.5 * (0.1 * weight * log(factor) + 1.0) ** 2)


def _value(source: Any, config: Mapping[str, Any], kind: type[int] | type[float]) -> Any:
    return number(source, config, kind) if isinstance(source, Key) else source


def number(key: Key, config: Mapping[str, Any], kind: type[int] | type[float]) -> Any:
    """Read a number that is at least 0.

    Raises:
        MappingError: the value is none.
    """
    value = key.of(config)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (kind is float and isinstance(value, float))) or not 0 <= value < float("inf"):
        what = "a whole number" if kind is int else "a number"
        raise MappingError(f"config.json: {key.name} is {value!r}; expected {what} of at least 0")
    return kind(value)


def _windows(rule: WindowRule | None, config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    size = rule.size.of(config) if rule is not None else None
    if rule is None or size is None or (rule.switch is not None and not rule.switch.of(config)):
        return (None,) * layers
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise MappingError(f"config.json: {rule.size.name} is {size!r}; expected null or a whole number of at least 1")
    if rule.pattern == "all":
        return (size,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        bound = number(rule.bound, config, int) if rule.bound is not None else layers
        has = [i >= bound if rule.pattern == "from" else i % 2 == 0 and i < bound for i in range(layers)]
        return tuple(size if windowed else None for windowed in has)
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {WINDOWED, FULL}:
        raise MappingError(
            f"config.json: layer_types is {str(kinds)[:80]}; expected {layers} of {WINDOWED!r} and {FULL!r}"
        )
    return tuple(size if kind == WINDOWED else None for kind in kinds)


def _router(
    rule: RouterRule, config: Mapping[str, Any], sizes: Mapping[str, int], bias: bool, linear_bias: bool
) -> Router:
    normalise = rule.normalise.of(config) if isinstance(rule.normalise, Key) else rule.normalise
    grouped = rule.grouped is None or rule.grouped[0].of(config) == rule.grouped[1]
    router = Router(
        experts=sizes["experts"],
        top_k=sizes["top_k"],
        score=rule.score,
        normalise=bool(normalise),
        scale=float(_value(rule.scale, config, float)),
        groups=_value(rule.groups, config, int) if grouped else 1,
        group_top_k=_value(rule.group_top_k, config, int) if grouped else 1,
        group_best=rule.group_best,
        bias=bias,
        linear_bias=linear_bias,
        jitter=float(_value(rule.jitter, config, float)),
    )
    if rule.score == "sparsemixer" and router.top_k != 2:
        raise MappingError(f"config.json: {router.top_k} experts a token; a sparsemixer chooses 2")
    if router.top_k > router.experts:
        raise MappingError(f"config.json: {router.top_k} experts a token of {router.experts}; expected at most all")
    per_group = router.experts // max(router.groups, 1)
    if router.groups < 1 or router.experts % router.groups or not 1 <= router.group_top_k <= router.groups:
        raise MappingError(
            f"config.json: {router.group_top_k} of {router.groups} groups for {router.experts} experts; "
            "groups must be equal, and no more chosen than there are"
        )
    if router.groups > 1 and (per_group < router.group_best or router.top_k > router.group_top_k * per_group):
        raise MappingError(
            f"config.json: {router.group_top_k} groups of {per_group} experts; a group needs {router.group_best} "
            f"and all groups of a token {router.top_k}"
        )
    return router
