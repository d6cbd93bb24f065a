"""Where a run's numbers go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.flag import check_fields, flag


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """Where a run's numbers go, besides standard output."""

    interval: int = flag(1, "--log-interval", at_least=1)
    """Iterations between lines of the log; each gives the mean over them."""
    file: Path | None = flag(None, "--log-file")
    """JSON Lines file that gets every step and evaluation."""
    tensorboard_dir: Path | None = None
    """Folder for TensorBoard's curves."""
    wandb_project: str | None = None
    """Project of Weights & Biases."""
    wandb_name: str = flag("", "--wandb-exp-name")
    """Name of the run in Weights & Biases."""
    per_layer_logging: bool = flag(False, "--moe-per-layer-logging")
    """Log losses and load of each MoE layer, not only their means."""
    params_norm: bool = flag(False, "--log-params-norm")
    """Log the L2 norm of all weights, at the steps that the log has a line of."""
    num_zeros: bool = flag(False, "--log-num-zeros-in-grad")
    """Log how many elements of the gradient are exactly zero, at the steps that the log has a line of."""

    def __post_init__(self) -> None:
        check_fields(self)
