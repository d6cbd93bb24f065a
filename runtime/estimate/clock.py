"""Times work on a device for a calibration, all ranks together."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist


class Clock:
    """Times work on a device, all ranks together."""

    def __init__(self, device: torch.device, warm: float) -> None:
        self.device, self._warm = device, warm

    def seconds(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Give the mean time of some work in a row, that of the slowest rank."""
        self._synchronize()
        begin = time.perf_counter()
        work()
        work()
        # Ranks must agree on how often, since the work may be a collective: none looks at its own clock alone.
        while self._agreed(time.perf_counter() - begin) < self._warm:
            work()
        self._synchronize()
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(repeats):
            work()
        self._synchronize()
        return self._agreed((time.perf_counter() - begin) / repeats)

    def _agreed(self, seconds: float) -> float:
        self._synchronize()
        longest = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(longest, op=dist.ReduceOp.MAX)
        return float(longest)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
