"""A run's settings as they were resolved: the file that starts it again, and the lines that the log begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.settings.fields import GROUPS, Setting, settings
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

    table = {
        group.name: {
            setting.name[2:]: _plain(_shown(setting, value))
            for setting, value in _values(run, group.name)
            if value is not None and value != ()
        }
        for group in GROUPS
    }
    head = f"# The settings of this run. To start it again: torchrun [...] -m runtime.train --config {RUN_FILE}\n"
    groups = {name: group for name, group in table.items() if group}
    return head + str(yaml.safe_dump(groups, sort_keys=False, default_flow_style=None))


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
            words = " ".join(map(str, shown)) if isinstance(shown, list) else str(shown)
            parts.append(setting.name[2:] if shown is True else f"{setting.name[2:]} {words}")
        if parts:
            lines.append(f"settings, {group.name.replace('_', ' ')}: {', '.join(parts)}")
    return lines


def _values(run: RunConfig, group: str) -> list[tuple[Setting, Any]]:
    owner = getattr(run, group)
    if owner is None:  # no experts
        return []
    return [(setting, getattr(owner, setting.field)) for setting in settings() if setting.group == group]


def _shown(setting: Setting, value: Any) -> Any:
    """A value as its flag says it: a switch that has only an off form says that it is off."""
    return not value if setting.kind is bool and not setting.names else value


def _plain(value: Any) -> Any:
    """A value as YAML and people have it."""
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value.absolute()) if isinstance(value, Path) else value
