"""One self-contained page: styles, script and data in a single file that needs no network."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moeconv.errors import WriteError

_PARTS = Path(__file__).with_name("page")
_SCRIPTS = ("base.js", "chart.js", "heat.js", "report.js")
_MARK = '<meta name="generator" content="moeconv report">'


def make_page(data: Mapping[str, Any]) -> str:
    """Put the page together.

    Args:
        data: what `report_data` gives.

    Returns:
        The page's HTML.
    """
    names = ", ".join(run["name"] for run in data["runs"])
    parts = {
        "title": html.escape(f"{names}: training report"),
        "style": (_PARTS / "page.css").read_text(encoding="utf-8"),
        "script": "\n".join((_PARTS / name).read_text(encoding="utf-8") for name in _SCRIPTS),
        # Within a script element only "<" can end it, and JSON has it in strings alone.
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    pieces = (_PARTS / "page.html").read_text(encoding="utf-8").split("@")
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def write_page(path: Path, page: str) -> None:
    """Write a page, or replace an older report; nothing is left half written.

    Args:
        path: the file.
        page: its HTML.

    Raises:
        WriteError: it can't be written, or there is a file that is no report.
    """
    try:
        if path.exists():
            with path.open("rb") as file:
                if _MARK.encode() not in file.read(4096):
                    raise WriteError(f"{path}: exists and is no report; name another file with -o, or remove it")
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise WriteError(f"{path}: can't be written: {error.strerror}") from None
