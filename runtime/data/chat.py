"""Conversations as token ids, each with a mark that says whether it is learned: what the assistant says is.

A marked id is twice the id, plus 1 where it is learned. So conversations go through everything that texts go through: parts,
caches, token files, blends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from runtime.data.conversations import ASSISTANT, Conversation, Message
from runtime.data.errors import DataError
from runtime.data.tokenizer import Encoder, EncoderSpec, Tokenizer, check_repeatable, load_tokenizer
from runtime.data.turns import AssistantTurns

T = TypeVar("T")

CHAT_FORMAT = 1
"""Raised when the same conversation would give other marked ids."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_QUOTED = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatSpec:
    """All that another process needs to render and tokenize conversations as this one does."""

    folder: str
    """Where the tokenizer is."""
    template: str | None
    """Instead of the tokenizer's own chat template."""
    named: str
    """Where the template is, for messages."""
    turns: AssistantTurns = "all"
    plain_prompts: bool = False
    """Prompts that are strings, and their completions, stand as they are, without the template."""
    eod: int | None
    """Id at the end of a completion that the template doesn't render; None puts none."""
    vocab_size: int
    max_id: int

    @property
    def num_values(self) -> int:
        """Marked ids are below it."""
        return 2 * (self.max_id + 1)

    @property
    def identity(self) -> dict[str, Any]:
        """What the marked ids depend on."""
        how = [self.template, self.turns, self.plain_prompts, self.eod]
        return {"tokenizer": self.folder, "form of conversations": how}


def chat_spec(
    tokenizer: Tokenizer,
    path: Path,
    *,
    template: Path | None,
    turns: AssistantTurns,
    plain_prompts: bool,
    append_eod: bool,
) -> ChatSpec:
    """Fix how conversations become marked ids.

    Args:
        tokenizer: the tokenizer.
        path: where it came from.
        template: file with a chat template (Jinja) instead of the tokenizer's own.
        turns: which turns of the assistant are learned.
        plain_prompts: whether prompts that are strings are not rendered by the template.
        append_eod: whether a completion that isn't rendered ends with the tokenizer's end-of-sequence token.

    Returns:
        What workers render with.

    Raises:
        DataError: the tokenizer draws at random, or can't tell where in a text a token is.
    """
    check_repeatable(tokenizer, path)
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{path}: its tokenizer is written in Python and doesn't tell which characters a token stands for; "
            "conversations need one with a tokenizer.json"
        )
    text = read_template(template) if template is not None else None
    ids = cast(Any, tokenizer).get_vocab().values()
    eod = tokenizer.eos_token_id if append_eod else None
    return ChatSpec(
        folder=str(path),
        template=text,
        named=str(template or path),
        turns=turns,
        plain_prompts=plain_prompts,
        eod=eod,
        vocab_size=len(tokenizer),
        max_id=max((*ids, len(tokenizer) - 1)),
    )


def read_template(path: Path) -> str:
    """Read a file with a chat template.

    Raises:
        DataError: it can't be read.
    """
    try:
        return path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--chat-template {path}: can't be read: {error}") from None


def open_encoder(spec: EncoderSpec | ChatSpec) -> Encoder | ChatEncoder:
    """Make what turns texts, or conversations, into ids."""
    return ChatEncoder(spec) if isinstance(spec, ChatSpec) else Encoder(spec)


class ChatEncoder:
    """Turns conversations into marked ids."""

    def __init__(self, spec: ChatSpec) -> None:
        self.spec = spec
        self._tokenizer = cast(Any, load_tokenizer(Path(spec.folder)))
        if spec.template is not None:
            self._tokenizer.chat_template = spec.template
        self.has_template = self._tokenizer.chat_template is not None

    def encode(self, conversation: Conversation) -> npt.NDArray[np.int64] | str:
        """Give the marked ids of a conversation.

        Args:
            conversation: what a record holds.

        Returns:
            [N] int64; the first is never marked, because nothing predicts it. Or words for why the template takes no
            such conversation.

        Raises:
            DataError: there is no chat template, or it doesn't let tell what the assistant says.
        """
        if not conversation.messages:
            if self.spec.plain_prompts or not self.has_template:
                return self._plain(conversation.prompt, conversation.completion)
            turns = (
                {"role": "user", "content": conversation.prompt},
                {"role": ASSISTANT, "content": conversation.completion},
            )
            conversation = Conversation(
                conversation.where, turns, 1, tools=conversation.tools, options=conversation.options
            )
        return self._tried(conversation, lambda: self._rendered(conversation))

    def prompt(self, conversation: Conversation) -> list[int] | str:
        """Give the ids of a conversation that the assistant is to answer, up to where its answer begins.

        Args:
            conversation: has messages.

        Returns:
            The ids; or words for why the template takes no such conversation.

        Raises:
            DataError: there is no chat template.
        """
        messages = conversation.messages
        return self._tried(
            conversation, lambda: list(self._apply(conversation, messages, add_generation_prompt=True)["input_ids"])
        )

    def _tried(self, conversation: Conversation, render: Callable[[], T]) -> T | str:
        """What the template makes of a conversation, or words for why it takes none such."""
        if not self.has_template:
            raise DataError(
                f"{conversation.where()}: the tokenizer {self.spec.folder} has no chat template for messages; give one with "
                "--chat-template FILE (Jinja), or the folder of the chat model with --tokenizer-model"
            )
        import jinja2

        try:
            return render()
        except DataError:
            raise
        except jinja2.TemplateError as error:
            return f"the chat template takes no such conversation ({error.message or type(error).__name__})"
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            return f"the chat template takes no such conversation ({type(error).__name__}: {error})"

    def _plain(self, prompt: str, completion: str) -> npt.NDArray[np.int64]:
        """A text as the tokenizer takes it, whose second part is learned, with the end-of-sequence token."""
        encoding = self._tokenizer(prompt + completion, return_offsets_mapping=True, verbose=False)
        ids, trained = (
            list(encoding["input_ids"]),
            _within(encoding["offset_mapping"], [(len(prompt), len(prompt + completion))]),
        )
        eod = self.spec.eod
        if eod is not None and ids and ids[-1] == eod:
            trained[-1] = True
        elif eod is not None:
            ids.append(eod)
            trained.append(True)
        return _marked(ids, trained)

    def _rendered(self, conversation: Conversation) -> npt.NDArray[np.int64]:
        places = [n for n, message in enumerate(conversation.messages) if message["role"] == ASSISTANT]
        learned = [n for n in places if n >= conversation.first]
        learned = learned if self.spec.turns == "all" else learned[-1:]
        if self._has_marks(conversation):
            found = self._apply(conversation, conversation.messages, mask=True)
            ids, trained = list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]
            if learned == places:
                return _marked(ids, trained)
            begin = len(self._prefix(conversation, learned[0], self._text(conversation), prompt=True))
            offsets = self._tokenize(self._text(conversation))["offset_mapping"]
            return _marked(ids, [mark and end > begin for mark, (_, end) in zip(trained, offsets, strict=True)])
        whole = self._text(conversation)
        spans = [
            (len(self._prefix(conversation, n, whole, prompt=True)), len(self._prefix(conversation, n + 1, whole)))
            for n in learned
        ]
        encoding = self._tokenize(whole)
        return _marked(list(encoding["input_ids"]), _within(encoding["offset_mapping"], spans))

    def _has_marks(self, conversation: Conversation) -> bool:
        template = self._tokenizer.get_chat_template(None, conversation.tools)
        return _GENERATION.search(template) is not None

    def _prefix(self, conversation: Conversation, count: int, whole: str, *, prompt: bool = False) -> str:
        """The text of the first messages, with what begins the assistant's next turn; it must begin the whole text."""
        text = self._first(conversation, count, whole, prompt=prompt)
        if not whole.startswith(text):
            raise self._no_prefix(conversation, count, text, whole)
        return text

    def _first(self, conversation: Conversation, count: int, whole: str, *, prompt: bool) -> str:
        if count in (0, len(conversation.messages)):
            return whole if count else ""
        messages = conversation.messages[:count]
        return str(self._apply(conversation, messages, add_generation_prompt=prompt, tokenize=False))

    def _no_prefix(self, conversation: Conversation, count: int, text: str, whole: str) -> DataError:
        at = next(n for n, (a, b) in enumerate(zip(text + "\0", whole + "\0", strict=False)) if a != b)
        last = max(n for n, message in enumerate(conversation.messages) if message["role"] == ASSISTANT)
        helps = self.spec.turns == "all" and whole.startswith(self._first(conversation, last, whole, prompt=True))
        other = ", or learn the last turn alone: --assistant-turns last" if helps else ""
        return DataError(
            f"{conversation.where()}: the chat template of {self.spec.named} writes the first {count} messages otherwise "
            f"when more follow ({text[at : at + _QUOTED]!r} becomes {whole[at : at + _QUOTED]!r}), so it can't be told what "
            "the assistant says; give a template that has {% generation %} and {% endgeneration %} around that, with "
            f"--chat-template FILE{other}"
        )

    def _text(self, conversation: Conversation) -> str:
        return str(self._apply(conversation, conversation.messages, tokenize=False))

    def _apply(
        self,
        conversation: Conversation,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        mask: bool = False,
        tokenize: bool = True,
    ) -> Any:
        how: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": mask} if tokenize else {}
        options = {**(conversation.options or {}), "add_generation_prompt": add_generation_prompt, "tokenize": tokenize}
        return self._tokenizer.apply_chat_template(list(messages), tools=conversation.tools, **options, **how)

    def _tokenize(self, text: str) -> Any:
        """As `apply_chat_template` does: the template writes special tokens itself."""
        return self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)


def _within(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens stand for a character of one of the spans."""
    return [any(begin < last and end > first and end > begin for first, last in spans) for begin, end in offsets]


def _marked(ids: list[int], trained: list[bool]) -> npt.NDArray[np.int64]:
    marked = 2 * np.array(ids, np.int64) + np.array(trained, np.int64)
    marked[:1] &= ~1
    return marked
