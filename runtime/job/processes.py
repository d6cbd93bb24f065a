"""The processes of a job: who they are, how they start together, and how they agree."""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from moeconv.errors import MoeconvError
from runtime.parallel.graphs import release_graphs

STARTED = time.monotonic()
"""When this process began, near enough: --exit-duration-in-mins counts from here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """This process's place in the job, as torchrun says it; a process started by hand is a job of its own."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    attempt: int = 0
    """How often the launcher has started the job again."""

    @classmethod
    def from_environment(cls) -> Process:
        """Read the place from torchrun's variables."""
        names = {"rank": "RANK", "local_rank": "LOCAL_RANK", "world_size": "WORLD_SIZE"}
        names["attempt"] = "TORCHELASTIC_RESTART_COUNT"
        return cls(**{field: int(os.environ[name]) for field, name in names.items() if name in os.environ})


def connect(process: Process, purpose: str, timeout: float = 300.0) -> Store:
    """Connect to the job's store, with keys of this attempt of the job and this purpose only.

    After a restart torchrun's agent keeps the store of the attempt before, with the addresses of dead processes in it.

    Args:
        process: this process's place.
        purpose: sets keys apart.
        timeout: seconds to wait for the store and for its keys.

    Returns:
        The store; one of this process alone where it wasn't started by a launcher.
    """
    # The stubs of torch leave these public names out.
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None or port is None:
        return cast(Store, dist.HashStore())  # type: ignore[attr-defined]
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host,
        int(port),
        process.world_size,
        is_master=process.rank == 0 and not agent,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return PrefixStore(f"moeconv/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{purpose}", store)


def start(process: Process, store: Store, timeout: float) -> torch.device:
    """Join the job: NCCL where there are GPUs, gloo otherwise.

    Args:
        process: this process's place.
        store: where the processes meet.
        timeout: seconds that a collective may take.

    Returns:
        The device to compute on.

    Raises:
        MoeconvError: more processes on this machine than GPUs.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        count = torch.cuda.device_count()
        if process.local_rank >= count:
            raise MoeconvError(
                f"--nproc-per-node: process {process.local_rank} of this machine has no GPU; it has {count}"
            )
        torch.cuda.set_device(process.local_rank)
    device = torch.device("cuda", process.local_rank) if cuda else torch.device("cpu")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        rank=process.rank,
        world_size=process.world_size,
        store=store,
        timeout=timedelta(seconds=timeout),
        device_id=device if cuda else None,
    )
    return device


def end_groups() -> None:
    """Take the process groups apart, and their threads, each of which ends with the last reference to its group.

    A thread of gloo's that lets go of a tensor asks for Python's lock. Once Python itself is taken apart, this ends the thread in the middle
    of a destructor, and so the process: "terminate called without an active exception".
    Source: https://github.com/pytorch/pytorch/issues/190489.
    """
    release_graphs()
    dist.destroy_process_group()
    gc.collect()  # what the work has left in cycles holds groups as well


def one_first(first: bool, action: Callable[[], None]) -> None:
    """Run an action on chosen ranks, then on the others, which find its work done; errors of users reach everybody.

    Args:
        first: whether this rank is among those that go first.
        action: what to do.

    Raises:
        MoeconvError: the action failed on this or another rank.
    """
    for turn in (True, False):
        error: str | None = None
        if first is turn:
            try:
                action()
            except MoeconvError as failure:
                error = str(failure)
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        failed = next((text for text in errors if text is not None), None)
        if failed is not None:
            raise MoeconvError(failed)


def max_over_ranks(mine: Sequence[float], group: dist.ProcessGroup) -> list[float]:
    """Find the largest of each of some numbers.

    Args:
        mine: this rank's numbers, equally many on each rank.
        group: a gloo group of all ranks, so that no device has to be waited for.

    Returns:
        The same numbers on every rank.
    """
    values = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    found: list[float] = values.tolist()
    return found


def peak_memory(device: torch.device) -> int:
    """Give the peak since the last call: bytes of the GPU's memory that tensors took.

    Args:
        device: what the process computes on.

    Returns:
        Bytes; on a CPU the process's own peak since it began.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return int(peak)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
