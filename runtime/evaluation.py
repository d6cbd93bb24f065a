"""The loss on a set: whole global batches through the engine, and what they come to over all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.data.batch import IGNORED_LABEL
from runtime.data.prefetch import Prefetcher
from runtime.engine import Engine
from runtime.parallel.mesh import ParallelMesh


@dataclass(frozen=True, kw_only=True, slots=True)
class SetLoss:
    """What an evaluation on a set found; the same on every rank."""

    lm_loss: float
    """Mean cross entropy over the labels that count, nats a token."""
    tokens: int
    """Labels that count."""
    num_bytes: int | None
    """Bytes of the text that these stand for; None where that isn't known."""
    seconds: float


def evaluate_set(
    engine: Engine,
    mesh: ParallelMesh,
    loader: Prefetcher,
    *,
    count: int,
    size: int,
    bytes_V: Tensor | None,
    group: dist.ProcessGroup,
    doing: Callable[[int], None],
) -> SetLoss:
    """Measure the loss on the first samples of a set. Collective.

    Args:
        engine: the model.
        mesh: the ranks.
        loader: this rank's part of each global batch.
        count: samples.
        size: samples of a global batch.
        bytes_V: [V] int64 bytes that each token stands for; None where that isn't known. Read on the ranks that count.
        group: a gloo group of all ranks.
        doing: told the first sample of each global batch.

    Returns:
        The loss, each label weighing the same.
    """
    start = time.perf_counter()
    total = torch.zeros(3, dtype=torch.float64)  # loss, tokens, bytes
    for first in range(0, count, size):
        doing(first)
        batches = loader.global_batch(first, size, limit=count)
        mean = engine.evaluate(batches)
        for batch in batches:
            labels = batch.labels[batch.labels != IGNORED_LABEL]
            num_bytes = 0 if bytes_V is None else int(bytes_V[labels].sum())
            total += torch.tensor([mean * labels.numel(), labels.numel(), num_bytes], dtype=torch.float64)
    if not counts(mesh):
        total.zero_()
    dist.all_reduce(total, group=group)
    loss, tokens, found = total.tolist()
    return SetLoss(
        lm_loss=loss / max(tokens, 1),
        tokens=int(tokens),
        num_bytes=int(found) or None,
        seconds=time.perf_counter() - start,
    )


def counts(mesh: ParallelMesh) -> bool:
    """Say whether a rank counts its labels: of those that see the same samples, the first does."""
    return all(mesh.rank(axis) == 0 for axis in ("tp", "pp", "cp"))
