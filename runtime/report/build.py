"""One self-contained page: styles, script and data in a single file that needs no network."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
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
    scripts = [_PARTS / name for name in _SCRIPTS]
    return assemble(_PARTS, title=f"{names}: training report", scripts=scripts, data=data)


def assemble(
    folder: Path, *, title: str, scripts: Sequence[Path], data: Mapping[str, Any], styles: Sequence[Path] = ()
) -> str:
    """Put a page together of its parts.

    Args:
        folder: where its `page.html` is.
        title: of the page.
        scripts: what runs in it, after what all pages share.
        data: what the scripts read, as JSON values.
        styles: beside what all pages share.

    Returns:
        HTML that needs no network.
    """
    shared = [] if folder == _PARTS else [_PARTS / "base.js"]
    parts = {
        "title": html.escape(title),
        "style": "\n".join(path.read_text(encoding="utf-8") for path in (_PARTS / "page.css", *styles)),
        "script": "\n".join(path.read_text(encoding="utf-8") for path in (*shared, *scripts)),
        # Within a script element only "<" can end it, and JSON has it in strings alone.
        "data": json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    }
    pieces = (folder / "page.html").read_text(encoding="utf-8").split("@")
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def write_page(path: Path, page: str, mark: str = _MARK, kind: str = "report") -> None:
    """Write a page, or replace an older one of its kind; nothing is left half written.

    Args:
        path: the file.
        page: its HTML.
        mark: what pages of its kind begin with.
        kind: what they are called.

    Raises:
        WriteError: it can't be written, or there is a file that is no report.
    """
    try:
        if path.exists():
            with path.open("rb") as file:
                if mark.encode() not in file.read(4096):
                    raise WriteError(f"{path}: exists and is no {kind}; name another file, or remove it")
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise WriteError(f"{path}: can't be written: {error.strerror}") from None
