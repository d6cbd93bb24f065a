"""Everything that a run is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moeconv.families.base import Model
from runtime.checkpoint.config import CheckpointConfig
from runtime.data.config import DataConfig
from runtime.fp8.config import Fp8Config
from runtime.generate.config import GenerateConfig
from runtime.initial.config import InitConfig
from runtime.log.config import LogConfig
from runtime.model.dtypes import DtypeName
from runtime.model.lora import LoraConfig
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.optim.schedule import Schedule, ScheduleConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.settings.steps import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that a run is made of; fields but the model and the schedule are groups of settings."""

    model: Model
    """The checkpoint's; with adapters, if the run trains some."""
    parallel: ParallelConfig
    moe: MoEConfig | None
    """None for a dense model."""
    fp8: Fp8Config
    optim: OptimConfig
    lora: LoraConfig
    learning_rate: ScheduleConfig
    """The schedule as it was given."""
    schedule: Schedule
    """The schedule that follows from it."""
    recompute: RecomputeConfig
    train: TrainConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    init: InitConfig
    log: LogConfig
    generate: GenerateConfig | None = None
    """Of a run that writes text; None: it trains or evaluates."""
    stated: dict[str, Any] = field(default_factory=dict)
    """Flag -> value, for flags that stated something of the model; they were compared with it."""
    drawn: bool = False
    """Whether weights are drawn, not loaded."""
    notes: tuple[str, ...] = ()
    """Lines for the log: what was given and has no effect."""

    @property
    def dtype(self) -> DtypeName:
        """Type that weights and activations are computed in."""
        assert self.train.dtype is not None, "the checkpoint's own is filled in when a run is put together"
        return self.train.dtype
