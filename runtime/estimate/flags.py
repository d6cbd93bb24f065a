"""A setup as words of the trainer's command line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moeconv.errors import MoeconvError
from runtime.estimate.setup import Setup
from runtime.settings.fields import Setting, settings

_GROUPS = ("parallel", "recompute", "moe", "optim", "lora")


def trainer_flags(setup: Setup) -> list[str]:
    """Give the flags that make `runtime.train` do what was planned; those that would say the default are left out.

    Args:
        setup: what was planned.

    Returns:
        Words of a command line.
    """
    out = ["--seq-length", str(setup.seq_length), "--micro-batch-size", str(setup.micro_batch_size)]
    out += ["--global-batch-size", str(setup.global_batch_size), "--dtype", setup.dtype]
    for setting in settings():
        owner = getattr(setup, setting.group) if setting.group in _GROUPS else None
        if owner is not None:
            out += _words(owner, setting)
    return out


def _words(owner: Any, setting: Setting) -> list[str]:
    value = getattr(owner, setting.field)
    if value == setting.default or value is None or _follows(owner, setting):
        return []
    if setting.kind is bool:
        return [setting.names[0] if value else str(setting.off)]
    if setting.many:
        return [setting.name, *(str(part) for part in value)]
    return [setting.name, str(value)]


def _follows(owner: Any, setting: Setting) -> bool:
    """Whether the default comes to the same value, from the other fields."""
    try:
        return bool(replace(owner, **{setting.field: setting.default}) == owner)
    except (MoeconvError, TypeError):
        return False
