"""Conversations in data files: messages with roles, or a prompt and its completion, each record checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.data.documents import Bad, has_surrogate, read_records
from runtime.data.errors import DataError
from runtime.data.units import Unit

MESSAGES, PROMPT, COMPLETION = "messages", "prompt", "completion"
TOOLS, OPTIONS = "tools", "chat_template_kwargs"
ASSISTANT = "assistant"
_COLUMNS = (MESSAGES, PROMPT, COMPLETION, TOOLS, OPTIONS)
_FORMS = f'expected an object with "{MESSAGES}" (a list of messages), or with "{PROMPT}" and "{COMPLETION}"'

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A record: what the assistant says in it is learned."""

    where: Callable[[], str]
    """Names its place."""
    messages: tuple[Message, ...] = ()
    first: int = 0
    """Messages before this one are the prompt: nothing of theirs is learned."""
    prompt: str = ""
    """A prompt that is no list of messages, and its completion; `messages` are () then."""
    completion: str = ""
    tools: list[Any] | None = None
    options: Mapping[str, Any] | None = None
    """What else the template is given."""


def read_conversations(unit: Unit) -> Iterator[Conversation | Bad]:
    """Read a unit's conversations.

    Args:
        unit: lines, elements or rows.

    Yields:
        Conversations in order, and what can't be read.

    Raises:
        DataError: the file is damaged, or is no file of conversations.
    """
    if unit.reads == "text":
        raise DataError(
            f"{unit.path}: is plain text, which holds no conversations; {_FORMS} in each line of JSON Lines"
        )
    table = unit.reads in ("parquet", "arrow")

    def take(record: Any, where: Callable[[], str]) -> Conversation | Bad:
        return conversation_of(_without_nulls(record) if table else record, where)

    def columns(names: list[str]) -> list[str]:
        found = [name for name in _COLUMNS if name in names]
        if MESSAGES not in found and not {PROMPT, COMPLETION} <= set(found):
            raise DataError(f"{unit.path}: has the columns {', '.join(names)}; {_FORMS}")
        return found

    return read_records(unit, take, columns)


def _without_nulls(value: Any) -> Any:
    """A table has every key in every row; those that a record lacks are null in it."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def conversation_of(record: Any, where: Callable[[], str], *, answered: bool = True) -> Conversation | Bad:
    """Take a conversation from a record.

    Args:
        record: what a line or row holds.
        where: names its place.
        answered: whether the assistant must say something in it.

    Returns:
        The conversation, or what is wrong with the record.
    """
    if not isinstance(record, dict):
        return Bad(where, _FORMS)
    try:
        more: dict[str, Any] = {"tools": _tools(record.get(TOOLS)), "options": _options(record.get(OPTIONS))}
        if record.get(MESSAGES) is not None:
            messages = _messages(record[MESSAGES], MESSAGES, learned=answered)
            made = Conversation(where, tuple(messages), **more)
        elif record.get(PROMPT) is not None and record.get(COMPLETION) is not None:
            made = _prompted(record[PROMPT], record[COMPLETION], where, more)
        else:
            keys = ", ".join(sorted(map(str, record))[:8])
            raise _WrongError(f"{_FORMS}; it has {keys or 'none'}{_advice(record)}")
    except _WrongError as wrong:
        return Bad(where, str(wrong))
    if any(not text.isascii() and has_surrogate(text) for text in _strings(record)):
        return Bad(where, "its text holds a lone surrogate")
    return made


class _WrongError(Exception):
    """What is wrong with a record."""


def _advice(record: dict[Any, Any]) -> str:
    if "conversations" in record:
        return '; rename "conversations", "from" and "value" (human, gpt) to "messages", "role" and "content" (user, assistant)'
    return "; text without conversations is given with --data-path" if "text" in record else ""


def _prompted(prompt: Any, completion: Any, where: Callable[[], str], more: dict[str, Any]) -> Conversation:
    if isinstance(prompt, str) and isinstance(completion, str):
        return Conversation(where, prompt=prompt, completion=completion, **more)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise _WrongError(
            f'"{PROMPT}" is {_kind(prompt)} and "{COMPLETION}" {_kind(completion)}; expected two strings or two lists of messages'
        )
    before = _messages(prompt, PROMPT, learned=False)
    return Conversation(where, (*before, *_messages(completion, COMPLETION)), len(before), **more)


def _messages(value: Any, name: str, *, learned: bool = True) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _WrongError(f'its "{name}" is {_kind(value)}; expected a list of messages')
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise _WrongError(
                f'message {number} of "{name}" is {_kind(message)}; expected an object with "role" and "content"'
            )
        if not isinstance(message.get("role"), str):
            keys = ", ".join(sorted(map(str, message))[:8])
            raise _WrongError(
                f'message {number} of "{name}" has no "role" that is a string; it has {keys or "nothing"}'
            )
        if not isinstance(message.get("content"), str | list | None):
            raise _WrongError(
                f'the "content" of message {number} of "{name}" is {_kind(message["content"])}; expected a string'
            )
        if message.get("content") is None and len(message.keys() - {"role", "content", "name"}) == 0:
            raise _WrongError(f'message {number} of "{name}" has no "content"')
    if learned and all(message["role"] != ASSISTANT for message in value):
        roles = ", ".join(dict.fromkeys(message["role"] for message in value))
        raise _WrongError(
            f'no message of "{name}" has the role "{ASSISTANT}", so nothing is learned; the roles are {roles}'
        )
    return value


def _tools(value: Any) -> list[Any] | None:
    """A list of schemas, which tables often hold as one string."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise _WrongError(f'its "{TOOLS}" are a string that is no JSON') from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _WrongError(f'its "{TOOLS}" are {_kind(value)}; expected a list of objects')
    return value


def _options(value: Any) -> Mapping[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise _WrongError(f'its "{OPTIONS}" are {_kind(value)}; expected an object')
    return value or None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a truth value"}
    if isinstance(value, list) and not value:
        return "an empty list"
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
