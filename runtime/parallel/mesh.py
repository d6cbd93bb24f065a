"""The ranks as two grids over the same processes, one for attention, one for experts, and a process group per axis.

Attention, embeddings and norms see the grid (pp, dp, cp, tp); experts see (pp, edp, ep, etp). Both list the ranks in
the same order, the last axis fastest, so that tensor-parallel neighbours share a machine. Apart from pp the two grids
are independent: an expert's ranks may lie along tp, along cp and dp, or along any mixture of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from runtime.parallel.collectives import Group
from runtime.parallel.degrees import ParallelConfig

DENSE_AXES = ("pp", "dp", "cp", "tp")
EXPERT_AXES = ("pp", "edp", "ep", "etp")
# Axes taken together: data parallelism of dense weights, tokens of one sequence, and all ranks of a stage.
JOINT_AXES = {"dp_cp": ("dp", "cp"), "tp_cp": ("cp", "tp"), "tp_dp_cp": ("dp", "cp", "tp"), "ep_etp": ("ep", "etp")}

# Axes over which gradients are reduced while the backward pass goes on.
_REDUCTION_AXES = ("dp_cp", "edp")

Lane = Literal["layers", "reductions", "exchanges"]
_Made = dict[tuple[Lane, bool, tuple[int, ...]], dist.ProcessGroup]

# The groups made so far under a default process group, for as long as that one is there: a group's threads end with the last reference to it.
_made: WeakKeyDictionary[dist.ProcessGroup, _Made] = WeakKeyDictionary()


def _new_group(ranks: tuple[int, ...], lane: Lane, *, urgent: bool) -> dist.ProcessGroup:
    """Make a group, or give the one that the same ranks have already: axes of equal extent share a communicator.

    Reductions have communicators of their own: on a shared one, the exchanges of the layers would queue behind them. So
    have exchanges that overlap with computation: on a shared one, collectives run in the order in which the host launches
    them, and an exchange would wait for the numbers of rows of the micro-batch that it is to be hidden behind.
    What an urgent group does on a GPU goes before what is computed beside it: a product that fills the GPU would else
    hold up the communication that it is to hide.
    """
    world = dist.group.WORLD
    assert world is not None
    made, key = _made.setdefault(world, {}), (lane, urgent, ranks)
    if key not in made:
        options = _first_in_line() if urgent else None
        timeout = None if options is None else default_pg_timeout
        made[key] = dist.new_group(list(ranks), timeout=timeout, pg_options=options)
    return made[key]


def _lane(axis: str) -> Lane:
    if axis in _REDUCTION_AXES:
        return "reductions"
    return "exchanges" if axis == "ep_rows" else "layers"


def _first_in_line() -> Any:
    """Options by which NCCL's kernels get multiprocessors before those that compute; None on gloo."""
    if "nccl" not in str(dist.get_backend_config()):
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = default_pg_timeout
    return options


class ParallelMesh:
    """The coordinates of this rank, and the process group of each axis."""

    def __init__(self, parallel: ParallelConfig, world_size: int | None = None, rank: int | None = None) -> None:
        """Lay the ranks out and create the groups; collective over all ranks.

        Args:
            parallel: the degrees; data-parallel degrees are what the others leave of the world size.
            world_size: number of ranks; None asks torch.distributed (1 where it isn't initialised).
            rank: coordinates of this rank instead of the process's own; then no group is created.
        """
        initialized = dist.is_available() and dist.is_initialized()
        self.world_size = world_size or (dist.get_world_size() if initialized else 1)
        self.global_rank = rank if rank is not None else (dist.get_rank() if initialized else 0)
        self._connected = initialized and rank is None and self.world_size > 1
        dense = parallel.pp * parallel.cp * parallel.tp
        expert = parallel.pp * parallel.ep * parallel.etp
        for name, product in (("tp x pp x cp", dense), ("ep x etp x pp", expert)):
            message = f"{name} is {product}, which doesn't divide the world size {self.world_size}"
            assert self.world_size % product == 0, message
        dense_shape = (parallel.pp, self.world_size // dense, parallel.cp, parallel.tp)
        expert_shape = (parallel.pp, self.world_size // expert, parallel.ep, parallel.etp)
        ranks = np.arange(self.world_size)
        self._gathers_overlap = parallel.tp_comm_overlap and parallel.tp > 1
        self._groups: dict[str, Group] = {}
        self._members: dict[str, tuple[int, ...]] = {}
        for axes, shape in ((DENSE_AXES, dense_shape), (EXPERT_AXES, expert_shape)):
            grid = ranks.reshape(shape)
            for axis in axes:
                self._add(axis, grid, axes, (axis,))
            for name, joint in JOINT_AXES.items():
                if set(joint) <= set(axes):
                    self._add(name, grid, axes, joint)
            if parallel.overlap_exchange and "ep" in axes:
                self._add("ep_rows", grid, axes, ("ep",))
        self._add_ends(ranks.reshape(dense_shape))

    def _add(self, name: str, grid: npt.NDArray[np.int64], axes: Sequence[str], keep: Sequence[str]) -> None:
        if name in self._members:
            return
        kept = [axes.index(axis) for axis in keep]
        others = [i for i in range(len(axes)) if i not in kept]
        self._add_rows(name, grid.transpose(*others, *kept).reshape(-1, int(np.prod([grid.shape[i] for i in kept]))))

    def _add_rows(self, name: str, rows: npt.NDArray[np.int64]) -> None:
        for row in rows.tolist():
            members = tuple(row)
            # Every rank creates every group, in the same order: torch.distributed asks for that.
            connect = self._connected and len(members) > 1
            lane = _lane(name)
            urgent = lane == "exchanges" or (lane == "layers" and self._gathers_overlap)
            group = _new_group(members, lane, urgent=urgent) if connect else None
            if self.global_rank in members:
                self._members[name], self._groups[name] = members, group

    def _add_ends(self, grid: npt.NDArray[np.int64]) -> None:
        """The axis "ends": first and last stage, which both hold tied embeddings."""
        self._members["ends"], self._groups["ends"] = (self.global_rank,), None
        if grid.shape[0] > 1:
            self._add_rows("ends", np.stack([grid[0].reshape(-1), grid[-1].reshape(-1)], axis=1))

    def share_heads(self, num_kv_heads: int) -> None:
        """Create the axis "kv": the neighbours along tp that hold the same key/value head; collective.

        Args:
            num_kv_heads: key/value heads of the model.
        """
        copies = max(1, self.size("tp") // num_kv_heads)
        tp = self.size("tp")
        rows = np.arange(self.world_size).reshape(-1, tp).reshape(-1, copies)
        self._members.pop("kv", None)
        self._add_rows("kv", rows)

    def group(self, axis: str) -> Group:
        """The process group of this rank along an axis (tp, cp, dp, pp, ep, etp, edp, dp_cp, ...); None: one rank.

        "ep_rows" is the axis ep again where exchanges overlap, with a communicator for nothing else.
        """
        return self._groups[axis]

    def size(self, axis: str) -> int:
        """Ranks along an axis."""
        return len(self._members[axis])

    def rank(self, axis: str) -> int:
        """This rank's coordinate along an axis."""
        return self._members[axis].index(self.global_rank)

    def ranks(self, axis: str) -> tuple[int, ...]:
        """The global ranks along an axis, this one among them."""
        return self._members[axis]
