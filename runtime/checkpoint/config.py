"""Where checkpoints come from and go to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.flag import check_fields, flag


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Where checkpoints come from and go to."""

    load: Path | None = None
    """A checkpoint of any layout to start from: sharded, Hugging Face, or the --save folder of a run. Where it is an empty
    folder, the one of --save, or left out, weights are drawn."""
    save: Path | None = None
    """Folder for checkpoints; where it has one, the run goes on from the latest, whatever --load says."""
    save_interval: int = flag(0, at_least=0)
    """Iterations between saves; 0 saves at the end only."""
    keep_last: int = flag(0, at_least=0)
    """Checkpoints that are kept; 0 keeps all."""
    keep_best: bool = False
    """Save after each evaluation (--eval-interval) with the lowest validation loss so far, under the name `best` beside
    `latest`; --keep-last leaves it."""
    ckpt_step: int | None = None
    """Go on from the checkpoint of this iteration instead of the latest, of --save or --load (--ckpt-step). Of a run's
    own saves it becomes the latest at once, so that a restart goes on from what is saved after it."""
    exit_on_missing_checkpoint: bool = False
    """Never draw weights: where --load, or --save without it, has no checkpoint, the run is refused."""
    override_router: bool = False
    """Let the --moe-router flags change what the model's router computes, on purpose: config.json says so from then on."""
    finetune: bool = False
    """Take only the weights from --load: the run starts at iteration 0 with new optimizer states."""
    load_optim: bool = flag(True, off="--no-load-optim")
    """Take the optimizer's state from --load; --no-load-optim starts with new moments."""
    load_rng: bool = flag(True, off="--no-load-rng")
    """Take the seed from --load; --no-load-rng takes --seed."""
    save_optim: bool = flag(True, off="--no-save-optim")
    """Save the optimizer's state; --no-save-optim saves weights only, and no run can go on exactly from that."""

    async_save: bool = flag(True, "--async-save")
    """Train on while a save is written, from a copy in the host's memory (a save that has no room for it waits and says so);
    with --no-async-save training waits for every save, which then takes at most 32 MiB of the host a rank."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.finetune:
            object.__setattr__(self, "load_optim", False)
            object.__setattr__(self, "load_rng", False)
