"""Dynamic loss scaling for fp16: gradients are kept in range by a factor that halves when they overflow."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.optim.config import OptimConfig


@dataclass(slots=True)
class LossScale:
    """The factor on the loss, and how long it has held."""

    scale: float
    good_steps: int = 0

    @classmethod
    def start(cls, config: OptimConfig, *, fp16: bool) -> LossScale:
        """The scale at the start of a run: 1 unless gradients are fp16."""
        return cls(config.initial_loss_scale if fp16 else 1.0)

    def overflow(self, config: OptimConfig) -> bool:
        """Halve the scale after a step whose gradients were not finite.

        Returns:
            Whether there was room: False at the smallest scale, where the fault isn't the scale's.
        """
        self.good_steps = 0
        if self.scale <= config.min_loss_scale:
            return False
        self.scale = max(self.scale / 2, config.min_loss_scale)
        return True

    def success(self, config: OptimConfig) -> None:
        """Double the scale after enough steps without overflow."""
        self.good_steps += 1
        if self.good_steps >= config.loss_scale_window:
            self.scale, self.good_steps = self.scale * 2, 0
