"""What a new model is: its config.json and the files beside it, from a config that exists or from one made of the flags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeconv.checkpoint import model_of
from moeconv.errors import SourceError
from moeconv.families import family_of
from moeconv.families.base import Model
from moeconv.families.key_states import DTYPE, QUANTISED, SPECIAL_TOKENS
from moeconv.hub import description_folder
from moeconv.io.decode import parse_json
from moeconv.io.hf_folder import CONFIG
from moeconv.io.paths import read_inside
from runtime.initial.tokenizer import TokenizerFacts, read_tokenizer

GENERATION = "generation_config.json"


@dataclass(frozen=True, slots=True)
class Described:
    """A model that is to be drawn."""

    model: Model
    files: dict[str, bytes]
    """Name -> content of what its checkpoints carry: config.json, and what is known of generation and tokenizer."""
    folder: Path | None
    """Where its config is, and its tokenizer unless the settings name another; None where flags say what it is."""


def read_description(source: str) -> tuple[dict[str, Any], Path]:
    """Read the config.json of a model that exists.

    Args:
        source: the file, a folder that has it, or a model's id on the hub.

    Returns:
        The config, and the folder that it is in.

    Raises:
        SourceError: there is none, or it can't be read.
    """
    path = description_folder(source)
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        raise SourceError(f"--init-config {source}: has no {CONFIG}; name a {CONFIG}, or a folder that has one")
    return parse_json(read_inside(file.parent, file.name), str(file)), file.parent


def from_config(source: str, dtype: str | None, std: float | None, tokenizer: Path | None) -> Described:
    """Describe a new model by a config that exists.

    Args:
        source: as of `read_description`.
        dtype: the weights' torch dtype; None takes the config's own.
        std: the weights' standard deviation; None takes the config's own.
        tokenizer: another tokenizer than the one beside the config; None takes that, if there is one.

    Returns:
        The model. Its config is the one that exists, but for the weights' dtype and
        deviation and the special tokens of another tokenizer.

    Raises:
        MoeconvError: config or tokenizer can't be read, or the family is unknown.
    """
    config, folder = read_description(source)
    own = tokenizer is None
    facts = read_tokenizer(tokenizer or folder) if tokenizer is not None or _has_tokenizer(folder) else None
    files = {}
    if (folder / GENERATION).is_file() and own:
        files[GENERATION] = (folder / GENERATION).read_bytes()
    if facts is not None and not own:
        config |= facts.special
    name = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    config = {key: value for key, value in config.items() if key not in (*DTYPE, QUANTISED)}
    family = family_of(config)
    config = {"architectures": [family.architecture], **config, "torch_dtype": name}
    if std is not None:
        config[family.compute.init_std.name] = std
    return describe(config, facts, files, folder, source)


def describe(
    config: Mapping[str, Any], facts: TokenizerFacts | None, files: Mapping[str, bytes], folder: Path | None, where: str
) -> Described:
    """Put a new model's config and the files beside it together.

    Args:
        config: its config.json.
        facts: of its tokenizer; None where it has none.
        files: further files by name.
        folder: where the config is; None where flags say it.
        where: where the config comes from, for messages.

    Returns:
        The model.

    Raises:
        MappingError: the family is unknown, or the config is of no model.
    """
    out = {CONFIG: _text(config), **(facts.files if facts is not None else {}), **files}
    special = {name: config[name] for name in SPECIAL_TOKENS if config.get(name) is not None}
    if GENERATION not in out and special:
        out[GENERATION] = _text(special)
    return Described(model_of(dict(config), where), out, folder)


def _has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*")) or (folder / "tekken.json").is_file()


def _text(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(dict(values), indent=2) + "\n").encode()
