"""Numbers of an engine that are measured where somebody asks for them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.checkpoint import rectangles as states
from runtime.engine import Engine
from runtime.model.decoder import DecoderStage
from runtime.parallel.masters import pieces, read_masters


@torch.no_grad()
def params_norm(engine: Engine) -> float:
    """Give the L2 norm of all weights, each element counted once. Collective."""
    engine.optimizer.settle()
    counted = [shard for shard in engine.store.shards if shard.counted and shard.master.numel()]
    masters = (read_masters(shard, part) for shard in counted for part in pieces(shard))
    squares = [torch.linalg.vector_norm(x, dtype=torch.float64).square().to(engine.device) for x in masters]
    squares += engine.quantised.squares() if engine.quantised is not None else []
    return float(_sum(engine, squares).sqrt())


@torch.no_grad()
def num_zeros(engine: Engine) -> int:
    """Count the elements of the last step's gradient that are exactly zero. Collective."""
    return int(_sum(engine, [(x.tensor == 0).sum().double() for x in states.gradients(engine.trained)]))


def host_bytes(engine: Engine) -> int:
    """Give the bytes of the host's memory that a rank takes: masters, the optimizer's states, activations."""
    optimizer, away = engine.optimizer, [shard for shard in engine.trained if shard.offloaded]
    tensors = [optimizer.state(shard, name) for shard in away for name in optimizer.states(shard)]
    tensors += [shard.master for shard in away if shard.separate_master]
    activations = sum(stage.offload.host_bytes for stage in engine.module if isinstance(stage, DecoderStage))
    return sum(tensor.nbytes for tensor in tensors) + activations


def _sum(engine: Engine, summands: list[Tensor]) -> Tensor:
    """Sum 0-dim fp64 numbers over this rank and all others."""
    total = torch.stack([torch.zeros((), dtype=torch.float64, device=engine.device), *summands]).sum()
    if engine.mesh.world_size > 1:
        dist.all_reduce(total)
    return total
