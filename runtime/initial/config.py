"""How a model that comes from no checkpoint begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.flag import check_fields, flag


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """How a model that comes from no checkpoint begins."""

    init_config: str | None = flag(None, metavar="MODEL")
    """Train a new model with the architecture of this config.json: the file, a folder that has it, or a model's id on the
    hub. No weights of it are read. Without it, the architecture flags say what the model is."""
    init_method_std: float | None = flag(None, above=0)
    """Standard deviation of drawn weights; default: what config.json says, 0.02 where it is silent."""
    embedding_init_method_std: float | None = flag(None, above=0)
    """Standard deviation of drawn embeddings; default: that of the other weights."""
    use_scaled_init_method: bool = flag(True, off="--no-scaled-init-method")
    """Draw the output projections of attention and feed-forward parts with a deviation divided by sqrt(2 * layers)."""

    def __post_init__(self) -> None:
        check_fields(self)
        # So that the file with a run's settings works from any folder.
        if self.init_config is not None and Path(self.init_config).exists():
            object.__setattr__(self, "init_config", str(Path(self.init_config).absolute()))
