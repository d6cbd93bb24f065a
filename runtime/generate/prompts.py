"""What a model is to go on with: texts and conversations as token ids, and the ids that end what it writes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from moeconv.io.decode import brief, parse_json
from runtime.data.chat import ChatEncoder, chat_spec
from runtime.data.conversations import ASSISTANT, MESSAGES, Conversation, Message, conversation_of
from runtime.data.documents import Bad
from runtime.data.errors import DataError
from runtime.data.tokenizer import load_tokenizer

ROLES = ("system", "developer", "user", ASSISTANT, "tool")
_GENERATION = "generation_config.json"
_STDIN = Path("-")


class Prompts:
    """Turns texts and conversations into token ids."""

    def __init__(self, path: Path, template: Path | None, vocab_size: int) -> None:
        """Load a tokenizer.

        Args:
            path: as `load_tokenizer` takes it.
            template: file with a chat template instead of the tokenizer's own.
            vocab_size: of the model.

        Raises:
            DataError: there is no tokenizer.
        """
        self.tokenizer = cast(Any, load_tokenizer(path))
        self._path, self._template, self._vocab_size = path, template, vocab_size
        self._encoder: ChatEncoder | None = None

    def text(self, text: str) -> list[int]:
        """Give the ids of a text.

        Raises:
            DataError: an id is none of the model's.
        """
        return self._known(list(self.tokenizer(text, verbose=False)["input_ids"]))

    def conversation(
        self, messages: Sequence[Message], tools: list[Any] | None = None, options: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Give the ids of a conversation, up to where the assistant's answer begins.

        Args:
            messages: with roles.
            tools: schemas for the template.
            options: what else the template is given.

        Returns:
            The ids.

        Raises:
            DataError: a role is unknown, the last message is the assistant's, or the template takes no such conversation.
        """
        for number, message in enumerate(messages, 1):
            if message["role"] not in ROLES:
                raise DataError(
                    f"message {number} has the role {brief(message['role'])}; expected one of {', '.join(ROLES)}"
                )
        if messages[-1]["role"] == ASSISTANT:
            raise DataError("the last message is the assistant's: there is nothing to answer; take it out")
        if self._encoder is None:
            how: dict[str, Any] = {"turns": "all", "plain_prompts": False, "append_eod": False}
            self._encoder = ChatEncoder(chat_spec(self.tokenizer, self._path, template=self._template, **how))
        where = str(self._path)
        found = self._encoder.prompt(Conversation(lambda: where, tuple(messages), tools=tools, options=options))
        if isinstance(found, str):
            raise DataError(f"{self._template or where}: {found}")
        return self._known(found)

    def _known(self, ids: list[int]) -> list[int]:
        if ids and max(ids) >= self._vocab_size:
            raise DataError(
                f"the tokenizer {self._path} gives the id {max(ids)}, the model has {self._vocab_size} tokens; name the model's "
                "own with --tokenizer-model"
            )
        return ids


def read_conversation(path: Path) -> Conversation:
    """Read a conversation that is to be answered.

    Args:
        path: file with a JSON object as --finetune-data has them, or with its list of messages; - is standard input.

    Returns:
        The conversation.

    Raises:
        DataError: it can't be read, or is none.
    """
    name = "standard input" if path == _STDIN else str(path)
    try:
        data = sys.stdin.buffer.read() if path == _STDIN else path.read_bytes()
    except OSError as error:
        raise DataError(f"--messages {path}: can't be read: {error.strerror}") from None
    head = data.lstrip()[:1]
    record = parse_json(b'{"%s": %s}' % (MESSAGES.encode(), data) if head == b"[" else data, f"--messages, {name}")
    found = conversation_of(record, lambda: name, answered=False)
    if isinstance(found, Bad) or not found.messages:
        raise DataError(f"--messages, {name}: {found.what if isinstance(found, Bad) else 'has no messages'}")
    return found


def end_ids(folders: Sequence[Path], config: Mapping[str, Any], tokenizer: Any, *, chat: bool) -> list[int]:
    """Give the ids that end what a model writes: those that transformers' `generate` stops at.

    Args:
        folders: where generation_config.json may be, the first that has one counts.
        config: the model's config.json, for models without one.
        tokenizer: of transformers.
        chat: whether an answer ends at the tokenizer's end-of-sequence token, too: it is what the chat template's training
            has put there.

    Returns:
        The ids, rising; empty where nothing says one.

    Raises:
        SourceError: generation_config.json is malformed.
    """
    path = next((folder / _GENERATION for folder in folders if (folder / _GENERATION).is_file()), None)
    stated = None if path is None else parse_json(path.read_bytes(), str(path)).get("eos_token_id")
    stated = config.get("eos_token_id") if stated is None else stated
    ids = stated if isinstance(stated, list) else [stated]
    found = {number for number in ids if type(number) is int}
    own = getattr(tokenizer, "eos_token_id", None)
    if own is not None and (chat or not found):
        found.add(int(own))
    return sorted(found)
