"""Room for rows that travel between ranks, set aside before their numbers are known, so that the host needn't wait for them.

How many rows go where is known on the device alone. A step that runs with room set aside never asks: what each rank sends to
each other one, and what a rank's experts compute, have fixed shapes, and the rows' real numbers stay on the device. Nothing
is ever dropped: where a step has needed more room than there was, its update is left out and it is done again with the
numbers read, after which there is more room.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.moe.row_margin import MARGIN

GROWTH = 1.5
"""Of room that has been outgrown, at least: with it go the graphs, which take seconds to be made."""
TRIAL = 2
"""Steps until room counts as settled."""
MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class RowRoom:
    """How many rows there is room for, the same on every rank."""

    sent: int
    """From a rank to each rank of its group: tokens."""
    held: int
    """Of a rank's experts: choices."""


class RowBudget:
    """The room of a model's MoE layers, all alike."""

    def __init__(self, device: torch.device) -> None:
        """Begin without room: numbers are read until `agree`.

        Args:
            device: of the layers.
        """
        self.room: RowRoom | None = None
        self._before = RowRoom(0, 0)
        self._steps = 0
        self._most = torch.zeros(2, dtype=torch.int32, device=device)
        self._limits = torch.zeros_like(self._most)
        self._read = [0, 0]

    @property
    def sent_needed(self) -> Tensor:
        """0-dim int32, the tokens that a rank has most had for one rank in this step."""
        return self._most[0]

    @property
    def held_needed(self) -> Tensor:
        """0-dim int32, the choices of a rank's experts of which there were most."""
        return self._most[1]

    def begin(self) -> None:
        """Begin a step."""
        self._most.zero_()
        self._steps += 1

    @property
    def settled(self) -> bool:
        """Whether the room has been enough for some steps: what is made for it may be dear."""
        return self.room is not None and self._steps > TRIAL

    def note(self, sent: int, held: int) -> None:
        """Take numbers that the host has read: tokens for the rank that gets most, choices of this rank's experts."""
        self._read = [max(self._read[0], sent), max(self._read[1], held)]

    def outgrown(self) -> Tensor:
        """[1] fp64 on the device, more than 0 where this step had too little room on this rank; where numbers are read, nothing is needed."""
        return (self._most > self._limits).any().double().view(1)

    def read_again(self) -> None:
        """Do without room until `agree`: this step's numbers are to be read."""
        self.room, self._before = None, self.room or self._before

    def agree(self) -> None:
        """Set room aside for what has been read, and some more; after too little, for much more. Collective, over all ranks."""
        most = torch.tensor(self._read, dtype=torch.int64, device=self._most.device)
        if dist.is_initialized():
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        before = (self._before.sent, self._before.held)
        wanted = (max(n * MARGIN, b * GROWTH) for n, b in zip(most.tolist(), before, strict=True))
        self.set(RowRoom(*(-(-int(number) // MULTIPLE) * MULTIPLE for number in wanted)))

    def set(self, room: RowRoom) -> None:
        """Set room aside, the same on every rank."""
        self.room, self._steps = room, 0
        self._limits.copy_(torch.tensor([room.sent, room.held], dtype=torch.int32))
