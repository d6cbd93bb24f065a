"""Where the texts come from that a model goes on with, and where what it writes is shown: on the first rank."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from moeconv.errors import MoeconvError
from runtime.data.conversations import ASSISTANT, Message
from runtime.errors import require
from runtime.generate.config import GenerateConfig
from runtime.generate.generator import GenerationError, Stopped, check_room
from runtime.generate.prompts import Prompts, read_conversation
from runtime.generate.stream import TextStream

_WHY: dict[Stopped, str] = {
    "end": "",
    "length": ", as many as --max-new-tokens",
    "positions": ": the model has no more positions",
}


@dataclass(frozen=True, slots=True)
class Written:
    """A text that a model has written."""

    ids: list[int]
    """Of the prompt."""
    tokens: list[int]
    """What follows, without the token that ends it."""
    text: str
    stopped: Stopped
    seconds: float


class Source(Protocol):
    """Gives texts, and takes what follows them."""

    def texts(self) -> Iterator[list[int]]:
        """Give the ids of each text; `done` is called before the next one is taken."""

    def token(self, token: int) -> None:
        """Take a token of what follows the text, as soon as there is one."""

    def done(self, stopped: Stopped) -> None:
        """End what follows the text."""


class _Shown:
    """Shows what is written as it comes, and keeps it."""

    def __init__(self, prompts: Prompts, *, quiet: bool) -> None:
        self._prompts, self._quiet = prompts, quiet
        self.written: list[Written] = []
        self.begin([])

    def begin(self, ids: list[int]) -> None:
        """Begin a text."""
        self._ids, self._tokens, self._stream = ids, list[int](), TextStream(self._prompts.tokenizer)
        self._start = time.perf_counter()

    def token(self, token: int) -> None:
        """Take a token; see `Source`."""
        self._tokens.append(token)
        self._print(self._stream.push(token))

    def done(self, stopped: Stopped) -> None:
        """End the text; see `Source`."""
        self._print(self._stream.end() + "\n")
        seconds = time.perf_counter() - self._start
        self.written.append(Written(self._ids, self._tokens, self._stream.whole(), stopped, seconds))
        count = len(self._tokens)
        if not self._quiet:
            print(f"[{count} tokens{_WHY[stopped]}; {count / seconds:.1f} tokens/s]", file=sys.stderr, flush=True)

    def _print(self, text: str) -> None:
        if self._quiet:
            return
        try:
            print(text, end="", flush=True)
        except BrokenPipeError:
            raise GenerationError("standard output was closed before the text was written") from None


class OneShot(_Shown):
    """Texts that are all there at the start."""

    def __init__(self, config: GenerateConfig, prompts: Prompts, longest: int, about: dict[str, Any]) -> None:
        """Read them.

        Args:
            config: names them.
            prompts: makes ids of them.
            longest: positions of the model; 0 where there is no limit.
            about: what --json says beside the texts.

        Raises:
            MoeconvError: one can't be read, or leaves no room.
        """
        super().__init__(prompts, quiet=config.json)
        self._json, self._about = config.json, about
        self._texts: list[tuple[Any, list[int]]] = []
        if config.messages is not None:
            found = read_conversation(config.messages)
            messages = list(found.messages)
            self._texts.append((messages, prompts.conversation(messages, found.tools, found.options)))
        elif config.chat:
            messages = [*_system(config), {"role": "user", "content": sys.stdin.read().strip()}]
            require(bool(messages[-1]["content"]), "--chat: standard input holds no message")
            self._texts.append((messages, prompts.conversation(messages)))
        else:
            texts = [sys.stdin.read() if text == "-" else text for text in config.prompt]
            self._texts += [(text, prompts.text(text)) for text in texts]
        for _, ids in self._texts:
            check_room(ids, longest)

    def texts(self) -> Iterator[list[int]]:
        """Give the texts; see `Source`."""
        for number, (text, ids) in enumerate(self._texts, 1):
            if len(self._texts) > 1 and not self._quiet:
                print(f"--- {number} of {len(self._texts)}: {text}", file=sys.stderr, flush=True)
            self.begin(ids)
            yield ids
        if self._json:
            print(json.dumps(self._about | {"texts": list(map(self._record, range(len(self.written))))}), flush=True)

    def _record(self, number: int) -> dict[str, Any]:
        done, given = self.written[number], self._texts[number][0]
        return {
            "prompt" if isinstance(given, str) else "messages": given,
            "prompt_tokens": len(done.ids),
            "text": done.text,
            "tokens": done.tokens,
            "stopped": done.stopped,
            "seconds": round(done.seconds, 3),
        }


class Talk(_Shown):
    """A conversation at a terminal, turn by turn."""

    def __init__(self, config: GenerateConfig, prompts: Prompts, longest: int) -> None:
        """Begin it; arguments as of `OneShot`.

        Raises:
            MoeconvError: there is no chat template.
        """
        super().__init__(prompts, quiet=False)
        self._begins, self._longest = _system(config), longest
        self._messages: list[Message] = list(self._begins)
        prompts.conversation(
            [*self._begins, {"role": "user", "content": "?"}]
        )  # what is wrong is said before the model is loaded

    def texts(self) -> Iterator[list[int]]:
        """Give the conversation after each message that is typed; see `Source`."""
        print("/new begins another conversation, /exit or Ctrl-D ends.", file=sys.stderr, flush=True)
        while (line := _typed()) is not None:
            if line == "/new":
                self._messages = list(self._begins)
            elif line:
                self._messages.append({"role": "user", "content": line})
                try:
                    ids = self._prompts.conversation(self._messages)
                    check_room(ids, self._longest)
                except MoeconvError as error:
                    self._messages.pop()
                    print(f"error: {error}", file=sys.stderr, flush=True)
                    continue
                self.begin(ids)
                yield ids
                self._messages.append({"role": ASSISTANT, "content": self.written.pop().text})


def _typed() -> str | None:
    """A line from the terminal; None at its end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines)
    try:
        line = input("> ").strip()
    except EOFError:
        print(flush=True)
        return None
    return None if line == "/exit" else line


def _system(config: GenerateConfig) -> list[Message]:
    return [] if config.system is None else [{"role": "system", "content": config.system}]


def open_source(config: GenerateConfig, prompts: Prompts, longest: int, about: dict[str, Any]) -> Source:
    """Open what a run is to go on with; arguments as of `OneShot`.

    Raises:
        MoeconvError: it can't be read, or the model can't go on with it.
    """
    if config.chat and sys.stdin.isatty():
        require(not config.json, "--json with --chat is for one message: give it on standard input")
        return Talk(config, prompts, longest)
    return OneShot(config, prompts, longest, about)
