"""How the ranks divide a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeconv.layout.degrees import Degrees
from runtime.flag import check_fields, flag

PipelineSchedule = Literal["auto", "gpipe", "1f1b", "interleaved", "zero-bubble"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the ranks divide the model; the data-parallel degrees follow from the world size."""

    tp: int = flag(1, "--tensor-model-parallel-size", at_least=1)
    """Tensor-parallel degree of attention, embeddings and dense layers."""
    sp: bool = flag(False, "--sequence-parallel")
    """Split activations between the tensor-parallel regions over the tensor-parallel ranks."""
    tp_comm_overlap: bool = False
    """Overlap the gathers before and the sums after products of tensor parallelism with these, piece by piece; needs
    --sequence-parallel."""
    pp: int = flag(1, "--pipeline-model-parallel-size", at_least=1)
    """Stages of the pipeline."""
    vpp: int = flag(1, "--num-virtual-stages-per-pipeline-rank", at_least=1)
    """Model chunks (virtual stages) a pipeline rank."""
    layers_per_virtual_stage: int | None = flag(None, "--num-layers-per-virtual-pipeline-stage", at_least=1)
    """Layers of a virtual stage, instead of how many such stages a rank has."""
    pp_layers: tuple[int, ...] | None = flag(None, at_least=1, metavar="N,N,...")
    """Layers of each of the stages (those of virtual ones too), in the order of the model; without it, evenly many, or so many
    that the head's stage takes no longer than the others, where that is known to pay."""
    ep: int = flag(1, "--expert-model-parallel-size", at_least=1)
    """Expert-parallel degree: contiguous blocks of experts."""
    etp: int = flag(0, "--expert-tensor-parallel-size", at_least=0)
    """Tensor-parallel degree inside an expert; 0 takes that of attention."""
    cp: int = flag(1, "--context-parallel-size", at_least=1)
    """Ranks that share a sequence."""
    use_distributed_optimizer: bool = False
    """Shard gradients and optimizer state over data parallel; parameters stay whole during the step."""
    fully_shard: bool = flag(False, "--fully-shard", "--use-torch-fsdp2")
    """Shard parameters over data parallel too, and gather them layer by layer."""
    overlap_exchange: bool = flag(False, "--overlap-moe-expert-parallel-comm")
    """Compute two micro-batches at a time, layer by layer, so that one's rows travel between the ranks of experts while the
    other is computed. Both micro-batches' activations are alive at a time; losses and statistics are each micro-batch's own.
    With an odd number of micro-batches a step, the last one is computed alone."""
    pp_schedule: PipelineSchedule = flag("auto", "--pipeline-schedule")
    """Order of the pipeline's passes; auto is interleaved with virtual stages, else 1f1b."""

    def __post_init__(self) -> None:
        if self.etp == 0:
            object.__setattr__(self, "etp", self.tp)
        if self.pp_schedule == "auto":
            object.__setattr__(self, "pp_schedule", "interleaved" if self.vpp > 1 else "1f1b")
        check_fields(self)

    @property
    def layout(self) -> Degrees:
        """The degrees that decide which rectangle of which tensor a rank holds."""
        return Degrees(tp=self.tp, pp=self.pp, vpp=self.vpp, ep=self.ep, etp=self.etp, pp_layers=self.pp_layers)
