"""What runs the micro-batches of a step, and the simplest such thing: a model that isn't cut into stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """What one forward pass takes, on the device; the micro-batches of a step are all alike in shape."""

    tokens: Tensor
    """[B, S] int64."""
    labels: Tensor
    """[B, S] int64."""
    more: tuple[Any, ...] = ()
    """What every stage is given besides its input; every rank has it, so it is not sent."""


class Runner(Protocol):
    """Runs the micro-batches of a step through this rank's stages."""

    def backwards(self, num_microbatches: int) -> int | None:
        """Backward passes of each parameter with the last of which its reduction may begin; None where that isn't known."""

    def run(self, microbatches: Sequence[Microbatch], *, backward: bool) -> None:
        """Run the micro-batches of a step.

        Args:
            microbatches: in order.
            backward: whether to compute gradients.
        """


class WholeModel:
    """Micro-batches one after another through a whole model."""

    at_once = 1
    """Micro-batches whose passes are mixed."""

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        self._model, self._loss = model, loss

    def backwards(self, num_microbatches: int) -> int | None:
        """As of `Runner.backwards`."""
        return num_microbatches

    def run(self, microbatches: Sequence[Microbatch], *, backward: bool) -> None:
        """Run the micro-batches of a step; arguments as of `Runner.run`."""
        for batch in microbatches:
            loss = self._loss(self._model(batch.tokens, *batch.more), batch.labels)
            if backward:
                loss.backward()  # type: ignore[no-untyped-call]
