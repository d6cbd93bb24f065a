"""Where a run's numbers go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """Where a run's numbers go, besides standard output."""

    file: Path | None = None
    tensorboard_dir: Path | None = None
    wandb_project: str | None = None
    wandb_name: str = ""
