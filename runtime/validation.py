"""The evaluations of a run so far: which was the best, and how long none has been better."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runtime.checkpoint import folder as folders
from runtime.checkpoint.config import CheckpointConfig
from runtime.settings.steps import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What the evaluations on the validation data came to; checkpoints keep it, so that a run goes on with it."""

    iteration: int = 0
    """Of the last evaluation; 0 before the first."""
    best_iteration: int = 0
    """Of the lowest loss; 0 before the first."""
    best_loss: float | None = None
    """The lowest loss."""
    reference_loss: float | None = None
    """What a loss is compared with that is to count as better: the last one that was."""
    waited: int = 0
    """Evaluations since then."""

    def after(self, iteration: int, loss: float, min_delta: float) -> Validation:
        """Count an evaluation.

        Args:
            iteration: after which it was.
            loss: what it found; NaN and infinity are never better.
            min_delta: by how much a loss must be lower to count as better.

        Returns:
            The evaluations with this one.
        """
        best = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        better = math.isfinite(loss) and (self.reference_loss is None or loss < self.reference_loss - min_delta)
        return dataclasses.replace(
            self,
            iteration=iteration,
            best_iteration=iteration if best else self.best_iteration,
            best_loss=loss if best else self.best_loss,
            reference_loss=loss if better else self.reference_loss,
            waited=0 if better else self.waited + 1,
        )

    def line(self, patience: int) -> str:
        """Say in a line how it stands.

        Args:
            patience: evaluations that the run waits for a better one; 0 waits for ever.
        """
        if self.best_loss is None:
            return "no validation loss so far is a number"
        best = f"the lowest validation loss is {self.best_loss:.6f}, after iteration {self.best_iteration}"
        counts = f"; {self.waited} of {patience} evaluations without a better one" if patience and self.waited else ""
        return best + counts


class Referee:
    """Decides from a run's evaluations when it ends and which checkpoint is its best; the same on every rank."""

    def __init__(
        self, train: TrainConfig, checkpoint: CheckpointConfig, note: Callable[[str], None], *, first: bool
    ) -> None:
        """Begin a run.

        Args:
            train: --early-stop.
            checkpoint: --keep-best and --save.
            note: takes lines for the log.
            first: whether this rank moves the link; one does.
        """
        self._patience, self._min_delta, self._note = train.early_stop, train.early_stop_min_delta, note
        self._folder = checkpoint.save if checkpoint.keep_best else None
        self._first = first
        self._seen = Validation()

    @property
    def _wanted(self) -> bool:
        return self._patience > 0 or self._folder is not None

    def resume(self, stored: dict[str, Any]) -> None:
        """Go on with what a checkpoint of the run keeps."""
        self._seen = Validation(**stored)
        self.mark()

    def stored(self) -> dict[str, Any]:
        """Give what a checkpoint keeps; empty where nothing depends on evaluations."""
        return dataclasses.asdict(self._seen) if self._wanted else {}

    def judge(self, iteration: int, loss: float) -> str:
        """Count an evaluation.

        Args:
            iteration: after which it was.
            loss: what it found.

        Returns:
            Why the run is to be left; empty to go on.
        """
        if not self._wanted:
            return ""
        self._seen = self._seen.after(iteration, loss, self._min_delta)
        self._note(self._seen.line(self._patience))
        return self.reason

    def misses(self, iteration: int) -> bool:
        """Say whether an evaluation after a step would count, and hasn't been counted."""
        return self._wanted and self._seen.iteration != iteration

    def keeps(self, iteration: int) -> bool:
        """Say whether the weights after a step are to be kept as the best."""
        return self._folder is not None and 0 < iteration == self._seen.iteration == self._seen.best_iteration

    @property
    def is_over(self) -> bool:
        """Whether evaluations have not become better for as long as the run waits."""
        return 0 < self._patience <= self._seen.waited

    @property
    def reason(self) -> str:
        """Why the run is to be left; empty to go on."""
        return f"--early-stop {self._patience}: no better evaluation in so many" if self.is_over else ""

    def mark(self) -> None:
        """Let `best` name the checkpoint of the best evaluation, which is on disk if it is complete there."""
        if self._first and self._folder is not None:
            folders.point_best(self._folder, self._seen.best_iteration)
