"""What ranks send each other: bytes of each axis and link in a layer, a micro-batch and a step, and their time alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from runtime.estimate.local import Local
from runtime.estimate.machine import Collective, Machine
from runtime.estimate.parameters import Sums
from runtime.estimate.setup import ITEMSIZE, Setup
from runtime.moe.tail import TAIL

ROUTING_WEIGHT_BYTES = 4
"""Of a choice's routing weight, where tokens are gathered."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Ranks along an axis."""

    name: str
    ranks: int
    stride: int
    """From one of them to the next, in global ranks."""

    def per_node(self, gpus_per_node: int) -> int:
        """Ranks of the group on one node."""
        return max(1, min(self.ranks, gpus_per_node // self.stride))

    def link(self, machine: Machine) -> str:
        """The link that its collectives cross."""
        return "nvlink" if self.ranks * self.stride <= machine.gpus_per_node else "network"


@dataclass(frozen=True, slots=True)
class Transfer:
    """Collectives of one kind along an axis."""

    axis: Axis
    kind: Collective
    num_bytes: float
    """That each rank sends in one of them."""
    forward: float
    """How often in a forward pass."""
    backward: float
    """How often in a backward pass."""
    exchange: bool = False
    """Whether its size depends on the routing: ranks then wait for the fullest."""

    def seconds(self, machine: Machine) -> float:
        """The time of one of them."""
        axis, nvlink = self.axis, machine.links["nvlink"]
        if axis.link(machine) == "nvlink":
            alone = nvlink.seconds(self.kind, self.num_bytes, axis.ranks)
        else:
            network, here = machine.links["network"], axis.per_node(machine.gpus_per_node)
            if self.kind in ("all_to_all", "send"):  # what stays on the node goes beside it
                away = (axis.ranks - here) / max(1, axis.ranks - 1)
                alone = max(
                    network.seconds(self.kind, self.num_bytes * away, axis.ranks),
                    nvlink.seconds(self.kind, self.num_bytes * (1 - away), here),
                )
            else:  # a ring leaves the node once, over all its ranks' adapters
                rate = network.rate(self.kind, axis.ranks) * here
                rate = min(rate, nvlink.rate(self.kind, here)) if here > 1 else rate
                alone = network.latency + self.num_bytes / rate
            alone += network.hop * (-(-axis.ranks // here) - 1)
        wait = machine.exchange_wait_us * 1e-6 if self.exchange else 0.0
        return alone + wait if self.num_bytes > 0 else 0.0

    def latency(self, machine: Machine) -> float:
        """The part of it that does not depend on the bytes."""
        link = machine.links[self.axis.link(machine)]
        nodes = -(-self.axis.ranks // self.axis.per_node(machine.gpus_per_node))
        return link.latency + link.hop * (nodes - 1)

    def exposed(self, machine: Machine) -> float:
        """The time that one of them takes from computing between layers, with the pause around it."""
        return self.seconds(machine) + machine.collective_gap_us * 1e-6


def axes(setup: Setup) -> dict[str, Axis]:
    """Give the axes with their extent and stride: tensor-parallel neighbours first, pipeline stages furthest apart."""
    p = setup.parallel
    stage = setup.world_size // p.pp
    return {
        "tp": Axis("tp", p.tp, 1),
        "cp": Axis("cp", p.cp, p.tp),
        "dp": Axis("dp", setup.dp * p.cp, p.tp),
        "etp": Axis("etp", p.etp, 1),
        "ep": Axis("ep", p.ep, p.etp),
        "edp": Axis("edp", setup.edp, p.ep * p.etp),
        "pp": Axis("pp", p.pp, stage),
    }


def _sent(axis: Axis, whole: float) -> float:
    """What a rank sends of a tensor that a group gathers, scatters or exchanges."""
    return whole * (axis.ranks - 1) / axis.ranks


def layer_traffic(setup: Setup, local: Local, layer: int) -> list[Transfer]:
    """List the collectives of a layer with one micro-batch.

    Args:
        setup: what is planned.
        local: one rank's sizes.
        layer: its number.

    Returns:
        The collectives of both passes, none of which the trainer hides behind computing.
    """
    along = axes(setup)
    out = list(_region(setup, local, along["tp"]))
    if setup.parallel.cp > 1:
        cp = along["cp"]
        size = _sent(cp, local.tokens * cp.ranks * local.key_value * local.item)
        out += [Transfer(cp, "all_gather", size, 1, 0), Transfer(cp, "reduce_scatter", size, 0, 1)]
    if layer in setup.model.moe_layers and setup.moe is not None:
        out += _moe(setup, local, along)
        if setup.model.width("shared"):
            out += _region(setup, local, along["tp"])
    else:
        out += _region(setup, local, along["tp"])
    return out


def _region(setup: Setup, local: Local, tp: Axis) -> Iterator[Transfer]:
    """Into a tensor-parallel region and out of it."""
    if tp.ranks == 1:
        return
    whole = local.tokens * local.hidden * local.item
    size = _sent(tp, whole)
    if setup.sp:
        yield Transfer(tp, "all_gather", size, 1, 1)
        yield Transfer(tp, "reduce_scatter", size, 1, 1)
    else:
        yield Transfer(tp, "all_reduce", 2 * size, 1, 1)


def _moe(setup: Setup, local: Local, along: dict[str, Axis]) -> Iterator[Transfer]:
    """To the experts and back."""
    ep, etp, tp = along["ep"], along["etp"], along["tp"]
    row = local.hidden * local.item
    if not setup.sp and tp.ranks > 1:  # each rank of tp routes its own tokens, and all get the results
        yield Transfer(tp, "all_gather", _sent(tp, local.tokens * row), 1, 1)
    if ep.ranks * etp.ranks == 1:
        return
    if local.exchanged:
        # There with their weights behind them, and back without.
        for bytes_of_row in (row + TAIL * local.item, row):
            yield Transfer(ep, "all_to_all", _sent(ep, local.arriving * bytes_of_row), 1, 1, exchange=True)
        if not setup.captured:
            yield Transfer(ep, "all_gather", _sent(ep, 8.0 * local.num_experts * ep.ranks), 1, 0)
        if etp.ranks > 1:
            size = _sent(etp, local.gathered * row)
            yield Transfer(etp, "all_gather", size, 1, 1)
            yield Transfer(etp, "reduce_scatter", size, 1, 1)
        return
    over_ep, over_etp = local.tokens_moe * ep.ranks * row, local.gathered * row
    for axis, whole in ((ep, over_ep), (etp, over_etp)):
        if axis.ranks > 1:
            yield Transfer(axis, "all_gather", _sent(axis, whole), 1, 1)
            yield Transfer(axis, "reduce_scatter", _sent(axis, whole), 1, 1)
            small = whole / row * setup.model.sizes["top_k"] * (8 + ROUTING_WEIGHT_BYTES)
            yield Transfer(axis, "all_gather", _sent(axis, small), 2, 1)


def ends_traffic(setup: Setup, local: Local) -> tuple[list[Transfer], list[Transfer]]:
    """List the collectives of the embedding, and of head and loss, with one micro-batch."""
    tp = axes(setup)["tp"]
    if tp.ranks == 1:
        return [], []
    size = _sent(tp, local.tokens * local.hidden * local.item)
    loss = Transfer(tp, "all_reduce", 2 * _sent(tp, 4.0 * local.tokens), 2, 0)
    if not setup.sp:
        out = Transfer(tp, "all_reduce", 2 * size, 1, 0)
        return [out], [Transfer(tp, "all_reduce", 2 * size, 0, 1), loss]
    first = [Transfer(tp, "reduce_scatter", size, 1, 0), Transfer(tp, "all_gather", size, 0, 1)]
    return first, [Transfer(tp, "all_gather", size, 1, 0), Transfer(tp, "reduce_scatter", size, 0, 1), loss]


def gradient_traffic(setup: Setup, sums: Sums) -> tuple[list[Transfer], list[Transfer]]:
    """List the collectives of a step over data parallelism.

    Args:
        setup: what is planned.
        sums: the elements of a rank.

    Returns:
        The reductions of gradients, and the gathers of updated weights; with full sharding those of one micro-batch, the
        gathers in each pass.
    """
    along, parallel = axes(setup), setup.parallel
    sharded = parallel.use_distributed_optimizer or parallel.fully_shard
    reduce: list[Transfer] = []
    gather: list[Transfer] = []
    for axis, expert in ((along["dp"], False), (along["edp"], True)):
        count = sums.by_expert[expert]
        if axis.ranks == 1 or not count:
            continue
        gradients, weights = _sent(axis, count * setup.gradient), _sent(axis, count * ITEMSIZE[setup.dtype])
        if sharded:
            reduce.append(Transfer(axis, "reduce_scatter", gradients, 0, 1))
            gather.append(Transfer(axis, "all_gather", weights, 1, 1 if parallel.fully_shard else 0))
        else:
            reduce.append(Transfer(axis, "all_reduce", 2 * gradients, 0, 1))
    return reduce, gather


def sharding_passes(setup: Setup, rank: int) -> float:
    """Count the bytes that full sharding reads and writes on a pipeline rank itself with one micro-batch.

    Shards are cast for a gather, and what has come is copied into the weights, in either pass; gradients are cast for their
    reduction, and a rank's part is added to its sum.

    Args:
        setup: what is planned.
        rank: the pipeline rank.

    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py
    """
    along, sums, item = axes(setup), setup.parameters.sums(rank), ITEMSIZE[setup.dtype]
    out = 0.0
    for axis, expert in ((along["dp"], False), (along["edp"], True)):
        if axis.ranks == 1:
            continue
        trained, frozen = sums.by_expert[expert], sums.frozen[expert]
        out += 2 * (trained * (setup.wide + item) + frozen * 2 * item) / axis.ranks + 4 * (trained + frozen) * item
        out += trained * (item + setup.gradient) + 3 * trained * setup.wide / axis.ranks
    return out


def partial_traffic(setup: Setup, sums: Sums) -> list[Transfer]:
    """List the sums of gradients over the axes beside data parallelism, at the end of a step."""
    along = axes(setup)
    copies = max(1, setup.parallel.tp // setup.model.sizes["kv_heads"])
    extents = {"tp": along["tp"], "kv": Axis("kv", copies, 1), "etp": along["etp"]}
    extents["ends"] = Axis("ends", 2 if setup.parallel.pp > 1 else 1, along["pp"].stride * (setup.parallel.pp - 1) or 1)
    out = []
    for name, axis in extents.items():
        count = 0.0
        for expert in (False, True):
            shares = setup.replicas(expert=expert) if setup.parallel.use_distributed_optimizer else 1
            count += sums.partial.get((name, expert), 0) / shares
        if axis.ranks > 1 and count:
            out.append(Transfer(axis, "all_reduce", 2 * _sent(axis, count * setup.reduced), 0, 1))
    return out
