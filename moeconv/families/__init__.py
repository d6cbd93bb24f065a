"""Model families, one data file each. To add one: write its file, and list it here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeconv.errors import MappingError
from moeconv.families.base import Family
from moeconv.families.deepseek_v2 import DEEPSEEK_V2
from moeconv.families.deepseek_v3 import DEEPSEEK_V3
from moeconv.families.dots1 import DOTS1
from moeconv.families.ernie4_5_moe import ERNIE4_5_MOE
from moeconv.families.flex_olmo import FLEX_OLMO
from moeconv.families.glm4_moe import GLM4_MOE
from moeconv.families.glm4_moe_lite import GLM4_MOE_LITE
from moeconv.families.gpt_oss import GPT_OSS
from moeconv.families.granitemoe import GRANITEMOE
from moeconv.families.hunyuan_v1_moe import HUNYUAN_V1_MOE
from moeconv.families.jamba import JAMBA
from moeconv.families.llama import LLAMA
from moeconv.families.llama4_text import LLAMA4_TEXT
from moeconv.families.minimax_m2 import MINIMAX_M2
from moeconv.families.mistral import MISTRAL
from moeconv.families.mixtral import MIXTRAL
from moeconv.families.olmoe import OLMOE
from moeconv.families.phimoe import PHIMOE
from moeconv.families.qwen2 import QWEN2
from moeconv.families.qwen2_moe import QWEN2_MOE
from moeconv.families.qwen3 import QWEN3
from moeconv.families.qwen3_5_moe_text import QWEN3_5_MOE_TEXT
from moeconv.families.qwen3_moe import QWEN3_MOE
from moeconv.families.qwen3_next import QWEN3_NEXT
from moeconv.families.wrapped import WRAPPED

# The order of preference where several could hold a model.
_ALL = (
    MIXTRAL,
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    QWEN2_MOE,
    QWEN3_MOE,
    DOTS1,
    GLM4_MOE,
    OLMOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE_LITE,
    GPT_OSS,
    MINIMAX_M2,
    ERNIE4_5_MOE,
    GRANITEMOE,
    PHIMOE,
    HUNYUAN_V1_MOE,
    FLEX_OLMO,
    QWEN3_NEXT,
    QWEN3_5_MOE_TEXT,
    LLAMA4_TEXT,
    JAMBA,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}
"""The language models, by their `model_type`; those inside models of several parts are in `wrapped`."""
_BY_TYPE = (
    FAMILIES
    | {family.model_type: family for family in WRAPPED}
    | {model_type: family for family in _ALL for model_type in family.also}
)


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
    if not isinstance(model_type, str) or model_type not in _BY_TYPE:
        raise MappingError(f"config.json: model_type is {model_type!r}; supported are {', '.join(sorted(_BY_TYPE))}")
    return _BY_TYPE[model_type]
