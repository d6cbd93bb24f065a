"""How many operations a piece of code launches: on a GPU each costs the host some microseconds."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Counts the operations that do work; views, detached ones and bare memory don't."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not (func.is_view or "empty" in str(func) or "detach" in str(func)):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))
