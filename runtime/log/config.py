"""Where a run's numbers go, and which of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.errors import require

LOG_NAME = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """Where a run's numbers go, besides standard output, and which of them."""

    file: Path | None = None
    """JSON Lines file (--log-file): an object for each interval, evaluation and note; `moeconv report` reads it. None is
    metrics.jsonl in the folder of --save."""
    tensorboard_dir: Path | None = None
    """Folder of TensorBoard files (--tensorboard-dir)."""
    wandb_project: str | None = None
    """Project on Weights & Biases (--wandb-project)."""
    wandb_name: str = ""
    """The run's name on Weights & Biases (--wandb-exp-name)."""
    per_layer: bool = False
    """Losses, load, drops and entropy of each layer's router, too (--moe-per-layer-logging)."""
    dead_expert_steps: int = 100
    """An expert without a token for so many steps is named as dead (--moe-dead-expert-steps)."""
    progress_bar: bool = True
    """Show a bar where standard output is a terminal (--no-progress-bar turns it off)."""

    def __post_init__(self) -> None:
        require(
            self.dead_expert_steps >= 1,
            f"--moe-dead-expert-steps is {self.dead_expert_steps}; expected at least 1 step",
        )
