"""Runs of the trainer one after another in long-lived ranks, which is faster than torchrun for each."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from runtime.job.processes import Process
from runtime.parity.ranks import RankPool
from runtime.settings.flags import parse_flags
from runtime.start import prepare, run_job


@dataclass(frozen=True)
class Job:
    """A run of the trainer."""

    num_ranks: int
    arguments: tuple[str, ...]


def run_jobs(jobs: Sequence[Job], pool: RankPool) -> None:
    """Do runs in order.

    Args:
        jobs: the runs.
        pool: the ranks that do them.

    Raises:
        RankError: a run failed; with the traceback of its rank.
    """
    for job in jobs:
        pool.run(job.num_ranks, _run, job.arguments)


def _run(arguments: tuple[str, ...]) -> None:
    rank = dist.get_rank()
    process = Process(rank=rank, local_rank=rank, world_size=dist.get_world_size())
    run, origin = prepare(parse_flags(arguments), process)
    store = dist.PrefixStore("data", dist.distributed_c10d._get_default_store())
    with contextlib.redirect_stdout(io.StringIO()):
        run_job(run, origin, process, torch.device("cpu"), store, lambda doing, **_: None)
