"""What the largest number of an 8-bit format stands for, tensor by tensor.

A bound is the absolute value that becomes the format's largest number; a product of 8-bit numbers is scaled by its
operands' bounds. Tensorwise, a tensor's bound is its own largest absolute value, for which it is read once more. Delayed,
it is the largest of the last steps, so that the pass which makes a tensor can write it in 8 bits at once; what is larger
saturates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.fp8.config import Fp8Config

HISTORY_STEPS = 16


class Scaling:
    """The bounds of all tensors of this rank that are quantised, in places (slots) that modules take when they are built."""

    def __init__(self, config: Fp8Config, device: torch.device) -> None:
        """Begin with no history; the arrays come with the first step."""
        self.config = config
        self.step = 0
        """Counts `begin`: weights that were quantised at another count are stale."""
        self._device = device
        self._num_slots = 0
        self._used: set[int] = set()
        self._known: set[int] = set()
        self._amaxes = self._bounds = self._history = torch.empty(0)

    def take_slot(self) -> int:
        """Make a place for a tensor's history."""
        self._num_slots += 1
        return self._num_slots - 1

    def begin(self, *, trains: bool) -> None:
        """Begin a step, or an evaluation: weights may have changed.

        Args:
            trains: a step follows, and delayed bounds what the last one found; an evaluation, which knows no gradients, keeps
                them.
        """
        self.step += 1
        if self.config.recipe != "delayed":
            return
        if self._amaxes.shape[0] != self._num_slots:
            self._amaxes = torch.zeros(self._num_slots, device=self._device)
            self._bounds = torch.ones_like(self._amaxes)
            self._history = self._amaxes.repeat(HISTORY_STEPS, 1)
        if not trains or not self._used:
            return
        found = torch.where(torch.isfinite(self._amaxes), self._amaxes, self._bounds)
        self._history = torch.cat([found.unsqueeze(0), self._history[:-1]])
        most = self._history.amax(0)
        self._bounds = torch.where(most > 0, most, 1.0)
        self._amaxes = torch.zeros_like(self._amaxes)
        self._known |= self._used
        self._used = set()

    def bound(self, slot: int, find: Callable[[Tensor], object]) -> tuple[Tensor, Tensor | None]:
        """Give a tensor's bound.

        Args:
            slot: its place.
            find: raises a number [1] on the device to the tensor's largest absolute value; called where the bound depends on
                it: tensorwise, and delayed in a tensor's first step.

        Returns:
            [1] fp32; and, [1], what the pass that quantises is to raise to the largest absolute value that it meets, None if
            that is known.
        """
        delayed = self.config.recipe == "delayed"
        if delayed:
            self._used.add(slot)
            if slot in self._known:
                return self._bounds[slot : slot + 1], self._amaxes[slot : slot + 1]
        amax = torch.zeros(1, device=self._device)
        find(amax)
        if delayed:
            place = self._amaxes[slot : slot + 1]
            torch.maximum(place, amax, out=place)
        return amax, None
