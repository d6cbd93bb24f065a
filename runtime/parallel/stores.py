"""The store of a run's parameters, by its degrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from runtime.parallel.buckets import BucketStore
from runtime.parallel.degrees import ParallelConfig
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.shards import Store


def make_store(
    module: nn.Module,
    stages: Sequence[nn.Module],
    parallel: ParallelConfig,
    mesh: ParallelMesh,
    device: torch.device,
    **storage: Any,
) -> Store:
    """Give the parameters, so far on the meta device, their memory.

    Args:
        module: holds the stages; names are taken from it.
        stages: this rank's.
        parallel: the degrees.
        mesh: the ranks.
        device: where weights and gradients go.
        **storage: types and places of masters and gradients, as either store takes them (`OptimConfig.storage`).

    Returns:
        The store.
    """
    if parallel.fully_shard:
        # Imported where it is used: it takes seconds that other runs need not spend.
        from runtime.parallel.full_sharding import FullyShardedStore

        return FullyShardedStore(stages, mesh, device, **storage)
    distributed = parallel.use_distributed_optimizer
    return BucketStore(stages, module.named_parameters(), mesh, device, distributed=distributed, **storage)


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
