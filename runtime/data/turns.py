"""Which turns of the assistant are learned."""

from typing import Literal

AssistantTurns = Literal["all", "last"]
