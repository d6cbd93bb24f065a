"""Being asked to stop: the first time to save and leave, the second time at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A terminal and a scheduler signal the launcher and its processes, and the launcher passes it on: that is one request.
_SAME_REQUEST_SECONDS = 1.0


class StopRequest:
    """SIGTERM and SIGINT (Ctrl-C) as a request: save and leave after the step.

    A second one leaves at once, and so does the first before there is anything to save. A thread reads the signals,
    since a process that waits in a collective runs no signal handler of Python's.
    """

    def __init__(
        self,
        *,
        speaks: bool = True,
        leave: Callable[[int], object] = os._exit,
        same_request_seconds: float = _SAME_REQUEST_SECONDS,
    ) -> None:
        """Take over the signals of this process; in its main thread.

        Args:
            speaks: whether this process says on stderr what it does; one of a job is enough.
            leave: ends the process with a status.
            same_request_seconds: signals so close after the first are taken for the same request.
        """
        self.received = False
        """Whether the run is to stop after its step."""
        self._saves = False
        self._first: float | None = None
        self._speaks, self._leave, self._same = speaks, leave, same_request_seconds
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # What is handled by a Python function also goes to the wakeup descriptor, at once.
        self._before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def begin_training(self) -> None:
        """Say that from now on there is something to save: the loop looks at `received` after each step."""
        self._saves = True

    def restore(self) -> None:
        """Give the signals back to what handled them before."""
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._write)

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while received := os.read(self._read, 64):
                for number in received:
                    if number in _SIGNALS:
                        self._take(signal.Signals(number))
        os.close(self._read)

    def _take(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first is not None and now - self._first < self._same:
            return
        again, self._first = self._first is not None, now if self._first is None else self._first
        if self._saves and not again:
            self.received = True
            self._say(f"{number.name}: leaving after this step and its save; once more leaves at once")
            return
        self._say(f"{number.name}: leaving at once; " + ("what is saved already stays" if again else "nothing to save"))
        self._leave(128 + number)

    def _say(self, text: str) -> None:
        if self._speaks:
            with contextlib.suppress(OSError, ValueError):
                print(text, file=sys.stderr, flush=True)
