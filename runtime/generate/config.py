"""What text a model writes, and how its tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.errors import require
from runtime.flag import check_fields, flag


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """What text a model writes instead of being trained (`moeconv generate`)."""

    prompt: tuple[str, ...] = flag((), metavar="TEXT")
    """Texts that the model goes on with, each by itself; - is standard input."""
    chat: bool = False
    """Answer what is typed, turn by turn, through the chat template; what comes from a pipe is one message."""
    messages: Path | None = None
    """File with a conversation to answer: JSON of "messages" with roles, and of "tools"; - is standard input."""
    system: str | None = flag(None, metavar="TEXT")
    """With --chat: what the conversation begins with, in the role system."""
    max_new_tokens: int = flag(256, at_least=1)
    """Tokens that are written at most, for each prompt or answer."""
    temperature: float = flag(0.0, at_least=0)
    """What logits are divided by before a token is drawn; 0 takes the likeliest token each time."""
    top_k: int = flag(0, at_least=0)
    """Draw among so many of the likeliest tokens; 0 is all."""
    top_p: float = flag(1.0, above=0, at_most=1)
    """Draw among the likeliest tokens that together have this probability."""
    json: bool = False
    """Print one JSON object at the end instead of text as it is written."""
    chat_template: Path | None = None
    """File with a chat template instead of the tokenizer's own; the data's."""

    def __post_init__(self) -> None:
        check_fields(self)
        ways = [
            name
            for name, given in (("--prompt", self.prompt), ("--chat", self.chat), ("--messages", self.messages))
            if given
        ]
        require(len(ways) <= 1, f"{' excludes '.join(ways)}: give one of them")
        require(self.system is None or self.chat, "--system begins a conversation: give it with --chat")
        for name, given in (("top-k", self.top_k > 0), ("top-p", self.top_p < 1)):
            require(
                not given or self.temperature > 0,
                f"--{name} is of tokens that are drawn, and --temperature 0 draws none: give one above 0, such as 1",
            )
        reads = [text for text in self.prompt if text == "-"]
        require(len(reads) <= 1, "--prompt - is given twice; standard input can be read once")

    @property
    def wanted(self) -> bool:
        """Whether text is to be written at all."""
        return bool(self.prompt or self.chat or self.messages)
