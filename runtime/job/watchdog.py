"""What keeps a broken job from standing still: a rank that dies or hangs is named, with its traceback, on every rank.

A rank blocked in a collective can't notice that its partner is gone; NCCL's own timeout takes half an hour. A thread
of each rank talks to the job's store instead: it reports that it lives, and looks whether somebody has failed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Protocol

from torch.distributed.distributed_c10d import Store

from moeconv.errors import MoeconvError

FAILURE_STATUS = 1
_FAILED = "failed"
_ALIVE = "alive"


class Progress(Protocol):
    """How the rest of the trainer tells the watchdog that it is getting on."""

    def __call__(self, doing: str, *, limited: bool = True) -> None: ...


class Watchdog:
    """Ends this process when its own progress stops, or when another rank has failed, stopped or vanished."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        stall_seconds: float,
        silence_seconds: float = 60.0,
        interval: float = 1.0,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._stall, self._silence, self._interval = stall_seconds, silence_seconds, interval
        self._leave = leave
        self._doing, self._since, self._limited = "start-up", time.monotonic(), False
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching."""
        self._thread.start()

    def progress(self, doing: str, *, limited: bool = True) -> None:
        """Say that the process is getting on.

        Args:
            doing: what it does next, for the report.
            limited: whether that may take no longer than stall_seconds; reading a large checkpoint may.
        """
        self._doing, self._since, self._limited = doing, time.monotonic(), limited

    def fail(self, error: BaseException) -> bool:
        """Tell every rank that this one is about to die, and why.

        Args:
            error: what was raised.

        Returns:
            Whether it is the first to fail, so that nobody else has told the cause.
        """
        self._stop.set()
        text = str(error) if isinstance(error, MoeconvError) else "".join(traceback.format_exception(error))
        return self._publish(f"rank {self._rank} on {socket.gethostname()} failed in {self._doing}:\n{text}")

    def stop(self) -> None:
        """Stop watching: the process ends as it should."""
        self._stop.set()
        with contextlib.suppress(RuntimeError):  # the job's store may be gone already: everybody is leaving
            self._store.set(f"{_ALIVE}/{self._rank}", "left")

    def _publish(self, report: str) -> bool:
        with contextlib.suppress(RuntimeError):  # without a store there is nobody to tell
            if self._store.add(f"{_FAILED}/count", 1) > 1:
                return False  # the first failure is the cause, the others follow from it
            self._store.set(_FAILED, report)
        return True

    def _watch(self) -> None:
        beat = 0
        while not self._stop.wait(self._interval):
            beat += 1
            try:
                self._store.set(f"{_ALIVE}/{self._rank}", str(beat))
                failed = self._store.get(_FAILED).decode() if self._store.check([_FAILED]) else None
                failed = failed or self._own_stall() or (self._silent_rank() if self._rank == 0 else None)
            except RuntimeError as error:
                failed = f"the job's store doesn't answer any more ({error}); the node that keeps it is gone"
            if failed and not self._stop.is_set():
                self._end(failed)
                return

    def _own_stall(self) -> str | None:
        seconds = time.monotonic() - self._since
        if not self._limited or seconds < self._stall:
            return None
        report = (
            f"rank {self._rank} on {socket.gethostname()} stands still for {seconds:.0f} s in {self._doing} "
            "(--distributed-timeout-minutes)"
        )
        self._publish(report)
        return report

    def _silent_rank(self) -> str | None:
        """Look for a rank whose process is gone without a word, as after SIGKILL or the loss of a node."""
        now = time.monotonic()
        for rank in range(1, self._world_size):
            key = f"{_ALIVE}/{rank}"
            if not self._store.check([key]):
                continue  # not there yet: machines take their time to start
            beat = self._store.get(key)
            if beat != self._seen.get(rank, (None, 0.0))[0]:
                self._seen[rank] = (beat, now)
            elif beat != b"left" and now - self._seen[rank][1] > self._silence:
                report = f"rank {rank} gave no sign of life for {self._silence:.0f} s: its process or node is gone"
                self._publish(report)
                return report
        return None

    def _end(self, report: str) -> None:
        # torchrun kills the others as soon as the first process ends: let each say where it stands before that.
        print(f"[rank {self._rank}] ending in {self._doing}, because {report}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        self._stop.wait(2 * self._interval)
        self._leave(FAILURE_STATUS)


class StopRequest:
    """SIGTERM as a request that all ranks agree on: save and leave after the step."""

    def __init__(self) -> None:
        self.received = False
        self._before = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, signum: int, frame: object) -> None:
        self.received = True

    def restore(self) -> None:
        """Give the signal back to what handled it before."""
        signal.signal(signal.SIGTERM, self._before)
