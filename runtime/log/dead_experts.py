"""Which experts have had no token for long."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class DeadExperts:
    """Counts, for each expert, the steps since it last had a token."""

    def __init__(self, num_steps: int) -> None:
        """Start with every expert alive.

        Args:
            num_steps: an expert without a token for so many steps in a row is dead.
        """
        self._num_steps = num_steps
        self._idle_LE: Tensor | None = None
        self._named: set[tuple[int, int]] = set()

    def step(self, load_LE: Tensor) -> None:
        """Take the load of a step.

        Args:
            load_LE: [L, E] int64 choices of each expert; a layer without any has no experts.
        """
        if self._idle_LE is None:
            self._idle_LE = torch.zeros_like(load_LE)
        idle = (load_LE == 0) & (load_LE.sum(1, keepdim=True) > 0)
        self._idle_LE = torch.where(idle, self._idle_LE + 1, 0)

    def dead(self) -> dict[int, list[int]]:
        """Give the experts that are dead now: layer -> their numbers."""
        found: dict[int, list[int]] = {}
        if self._idle_LE is not None:
            for layer, expert in (self._idle_LE >= self._num_steps).nonzero().tolist():
                found.setdefault(layer, []).append(expert)
        return found

    def news(self) -> list[str]:
        """Give lines on what has changed since the last call: experts that died, and those that came back."""
        now = {(layer, expert) for layer, experts in self.dead().items() for expert in experts}
        died, back = now - self._named, self._named - now
        self._named = now
        lines = []
        if died:
            lines.append(f"experts without a token for {self._num_steps} steps: {describe(_by_layer(died))}")
        if back:
            lines.append(f"experts that have tokens again: {describe(_by_layer(back))}")
        return lines


def _by_layer(pairs: set[tuple[int, int]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for layer, expert in sorted(pairs):
        found.setdefault(layer, []).append(expert)
    return found


def describe(dead: Mapping[int, list[int]], most: int = 8) -> str:
    """Name experts by layer.

    Args:
        dead: layer -> experts.
        most: layers that are named; of the others only the number is told.

    Returns:
        Such as `layer 3: 5 7; layer 9: 0`.
    """
    layers = sorted(dead)
    parts = [f"layer {layer}: {' '.join(map(str, dead[layer]))}" for layer in layers[:most]]
    rest = sum(len(dead[layer]) for layer in layers[most:])
    return "; ".join(parts) + (f"; {rest} more in {len(layers) - most} other layers" if rest else "")
