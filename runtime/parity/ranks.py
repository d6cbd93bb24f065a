"""A pool of processes that stay alive over many multi-rank cases: imports and start-up are paid once."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.distributed_c10d import PrefixStore

_START_SECONDS = 600.0


class RankError(Exception):
    """A rank of a case failed; the message holds its traceback."""


class RankPool:
    """Runs functions on 1 to `size` gloo ranks, each case in a process group of its own; a rank starts with the first case that has it."""

    def __init__(self, size: int, start_method: str = "spawn") -> None:
        """Make a pool of no processes yet.

        Args:
            size: the most ranks that a case may have.
            start_method: multiprocessing's. `forkserver` starts ranks with what its server has imported, where none of that uses a GPU.
        """
        self.size = size
        self._context: Any = mp.get_context(start_method)
        self._server: Any = None  # the store, which lives as long as the ranks
        self._count = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, num_ranks: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Call a function on each of some ranks, within an initialised process group.

        Args:
            num_ranks: world size of the case.
            function: a top-level function.
            *args: its arguments, the same on each rank.
            timeout: seconds after which the case counts as hung.

        Returns:
            What each rank returned.

        Raises:
            RankError: a rank raised, died or hung; the pool's processes are replaced before the next case.
        """
        assert num_ranks <= self.size, f"{num_ranks} ranks of a pool of {self.size}"
        if len(self._processes) < num_ranks:
            self._start(num_ranks)
        self._count += 1
        pipes = self._pipes[:num_ranks]
        for pipe in pipes:
            pipe.send((self._count, num_ranks, function, args, timeout))
        results: dict[int, Any] = {}
        while len(results) < num_ranks:
            pending = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = wait(pending, timeout)
            if not ready:
                self._fail(f"ranks {[r for r in range(num_ranks) if r not in results]} hung for {timeout} s")
            for rank, pipe in enumerate(pipes):
                if pipe not in ready:
                    continue
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    self._fail(f"rank {rank} died")
                if not ok:
                    self._fail(f"rank {rank}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(num_ranks)]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _fail(self, message: str) -> None:
        self.close()
        raise RankError(message)

    def _start(self, num_ranks: int) -> None:
        if not self._processes:
            self._server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        first = len(self._processes)
        for rank in range(first, num_ranks):
            mine, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(rank, self._server.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)
        for rank, pipe in enumerate(self._pipes[first:], first):  # imports count for no case's time
            try:
                if not pipe.poll(_START_SECONDS):
                    self._fail(f"rank {rank} did not start within {_START_SECONDS} s")
                pipe.recv()
            except EOFError:
                self._fail(f"rank {rank} died as it started")


def _serve(rank: int, port: int, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    pipe.send("ready")
    while True:
        try:
            number, num_ranks, function, args, timeout = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                store=PrefixStore(f"case{number}", store),
                rank=rank,
                world_size=num_ranks,
                timeout=timedelta(seconds=timeout),
            )
            result = function(*args)
            dist.barrier()
            dist.destroy_process_group()
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            return
