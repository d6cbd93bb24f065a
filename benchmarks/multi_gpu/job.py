"""What a task is, and what the ranks that run it share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from benchmarks.multi_gpu.sizes import Sizes
from runtime.engine import Engine
from runtime.estimate.setup import Setup
from runtime.job.processes import max_over_ranks
from runtime.model.context import TORCH_DTYPES
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One measurement; it goes to the ranks as JSON."""

    number: int
    kind: str
    """parity, training, traffic, scaling, save or resume."""
    world: int
    """Ranks that take part: all of a launch, or its first alone."""
    label: str
    parallel: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """This rank's surroundings in a task."""

    device: torch.device
    sizes: Sizes
    scratch: Path
    """Where checkpoints go; the same folder for every rank and launch."""
    fill: float
    """Share of a GPU's memory that a model may be planned to take."""
    control: dist.ProcessGroup | None
    """A gloo group of the ranks that take part; None is one rank."""
    balanced: bool = False
    """Whether each expert gets as many tokens, whatever the routers choose."""

    @property
    def memory(self) -> float:
        """Bytes that a model may be planned to take; a CPU's sizes are fixed."""
        if self.device.type != "cuda":
            return 0.0
        return self.fill * torch.cuda.get_device_properties(self.device).total_memory

    def everyone(self, value: T) -> list[T]:
        """Collect a value of every rank on every rank."""
        if self.control is None:
            return [value]
        out: list[Any] = [None] * dist.get_world_size(self.control)
        dist.all_gather_object(out, value, group=self.control)
        return out

    def any(self, mine: bool) -> bool:
        """Find out whether any rank says yes."""
        return mine if self.control is None else bool(max_over_ranks([mine], self.control)[0])

    def synchronize(self) -> None:
        """Wait for the device, then for all ranks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.control is not None:
            dist.all_reduce(torch.zeros(1), group=self.control)

    def setup(self, task: Task, num_layers: int) -> Setup:
        """Give the settings of a task's layout, with CUDA graphs where the trainer has them."""
        model = self.sizes.model(num_layers)
        router = model.compute.router
        assert router is not None
        return Setup(
            model=model, world_size=task.world, parallel=ParallelConfig(**task.parallel),
            moe=MoEConfig(router=router, aux_loss_coeff=(0.01,), force_load_balancing=self.balanced),
            optim=OptimConfig(lr=1e-4), recompute=RecomputeConfig(), dtype=self.sizes.dtype,
            seq_length=self.sizes.positions, micro_batch_size=1, num_microbatches=1,
            graphs="auto" if self.device.type == "cuda" else "none",
        )  # fmt: skip

    def engine(self, task: Task, num_layers: int) -> tuple[Engine, ParallelMesh]:
        """Build the engine of a task's layout; its weights are zero."""
        setup = self.setup(task, num_layers)
        parallel, dtype = setup.parallel, TORCH_DTYPES[setup.dtype]
        mesh = ParallelMesh(parallel) if self.control is not None else ParallelMesh(parallel, 1, 0)
        taken = (setup.model, dtype, parallel, setup.moe, setup.optim, setup.recompute, mesh, self.device)
        return Engine(*taken, captures=setup.captured), mesh


@torch.no_grad()
def draw_weights(engine: Engine) -> None:
    """Fill a model with random weights on its device.

    Ranks with the same part of the model draw the same numbers, and those with other parts of it the same numbers too:
    enough to measure with, and as fast as memory.
    """
    generator = torch.Generator(engine.device).manual_seed(0)
    for shard in engine.store.shards:
        for held in shard.held():
            if "norm" in held.slot.name:
                held.flat.fill_(1)
            else:
                held.flat.normal_(std=0.02, generator=generator)
        shard.masters_from_weights()
    for member in engine.quantised.members if engine.quantised is not None else ():
        for place, block in enumerate(member.matrices()):
            matrix = torch.empty(block.rect.shape, dtype=torch.bfloat16, device=engine.device)
            member.weight.take(place, matrix.normal_(std=0.02, generator=generator))
