"""Where a run's numbers go, and which of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.flag import check_fields, flag

LOG_NAME = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """Where a run's numbers go, besides standard output, and which of them."""

    interval: int = flag(1, "--log-interval", at_least=1)
    """Iterations between lines of the log; each gives the mean over them."""
    file: Path | None = flag(None, "--log-file")
    """JSON Lines file that gets every line of the log, evaluation and note, and that `moeconv report` reads; by default
    metrics.jsonl in the folder of --save."""
    tensorboard_dir: Path | None = None
    """Folder for TensorBoard's curves."""
    wandb_project: str | None = None
    """Project of Weights & Biases."""
    wandb_name: str = flag("", "--wandb-exp-name")
    """Name of the run in Weights & Biases."""
    per_layer_logging: bool = flag(False, "--moe-per-layer-logging")
    """Log losses, load, drops and entropy of each MoE layer's router, not only their means."""
    dead_expert_steps: int = flag(100, "--moe-dead-expert-steps", at_least=1)
    """Steps without a token after which an expert is named as dead."""
    progress_bar: bool = flag(True, off="--no-progress-bar")
    """Show a bar where standard output is a terminal."""
    params_norm: bool = flag(False, "--log-params-norm")
    """Log the L2 norm of all weights, at the steps that the log has a line of."""
    num_zeros: bool = flag(False, "--log-num-zeros-in-grad")
    """Log how many elements of the gradient are exactly zero, at the steps that the log has a line of."""

    def __post_init__(self) -> None:
        check_fields(self)
