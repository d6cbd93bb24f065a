"""CUDA graphs that hold what has to be given back before a process ends its groups."""

from __future__ import annotations

import weakref

import torch

_graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()


def remember(graph: torch.cuda.CUDAGraph) -> None:
    """Have a graph released with the others, if it is still there then."""
    _graphs.add(graph)


def release_graphs() -> None:
    """Give back what graphs hold; none can be replayed any more.

    A communicator of NCCL's waits, when it is destroyed, for every graph into which one of its transfers was captured.
    """
    for graph in list(_graphs):
        graph.reset()
    _graphs.clear()
