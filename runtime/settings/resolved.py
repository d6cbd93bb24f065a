"""A run's settings as they were resolved: the file that starts it again, and the lines that the log begins with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from moeconv.errors import MoeconvError
from runtime.data.blend import absolute_words
from runtime.settings.fields import GROUPS, Setting, settings
from runtime.settings.parser import word
from runtime.settings.run import RunConfig

RUN_FILE = "run.yaml"


def run_file(run: RunConfig) -> str:
    """Give the `--config` file that starts a run again: every setting by name, those at their default included.

    Args:
        run: the settings.

    Returns:
        YAML; paths are absolute, so that it works from any folder.
    """
    import yaml

    def inline(value: Any) -> str:
        return str(yaml.safe_dump(value, default_flow_style=True, width=1000)).removesuffix("...\n").strip()

    lines = [f"# The settings of this run. To start it again: moeconv train --config {RUN_FILE}"]
    for group in GROUPS:
        shown = [(s, value) for s, value in _values(run, group.name) if value is not None and value != ()]
        lines += [f"{group.name}:"] if shown else []
        lines += [f"  {setting.name[2:]}: {inline(_plain(_shown(setting, value)))}" for setting, value in shown]
    lines += ["architecture:"] if run.stated else []
    lines += [f"  {name[2:]}: {inline(value)}" for name, value in run.stated.items()]
    return "\n".join(lines) + "\n"


def summary(run: RunConfig) -> list[str]:
    """Give the settings that differ from their defaults, one line a group.

    Args:
        run: the settings.

    Returns:
        Lines for the log.
    """
    lines = []
    for group in GROUPS:
        parts = []
        for setting, value in _values(run, group.name):
            if value == setting.default or value is None or value == ():
                continue
            shown = _plain(_shown(setting, value))
            words = " ".join(map(word, shown)) if isinstance(shown, list) else word(shown)
            parts.append(setting.name[2:] if shown is True else f"{setting.name[2:]} {words}")
        if parts:
            lines.append(f"settings, {group.name.replace('_', ' ')}: {', '.join(parts)}")
    return lines


def _values(run: RunConfig, group: str) -> list[tuple[Setting, Any]]:
    owner = getattr(run, group)
    if owner is None:  # no experts, or nothing to write
        return []
    return [(setting, _as_given(owner, setting)) for setting in settings() if setting.group == group]


def _as_given(owner: Any, setting: Setting) -> Any:
    """A setting's value; where its default comes to the same, the default, so that it still follows the others."""
    value = getattr(owner, setting.field)
    if value == setting.default:
        return setting.default
    try:
        follows = getattr(dataclasses.replace(owner, **{setting.field: setting.default}), setting.field) == value
    except (MoeconvError, TypeError):  # without it the others don't hold, or it has no default
        return value
    return setting.default if follows else value


def _shown(setting: Setting, value: Any) -> Any:
    """A value as its flag says it: a switch that has only an off form says that it is off."""
    if setting.group == "data" and setting.many and setting.mark.metavar == "PATH":
        return absolute_words(value)
    return not value if setting.kind is bool and not setting.names else value


def _plain(value: Any) -> Any:
    """A value as YAML and people have it."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value.absolute()) if isinstance(value, Path) else value
