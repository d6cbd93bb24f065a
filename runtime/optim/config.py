"""The optimizer's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.errors import require


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with fp32 master weights."""

    optimizer: str = "adam"
    """adam: AdamW, whose weight decay is decoupled."""
    lr: float = 1e-4
    """Peak learning rate; the trainer's schedule sets the rate of each step."""
    weight_decay: float = 0.01
    """Decoupled; norms, biases and other one-dimensional parameters are not decayed."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 halves the moments: 4 bytes a parameter less, rounded stochastically."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 doesn't clip."""
    skip_nonfinite: bool = False
    """A step with a NaN or inf loss or gradient is left out; False stops the run with a report."""
    initial_loss_scale: float = 2.0**32
    """fp16 only: where dynamic loss scaling starts."""
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000
    """fp16 only: steps without overflow before the scale doubles."""

    def __post_init__(self) -> None:
        require(self.lr >= 0, f"--lr is {self.lr}; expected at least 0")
        require(self.weight_decay >= 0, f"--weight-decay is {self.weight_decay}; expected at least 0")
        require(self.clip_grad >= 0, f"--clip-grad is {self.clip_grad}; expected at least 0")
        for flag, beta in (("--adam-beta1", self.adam_beta1), ("--adam-beta2", self.adam_beta2)):
            require(0 <= beta < 1, f"{flag} is {beta}; expected 0 <= beta < 1")
        require(self.adam_eps > 0, f"--adam-eps is {self.adam_eps}; expected more than 0")
