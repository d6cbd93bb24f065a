"""How the ranks divide a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeconv.layout.degrees import Degrees
from runtime.errors import require

PipelineSchedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the ranks divide the model; the data-parallel degrees follow from the world size."""

    tp: int = 1
    """Tensor-parallel degree of attention, embeddings and dense layers."""
    sp: bool = False
    """Sequence parallelism: activations between the tensor-parallel regions are split over tp."""
    pp: int = 1
    vpp: int = 1
    """Model chunks (virtual stages) a pipeline rank."""
    pp_layers: tuple[int, ...] | None = None
    """Layers of each of the pp * vpp stages, in the order of the model; None splits evenly."""
    ep: int = 1
    etp: int = 0
    """Tensor-parallel degree inside an expert; 0 takes tp."""
    cp: int = 1
    use_distributed_optimizer: bool = False
    """Gradients and optimizer state are sharded over data parallel; parameters stay whole during the step."""
    fully_shard: bool = False
    """Parameters are sharded over data parallel too, and gathered layer by layer."""
    pp_schedule: PipelineSchedule = "1f1b"

    def __post_init__(self) -> None:
        if self.etp == 0:
            object.__setattr__(self, "etp", self.tp)
        for name in ("tp", "pp", "vpp", "ep", "etp", "cp"):
            require(getattr(self, name) >= 1, f"parallel degree {name} is {getattr(self, name)}; expected at least 1")

    @property
    def layout(self) -> Degrees:
        """The degrees that decide which rectangle of which tensor a rank holds."""
        return Degrees(tp=self.tp, pp=self.pp, vpp=self.vpp, ep=self.ep, etp=self.etp, pp_layers=self.pp_layers)
