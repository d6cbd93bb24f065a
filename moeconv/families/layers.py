"""Kinds of layers as config.json names them: which have experts, and which have attention of another kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moeconv.errors import MappingError

# How a config names the layers whose feed-forward part is a mixture of experts.
MoELayers = Literal["none", "listed", "first", "types", "between", "every", "period"]
# How a config names the layers whose attention is not softmax attention (a state-space or linear one).
LinearLayers = Literal["none", "types", "period"]

LINEAR, FULL = "linear_attention", "full_attention"  # in `layer_types`
_INTERVAL = 4  # of `full_attention_interval`


@dataclass(frozen=True, slots=True)
class _Pattern:
    """Reads the chosen ones of `count` layers from a config, and writes them as its keys, with what it can't say in words."""

    read: Callable[[Mapping[str, Any], int], frozenset[int]]
    write: Callable[[int, frozenset[int]], tuple[dict[str, Any], list[str]]]
    keys: tuple[str, ...] = ()


def moe_layers(pattern: MoELayers, config: Mapping[str, Any], count: int) -> frozenset[int]:
    """Find the layers with experts, as transformers does.

    Args:
        pattern: how the family's config names them.
        config: config.json as parsed.
        count: layers of the model.

    Returns:
        Their numbers.

    Raises:
        MappingError: a key has a value that means nothing.
    """
    return _MOE[pattern].read(config, count)


def moe_keys(pattern: MoELayers, count: int, chosen: frozenset[int]) -> tuple[dict[str, Any], list[str]]:
    """Name layers with experts as a family's config does: the keys, and in words what it can't say."""
    return _MOE[pattern].write(count, chosen)


def linear_layers(pattern: LinearLayers, config: Mapping[str, Any], count: int) -> frozenset[int]:
    """Find the layers whose attention is linear or a state-space one; arguments as of `moe_layers`."""
    return _LINEAR[pattern].read(config, count)


def linear_keys(pattern: LinearLayers, count: int, chosen: frozenset[int]) -> tuple[dict[str, Any], list[str]]:
    """Name layers with linear attention as a family's config does: the keys, and in words what it can't say."""
    return _LINEAR[pattern].write(count, chosen)


def pattern_keys(moe: MoELayers, linear: LinearLayers) -> tuple[str, ...]:
    """Give the keys of a config that name kinds of layers."""
    return (*_MOE[moe].keys, *_LINEAR[linear].keys)


def _number(config: Mapping[str, Any], key: str, silent: int | None, least: int = 0) -> int:
    value = config.get(key, silent)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise MappingError(f"config.json: {key} is {value!r}; expected a whole number of at least {least}")
    return value


def _layers_of(config: Mapping[str, Any], key: str) -> list[int]:
    listed = config.get(key)
    listed = [] if listed is None else listed
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise MappingError(f"config.json: {key} is {str(listed)[:80]}; expected a list of layers")
    return listed


def _types(config: Mapping[str, Any], key: str, count: int, kinds: set[str]) -> list[str] | None:
    types = config.get(key)
    if types is not None and (
        not isinstance(types, list)
        or len(types) != count
        or not all(isinstance(kind, str) and kind in kinds for kind in types)
    ):
        raise MappingError(f"config.json: {key} is {str(types)[:80]}; expected {count} of {', '.join(sorted(kinds))}")
    return types


def _read_listed(config: Mapping[str, Any], count: int) -> frozenset[int]:
    listed, step = _layers_of(config, "mlp_only_layers"), _number(config, "decoder_sparse_step", 1, 1)
    return frozenset(layer for layer in range(count) if layer not in listed and (layer + 1) % step == 0)


def _write_listed(count: int, chosen: frozenset[int]) -> tuple[dict[str, Any], list[str]]:
    return {"mlp_only_layers": sorted(set(range(count)) - chosen), "decoder_sparse_step": 1}, []


def _read_first(config: Mapping[str, Any], count: int) -> frozenset[int]:
    first = config.get("first_k_dense_replace")
    if first is None:
        raise MappingError("config.json: first_k_dense_replace is None; the family needs the number of dense layers")
    return frozenset(range(count)[_number(config, "first_k_dense_replace", None) :])


def _write_first(count: int, chosen: frozenset[int]) -> tuple[dict[str, Any], list[str]]:
    first = count - len(chosen)
    right = chosen == frozenset(range(first, count))
    return {"first_k_dense_replace": first}, [] if right else ["dense layers after one with experts"]


def _read_types(config: Mapping[str, Any], count: int) -> frozenset[int]:
    types = _types(config, "mlp_layer_types", count, {"dense", "sparse"})
    return frozenset(range(1, count) if types is None else (i for i, kind in enumerate(types) if kind == "sparse"))


def _write_types(count: int, chosen: frozenset[int]) -> tuple[dict[str, Any], list[str]]:
    return {"mlp_layer_types": ["sparse" if layer in chosen else "dense" for layer in range(count)]}, []


def _read_between(config: Mapping[str, Any], count: int) -> frozenset[int]:
    first, step = _number(config, "moe_layer_start_index", 1), _number(config, "moe_layer_interval", 1, 1)
    last = _number(config, "moe_layer_end_index", -1, -1)
    last = count - 1 if last == -1 else last
    return frozenset(layer for layer in range(count) if first <= layer <= last and (layer + 1) % step == 0)


def _write_between(count: int, chosen: frozenset[int]) -> tuple[dict[str, Any], list[str]]:
    first, last = min(chosen, default=count), max(chosen, default=count - 1)
    keys = {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": 1}
    right = chosen == frozenset(range(first, last + 1))
    return keys, [] if right else ["dense layers between those with experts"]


def _read_every(config: Mapping[str, Any], count: int) -> frozenset[int]:
    if config.get("moe_layers") is not None:
        return frozenset(_layers_of(config, "moe_layers")) & frozenset(range(count))
    step = _number(config, "interleave_moe_layer_step", 1, 1)
    return frozenset(range(step - 1, count, step))


def _write_every(count: int, chosen: frozenset[int]) -> tuple[dict[str, Any], list[str]]:
    return {"moe_layers": sorted(chosen)}, []


def _read_period(prefix: str, period: int, offset: int) -> Callable[[Mapping[str, Any], int], frozenset[int]]:
    def read(config: Mapping[str, Any], count: int) -> frozenset[int]:
        every, at = _number(config, f"{prefix}_period", period, 1), _number(config, f"{prefix}_offset", offset)
        return frozenset(layer for layer in range(count) if layer % every == at)

    return read


def _write_period(prefix: str) -> Callable[[int, frozenset[int]], tuple[dict[str, Any], list[str]]]:
    def write(count: int, chosen: frozenset[int]) -> tuple[dict[str, Any], list[str]]:
        at = min(chosen, default=count)
        later = sorted(chosen)[1:]
        every = later[0] - at if later else max(count, at + 1)
        keys = {f"{prefix}_period": every, f"{prefix}_offset": at}
        right = chosen == frozenset(layer for layer in range(count) if layer % every == at)
        return keys, [] if right else ["layers whose kinds don't repeat"]

    return write


def _read_linear_types(config: Mapping[str, Any], count: int) -> frozenset[int]:
    types = _types(config, "layer_types", count, {LINEAR, FULL})
    if types is not None:
        return frozenset(layer for layer, kind in enumerate(types) if kind == LINEAR)
    every = _number(config, "full_attention_interval", _INTERVAL, 1)
    return frozenset(layer for layer in range(count) if (layer + 1) % every)


def _write_linear_types(count: int, chosen: frozenset[int]) -> tuple[dict[str, Any], list[str]]:
    return {"layer_types": [LINEAR if layer in chosen else FULL for layer in range(count)]}, []


_read_full_period = _read_period("attn_layer", 8, 4)


def _read_linear_period(config: Mapping[str, Any], count: int) -> frozenset[int]:
    return frozenset(range(count)) - _read_full_period(config, count)


def _write_linear_period(count: int, chosen: frozenset[int]) -> tuple[dict[str, Any], list[str]]:
    return _write_period("attn_layer")(count, frozenset(range(count)) - chosen)


_MOE: Mapping[str, _Pattern] = {
    "none": _Pattern(
        lambda config, count: frozenset(range(count)),
        lambda count, chosen: ({}, [] if len(chosen) == count else ["dense layers"]),
    ),
    "listed": _Pattern(_read_listed, _write_listed, ("mlp_only_layers", "decoder_sparse_step")),
    "first": _Pattern(_read_first, _write_first, ("first_k_dense_replace",)),
    "types": _Pattern(_read_types, _write_types, ("mlp_layer_types",)),
    "between": _Pattern(
        _read_between, _write_between, ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")
    ),
    "every": _Pattern(_read_every, _write_every, ("moe_layers", "interleave_moe_layer_step")),
    "period": _Pattern(
        _read_period("expert_layer", 2, 1),
        _write_period("expert_layer"),
        ("expert_layer_period", "expert_layer_offset"),
    ),
}
_LINEAR: Mapping[str, _Pattern] = {
    "none": _Pattern(
        lambda config, count: frozenset(), lambda count, chosen: ({}, ["linear attention"] if chosen else [])
    ),
    "types": _Pattern(_read_linear_types, _write_linear_types, ("layer_types", "full_attention_interval")),
    "period": _Pattern(_read_linear_period, _write_linear_period, ("attn_layer_period", "attn_layer_offset")),
}
