"""Runs of the trainer one after another in a few long-lived processes, which is faster than torchrun for each."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


@dataclass(frozen=True)
class Job:
    """A run of the trainer."""

    num_ranks: int
    arguments: tuple[str, ...]


def run_jobs(jobs: Sequence[Job]) -> None:
    """Do runs in order; each waits for the ones before.

    Args:
        jobs: the runs.

    Raises:
        RuntimeError: a run failed; with the traceback of its rank.
    """
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    size = max(job.num_ranks for job in jobs)
    context: Any = mp.start_processes(_work, (server.port, list(jobs)), nprocs=size, join=False, start_method="spawn")
    while not context.join(timeout=600):
        pass


def _work(rank: int, port: int, jobs: list[Job]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=300))
    for number, job in enumerate(jobs):
        if rank < job.num_ranks:
            _run(rank, job, dist.PrefixStore(f"job{number}", store))
            if rank == 0:
                store.set(f"done{number}", "1")
        store.wait([f"done{number}"])


def _run(rank: int, job: Job, store: Any) -> None:
    from runtime.distributed import Process
    from runtime.train import prepare, run_job

    process = Process(rank=rank, local_rank=rank, world_size=job.num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.num_ranks, timeout=timedelta(seconds=120))
    run, origin, notes = prepare(job.arguments, process)
    with contextlib.redirect_stdout(io.StringIO()):
        run_job(run, origin, notes, process, torch.device("cpu"), lambda doing, **_: None, lambda: False)
    dist.destroy_process_group()
