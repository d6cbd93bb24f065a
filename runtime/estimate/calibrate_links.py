"""Measure what connects ranks, for a calibration: collectives of a node's ranks, and of one rank of each node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from runtime.estimate.clock import Clock
from runtime.estimate.machine import COLLECTIVES, Collective
from runtime.parallel.collectives import all_gather_single, reduce_scatter_single


def measure_links(clock: Clock, message: int, per_node: int) -> dict[str, Any]:
    """Measure the collectives of groups of 2, 4, ... ranks of a node, and of one rank of each node.

    Args:
        clock: times them.
        message: bytes of the largest; the smallest is a 16th.
        per_node: ranks of a node.

    Returns:
        The `links` of a calibration file; of a link that no group crosses there is nothing.
    """
    world, out = dist.get_world_size(), {}
    counts = [n for n in (2, 4, 8, 16) if n <= per_node and world % n == 0]
    if counts:
        out["nvlink"] = _link(clock, message, {n: [range(i, i + n) for i in range(0, world, n)] for n in counts})
    nodes = world // per_node
    if nodes > 1:
        rows = {nodes: [range(i, world, per_node) for i in range(per_node)]}
        out["network"] = {"hop_us": 3} | _link(clock, message, rows)
    return out


def _link(clock: Clock, message: int, groups: Mapping[int, Sequence[range]]) -> dict[str, Any]:
    """Latency and rates from the times of a large and a small message."""
    rates: dict[str, dict[int, float]] = {kind: {} for kind in COLLECTIVES}
    latencies = []
    for count, rows in groups.items():
        # Every rank makes every group, as torch.distributed asks.
        made = [(row, dist.new_group(list(row))) for row in rows]
        mine = next(group for row, group in made if dist.get_rank() in row)
        for kind in COLLECTIVES:
            if kind == "send" and count > min(groups):
                continue
            large, small = (_collective(clock, kind, mine, size) for size in (message, message // 16))
            # Where sixteen times the bytes don't take twice the time, the difference is noise: what was reached then counts.
            clear = large[1] > 2 * small[1]
            rate = (large[0] - small[0]) / (large[1] - small[1]) if clear else large[0] / large[1]
            rates[kind][count] = rate / 1e9
            latencies.append(max(0.0, small[1] - small[0] / rate))
    latency = sorted(latencies)[len(latencies) // 2]
    return {"latency_us": latency * 1e6, "hop_us": 0, "gb_s": rates}


def _collective(clock: Clock, kind: Collective, group: dist.ProcessGroup, size: int) -> tuple[float, float]:
    """Bytes that a rank sends in a collective, and its seconds."""
    ranks, rank = group.size(), group.rank()
    count = size // 2 // ranks * ranks
    whole = torch.zeros(count, dtype=torch.bfloat16, device=clock.device)
    piece, other = whole[: count // ranks].clone(), whole.clone()
    share = 2 * count * (ranks - 1) / ranks
    if kind == "all_gather":
        return share, clock.seconds(lambda: all_gather_single(whole, piece, group=group))
    if kind == "reduce_scatter":
        return share, clock.seconds(lambda: reduce_scatter_single(piece, whole, group=group))
    if kind == "all_reduce":
        return 2 * share, clock.seconds(lambda: dist.all_reduce(whole, group=group))
    if kind == "all_to_all":
        return share, clock.seconds(lambda: dist.all_to_all_single(other, whole, group=group))
    ahead, behind = (rank + 1) % ranks, (rank - 1) % ranks

    def pass_on() -> None:
        send = dist.P2POp(dist.isend, whole, dist.get_global_rank(group, ahead), group)
        receive = dist.P2POp(dist.irecv, other, dist.get_global_rank(group, behind), group)
        for work in dist.batch_isend_irecv([send, receive]):
            work.wait()

    return 2.0 * count, clock.seconds(pass_on)
