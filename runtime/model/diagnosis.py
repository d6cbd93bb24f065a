"""Where a number that is not finite came from: the first bad module in the order of the model, and its rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeconv.errors import MoeconvError
from runtime.model.decoder import DecoderLayer
from runtime.parallel.masters import read_masters
from runtime.parallel.mesh import ParallelMesh
from runtime.parallel.shards import Store


class NonFiniteError(MoeconvError):
    """A loss or a gradient of a step is NaN or infinite; the step was not applied."""


def diagnose(
    module: nn.Module, store: Store, mesh: ParallelMesh, again: Callable[[], None], loss: float
) -> NonFiniteError:
    """Find the first bad module. Collective; costs a forward pass, so it runs only after the fact.

    Args:
        module: this rank's stages.
        store: has weights and gradients.
        mesh: the ranks.
        again: runs the forward pass of the step once more.
        loss: mean loss of the step.

    Returns:
        The error to raise, the same on every rank.
    """
    # Candidates sort by what failed first: a weight, an output of the forward pass, a gradient.
    found: list[tuple[int, int, str]] = []
    names = {child: _public_name(module, name) for name, child in module.named_modules()}
    parts = [(shard, part) for shard in store.shards for part in shard.parts()]
    for shard, part in parts:
        if not bool(torch.isfinite(read_masters(shard, part.range)).all()):
            found.append((0, 0, f"weight {_weight_name(part.slot.topology.pieces, part.slot.name)}"))
    handles = [
        child.register_forward_hook(_hook(found, index, names[child]))
        for index, child in enumerate(module.modules())
        if child is not module and not any(True for _ in child.children())
    ]
    try:
        again()
    finally:
        for handle in handles:
            handle.remove()
    for place, (shard, part) in enumerate(parts):
        if not (shard.topology.frozen or bool(torch.isfinite(shard.grad_shard[part.range]).all())):
            name = _weight_name(part.slot.topology.pieces, part.slot.name)
            found.append((2, place, f"gradient of {name}"))
    first = min(((kind, mesh.rank("pp"), place, what) for kind, place, what in found), default=None)
    everyone: list[tuple[int, int, int, str] | None] = [first]
    if mesh.world_size > 1:
        everyone = [None] * mesh.world_size
        dist.all_gather_object(everyone, first)
    ranked = [(entry, rank) for rank, entry in enumerate(everyone) if entry is not None]
    where = "no module repeats it: a communication or the hardware may be at fault"
    if ranked:
        entry, rank = min(ranked)
        where = f"first bad: {entry[3]}, on rank {rank}"
    return NonFiniteError(
        f"the step's loss is {loss} or its gradient is not finite; {where}. The step was not applied. "
        "Resume from the last checkpoint with a lower learning rate, or leave such steps out"
    )


def _hook(found: list[tuple[int, int, str]], index: int, name: str) -> Callable[..., None]:
    def check(_: nn.Module, __: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        bad = any(isinstance(x, Tensor) and x.is_floating_point() and not torch.isfinite(x).all() for x in tensors)
        if bad:
            found.append((1, index, f"output of {name}"))

    return check


def _public_name(module: nn.Module, name: str) -> str:
    """A module's name with the layer's number in the whole model instead of the stage."""
    parts = name.split(".")
    if len(parts) > 2 and parts[1] == "layers":
        layer = module.get_submodule(".".join(parts[:3]))
        if isinstance(layer, DecoderLayer):
            return ".".join(["model.layers", str(layer.index), *parts[3:]])
    return ".".join(["model", *parts[1:]])


def _weight_name(pieces: tuple[Any, ...], fallback: str) -> str:
    if not pieces:
        return fallback
    more = f" (and {len(pieces) - 1} more in one parameter)" if len(pieces) > 1 else ""
    return f"{pieces[0].name}{more}"
