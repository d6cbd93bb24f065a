"""What a machine's host takes of a step, measured: to launch a kernel, and to exchange memory with its GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from runtime.data.batch import Batch
from runtime.engine import Engine
from runtime.estimate.machine import find_machine
from runtime.estimate.setup import Setup
from runtime.estimate.stage import Costs
from runtime.model.context import TORCH_DTYPES
from runtime.model.recompute import RecomputeConfig
from runtime.moe.config import MoEConfig
from runtime.optim.config import OptimConfig
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from runtime.parity.configs import aligned_model

Seconds = Callable[[Callable[[], object]], float]
"""From some work to its mean time in a row, that of the slowest rank."""

# So few that a GPU is done with a kernel long before the next is launched.
POSITIONS = 128
MICROBATCHES = 4


def measure_launches(seconds: Seconds, device: torch.device, dtype: str) -> float:
    """Time the passes of a model whose kernels take a GPU next to nothing.

    Args:
        seconds: times them.
        device: this rank's.
        dtype: of weights and activations.

    Returns:
        Seconds of the host for each kernel that a plan counts, Python's share included: `launch_us` of a calibration file.
    """
    world = dist.get_world_size()
    model = aligned_model()
    router = model.compute.router
    assert router is not None
    setup = Setup(
        model=model, world_size=world, parallel=ParallelConfig(), moe=MoEConfig(router=router), optim=OptimConfig(),
        recompute=RecomputeConfig(), dtype=dtype, seq_length=POSITIONS, micro_batch_size=1, num_microbatches=MICROBATCHES,
        graphs="none",
    )  # fmt: skip
    mesh = ParallelMesh(setup.parallel, world)
    engine = Engine(
        model, TORCH_DTYPES[dtype], setup.parallel, setup.moe, setup.optim, setup.recompute, mesh, device
    )  # fmt: skip
    tokens = torch.arange(POSITIONS + 1).remainder(model.sizes["vocab"]).unsqueeze(0)
    batch = Batch(tokens=tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous())
    taken = seconds(lambda: engine.accumulate([batch] * MICROBATCHES))
    launches = Costs(setup, find_machine("h100")).stage(range(model.sizes["layers"])).launches
    return taken / MICROBATCHES / sum(launches)


def measure_link(seconds: Seconds, device: torch.device, num_bytes: int, per_node: int) -> dict[str, Any]:
    """Time copies between a GPU and page-locked memory of the host, both ways at once, on all GPUs together.

    Args:
        seconds: times them.
        device: this rank's GPU.
        num_bytes: that travel each way.
        per_node: ranks of a node.

    Returns:
        Keys of a calibration file. What a host's memory gives all its GPUs is known where several have used it.
    """
    sources = [torch.zeros(num_bytes, dtype=torch.uint8, device=device), _page_locked(num_bytes)]
    targets = [_page_locked(num_bytes), torch.empty_like(sources[0])]
    streams = [torch.cuda.Stream(device) for _ in sources]  # type: ignore[no-untyped-call]

    def there_and_back() -> None:
        for stream, source, target in zip(streams, sources, targets, strict=True):
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)

    rate = num_bytes / seconds(there_and_back)
    together = {"host_gb_s": 2 * per_node * rate / 1e9} if per_node > 1 else {}
    return {"pcie_gb_s": rate / 1e9} | together


def _page_locked(num_bytes: int) -> torch.Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
