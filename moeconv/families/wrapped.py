"""Models of several parts, of which the language model is one of the families; the other parts go along unread.

The language model's config is a part of theirs, and its tensors have longer names. They convert through every layout; the trainer,
upcycling and Megatron's formats refuse them by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moeconv.families.base import Alias, Family, Split, TensorRule
from moeconv.families.decoder import MLP, fused_experts
from moeconv.families.deepseek_v3 import DEEPSEEK_V3
from moeconv.families.glm4_moe import GLM4_MOE
from moeconv.families.llama4_text import LLAMA4_TEXT
from moeconv.families.qwen3_5_moe_text import QWEN3_5_MOE_TEXT
from moeconv.families.qwen3_moe import QWEN3_MOE

_SOURCE = "https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/"
_BESIDE = {"model.": "model.language_model."}
_INSIDE = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}


def _wrapped(
    family: Family,
    name: str,
    model_type: str,
    architecture: str,
    names: Mapping[str, str],
    carried: tuple[str, ...],
    forms: tuple[Family, ...] = (),
) -> Family:
    """Give the family of a model that has another family's language model in it.

    Args:
        family: of the language model.
        name: the new family's.
        model_type: as in its config.json.
        architecture: its class in transformers.
        names: beginnings of the language model's names -> what they are here.
        carried: patterns of the other parts' names.
        forms: the families that `_wrapped` gives for checkpoints that transformers saves anew with other names or shapes.

    Returns:
        The family.
    """

    def longer(text: str) -> str:
        found = next((old for old in names if text.startswith(old)), "")
        return names.get(found, "") + text.removeprefix(found)

    lacks = " and ".join(filter(None, (family.compute.lacks, "pictures")))
    return replace(
        family,
        name=name,
        model_type=model_type,
        architecture=architecture,
        text="text_config",
        also=(),
        rules=tuple(replace(rule, name=longer(rule.name)) for rule in family.rules),
        aliases=tuple(
            Alias(longer(a.name), tuple(map(longer, a.parts)), a.stack, a.dim, a.hub) for a in family.aliases
        ),
        carried=(*family.carried, *carried),
        forms=forms,
        compute=replace(family.compute, lacks=lacks),
        source=f"{_SOURCE}{model_type}/modeling_{model_type}.py",
    )


def _turned(family: Family) -> Family:
    """Give a family whose experts are published as stacks of [in, out]."""
    names, prefix = ("gate_proj", "up_proj", "down_proj"), MLP + "experts.{expert}."
    shapes = (("hidden", "ffn"), ("hidden", "ffn"), ("ffn", "hidden"))
    experts = {
        f"expert.{role}": TensorRule(
            f"expert.{role}", prefix + name, shape, Split("etp", dim), layers="moe", transposed=True
        )
        for role, name, shape, dim in zip(("gate", "up", "down"), names, shapes, (1, 1, 0), strict=True)
    }
    stacks = (MLP + "experts.gate_up_proj", MLP + "experts.down_proj")
    return replace(
        family,
        rules=tuple(experts.get(rule.role, rule) for rule in family.rules),
        aliases=fused_experts(stacks, prefix, names, hub=True, dim=1),
    )


def _stacked(family: Family) -> Family:
    """Give a family whose experts are written as the stacks that transformers 5 keeps in memory."""
    return replace(family, aliases=tuple(replace(alias, hub=True) for alias in family.aliases))


_QWEN3_VL = ("Qwen3-VL-MoE", "qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", _BESIDE, ("model.visual.*",))
_KIMI = ("Kimi-K2.5", "kimi_k25", "KimiK25ForConditionalGeneration")
# transformers 5 saves Kimi's layers as blocks, under names that it reads again; kept as in memory, all parts have others.
_BLOCKS = {"model.layers.": "language_model.model.blocks.", **_INSIDE}

WRAPPED = (
    _wrapped(
        _stacked(QWEN3_5_MOE_TEXT),
        "Qwen3.5-MoE with vision",
        "qwen3_5_moe",
        "Qwen3_5MoeForConditionalGeneration",
        _BESIDE,
        ("model.visual.*",),
    ),
    # Saved anew its experts are no longer turned.
    _wrapped(_turned(QWEN3_MOE), *_QWEN3_VL, forms=(_wrapped(_stacked(QWEN3_MOE), *_QWEN3_VL),)),
    _wrapped(
        LLAMA4_TEXT,
        "Llama-4 with vision",
        "llama4",
        "Llama4ForConditionalGeneration",
        _INSIDE,
        ("vision_model.*", "multi_modal_projector.*"),
    ),
    _wrapped(GLM4_MOE, "GLM-4.5V", "glm4v_moe", "Glm4vMoeForConditionalGeneration", _BESIDE, ("model.visual.*",)),
    _wrapped(
        DEEPSEEK_V3,
        *_KIMI,
        _INSIDE,
        ("vision_tower.*", "mm_projector.*"),
        forms=(
            _wrapped(DEEPSEEK_V3, *_KIMI, _BLOCKS, ("vision_tower.*", "mm_projector.*", "model.mm_projector.*")),
            _wrapped(_stacked(DEEPSEEK_V3), *_KIMI, _BESIDE, ("model.vision_tower.*", "model.mm_projector.*")),
        ),
    ),
)
