"""Untrusted JSON: bounded in bytes, values and depth before it is parsed, and of exactly the types that its reader names."""

from __future__ import annotations

import json
import re
import reprlib
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from moeconv.errors import SourceError

T = TypeVar("T")
# Limits that no real checkpoint meets: sizes and positions fit any disk, shapes any framework.
MAX_DIMS = 32
MAX_DEPTH = 64
MAX_SMALL_BYTES = 64 << 20  # config.json, an index: some MB at most in practice
MAX_VALUES = 8_000_000
MAX_NAME_CHARS = 1024

Size = Annotated[int, Meta(ge=0, le=2**62)]
"""A number of bytes or elements, or a position."""
Shape = Annotated[tuple[Size, ...], Meta(max_length=MAX_DIMS)]
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
"""An XXH3-128 checksum, as hexadecimal digits."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _Twice(Exception):
    """A JSON object names a key twice."""


def parse_json(
    raw: bytes,
    where: str,
    *,
    max_bytes: int = MAX_SMALL_BYTES,
    max_values: int = MAX_VALUES,
    deep: bool = False,
    finite: bool = False,
) -> dict[str, Any]:
    """Parse a JSON object strictly: UTF-8, each key once, no more of anything than a checkpoint has.

    Args:
        raw: the file's bytes.
        where: the file's name, for messages.
        max_bytes: the most bytes that are parsed.
        max_values: the most values, keys not counted, that it may hold, so that memory stays in proportion.
        deep: leave its depth to a `typed` that follows, rather than refuse more than 64 levels.
        finite: refuse NaN and infinities, which JSON has not, but Python writes.

    Returns:
        The object.

    Raises:
        SourceError: it is no such JSON object.
    """
    if len(raw) > max_bytes:
        raise SourceError(f"{where}: {len(raw):,} bytes; such files have at most {max_bytes:,}")
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > max_values:
        raise SourceError(f"{where}: holds more than {max_values:,} values; no checkpoint has so many")
    try:
        text = raw.decode()
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_int if b"-0" in raw else None,
            parse_constant=_no_number if finite else None,
        )
        if not deep:
            _check_depth(value, MAX_DEPTH)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except _Twice as error:
        raise SourceError(f"{where}: names {error} twice") from None
    except UnicodeError:
        raise SourceError(f"{where}: is no JSON: it is not in UTF-8, or holds half a character") from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: is no JSON: {str(error) or 'nested too deeply'}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{where}: is no JSON object")
    return value


def typed(value: Any, kind: type[T], where: str) -> T:
    """Check that parsed values are of exactly the types, lengths and ranges that a class declares, and make one of them.

    Args:
        value: dicts, lists, strings and numbers.
        kind: a msgspec.Struct, or another type that msgspec knows.
        where: the file's name, for messages.

    Returns:
        The object.

    Raises:
        SourceError: a value is missing, unknown, or of another type or range.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise SourceError(f"{where}: is damaged: {error}") from None


def brief(value: Any, length: int = 200) -> str:
    """Show a value of any size in a message: cut in depth and in length."""
    text = _short.repr(value)
    return text if len(text) <= length else text[:length] + "..."


class _Brief(reprlib.Repr):
    """Cuts what is shown; numbers of more digits than Python prints are shown by their length."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 200, 200

    def repr_OrderedTable(self, value: dict[Any, Any], level: int) -> str:
        """Show the dict that an OrderedDict in a pickle becomes."""
        return self.repr_dict(value, level)

    def repr_int(self, value: int, level: int) -> str:
        """Show a whole number."""
        return f"<a number of {value.bit_length()} bits>" if value.bit_length() > 256 else repr(value)


_short = _Brief()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Twice(brief(key))
            seen.add(key)
    return table


def _int(text: str) -> int:
    if text == "-0":  # a whole number for Python, a fraction for the readers of other languages
        raise ValueError("-0 is no whole number")
    return int(text)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        if not left:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        for inner in value:
            if isinstance(inner, dict | list):
                _check_depth(inner, left - 1)
