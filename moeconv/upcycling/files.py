"""Recipe files: YAML with the options' names, and mergekit-moe's where it says something that maps.

Source of mergekit's fields: https://github.com/arcee-ai/mergekit/blob/a6e4028/mergekit/moe/config.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeconv.errors import RecipeError
from moeconv.upcycling.carriers import CARRIERS

_ARCHITECTURES = {family.mergekit: name for name, family in CARRIERS.items() if family.mergekit is not None}
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_FIELDS = {"base_model", "gate_mode", "dtype", "experts_per_token", "architecture", "experts"}
_EXPERT_FIELDS = {"source_model", "positive_prompts", "negative_prompts", "noise_scale"}


def load_yaml(path: Path) -> Any:
    """Read a YAML file without constructing objects.

    Raises:
        RecipeError: it can't be read, or is no YAML.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: can't be read as YAML: {str(error).splitlines()[0]}") from None


def recipe_table(path: Path, source: str) -> dict[str, Any]:
    """Read a recipe file.

    Args:
        path: a YAML file with options of `moeconv upcycle`, or one of mergekit-moe.
        source: the source as the user named it; mergekit's `base_model` must be the same.

    Returns:
        Options by name, as `recipe.from_table` takes them; `dtype`, if the file asks for one, by its safetensors name.

    Raises:
        RecipeError: the file says something that does not map.
    """
    table = load_yaml(path)
    if not isinstance(table, Mapping):
        raise RecipeError(f"{path}: expected a table of options, got {type(table).__name__}")
    if "base_model" in table and "experts" in table and isinstance(table["experts"], list):
        return _from_mergekit(table, str(path), source)
    return {str(key): value for key, value in table.items()}


def _from_mergekit(table: Mapping[str, Any], where: str, source: str) -> dict[str, Any]:
    _refuse_others(table, _FIELDS, where)
    if str(table["base_model"]) != source:
        raise RecipeError(f"{where}: base_model is {table['base_model']!r} and SRC is {source!r}; give the same")
    experts = table["experts"]
    for entry in experts:
        if not isinstance(entry, Mapping) or "source_model" not in entry:
            raise RecipeError(f"{where}: each of experts needs a source_model; got {entry!r}")
        _refuse_others(entry, _EXPERT_FIELDS, where)
    models = [str(entry["source_model"]) for entry in experts]
    branches = list(dict.fromkeys(m for m in models if m != source))
    noise = {float(entry.get("noise_scale") or 0) for entry in experts}
    if len(noise) > 1:
        raise RecipeError(f"{where}: noise_scale differs between experts; one for all maps")
    std = noise.pop() if noise else 0.0
    out: dict[str, Any] = {"experts": len(experts), "top_k": int(table.get("experts_per_token") or 2)}
    out["method"] = "mix" if branches else "noise" if std else "copy"
    if std:
        out["noise_std"] = std
    if branches:
        order = [source, *branches]
        out |= {"branches": branches, "average": False, "assignment": [order.index(m) for m in models]}
    if table.get("architecture") is not None:
        if table["architecture"] not in _ARCHITECTURES:
            raise RecipeError(
                f"{where}: architecture {table['architecture']!r} does not map; {', '.join(_ARCHITECTURES)} do"
            )
        out["carrier"] = _ARCHITECTURES[table["architecture"]]
    if table.get("dtype") is not None:
        if table["dtype"] not in _DTYPES:
            raise RecipeError(f"{where}: dtype {table['dtype']!r} does not map; {', '.join(_DTYPES)} do")
        out["dtype"] = _DTYPES[table["dtype"]]
    return out | _gate(table, where)


def _gate(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    mode = table.get("gate_mode", "hidden")
    if mode == "random":  # mergekit draws from N(0, 1)
        return {"router": "random", "router_std": 1.0}
    if mode in ("hidden", "hidden_avg"):
        prompts = [{key: e.get(key) for key in ("positive_prompts", "negative_prompts")} for e in table["experts"]]
        return {"router": "hidden", "hidden_average": mode == "hidden_avg", "prompts": prompts}
    raise RecipeError(f"{where}: gate_mode {mode!r} does not map; hidden, hidden_avg and random do")


def _refuse_others(table: Mapping[str, Any], known: set[str], where: str) -> None:
    others = sorted(key for key in table if key not in known and table[key] is not None)
    if others:
        raise RecipeError(f"{where}: {', '.join(others)} of mergekit does not map to this program; leave it out")
