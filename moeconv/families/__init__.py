"""Model families, one data file each. To add one: write its file, and list it here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeconv.errors import MappingError
from moeconv.families.base import Family
from moeconv.families.dots1 import DOTS1
from moeconv.families.glm4_moe import GLM4_MOE
from moeconv.families.llama import LLAMA
from moeconv.families.mistral import MISTRAL
from moeconv.families.mixtral import MIXTRAL
from moeconv.families.olmoe import OLMOE
from moeconv.families.qwen2 import QWEN2
from moeconv.families.qwen2_moe import QWEN2_MOE
from moeconv.families.qwen3 import QWEN3
from moeconv.families.qwen3_moe import QWEN3_MOE

# The order of preference where several could hold a model.
_ALL = (MIXTRAL, LLAMA, MISTRAL, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE, DOTS1, GLM4_MOE, OLMOE)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}


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
