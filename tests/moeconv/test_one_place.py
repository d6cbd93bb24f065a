"""What a model is stands in `moeconv/families/` and nowhere else: no other room spells a family, a tensor or a config key."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeconv.families import FAMILIES
from moeconv.families.base import ROLES, Family
from moeconv.families.compute import Key

ROOT = Path(__file__).parents[2]
# Words that name something else, too: a flag's or setting's own name in the trainer, Megatron's arguments, plain words.
ALSO = {
    "hidden_size",  # Megatron's argument, too
    "num_attention_heads",
    "max_position_embeddings",
    "attention_dropout",
    "moe_intermediate_size",
    "num_experts",
    "vocab_size",
    *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "v_head_dim"),
    "head_dim",  # a size of ours, too
    "input_layernorm",  # Megatron's tensors, too
    "qkv_bias",
    "shared_experts",  # a recipe's key, too
    "experts_per_token",
    "final_layernorm",  # Megatron's tensor, too
}


def keys_of(family: Family) -> set[str]:
    """Every key of config.json that a family reads, without those that are a size's or flag's own name here."""
    found = {key for names in family.sizes.values() for key in ((names,) if isinstance(names, str) else names)}
    found |= {key if isinstance(key, str) else key[0] for key in family.flags.values()}
    for rule in (family.compute, family.compute.window, family.compute.router):
        for field in dataclasses.fields(rule) if rule is not None else ():
            value = getattr(rule, field.name)
            found |= {value.name} if isinstance(value, Key) else set()
    return found


def spelled() -> set[str]:
    """Every word that only families may spell: model types, architectures, keys, and the parts of tensors' names."""
    words = set()
    for family in FAMILIES.values():
        words |= {family.model_type, family.architecture} | keys_of(family)
        for rule in family.rules:
            words |= {part for part in rule.name.split(".") if "_" in part and "{" not in part}
    return words - ALSO


def literals(path: Path) -> Iterator[tuple[int, str]]:
    """The string literals of a module, docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    docs = {
        id(node.value)
        for body in ast.walk(tree)
        if isinstance(body, ast.Module | ast.ClassDef | ast.FunctionDef)
        for node in body.body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


FILES = [
    path
    for top in ("moeconv", "runtime", "cli")
    for path in sorted((ROOT / top).rglob("*.py"))
    if not {"families", "parity"}
    & set(path.relative_to(ROOT).parts)  # the parity proof's tiny models are given as config.json is
]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_room_but_families_spells_what_a_model_is(path: Path) -> None:
    words = spelled()
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for line, text in literals(path)
        if text not in ROLES and words & set(re.findall(r"[A-Za-z0-9_]+", text))
    ]
    assert found == []
