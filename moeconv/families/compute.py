"""What a family computes with its tensors, as data: each value a constant, or a key of config.json with what transformers takes where it is silent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moeconv.errors import MappingError
from moeconv.families.rope import Rope, RopeRule

Score = Literal["softmax", "sigmoid"]
WINDOWED, FULL = "sliding_attention", "full_attention"  # a layer's kind of attention in `layer_types`


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
    """Which layers attend through a sliding window: all of them, those from a layer on, or every second one below a layer.

    `size` counts positions, the token's own included. With `switch` there is a window only where that key is true; `bound` is the layer
    of the last two patterns, which yield to `layer_types` where the config lists them.
    """

    pattern: Literal["all", "from", "even below"]
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """What a router computes.

    The scores of all experts are a softmax or sigmoids of the logits. The `top_k` best are chosen, among those of the `group_top_k`
    best of `groups` equal groups, whose value is the sum of their `group_best` best scores; a stored bias (role `router.bias`) counts in the
    choice alone. The chosen scores, divided by their sum where `normalise` is set and multiplied by `scale`, are the weights.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeRule:
    """What a family computes. `fixed` names keys of config.json that everyone who computes needs to have the given value."""

    norm_eps: Key
    max_positions: Key
    rope: RopeRule
    act: Key = Key("hidden_act", "silu")
    init_std: Key = Key("initializer_range", 0.02)
    window: WindowRule | None = None
    router: RouterRule | None = None
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"attention_dropout": 0.0})


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """What a model computes: a family's rules with the values of a config.

    `windows` has the sliding window of each layer in positions, the token's own included; None attends to everything before.
    `router` is None for a dense model. `others` holds keys under which the model computes something that no rule describes, with
    their values.
    """

    norm_eps: float
    max_positions: int
    rope: Rope
    act: str
    init_std: float
    windows: tuple[int | None, ...]
    router: Router | None
    others: Mapping[str, Any]


def resolve(rule: ComputeRule, config: Mapping[str, Any], sizes: Mapping[str, int], *, bias: bool) -> Compute:
    """Read from a config what a family's model computes.

    Args:
        rule: the family's rules.
        config: config.json as parsed.
        sizes: the model's sizes.
        bias: whether the model has a stored bias of the router.

    Returns:
        What is computed.

    Raises:
        MappingError: a value is of the wrong type, or no value that transformers computes with.
    """
    others = {key: config[key] for key, value in rule.fixed.items() if config.get(key) not in (None, value)}
    if config.get("quantization_config") is not None:
        others["quantization_config"] = config["quantization_config"].get("quant_method", "?")
    return Compute(
        norm_eps=number(rule.norm_eps, config, float),
        max_positions=number(rule.max_positions, config, int),
        rope=rule.rope.resolve(config, sizes["head_dim"], number(rule.max_positions, config, int)),
        act=str(rule.act.of(config)),
        init_std=number(rule.init_std, config, float),
        windows=_windows(rule.window, config, sizes["layers"]),
        router=_router(rule.router, config, sizes, bias=bias) if rule.router is not None else None,
        others=others,
    )


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
    if rule.pattern == "all" or rule.bound is None:
        return (size,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        bound = number(rule.bound, config, int)
        has = [i >= bound if rule.pattern == "from" else i % 2 == 0 and i < bound for i in range(layers)]
        return tuple(size if windowed else None for windowed in has)
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {WINDOWED, FULL}:
        raise MappingError(
            f"config.json: layer_types is {str(kinds)[:80]}; expected {layers} of {WINDOWED!r} and {FULL!r}"
        )
    return tuple(size if kind == WINDOWED else None for kind in kinds)


def _router(rule: RouterRule, config: Mapping[str, Any], sizes: Mapping[str, int], *, bias: bool) -> Router:
    def value(source: Any, kind: type[int] | type[float]) -> Any:
        return number(source, config, kind) if isinstance(source, Key) else source

    normalise = rule.normalise.of(config) if isinstance(rule.normalise, Key) else rule.normalise
    router = Router(
        experts=sizes["experts"],
        top_k=sizes["top_k"],
        score=rule.score,
        normalise=bool(normalise),
        scale=float(value(rule.scale, float)),
        groups=value(rule.groups, int),
        group_top_k=value(rule.group_top_k, int),
        group_best=rule.group_best,
        bias=bias,
    )
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


def config_keys(rule: ComputeRule, compute: Compute) -> dict[str, Any]:
    """Write what is computed as the keys of a family's config: the inverse of `resolve`.

    Args:
        rule: the family's rules.
        compute: what a model computes.

    Returns:
        Every key with its value, also where transformers would take the same.

    Raises:
        MappingError: the family's config can't say it; names each thing.
    """
    keys, problems = config_keys_and_problems(rule, compute)
    if problems:
        raise MappingError(f"no config of this family says {'; '.join(problems)}")
    return keys


def config_keys_and_problems(rule: ComputeRule, compute: Compute) -> tuple[dict[str, Any], list[str]]:
    """Write what is computed as the keys of a family's config, as far as it can say it.

    Args:
        rule: the family's rules.
        compute: what a model computes.

    Returns:
        The keys, and in words what the family's config can't say.
    """
    keys = {
        rule.norm_eps.name: compute.norm_eps,
        rule.max_positions.name: compute.max_positions,
        rule.act.name: compute.act,
        rule.init_std.name: compute.init_std,
    }
    problems = [f"{name} = {value!r}" for name, value in compute.others.items()]
    if rule.rope.share is None and compute.rope.share != 1.0:
        problems.append(f"rotary positions that turn {compute.rope.share:g} of each head")
    else:
        keys |= rule.rope.config_keys(compute.rope)
    windows = window_keys(rule.window, compute.windows)
    if windows is None:
        mixed = len(set(compute.windows)) > 1
        problems.append("sliding windows that differ between layers" if mixed else "a sliding window")
    keys |= windows or {}
    if compute.router is not None and rule.router is not None:
        found, wrong = router_keys(rule.router, compute.router)
        keys |= found
        problems += wrong
    return keys, problems


def window_keys(rule: WindowRule | None, windows: tuple[int | None, ...]) -> dict[str, Any] | None:
    """Give the keys that put windows on these layers; None where the family has none that do."""
    sizes = {size for size in windows if size is not None}
    if rule is None:
        return None if sizes else {}
    off: dict[str, Any] = {rule.switch.name: False} if rule.switch is not None else {rule.size.name: None}
    if not sizes:
        return off
    if len(sizes) > 1 or (rule.pattern == "all" and None in windows):
        return None
    keys: dict[str, Any] = {rule.size.name: sizes.pop()}
    if rule.switch is not None:
        keys[rule.switch.name] = True
    if rule.pattern != "all":
        keys["layer_types"] = [FULL if size is None else WINDOWED for size in windows]
    return keys


def router_keys(rule: RouterRule, router: Router) -> tuple[dict[str, Any], list[str]]:
    """Write a router as a family's keys.

    Returns:
        The keys, and in words what the family's config can't say.
    """
    keys: dict[str, Any] = {}
    problems = []
    if rule.score != router.score:
        problems.append(f"a router that scores by {router.score}")
    pairs = (
        (
            rule.normalise,
            router.normalise,
            "routing weights " + ("that sum to 1" if router.normalise else "that are not renormalised"),
        ),
        (rule.scale, router.scale, f"routing weights times {router.scale:g}"),
        (rule.groups, router.groups, f"{router.groups} groups of experts"),
        (rule.group_top_k, router.group_top_k, f"{router.group_top_k} groups a token"),
    )
    for source, value, words in pairs:
        if isinstance(source, Key):
            keys[source.name] = value
        elif source != value:
            problems.append(words)
    return keys, problems
