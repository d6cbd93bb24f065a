"""What runs the micro-batches of a step, and the simplest such thing: a model that isn't cut into stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor, nn

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Runner(Protocol):
    """Runs the micro-batches of a step through this rank's stages."""

    @property
    def counts_backwards(self) -> bool:
        """Whether each parameter sees one ordinary backward pass for each micro-batch."""

    def run(self, tokens: Sequence[Tensor], labels: Sequence[Tensor], *, backward: bool) -> None:
        """Run the micro-batches of a step.

        Args:
            tokens: [B, S] of each micro-batch; all alike in shape.
            labels: [B, S] of each micro-batch.
            backward: whether to compute gradients.
        """


class WholeModel:
    """Micro-batches one after another through a whole model."""

    counts_backwards = True

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        self._model, self._loss = model, loss

    def run(self, tokens: Sequence[Tensor], labels: Sequence[Tensor], *, backward: bool) -> None:
        """Run the micro-batches of a step; arguments as of `Runner.run`."""
        for inputs, target in zip(tokens, labels, strict=True):
            loss = self._loss(self._model(inputs), target)
            if backward:
                loss.backward()  # type: ignore[no-untyped-call]
