"""The global batch size of each step: constant, or ramped up over the first samples of a run as Megatron does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runtime.errors import require


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSizes:
    """How many sequences a step takes after so many have been consumed.

    Source:
        https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/num_microbatches_calculator.py
        (RampupBatchsizeNumMicroBatchesCalculator)
    """

    full: int
    """Sequences of a step after the ramp."""
    start: int = 0
    """Sequences of the first steps; 0: there is no ramp."""
    increment: int = 0
    """What each stage of the ramp adds."""
    samples: int = 0
    """Sequences consumed until the full size."""

    @classmethod
    def ramp(cls, full: int, values: Sequence[int]) -> BatchSizes:
        """Make the sizes that --rampup-batch-size asks for.

        Args:
            full: --global-batch-size.
            values: start, increment and samples; none are a constant size.

        Returns:
            The sizes.

        Raises:
            ConfigError: the ramp doesn't lead to the full size.
        """
        if not values:
            return cls(full=full)
        shown = f"--rampup-batch-size {' '.join(map(str, values))}"
        require(len(values) == 3, f"{shown}: expected three numbers, START INCREMENT SAMPLES")
        start, increment, samples = values
        require(
            start >= 1 and increment >= 1 and samples >= 1,
            f"{shown}: each of START, INCREMENT and SAMPLES is at least 1",
        )
        require(
            start < full and (full - start) % increment == 0,
            f"{shown} with --global-batch-size {full}: the way from {start} to {full} is no whole number of steps of "
            f"{increment}; a START below the global batch size and an INCREMENT that divides the difference fit",
        )
        return cls(full=full, start=start, increment=increment, samples=samples)

    def at(self, consumed: int) -> int:
        """Give the size of the step that begins after so many sequences.

        Args:
            consumed: sequences of all steps before it.

        Returns:
            Its sequences.
        """
        if not self.start or consumed > self.samples:
            return self.full
        stages = (self.full - self.start) // self.increment
        return self.start + int(consumed / (self.samples / stages)) * self.increment

    def all(self) -> Iterator[int]:
        """Give every size that a run may have, rising."""
        yield from range(self.start, self.full, self.increment) if self.start else ()
        yield self.full

    def consumed(self, steps: int) -> int:
        """Count the sequences that the first steps of a run take."""
        taken = 0
        while steps and self.start and taken <= self.samples:
            taken, steps = taken + self.at(taken), steps - 1
        return taken + steps * self.full

    def steps(self, samples: int) -> tuple[int, int]:
        """Count the steps of a run, as Megatron does: what is left at its end for less than a step isn't trained on.

        Args:
            samples: --train-samples.

        Returns:
            Steps, and the sequences that they take.

        Source:
            https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/training/training.py (update_train_iters)
        """
        count = consumed = 0
        while self.start and consumed <= self.samples and consumed <= samples:
            consumed += self.at(consumed)
            count += 1
        rest = max(samples - consumed, 0) // self.full
        return count + rest, consumed + rest * self.full
