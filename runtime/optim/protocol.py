"""What an optimizer is for the engine: states by name, one step, numbers for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from runtime.parallel.shards import Shard


class Optimizer(Protocol):
    """Updates the masters of this rank's shards from their gradients.

    Its states are on disk as `optimizer.<state>.<tensor>`, so a new optimizer needs no other room.
    """

    num_steps: int
    """Updates so far, those that were skipped not counted."""

    @property
    def divisor(self) -> Tensor | None:
        """What gradients were divided by in the last step."""

    def states(self, shard: Shard) -> Sequence[str]:
        """The names of what is kept for each element of a shard, beside the master."""

    def state(self, shard: Shard, name: str) -> Tensor:
        """A state of a shard, [N] as its master; live memory, where the shard has its state."""

    def set_lr(self, lr: float, decoupled_lr: float | None = None) -> None:
        """Set the learning rate of the next step, and that of embedding and head where it is another."""

    def step(self, grad_divisor: Tensor, skip: Tensor) -> None:
        """Update the masters, and the weights that are rounded from them.

        Args:
            grad_divisor: 0-dim; gradients are divided by it first (loss scale over clip coefficient). They stay as they are.
            skip: 0-dim bool; true leaves weights and states as they are.
        """

    def settle(self) -> None:
        """Wait until masters and states in the host's memory are those of the last step; called before they are touched."""

    def scalars(self) -> dict[str, Any]:
        """Give what a checkpoint must keep besides tensors, as JSON; the same on every rank."""

    def load_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Take back what `scalars` gave; what is missing stays as it is."""
