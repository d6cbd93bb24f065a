"""A model's sizes, as config.json states them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeconv.errors import MappingError
from moeconv.families.names import evaluate

MAX_LAYERS, MAX_EXPERTS = 4096, 16384
_DEFAULTS = {"kv_heads": "heads"}  # of every family


def read_sizes(
    family: str,
    config: Mapping[str, Any],
    keys: Mapping[str, str | tuple[str, ...]],
    defaults: Mapping[str, str],
    may_be_zero: tuple[str, ...],
) -> dict[str, int]:
    """Read a model's sizes.

    Args:
        family: the family's name, for messages.
        config: config.json as parsed.
        keys: the key, or the names of the key, of each size.
        defaults: the sums of products of other sizes that a size is where the config is silent.
        may_be_zero: sizes that need not be at least 1.

    Returns:
        Each size by its name.

    Raises:
        MappingError: a size is missing, no whole number, stated twice otherwise, or larger than any model's.
    """
    sizes: dict[str, int] = {}
    defaults = _DEFAULTS | dict(defaults)
    for name, names in keys.items():
        names = (names,) if isinstance(names, str) else names
        value = read_size(names, config, 0 if name in may_be_zero else 1)
        if value is not None:
            sizes[name] = value
        elif name not in defaults:
            raise MappingError(f"config.json has no {' or '.join(names)}, which {family} needs")
    for name, formula in defaults.items():
        if name not in sizes:
            sizes[name] = _default(name, formula, sizes)
    _check_limits(sizes)
    return sizes


def read_size(keys: tuple[str, ...], config: Mapping[str, Any], least: int) -> int | None:
    """Read a size, or another count, which a config may state under several names; None where it states none.

    Raises:
        MappingError: it is no whole number of at least `least`, or the names disagree.
    """
    stated = {key: config[key] for key in keys if config.get(key) is not None}
    for key, value in stated.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise MappingError(f"config.json: {key} is {value!r}; expected a whole number of at least {least}")
    if len(set(stated.values())) > 1:
        said = ", ".join(f"{key} is {value}" for key, value in stated.items())
        raise MappingError(f"config.json: {said}; they are names of one size, so remove those that are wrong")
    return next(iter(stated.values()), None)


def _check_limits(sizes: Mapping[str, int]) -> None:
    """Refuse sizes that no model has, before anything of that size is made."""
    for name, most in (("layers", MAX_LAYERS), ("experts", MAX_EXPERTS)):
        if sizes.get(name, 0) > most:
            raise MappingError(f"config.json says {sizes[name]} {name}; models have at most {most}")
    if any(size >= 2**40 for size in sizes.values()):
        raise MappingError(
            f"config.json says {max(sizes, key=lambda n: sizes[n])} {max(sizes.values())}; no model is so large"
        )


def _default(name: str, formula: str, sizes: Mapping[str, int]) -> int:
    if "//" not in formula:
        return evaluate(formula, sizes)
    over, under = (evaluate(term, sizes) for term in formula.split("//"))
    if over % under:
        raise MappingError(f"config.json: {name} is not given and {formula} = {over} / {under} is no whole number")
    return over // under
