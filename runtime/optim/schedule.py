"""Learning rate of each step: warm-up, then constant, linear, cosine, inverse square root or warm-up-stable-decay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from runtime.errors import require

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WsdStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]
DECAY_STYLES: tuple[DecayStyle, ...] = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_STYLES: tuple[WsdStyle, ...] = ("exponential", "linear", "cosine", "minus_sqrt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The learning rate as a function of the steps done, as Megatron counts it: the first step has done 0.

    Source:
        https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/optimizer_param_scheduler.py (get_lr).
    """

    max_lr: float
    min_lr: float = 0.0
    warmup_init: float = 0.0
    """Rate of the first warm-up step."""
    warmup_iters: int = 0
    decay_iters: int = 1
    """Steps until min_lr, the warm-up included; afterwards the rate stays there."""
    style: DecayStyle = "linear"
    wsd_style: WsdStyle = "exponential"
    wsd_iters: int = 0
    """WSD only: length of the decay at the end of decay_iters."""

    def __post_init__(self) -> None:
        require(self.style in DECAY_STYLES, f"--lr-decay-style is {self.style!r}; expected one of {DECAY_STYLES}")
        require(
            0 <= self.min_lr <= self.max_lr,
            f"--min-lr is {self.min_lr}; expected 0 to --lr ({self.max_lr})",
        )
        require(
            0 <= self.warmup_init <= self.max_lr,
            f"--lr-warmup-init is {self.warmup_init}; expected 0 to --lr ({self.max_lr})",
        )
        require(self.decay_iters >= 1, f"--lr-decay-iters is {self.decay_iters}; expected at least 1")
        require(
            0 <= self.warmup_iters < self.decay_iters or self.warmup_iters == 0,
            f"--lr-warmup-iters is {self.warmup_iters}; expected less than --lr-decay-iters ({self.decay_iters})",
        )
        require(
            self.style != "WSD" or 0 < self.wsd_iters <= self.decay_iters - self.warmup_iters,
            f"--lr-wsd-decay-iters is {self.wsd_iters}; expected 1 to what follows the warm-up "
            f"({self.decay_iters - self.warmup_iters})",
        )

    def lr(self, steps_done: int) -> float:
        """Give the learning rate of a step.

        Args:
            steps_done: optimizer steps before it.

        Returns:
            The rate.
        """
        if self.warmup_iters and steps_done <= self.warmup_iters:
            return self.warmup_init + (self.max_lr - self.warmup_init) * steps_done / self.warmup_iters
        if self.style == "constant":
            return self.max_lr
        if steps_done > self.decay_iters:
            return self.min_lr
        if self.style == "inverse-square-root":
            rate = self.max_lr * math.sqrt(max(self.warmup_iters, 1) / max(steps_done, 1))
            return max(self.min_lr, rate)
        return self.min_lr + self._remaining(steps_done) * (self.max_lr - self.min_lr)

    def _remaining(self, steps_done: int) -> float:
        """Give the share of the way from min_lr to max_lr, 1 at the start of the decay and 0 at its end."""
        if self.style == "WSD":
            start = self.decay_iters - self.wsd_iters
            if steps_done <= start:
                return 1.0
            done = (steps_done - start) / self.wsd_iters
            shares: dict[WsdStyle, float] = {
                "linear": 1.0 - done,
                "cosine": 0.5 * (math.cos(math.pi * done) + 1.0),
                "exponential": 2.0 * math.pow(0.5, done) - 1.0,
                "minus_sqrt": 1.0 - math.sqrt(done),
            }
            return shares[self.wsd_style]
        done = (steps_done - self.warmup_iters) / (self.decay_iters - self.warmup_iters)
        return 1.0 - done if self.style == "linear" else 0.5 * (math.cos(math.pi * done) + 1.0)
