"""A program in a process that is forked from the ranks' server: it begins without imports, and lives and dies like any other."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from tests.support.ranks import preload


class Forked:
    """What the tests use of `subprocess.Popen`, with output and errors in one pipe."""

    def __init__(self, function: Callable[..., None], *args: Any, environment: Mapping[str, str], folder: Path) -> None:
        """Start a process.

        Args:
            function: a top-level function; its end is the process's.
            *args: its arguments.
            environment: all variables.
            folder: to work in.
        """
        preload()
        context = mp.get_context("forkserver")
        mine, theirs = context.Pipe(duplex=False)
        # A daemon: what a failed test leaves behind is ended with pytest's worker.
        self._process = context.Process(
            target=_begin, args=(theirs, dict(environment), folder, function, args), daemon=True
        )
        self._process.start()
        theirs.close()
        self._output = ""
        self._reader = threading.Thread(target=self._read, args=(mine,), daemon=True)
        self._reader.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def _read(self, pipe: Connection) -> None:
        with os.fdopen(os.dup(pipe.fileno()), errors="replace") as file:
            pipe.close()
            self._output = file.read()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait until nobody can write any more, and for the end."""
        self._reader.join(timeout)
        if self._reader.is_alive():
            raise subprocess.TimeoutExpired("a forked program", timeout or 0.0)
        self._process.join()
        return self._output, None


def _begin(
    pipe: Connection, environment: dict[str, str], folder: Path, function: Callable[..., None], args: tuple[Any, ...]
) -> None:
    os.dup2(pipe.fileno(), 1)
    os.dup2(pipe.fileno(), 2)
    pipe.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    function(*args)
