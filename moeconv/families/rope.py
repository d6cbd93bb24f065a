"""Rotary positions as config.json states them, in the forms of transformers 4 and 5.

Source: https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/modeling_rope_utils.py
(RotaryEmbeddingConfigMixin.convert_rope_params_to_dict, standardize_rope_params)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moeconv.errors import MappingError

# The parameters that each kind of positions needs, and those that it may have.
KINDS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "alpha": (("factor", "alpha"), ()),  # a fixed stretch of the base, which configs call dynamic too
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    ),
    "longrope": (
        ("short_factor", "long_factor"),
        ("factor", "original_max_position_embeddings", "attention_factor"),
    ),
}
ORIGINAL = "original_max_position_embeddings"  # also a key beside the table, which counts before the table's
# Parameters that may be null, by kind: of the factor, the ratio of the lengths is taken instead.
_NULLABLE: Mapping[str, tuple[str, ...]] = {
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions.

    `dim` is how many of a head's elements are turned, the first ones, in pairs (i, i + dim / 2), or neighbours where they are `interleaved`, and
    `share` their share. `parameters` are those of the kind; `original_max_position_embeddings` is always among them where the kind has it.
    """

    theta: float
    dim: int
    share: float = 1.0
    kind: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeRule:
    """How a family's config states rotary positions: the base and the turned share of a head where it is silent.

    `share` is None for families that turn whole heads and have no key for it; `turned` is a key for the number of turned elements instead.
    `interleaved` says whether pairs are neighbours, or names the key that does, with what it means where the config is silent. `silent` are
    the parameters where the config states none. `alpha` says that a dynamic kind with that parameter is a kind of its own; `magnitudes` that
    stretched positions come with factors of their own, for short and for long sequences, and are of the kind longrope alone.
    """

    theta: float = 10000.0
    share: float | None = None
    turned: str | None = None
    interleaved: bool | tuple[str, bool] = False
    silent: Mapping[str, Any] | None = None
    alpha: bool = False
    magnitudes: bool = False

    def resolve(self, config: Mapping[str, Any], head_dim: int, max_positions: int) -> Rope:
        """Read the rotary positions from a config.

        Args:
            config: config.json as parsed.
            head_dim: elements of a head.
            max_positions: the config's longest sequence, in positions.

        Returns:
            The positions.

        Raises:
            MappingError: a parameter is missing, of the wrong type, or of an unknown kind.
        """
        table = self.table(config)
        kind = table.get("rope_type", table.get("type", "default"))
        kind = "alpha" if self.alpha and kind == "dynamic" and table.get("alpha") else kind
        known = ("default", "longrope") if self.magnitudes else tuple(KINDS)
        if not isinstance(kind, str) or kind not in known:
            raise MappingError(f"config.json: rope_type is {kind!r}; known kinds are {', '.join(known)}")
        theta = table.get("rope_theta", config.get("rope_theta", self.theta))
        share = self._share(table, config, head_dim)
        for name, value, most in (("rope_theta", theta, sys.float_info.max), ("partial_rotary_factor", share, 1.0)):
            if not (_is_number(value) and 0 < value <= most):
                raise MappingError(f"config.json: {name} is {str(value)[:80]}; expected a number above 0")
        if kind == "yarn" and theta == 1:
            raise MappingError("config.json: rope_theta is 1, of which yarn has no logarithm to divide by")
        if self.share is None and share != 1.0:
            raise MappingError(
                f"config.json: partial_rotary_factor is {share}, which transformers doesn't compute for this family"
            )
        dim = int(head_dim * share)
        if dim < 2 or dim % 2:
            raise MappingError(
                f"config.json: partial_rotary_factor is {share:g} of a head_dim of {head_dim}: {dim} elements are turned; they must be pairs"
            )
        more = ("short_mscale", "long_mscale") if self.magnitudes and kind != "default" else ()
        beside = {ORIGINAL: config[ORIGINAL]} if ORIGINAL in config and ORIGINAL in KINDS[kind][1] else {}
        parameters = _parameters(kind, {ORIGINAL: max_positions, **table, **beside}, dim, more)
        key = self.interleaved
        said = config.get(key[0], key[1]) if isinstance(key, tuple) else key
        if isinstance(key, tuple) and not isinstance(said, bool):
            raise MappingError(f"config.json: {key[0]} is {said!r}; expected true or false")
        return Rope(
            theta=float(theta), dim=dim, share=float(share), kind=kind, parameters=parameters, interleaved=bool(said)
        )

    def _share(self, table: Mapping[str, Any], config: Mapping[str, Any], head_dim: int) -> Any:
        """Read the turned share of a head, which the table states, a key beside it, or the number of turned elements."""
        stated = next((said for said in (table, config) if "partial_rotary_factor" in said), None)
        if stated is not None:
            share = stated["partial_rotary_factor"]
            if share is None and (stated is table or self.share is not None):
                raise MappingError("config.json: partial_rotary_factor is null; expected a number above 0")
            return 1.0 if share is None else share
        turned = config.get(self.turned) if self.turned is not None else None
        if turned is None:
            return 1.0 if self.share is None else self.share
        if type(turned) is not int or not 0 < turned <= head_dim:
            raise MappingError(
                f"config.json: {self.turned} is {turned!r}; expected a whole number of at least 1 and at most {head_dim}"
            )
        return turned / head_dim

    def table(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Give the parameters that count, of a config in the form of transformers 4 or 5.

        Raises:
            MappingError: they are no object, or one for each kind of layers.
        """
        stated = [config.get(key) for key in ("rope_scaling", "rope_parameters")]
        if wrong := [table for table in stated if table is not None and not isinstance(table, Mapping)]:
            raise MappingError(f"config.json: the rotary parameters are {str(wrong[0])[:80]}; expected an object")
        table: Mapping[str, Any] = stated[0] or (stated[1] if stated[1] is not None else self.silent or {})
        if nested := [key for key, value in table.items() if isinstance(value, Mapping)]:
            raise MappingError(
                f"config.json: the rotary parameters have others for {nested[0]}; expected one set for all layers"
            )
        return table

    def problems(self, rope: Rope) -> list[str]:
        """Say in words what a config of this family can't say of rotary positions."""
        found = []
        if self.share is None and rope.share != 1.0:
            found.append(f"rotary positions that turn {rope.share:g} of each head")
        if not isinstance(self.interleaved, tuple) and self.interleaved != rope.interleaved:
            found.append("rotary positions that turn " + ("neighbours" if rope.interleaved else "halves"))
        if self.magnitudes != ("short_mscale" in rope.parameters) and rope.kind != "default":
            found.append(f"rotary positions of the kind {rope.kind}")
        if rope.kind == "alpha" and not self.alpha:
            found.append("rotary positions whose base is stretched by alpha")
        return found

    def config_keys(self, rope: Rope) -> dict[str, Any]:
        """Write rotary positions as keys that transformers 4 and 5 both read; what `problems` names is left out."""
        keys: dict[str, Any] = {"rope_theta": rope.theta}
        if self.share is not None:
            keys["partial_rotary_factor"] = rope.share
        if isinstance(self.interleaved, tuple):
            keys[self.interleaved[0]] = rope.interleaved
        if rope.kind != "default":
            keys["rope_scaling"] = {"rope_type": "dynamic" if rope.kind == "alpha" else rope.kind, **rope.parameters}
        elif self.silent is not None:
            keys["rope_scaling"] = {"rope_type": "default"}
        return keys


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and value < 2**63)  # torch takes no larger integers


def _parameters(kind: str, table: Mapping[str, Any], dim: int, more: tuple[str, ...]) -> dict[str, Any]:
    needed, optional = KINDS[kind]
    needed = (*needed, *more)
    if missing := [name for name in needed if name not in table]:
        raise MappingError(f"config.json: rope_type {kind!r} lacks {', '.join(missing)}")
    nullable = _NULLABLE.get(kind, ())
    stated = {name: table[name] for name in (*needed, *optional) if name in table}
    values = {name: value for name, value in stated.items() if value is not None or name not in nullable}
    if values.get("truncate", True) is None:
        values["truncate"] = False
    for name, value in values.items():
        if name in ("short_factor", "long_factor"):
            right = (
                isinstance(value, list)
                and len(value) == dim // 2
                and all(_is_number(v) and 0 < v <= sys.float_info.max for v in value)
            )
            expected = f"{dim // 2} positive numbers"
        elif name == "truncate":
            right, expected = isinstance(value, bool), "true or false"
        elif name == ORIGINAL and kind == "longrope":
            right, expected = _is_number(value) and 1 < value <= sys.float_info.max, "a number above 1"
        else:
            right, expected = _is_number(value) and 0 < value <= sys.float_info.max, "a number above 0"
        if not right:
            raise MappingError(f"config.json: {name} of the rotary positions is {str(value)[:80]}; expected {expected}")
    return values
