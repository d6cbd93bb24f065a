"""Routing that stays the same when a forward pass is run again for its activations."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor

_active: list[RoutingTape] = []


class RoutingTape:
    """Keeps the choices of the routers that run in a checkpointed function, for when it runs again.

    Rounding, or another order of a reduction, can turn a near tie the other way in the second run: the saved tensors of
    the first would then belong to other experts. With the tape, the second run takes the first one's choices, and
    statistics are counted once.

    Example:
        torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False, context_fn=RoutingTape().contexts)
    """

    def __init__(self) -> None:
        self._choices: deque[Tensor] = deque()
        self.replaying = False

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of the first and the second run, as checkpoint's context_fn wants them."""
        return self._run(replaying=False), self._run(replaying=True)

    @contextmanager
    def _run(self, *, replaying: bool) -> Iterator[None]:
        self.replaying = replaying
        _active.append(self)
        try:
            yield
        finally:
            _active.pop()

    def record(self, chosen_TK: Tensor) -> None:
        """Keep a router's choices."""
        self._choices.append(chosen_TK)

    def replay(self) -> Tensor:
        """The choices of the router that is next in the order of the first run."""
        return self._choices.popleft()


def active_tape() -> RoutingTape | None:
    """The innermost tape that runs now."""
    return _active[-1] if _active else None
