"""What a model computes as the keys of a family's config: the inverse of `moeconv.families.compute.resolve`."""

from __future__ import annotations

from typing import Any

from moeconv.errors import MappingError
from moeconv.families.compute import (
    CONSTANT,
    FULL,
    GATE,
    SCALES,
    WINDOWED,
    Compute,
    ComputeRule,
    Key,
    Router,
    RouterRule,
    WindowRule,
)

_WORDS = {
    "norm": "another kind of norms",
    "norm_place": "norms in another place",
    "head_norms": "norms of heads on the other side of the rotation",
    "latent_norm_eps": "another epsilon of latent norms",
    "lacks": "what its attention computes",
    "embedding_scale": "a factor on embeddings",
    "residual_scale": "a factor on what is added to the residual",
    "logits_divisor": "a divisor of logits",
    "attention_scale": "a factor on queries times keys",
}


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
    found, wrong = _scale_keys(rule, compute)
    keys |= found
    problems += wrong
    keys |= rule.rope.config_keys(compute.rope)
    problems += rule.rope.problems(compute.rope)
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


def _scale_keys(rule: ComputeRule, compute: Compute) -> tuple[dict[str, Any], list[str]]:
    """Write the factors, the activation and the norms as a family's keys, and in words what its config can't say."""
    keys: dict[str, Any] = {}
    problems = [f"{_WORDS[name]}" for name in CONSTANT if getattr(rule, name) != getattr(compute, name)]
    for name in (*SCALES, "attention_scale"):
        source, value = getattr(rule, name), getattr(compute, name)
        if isinstance(source, Key) and value is not None:
            keys[source.name] = value
        elif source != value and not (name == "attention_scale" and rule.yarn_scale):
            problems.append(_WORDS[name])
    if rule.gate is not None and compute.gate is not None:
        keys |= {getattr(rule.gate, name).name: getattr(compute.gate, name) for name in GATE}
    elif (rule.gate is None) != (compute.gate is None):
        problems.append("another activation of the experts")
    return keys, problems


def window_keys(rule: WindowRule | None, windows: tuple[int | None, ...]) -> dict[str, Any] | None:
    """Give the keys that put windows on these layers; None where the family has none that do."""
    sizes = {size for size in windows if size is not None}
    if rule is None:
        return None if sizes else {}
    off: dict[str, Any] = {rule.switch.name: False} if rule.switch is not None else {rule.size.name: None}
    if not sizes:
        return off if rule.pattern != "alternate" else {"layer_types": [FULL] * len(windows)}
    if len(sizes) > 1 or (rule.pattern == "all" and None in windows):
        return None
    keys: dict[str, Any] = {rule.size.name: sizes.pop()}
    if rule.switch is not None:
        keys[rule.switch.name] = True
    if rule.pattern != "all" and not (rule.pattern == "all unless listed" and None not in windows):
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
        (rule.jitter, router.jitter, "a router that leaves out logits far from the best"),
    )
    if rule.grouped is not None:
        keys[rule.grouped[0].name] = rule.grouped[1] if router.groups > 1 else rule.grouped[0].silent
    for source, value, words in pairs:
        if isinstance(source, Key):
            keys[source.name] = value
        elif source != value:
            problems.append(words)
    return keys, problems
