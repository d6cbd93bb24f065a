"""Micro-batches through the stages of a pipeline, on the schedules of torch.distributed.pipelining."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle
from torch.distributed.pipelining.stage import _PipelineStageBase

from runtime.parallel.degrees import PipelineSchedule
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.runner import LossFunction, Microbatch

Schedule = PipelineScheduleSingle | PipelineScheduleMulti


class _Opaque(nn.Module):
    """Hides that a stage is sharded by FSDP: gradients are then reduced with each backward pass, as without stages.

    Only activations go from stage to stage; what else a stage needs of the batch, its rank has. The last one gives its loss:
    torch's schedules hold a stage's output until its backward pass is over, and logits are large.
    """

    def __init__(self, stage: nn.Module, loss: LossFunction | None) -> None:
        super().__init__()
        self.stage, self._loss = stage, loss
        self.microbatch: Microbatch | None = None
        """The one whose forward pass is due."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.microbatch is not None
        out: Tensor = self.stage(x, *self.microbatch.more)
        return out if self._loss is None else self._loss(out, self.microbatch.labels)


def _as_it_is(loss: Tensor, _: Tensor) -> Tensor:
    """The loss of a last stage, which has it worked out."""
    return loss


class _Stage(PipelineStage):
    """A stage that knows which micro-batch it computes, and says when a pass for weight gradients alone is over.

    No hooks of parameters run in such a pass.
    """

    collect: Callable[[], None]
    microbatches: Sequence[Microbatch] = ()

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Compute the forward pass of a micro-batch."""
        self.submod.microbatch = self.microbatches[fwd_chunk_id]  # type: ignore[assignment]
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Compute weight gradients of a micro-batch, and have them collected."""
        super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.collect()

    def _validate_fwd_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        # Torch before 2.13 compares shapes of each pass with what was announced; the last stage's output is the loss.
        if not self.is_last:
            super()._validate_fwd_outputs(outputs)  # type: ignore[misc]


class Pipeline:
    """This rank's stages, and a schedule for each number and shape of micro-batches that has come so far."""

    def __init__(
        self,
        stages: Sequence[nn.Module],
        mesh: ParallelMesh,
        device: torch.device,
        schedule: PipelineSchedule,
        activation: Callable[[int, int], tuple[int, ...]],
        dtype: torch.dtype,
        loss: LossFunction,
        collect: Callable[[], None],
    ) -> None:
        """Connect the stages.

        Args:
            stages: this rank's stages; the v-th is the model's stage v * pp + p.
            mesh: the ranks.
            device: where they compute.
            schedule: the order of forward and backward passes.
            activation: from sequences B and positions S of a micro-batch to the shape of what stages pass on.
            dtype: of the activations.
            collect: called after each pass for weight gradients alone.
            loss: from output and labels of the last stage to the scalar whose gradient is taken.
        """
        self._stages, self._mesh, self._device = stages, mesh, device
        self._kind, self._activation, self._dtype, self._loss = schedule, activation, dtype, loss
        self._collect = collect
        self._schedules: dict[tuple[int, int, int, bool], tuple[Schedule, list[_Stage]]] = {}

    def backwards(self, num_microbatches: int) -> int | None:
        """As of `Runner.backwards`."""
        return None if self._kind == "zero-bubble" else num_microbatches

    def run(self, microbatches: Sequence[Microbatch], *, backward: bool) -> None:
        """Run the micro-batches of a step; arguments as of `Runner.run`."""
        num, (batch, positions) = len(microbatches), microbatches[0].tokens.shape
        key = (num, batch, positions, backward)
        if key not in self._schedules:
            self._schedules[key] = self._make(num, batch, positions)
        schedule, stages = self._schedules[key]
        for stage in stages:
            stage.microbatches = microbatches
        first, last = self._mesh.rank("pp") == 0, self._mesh.rank("pp") == self._mesh.size("pp") - 1
        inputs = (torch.cat([x.tokens for x in microbatches]),) if first else ()
        target = torch.empty(num, device="meta") if last else None  # schedules split it, whatever it is
        if backward:
            schedule.step(*inputs, target=target, return_outputs=False)
        else:
            schedule.eval(*inputs, target=target, return_outputs=False)
        for stage in stages:
            stage.microbatches, stage.submod.microbatch = (), None  # type: ignore[assignment]

    def _make(self, num: int, batch: int, positions: int) -> tuple[Schedule, list[_Stage]]:
        stages = self._make_stages(batch, positions)
        size, plain = self._mesh.size("pp"), list[_PipelineStageBase](stages)
        if self._kind == "zero-bubble":
            return ScheduleInterleavedZeroBubble(plain, num, loss_fn=_as_it_is, scale_grads=False), stages
        if len(stages) > 1:
            return ScheduleInterleaved1F1B(plain, num, loss_fn=_as_it_is, scale_grads=False), stages
        # With fewer micro-batches than stages there is no steady state for 1F1B: both orders are the same work.
        kind = ScheduleGPipe if self._kind == "gpipe" or num < size else Schedule1F1B
        return kind(stages[0], num, loss_fn=_as_it_is, scale_grads=False), stages

    def _make_stages(self, batch: int, positions: int) -> list[_Stage]:
        size, rank = self._mesh.size("pp"), self._mesh.rank("pp")
        total = size * len(self._stages)
        between = torch.empty(self._activation(batch, positions), dtype=self._dtype, device="meta", requires_grad=True)
        tokens = torch.empty(batch, positions, dtype=torch.int64, device="meta")
        mine = [
            # Shapes are known: nothing has to be inferred by a trial run. The last stage sends nothing on.
            _Stage(
                _Opaque(module, self._loss if place * size + rank == total - 1 else None),
                place * size + rank,
                total,
                self._device,
                input_args=tokens if place * size + rank == 0 else between,
                output_args=between,
                group=self._mesh.group("pp"),
            )
            for place, module in enumerate(self._stages)
        ]
        for stage in mine:
            stage.collect = self._collect
        return mine
