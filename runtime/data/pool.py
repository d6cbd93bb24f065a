"""Processes that tokenize units, as many as there are cores."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

from runtime.data.chat import ChatSpec, open_encoder
from runtime.data.errors import DataError
from runtime.data.parts import PartReport, Tokenizing, tokenize_unit
from runtime.data.tokenizer import EncoderSpec
from runtime.data.units import Unit

_ROOT = Path(__file__).parents[2]
_GRACE = 5.0


def num_cores() -> int:
    """Give the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenize(
    units: Iterator[Unit], spec: EncoderSpec | ChatSpec, how: Tokenizing, folder: Path, workers: int
) -> Iterator[PartReport | None]:
    """Tokenize units in parallel, each into a part in the folder.

    Args:
        units: what to do, taken as processes become free.
        spec: how texts, or conversations, become ids.
        how: settings.
        folder: where the parts go.
        workers: processes; 1 works in this one.

    Yields:
        Reports, as units are done, in any order; None about once a second while there are none.

    Raises:
        DataError: a file is damaged, a part can't be written, or a process died. What is done is kept.
    """
    if workers == 1:
        encoder = open_encoder(spec)
        for unit in units:
            try:
                yield tokenize_unit(unit, encoder, how, folder)
            except OSError as error:
                raise DataError(
                    f"{folder}: can't be written: {error.strerror or error}; make room there, then start again"
                ) from None
        return
    pool = _Pool(spec, how, folder, workers)
    try:
        yield from pool.run(units)
    finally:
        pool.close()


class _Pool:
    def __init__(self, spec: EncoderSpec | ChatSpec, how: Tokenizing, folder: Path, workers: int) -> None:
        self._workers: dict[Connection, subprocess.Popen[bytes]] = {}
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            for _ in range(workers):
                ours, theirs = Pipe()
                command = [sys.executable, "-m", "runtime.data.worker", str(theirs.fileno())]
                process = subprocess.Popen(
                    command,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={**environment, "PYTHONPATH": path},
                    start_new_session=True,  # Ctrl-C reaches this process only, which then closes the connections
                )
                theirs.close()
                self._workers[ours] = process
            for connection in self._workers:
                self._send(connection, (spec, how, str(folder)))
        except BaseException:
            self.close()
            raise

    def run(self, units: Iterator[Unit]) -> Iterator[PartReport | None]:
        free = list(self._workers)
        busy: list[Connection] = []
        more = True
        while more or busy:
            while more and free:
                unit = next(units, None)
                if unit is None:
                    more = False
                    break
                connection = free.pop()
                self._send(connection, unit)
                busy.append(connection)
            if not busy:
                continue
            ready = wait(busy, timeout=1.0)
            if not ready:
                yield None
            for connection in [connection for connection in busy if connection in ready]:
                answer = self._receive(connection)
                busy.remove(connection)
                free.append(connection)
                yield answer

    def _send(self, connection: Connection, value: object) -> None:
        try:
            connection.send(value)
        except (BrokenPipeError, ConnectionResetError):
            raise self._dead(connection) from None

    def _receive(self, connection: Connection) -> PartReport:
        try:
            answer = connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._dead(connection) from None
        if isinstance(answer, str):
            raise DataError(answer)
        assert isinstance(answer, PartReport)
        return answer

    def _dead(self, connection: Connection) -> DataError:
        status = self._workers[connection].wait(_GRACE)
        how = (
            f"was killed by signal {-status} (9: most often the system ran out of memory)"
            if status < 0
            else f"ended with status {status}"
        )
        return DataError(
            f"a tokenizing process {how}; what is done is kept: start again to go on, with fewer --workers where memory is short"
        )

    def close(self) -> None:
        """End the processes: each leaves when its connection closes; one in the middle of a unit is told to."""
        for connection in self._workers:
            connection.close()
        for process in self._workers.values():
            process.terminate()
        for process in self._workers.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            process.kill()
            process.wait()
