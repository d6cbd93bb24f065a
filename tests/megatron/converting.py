"""What the tests of kills run in processes of their own; it imports no torch, so that they begin quickly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeconv.convert import Options
from moeconv.layout.degrees import Degrees
from moeconv.megatron.convert import export_megatron, import_megatron, open_megatron

DEGREES = Degrees(tp=2, ep=4, pp=2)


def convert(source: Path, out: Path, form: str, resume: bool, progress: Any = lambda _: None) -> None:
    options = Options(workers=2, resume=resume, progress=lambda _: progress)
    if form == "shards":
        import_megatron(open_megatron(source), out, DEGREES, options)
    else:
        fmt: Any = form
        export_megatron(source, out, fmt=fmt, degrees=DEGREES, spec="te", experts="grouped", options=options)
