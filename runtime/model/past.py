"""What a model that writes keeps of the positions before: keys and values of each layer.

Legend: S positions of a pass, B sequences, G key/value heads, K elements of a key, V elements of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST = 256
"""Positions that there is room for at first; it doubles when it is full."""


class Past:
    """Keys and values of the layers of this rank, and where the pass under way stands.

    A pass may compute more positions than are kept of it, so that they divide over the ranks: those at its end see what
    is before them, nothing sees them.
    """

    def __init__(self) -> None:
        self.length = 0
        """Positions that are kept."""
        self.count = 0
        """Positions of the pass under way that will be kept; its logits are those of the last of them."""
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, count: int) -> None:
        """Begin a pass of which so many positions are kept."""
        self.count = count

    def end(self) -> None:
        """Keep what the pass has computed; every layer has been through it."""
        self.length, self.count = self.length + self.count, 0

    def forget(self, length: int) -> None:
        """Keep the first positions alone.

        Args:
            length: how many; at most those that are kept.
        """
        assert length <= self.length, (length, self.length)
        self.length = length

    def extend(self, layer: int, k_SBGK: Tensor, v_SBGV: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's keys and values of the pass behind those before.

        Args:
            layer: its number.
            k_SBGK: [S, B, G, K], turned by their positions.
            v_SBGV: [S, B, G, V].

        Returns:
            [length + S, B, G, K] and [length + S, B, G, V], views of what is kept.
        """
        begin, end = self.length, self.length + k_SBGK.shape[0]
        before = self._kept.get(layer)
        kept = tuple(
            _with_room(None if before is None else before[place], x, begin, end)
            for place, x in enumerate((k_SBGK, v_SBGV))
        )
        self._kept[layer] = (kept[0], kept[1])
        for room, x in zip(kept, (k_SBGK, v_SBGV), strict=True):
            room[begin:end] = x
        return kept[0][:end], kept[1][:end]


def _with_room(before: Tensor | None, x: Tensor, begin: int, end: int) -> Tensor:
    """Memory for `end` positions like x, whose first `begin` are those of `before`."""
    if before is not None and before.shape[0] >= end:
        return before
    size = _FIRST
    while size < end:
        size *= 2
    room = torch.empty(size, *x.shape[1:], dtype=x.dtype, device=x.device)
    if before is not None:
        room[:begin] = before[:begin]
    return room
