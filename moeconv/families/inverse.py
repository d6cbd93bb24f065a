"""The config.json of a model that is described without one: the inverse of `Model.from_config`, for whatever family can hold it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from moeconv.families.base import Family, Model
from moeconv.families.compute import Compute, Key
from moeconv.families.key_states import DTYPE, LAYER_TYPES, SPECIAL_TOKENS
from moeconv.families.keys import config_keys_and_problems, window_keys
from moeconv.families.layers import linear_keys, moe_keys
from moeconv.families.names import evaluate

# What a config made of another's keeps of it besides.
CARRIED = (*SPECIAL_TOKENS, "use_cache", *DTYPE, "transformers_version")
_OF_LAYERS = (LAYER_TYPES, "no_rope_layers")  # lists of one entry a layer
# What a model has that others lack, by the roles of its tensors.
_WORDS = {
    **dict.fromkeys(("mlp.gate", "mlp.up", "mlp.down"), "dense layers"),
    **dict.fromkeys(("mlp.gate.bias", "mlp.up.bias", "mlp.down.bias"), "biases in the feed-forward part"),
    "attention.o.bias": "a bias on attention's output projection",
    **dict.fromkeys(("attention.q.bias", "attention.k.bias", "attention.v.bias"), "biases on queries, keys and values"),
    **dict.fromkeys(("attention.q_norm", "attention.k_norm"), "norms of query and key heads (qk-norm)"),
    "router.bias": "a bias of the router's choice",
    **dict.fromkeys(("shared.gate", "shared.up", "shared.down"), "shared experts"),
    "shared.router": "a gate on shared experts",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A model without a family.

    `sizes` has layers, hidden, heads, kv_heads, head_dim, vocab and, with experts, experts and top_k; `widths` the neurons of each feed-forward part
    (`mlp`, `expert`, `shared`); `shapes` the shape of each role's tensors. `free` are roles that a family may have besides.
    """

    sizes: Mapping[str, int]
    widths: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    moe_layers: frozenset[int]
    tied: bool
    compute: Compute
    linear_layers: frozenset[int] = frozenset()
    free: frozenset[str] = frozenset()


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    """Give the shape of the tensors of each role that a model has; those without elements are left out."""
    found = {rule.role: model.shape(rule) for rule in model.rules}
    return {role: shape for role, shape in found.items() if prod(shape)}


def write_config(family: Family, wanted: Description) -> tuple[dict[str, Any], list[str]]:
    """Write a family's config of a model.

    Args:
        family: the family.
        wanted: the model.

    Returns:
        The config, whose model has exactly these tensors and computes exactly this; and in words what the family can't hold, empty where it holds all.
    """
    if ("experts" in family.sizes) != ("experts" in wanted.sizes):
        return {}, ["experts" if "experts" in wanted.sizes else "a model without experts"]
    sizes, problems = _sizes(family, wanted)
    if problems:
        return {}, problems
    dense, problems = dict[str, Any](), list[str]()
    if "experts" in sizes:
        dense, problems = moe_keys(family.dense_layers, wanted.sizes["layers"], wanted.moe_layers)
    linear, wrong_kinds = linear_keys(family.linear_layers, wanted.sizes["layers"], wanted.linear_layers)
    others = {key: value for key, value in wanted.compute.others.items() if key in family.compute.fixed}
    rest = {key: value for key, value in wanted.compute.others.items() if key not in others}
    computed, wrong = config_keys_and_problems(family.compute, replace(wanted.compute, others=rest))
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{_first(family.sizes[name]): value or (None if name in family.null else 0) for name, value in sizes.items()},
        **dense,
        **_flags(family, wanted),
        **computed,
        **linear,
        **others,
        **family.stated,
    }
    model = Model.from_config(family, config)
    problems = list(dict.fromkeys([*_roles(model, wanted), *problems, *wrong_kinds, *wrong]))
    if not problems and model.compute != wanted.compute:
        problems.append("what it computes")
    return config, problems


def finish(family: Family, config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Add to a config what is not of the model itself.

    Args:
        family: the config's family.
        config: as `write_config` gives it.
        dtype: the name of the weights' torch dtype.

    Returns:
        The config with special tokens, the dtype under the name that transformers 4 and 5 both read, and use_cache, its keys sorted.
    """
    return dict(sorted((dict(config) | dict(family.tokens) | {"torch_dtype": dtype, "use_cache": True}).items()))


def layer_config(model: Model, layer: int) -> dict[str, Any]:
    """Write the config of a model of one layer of another, with a vocabulary of one token and a head of its own.

    Args:
        model: the model.
        layer: the layer.

    Returns:
        The model's config with the keys that name its size, its special tokens and the kinds of its layers changed.
    """
    family, sizes = model.family, dict(model.sizes) | {"layers": 1, "vocab": 1}
    dense, _ = moe_keys(family.dense_layers, 1, frozenset((0,) if layer in model.moe_layers else ()))
    linear, _ = linear_keys(family.linear_layers, 1, frozenset((0,) if layer in model.linear_layers else ()))
    config = {
        key: value[layer : layer + 1] if key in _OF_LAYERS and value else value for key, value in model.config.items()
    }
    if layer > 0 and isinstance(family.compute.embedding_scale, Key):
        config[family.compute.embedding_scale.name] = 1.0  # what comes in is no embedding
    config |= {_first(family.sizes[name]): 1 for name in ("layers", "vocab")} | dict.fromkeys(SPECIAL_TOKENS)
    config |= (dense if "experts" in sizes else {}) | linear
    config |= dict.fromkeys(_tied_keys(family), False)
    return config | (window_keys(family.compute.window, model.compute.windows[layer : layer + 1]) or {})


def _first(keys: str | tuple[str, ...]) -> str:
    return keys if isinstance(keys, str) else keys[0]


def _sizes(family: Family, wanted: Description) -> tuple[dict[str, int], list[str]]:
    """Give each size of a family; the widths of feed-forward parts are what their matrices' shapes are made of."""
    terms = {part: family.width(part) for part in ("expert", "mlp", "shared")}
    names = {name for term in terms.values() if term is not None for name in term.split("*")}
    sizes = {name: value for name, value in wanted.sizes.items() if name in family.sizes and name not in names}
    problems = []
    for part, term in terms.items():
        if term is None:
            continue
        width = wanted.widths.get(part, 0)
        if part == "mlp" and not width:  # a config states the width of dense layers even where there are none
            width = wanted.widths["expert"]
        unknown = [name for name in term.split("*") if name not in sizes]
        known = evaluate(term, {**sizes, **dict.fromkeys(unknown, 1)})
        if len(unknown) == 1 and width % known == 0:
            sizes[unknown[0]] = width // known
        elif known != width:
            problems.append(f"a width of {width} ({part})")
    if any(name not in sizes and name not in family.defaults for name in family.sizes):
        problems.append("attention of another kind")
    return sizes, problems


def _flags(family: Family, wanted: Description) -> dict[str, bool]:
    keys = {}
    for flag in family.flags:
        has = any(rule.only_if == flag and rule.role in wanted.shapes for rule in family.rules)
        keys[family.flag_key(flag)] = has
    return keys | dict.fromkeys(_tied_keys(family), wanted.tied)


def _tied_keys(family: Family) -> list[str]:
    """Name the keys of the flags under which a tensor need not be stored."""
    flags = {rule.absent_if for rule in family.rules}
    return [family.flag_key(flag) for flag in family.flags if flag in flags]


def _roles(model: Model, wanted: Description) -> list[str]:
    """List in words which tensors a model lacks, has besides, or has in another shape."""
    has = shapes_of(model)
    lacks = [role for role in wanted.shapes if role not in has]
    besides = [role for role in has if role not in wanted.shapes and role not in wanted.free]
    other = [role for role, shape in wanted.shapes.items() if role in has and has[role] != shape]
    return [
        *_named(lacks),
        *(f"a model without {words}" for words in _named(besides)),
        *(f"{role} of shape {list(wanted.shapes[role])}" for role in other),
    ]


def _named(roles: list[str]) -> list[str]:
    """Name what roles stand for, each thing once."""
    return list(dict.fromkeys(_WORDS.get(role, role) for role in roles))
