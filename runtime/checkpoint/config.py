"""Where checkpoints come from and go to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.errors import require


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where checkpoints come from and go to."""

    load: Path
    save: Path | None = None
    keep_last: int = 0
    """Checkpoints that are kept; 0 keeps all."""
    ckpt_step: int | None = None
    """Go on from the checkpoint of this iteration instead of the latest, of --save or --load (--ckpt-step). Of a run's
    own saves it becomes the latest at once, so that a restart goes on from what is saved after it."""
    finetune: bool = False
    """Take only the weights from `load`."""
    load_optim: bool = True
    load_rng: bool = True
    save_optim: bool = True

    def __post_init__(self) -> None:
        require(self.keep_last >= 0, f"--keep-last is {self.keep_last}; expected at least 0 (0 keeps all)")
