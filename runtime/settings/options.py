"""Every option string that the trainer knows, and what it means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from runtime.settings.architecture import FACTS, Fact
from runtime.settings.fields import Setting, settings
from runtime.settings.megatron import FIXED, NO_EFFECT, REFUSED, Fixed, NoEffect


@dataclass(frozen=True, slots=True)
class Option:
    """What an option string means."""

    target: Setting | Fact | NoEffect | Fixed | str | None
    """None is an option of this module; a text is the reason why it is refused."""
    nargs: str | int | None
    """As argparse has it; None is one value."""
    constant: Any = None
    """For an option without a value: what it sets."""


@cache
def options() -> dict[str, Option]:
    """Give every option string that the trainer knows."""
    out: dict[str, Option] = {"--config": Option(None, None)}

    def add(name: str, option: Option) -> None:
        assert name not in out, f"{name} is two flags"
        out[name] = option

    for setting in settings():
        switch = setting.kind is bool
        for name in setting.names:
            add(name, Option(setting, 0 if switch else "+" if setting.many else None, True))
        if setting.off is not None:
            add(setting.off, Option(setting, 0, False))
        for name, value in setting.mark.shorthands.items():
            add(name, Option(setting, 0, value))
    for fact in FACTS:
        add(fact.flag, Option(fact, 0 if fact.kind is bool else None, True))
    for name, fixed in FIXED.items():
        add(name, Option(fixed, None))
    for name, row in NO_EFFECT.items():
        add(name, Option(row, None if row.values == 1 else row.values, True))
    for name, reason in REFUSED.items():
        add(name, Option(reason, "*"))
    return out


def nearest(name: str, known: Iterable[str]) -> str:
    """Give the known flags that look most like a name, separated by commas; empty where none does."""
    plain = name.replace("_", "-")
    known = list(known)
    starts = [flag for flag in known if flag.startswith(plain)] if len(plain) > 5 else []
    close = difflib.get_close_matches(plain, known, n=3, cutoff=0.75)
    return ", ".join(dict.fromkeys([*close, *starts][:3]))
