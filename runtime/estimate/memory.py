"""A rank's memory at the peak of a step: its state, activations of all micro-batches in flight, and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.estimate.activations import layer_input
from runtime.estimate.finetuned import workspace_bytes
from runtime.estimate.fp8 import COPIES, copied_elements
from runtime.estimate.schedule import Pipeline
from runtime.estimate.setup import ITEMSIZE, Setup
from runtime.estimate.stage import Cost, merge
from runtime.estimate.state import State, rank_state
from runtime.optim.config import BUFFERS, PIECE


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank."""

    state: State
    activations: Mapping[str, float]
    """Kept for backward passes at the peak, by part of the model."""
    working: float
    """Needed for a moment beside them."""
    buffers: float
    """For what other ranks send, activations and gradients of a pipeline and weights that full sharding gathers; for the numbers of a
    quantised weight; for weights in 8 bits beside bf16; and for what is on its way from and to the host."""
    away: float = 0.0
    """Activations in the host's memory."""

    @property
    def host(self) -> float:
        """Bytes of the host's memory."""
        return self.state.host + self.away

    @property
    def peak(self) -> float:
        """All together."""
        return self.state.total + sum(self.activations.values()) + self.working + self.buffers

    def by_kind(self) -> dict[str, float]:
        """The kinds that a person reads, each in bytes."""
        return {
            "weights": self.state.weights,
            "gradients": self.state.gradients,
            "masters": self.state.masters,
            "moments": self.state.moments,
            "activations": sum(self.activations.values()),
            "working": self.working,
            "buffers": self.buffers,
        }


def rank_memory(setup: Setup, pipeline: Pipeline, rank: int, costs: Mapping[int, Cost]) -> Memory:
    """Work out the memory of a pipeline rank.

    Args:
        setup: what is planned.
        pipeline: the order of the passes.
        rank: the pipeline rank.
        costs: of its virtual stages, by their number in the model.

    Returns:
        Its memory; ranks that differ in other axes alone have the same.
    """
    needed = rank_activations(setup, pipeline, rank, costs)
    flying = _in_flight(pipeline, rank, costs).items()
    away = sum(count * sum(costs[stage].away.values()) for stage, count in flying)
    return Memory(rank_state(setup.parameters.stage(rank), setup), *needed, away)


def rank_activations(
    setup: Setup, pipeline: Pipeline, rank: int, costs: Mapping[int, Cost]
) -> tuple[dict[str, float], float, float]:
    """Work out what a pipeline rank needs beside its state; arguments as of `rank_memory`.

    Returns:
        Bytes kept for backward passes by part, needed beside them for a moment, and of buffers.
    """
    activations: dict[str, float] = {}
    for stage, count in _in_flight(pipeline, rank, costs).items():
        merge(activations, {part: count * size for part, size in costs[stage].kept.items()})
    working = max(cost.most_working for cost in costs.values())
    buffers = (
        _receiving(setup, pipeline, costs)
        + _gathered(setup, rank)
        + workspace_bytes(setup, rank)
        + COPIES * copied_elements(setup, rank)
        + _staged(setup, rank)
        + _products(setup, rank)
    )
    return activations, working, buffers


def _in_flight(pipeline: Pipeline, rank: int, costs: Mapping[int, Cost]) -> dict[int, int]:
    """Micro-batches of each virtual stage between their passes, when they keep most together."""
    kept = {stage: cost.kept_bytes + sum(cost.away.values()) for stage, cost in costs.items()}
    now = dict.fromkeys(costs, 0)
    best, most, size = dict(now), -1.0, 0.0
    for action in pipeline.beginning(rank):
        if action.kind == "F":
            now[action.stage] += 1
            size += kept[action.stage]
            if size > most:
                best, most = dict(now), size
        elif action.kind in "BW":
            now[action.stage] -= 1
            size -= kept[action.stage]
    return best


def _receiving(setup: Setup, pipeline: Pipeline, costs: Mapping[int, Cost]) -> float:
    """torch's stages have a buffer for each micro-batch of a step, for its activations and for its gradient."""
    last = pipeline.pp * pipeline.vpp - 1
    neighbours = sum((stage > 0) + (stage < last) for stage in costs)
    return neighbours * pipeline.num_microbatches * layer_input(setup)


def _staged(setup: Setup, rank: int) -> float:
    """Pieces of an optimizer's state that is in the host's memory, on their way."""
    if not setup.optim.on_host:
        return 0.0
    owned = sum(setup.owned(rank).values())
    states = (2 * setup.moment, setup.wide if setup.optim.ema_decay is not None else 0)
    return BUFFERS * min(PIECE, owned) * (setup.master + max(states))


def _products(setup: Setup, rank: int) -> float:
    """The largest gradient of experts in fp32, which products of 8 bits give, before it is added to a sum in bf16."""
    if setup.gradient == setup.wide or setup.fp8.format is None:
        return 0.0
    chunks = setup.parameters.chunks[rank :: setup.parallel.pp]
    kinds = {layer for layers in chunks for layer in setup.parameters.kinds(layers)}
    sizes = [p.size for layer in kinds for p in setup.parameters.layer(layer) if p.expert and not p.frozen]
    return max(sizes, default=0) * setup.wide


def _gathered(setup: Setup, rank: int) -> float:
    """What full sharding holds gathered: the ends of the model throughout, and besides them most in the backward pass.

    There the weights of the next layer have come while a layer's gradients, its own weights let go of, are copied to what they are
    reduced in.
    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py (post_backward).
    """
    if not setup.parallel.fully_shard:
        return 0.0
    chunks, item = setup.parameters.chunks[rank :: setup.parallel.pp], ITEMSIZE[setup.dtype]
    ends = sum(p.size for layers in chunks for p in setup.parameters.ends(layers))
    kinds = {layer for layers in chunks for layer in setup.parameters.kinds(layers)}
    largest = max(sum(p.size for p in setup.parameters.layer(layer)) for layer in kinds)
    return ends * item + largest * (item + item + setup.gradient)
