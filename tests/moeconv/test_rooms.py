"""Megatron's formats and upcycling know models by role alone: no family's name, tensor name or config key is spelled there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeconv.families import FAMILIES
from moeconv.families.base import ROLES
from moeconv.families.key_states import known_keys

ROOT = Path(__file__).parents[2] / "moeconv"
# Other programs' own words that happen to be ours too.
FOREIGN = {
    "megatron": {
        "dtype",  # a field of torch's metadata
        # arguments of Megatron's
        *("attention_dropout", "hidden_size", "max_position_embeddings", "num_attention_heads", "num_experts", "vocab_size"),
        *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "v_head_dim"),
        # modules of Megatron's
        *("input_layernorm", "final_layernorm", "shared_experts"),
        # a parameter of yarn and llama3, by the name that moeconv.families.rope has for it
        "original_max_position_embeddings",
    },
    # a field of mergekit's, an option of a recipe
    "upcycle": {"dtype", "shared_experts"},
}  # fmt: skip
OURS = {"head_dim", "qkv_bias"}  # a size, and a kind of tensor of Megatron's


def words() -> set[str]:
    """Give every name of a family, of a part of its tensors' names, and of its config's keys."""
    out: set[str] = set()
    for family in FAMILIES.values():
        out |= {family.model_type, family.architecture} | known_keys(family)
        templates = [rule.name for rule in family.rules] + [alias.name for alias in family.aliases]
        out |= {
            segment for name in templates for segment in name.split(".") if "_" in segment or segment in ("w1", "w2")
        }
    return out - OURS


def literals(tree: ast.Module) -> Iterator[ast.Constant]:
    """Give the strings of a module that are no docstrings."""
    expressions = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in expressions:
            yield node


@pytest.mark.parametrize("room", FOREIGN)
def test_no_family_is_spelled(room: str) -> None:
    forbidden = words() - FOREIGN[room]
    assert len(forbidden) > 50
    wrong = []
    for path in sorted((ROOT / room).rglob("*.py")):
        for node in literals(ast.parse(path.read_text(encoding="utf8"))):
            found = forbidden.intersection(re.findall(r"\w+", str(node.value)) if node.value not in ROLES else ())
            wrong += [f"{path.name}:{node.lineno} spells {word}" for word in sorted(found)]
    assert wrong == []
