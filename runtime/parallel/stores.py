"""The store of a run's parameters, by its degrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from runtime.optim.config import OptimConfig
from runtime.parallel.buckets import BucketStore
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.shards import Store


def make_store(
    module: nn.Module,
    stages: Sequence[nn.Module],
    parallel: ParallelConfig,
    optim: OptimConfig,
    mesh: ParallelMesh,
    device: torch.device,
) -> Store:
    """Give the parameters, so far on the meta device, their memory.

    Args:
        module: holds the stages; names are taken from it.
        stages: this rank's.
        parallel: the degrees.
        optim: types and places of masters and gradients.
        mesh: the ranks.
        device: where weights and gradients go.

    Returns:
        The store.
    """
    how: dict[str, Any] = {
        "host_share": optim.on_host,
        "remainders": optim.master_weights == "remainder",
        "bf16_grads": optim.main_grads_dtype == "bf16",
    }
    if parallel.fully_shard:
        # Imported where it is used: it takes seconds that other runs need not spend.
        from runtime.parallel.full_sharding import FullyShardedStore

        return FullyShardedStore(stages, mesh, device, **how)
    distributed = parallel.use_distributed_optimizer
    return BucketStore(stages, module.named_parameters(), mesh, device, distributed=distributed, **how)


def allocate_buffers(module: nn.Module, device: torch.device) -> None:
    """Give the buffers, so far on the meta device, their memory, filled with zeros.

    Args:
        module: their owner, or its owner.
        device: where they go.
    """
    for part in module.modules():
        for name, buffer in list(part._buffers.items()):
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = torch.zeros_like(buffer, device=device)
