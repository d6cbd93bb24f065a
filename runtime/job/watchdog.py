"""What keeps a broken job from standing still: a rank that dies or hangs is named, with its traceback, on every rank.

A rank blocked in a collective can't notice that its partner is gone; NCCL's own timeout takes half an hour. A thread
of each rank talks to the job's store instead: it reports that it lives, and looks whether somebody has failed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

from torch.distributed.distributed_c10d import Store

from moeconv.errors import MoeconvError

FAILURE_STATUS = 1
_FAILED = "failed"
_JUDGES = "judges"
_ALIVE = "alive"
_LEFT = b"left"
_PATIENCE = 30.0
"""Seconds to wait for the watchdog's thread at the end."""


class Progress(Protocol):
    """How the rest of the trainer tells the watchdog that it is getting on."""

    def __call__(self, doing: str, *, limited: bool = True) -> None: ...


@dataclass(frozen=True, slots=True)
class Report:
    """Why a job ends."""

    rank: int
    """The rank that is to blame."""
    host: str
    headline: str
    """What happened, in one line."""
    details: str = ""
    """A traceback, where the rank could give one."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself, again and again."""

    number: int
    steps: int
    """How often it has got on."""
    limited: bool
    """Whether what it does may not take for ever."""
    doing: str
    host: str


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
        self._leave, self._host = leave, socket.gethostname()
        self._doing, self._since, self._limited, self._steps = "start-up", time.monotonic(), False, 0
        self._heard: tuple[bytes, float] = (b"", time.monotonic())
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
        self._steps += 1

    def fail(self, error: BaseException) -> bool:
        """Tell every rank that this one is about to die, and why; of a crash, the traceback is printed before.

        Args:
            error: what was raised.

        Returns:
            Whether it is the first to fail. If not, its error follows from the first one, and a line is all that is
            printed.
        """
        self._stop.set()
        try:
            return self._tell(error)
        finally:
            self._join()

    def _tell(self, error: BaseException) -> bool:
        known = isinstance(error, MoeconvError)
        text = str(error) if known else "".join(traceback.format_exception(error))
        if not known and not self._failed_before():
            self._print(f"[rank {self._rank}] failed in {self._doing}:\n{text}")
        headline = f"failed in {self._doing}: {str(error) if known else _last_line(text)}"
        if self._publish(Report(self._rank, self._host, headline, "" if known else text)):
            return True
        if not known:  # the others' consequence, such as a connection that is closed
            self._print(f"[rank {self._rank}] ends in {self._doing}: another rank has failed before")
        return False

    def stop(self) -> None:
        """Stop watching: the process ends as it should."""
        self._stop.set()
        self._join()  # a beat that comes after the farewell would be missed for ever
        with contextlib.suppress(RuntimeError):  # the job's store may be gone already: everybody is leaving
            self._store.set(f"{_ALIVE}/{self._rank}", _LEFT.decode())

    def _join(self) -> None:
        # A thread that Python's end meets in a call of the store would take the whole process down with it.
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(max(2 * self._interval, _PATIENCE))

    def _failed_before(self) -> bool:
        # By the count: the report itself is set without an answer, and may be on its way.
        with contextlib.suppress(RuntimeError):
            return bool(self._store.add(f"{_FAILED}/count", 0) > 0)
        return False

    def _publish(self, report: Report) -> bool:
        with contextlib.suppress(RuntimeError):  # without a store there is nobody to tell
            if self._store.add(f"{_FAILED}/count", 1) > 1:
                return False  # the first failure is the cause, the others follow from it
            self._store.set(_FAILED, json.dumps(asdict(report)))
        return True

    def _read_failure(self) -> Report | None:
        with contextlib.suppress(RuntimeError):
            if self._store.check([_FAILED]):
                return Report(**json.loads(self._store.get(_FAILED)))
        return None

    def _watch(self) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            try:
                # The first beat comes before the first wait: a rank that has joined is missed from then on.
                beat = Beat(number, self._steps, self._limited, self._doing, self._host)
                self._store.set(f"{_ALIVE}/{self._rank}", json.dumps(asdict(beat)))
                report = self._read_failure() or self._own_stall() or self._silent_neighbour()
            except RuntimeError as error:
                text = f"the job's store doesn't answer any more ({error}); the node that keeps it is gone"
                report = Report(self._rank, self._host, text)
            if report is not None and not self._stop.is_set():
                self._end(report)
                return
            self._stop.wait(self._interval)

    def _own_stall(self) -> Report | None:
        seconds = time.monotonic() - self._since
        if not self._limited or seconds < self._stall:
            return None
        if self._store.add(_JUDGES, 1) > 1 and seconds < self._stall + 10 * self._interval:
            return None  # who stands still first looks at everybody; the others soon read what it finds
        report = self._judge(seconds)
        self._publish(report)
        return report

    def _judge(self, seconds: float) -> Report:
        """Find the rank for which the others wait: one that is silent, else one that is behind, else this one."""
        before = self._beats()
        self._stop.wait(3 * self._interval)
        after = self._beats()
        silent = [rank for rank, beat in after.items() if rank != self._rank and before.get(rank) == beat]
        if silent:
            rank = silent[0]
            text = f"gives no sign of life while rank {self._rank} waits in {self._doing} for {seconds:.0f} s: its"
            return Report(rank, after[rank].host, f"{text} process is stopped or gone, or its node")
        behind = [rank for rank, beat in after.items() if beat.limited and beat.steps < self._steps]
        if behind:
            beat = after[behind[0]]
            text = f"stands still in {beat.doing} while rank {self._rank} waits in {self._doing} for {seconds:.0f} s"
            return Report(behind[0], beat.host, f"{text} (--distributed-timeout-minutes)")
        text = f"stands still for {seconds:.0f} s in {self._doing} (--distributed-timeout-minutes)"
        return Report(self._rank, self._host, text)

    def _beats(self) -> dict[int, Beat]:
        """Read what each rank last said; those that haven't come yet or have left are not there."""
        keys = {rank: f"{_ALIVE}/{rank}" for rank in range(self._world_size)}
        said = {rank: self._store.get(key) for rank, key in keys.items() if self._store.check([key])}
        return {rank: Beat(**json.loads(text)) for rank, text in said.items() if text != _LEFT}

    def _silent_neighbour(self) -> Report | None:
        """Look whether the next rank is gone without a word, as after SIGKILL or the loss of a node."""
        rank = (self._rank + 1) % self._world_size
        key = f"{_ALIVE}/{rank}"
        if rank == self._rank or not self._store.check([key]):
            return None  # not there yet: machines take their time to start
        now, text = time.monotonic(), self._store.get(key)
        if text != self._heard[0]:
            self._heard = (text, now)
        elif text != _LEFT and now - self._heard[1] > self._silence:
            host = Beat(**json.loads(text)).host
            headline = f"gave no sign of life for {self._silence:.0f} s: its process or node is gone"
            report = Report(rank, host, headline)
            self._publish(report)
            return report
        return None

    def _end(self, report: Report) -> None:
        # torchrun kills the others as soon as the first process ends: let each say where it stands before that.
        line = f"rank {report.rank} on {report.host} {report.headline}"
        self._print(f"[rank {self._rank}] ends in {self._doing}: {line}")
        if report.details:
            # It stands above already, unless another machine has it.
            if report.host != self._host and self._rank == 0:
                self._print(report.details)
        else:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            sys.stderr.flush()
        self._stop.wait(2 * self._interval)
        self._leave(FAILURE_STATUS)

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "?"
