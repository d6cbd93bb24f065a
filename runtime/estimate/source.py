"""The model to plan for: config.json alone, of a folder, a file or a hub repository; no weight is looked at."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from moeconv.checkpoint import model_of
from moeconv.errors import SourceError
from moeconv.families.base import Model
from moeconv.families.key_states import QUANTISED
from moeconv.hub import config_file
from moeconv.io.decode import MAX_SMALL_BYTES, parse_json
from moeconv.io.hf_folder import CONFIG
from moeconv.io.paths import brief_path, read_whole


@dataclass(frozen=True, slots=True)
class Source:
    """A model, and where its config is."""

    path: Path
    model: Model
    notes: tuple[str, ...] = ()
    """What is planned otherwise than the config says."""


def read_source(source: str, revision: str | None = None) -> Source:
    """Read the config of a model.

    Args:
        source: a checkpoint's folder, a config.json, or a hub repository's id, of which only config.json is downloaded.
        revision: a branch, tag or commit of the repository.

    Returns:
        The model; weights that are stored quantised are planned for as plain numbers, which training needs.

    Raises:
        SourceError: there is no such folder, file or repository, or it holds no config.
        MappingError: the family is unknown, or a size is missing.
    """
    path = _config_path(source, revision)
    config = parse_json(read_whole(path, MAX_SMALL_BYTES), str(path))
    notes: tuple[str, ...] = ()
    if config.get(QUANTISED) is not None:
        config = {key: value for key, value in config.items() if key != QUANTISED}
        notes = (
            "weights are stored quantised; planned for plain ones (`moeconv import-hf --dtype bfloat16` makes them)",
        )
    return Source(path, model_of(config, str(path)), notes)


def _config_path(source: str, revision: str | None) -> Path:
    path = Path(source)
    if not os.path.lexists(path):
        return config_file(source, revision)
    if not path.is_dir():
        return path
    if not (path / CONFIG).is_file():
        raise SourceError(
            f"{brief_path(path)}: holds no {CONFIG}; give a checkpoint's folder, a config.json or a hub id"
        )
    return path / CONFIG
