"""Model families, one data file each. To add one: write its file, and list it here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeconv.errors import MappingError
from moeconv.families.base import Family
from moeconv.families.mixtral import MIXTRAL

FAMILIES: dict[str, Family] = {family.model_type: family for family in (MIXTRAL,)}


def family_of(config: Mapping[str, Any]) -> Family:
    """Find the family of a config.

    Args:
        config: config.json as parsed.

    Returns:
        The family whose `model_type` the config names.

    Raises:
        MappingError: the family is not supported.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise MappingError(f"config.json: model_type is {model_type!r}; supported are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
