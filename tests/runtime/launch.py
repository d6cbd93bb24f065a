"""Runs the trainer as users do, through torchrun; run as a program, it breaks the trainer in a chosen way first.

torchrun's own process is forked where it has been imported already; the ranks that it starts are programs.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.forked import Forked

ROOT = Path(__file__).parents[2]


def start(num_ranks: int, arguments: Sequence[object], *, fault: str = "none", max_restarts: int = 0) -> Forked:
    """Start a run.

    Args:
        num_ranks: processes.
        arguments: the trainer's command line.
        fault: the name of a function below that breaks something; none is plain `-m runtime.train`.
        max_restarts: how often torchrun starts it again.

    Returns:
        torchrun's process, with output and errors in one pipe.
    """
    program = ["-m", "runtime.train"] if fault == "none" else [__file__, fault]
    torchrun = ["--nproc-per-node", num_ranks, "--master-port", 0]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", max_restarts]
    command = [str(part) for part in (*torchrun, *program, *arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    from tests.support.forked import Forked  # not in the ranks, which run this file

    return Forked(_torchrun, command, environment=environment, folder=ROOT)


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import main

    main(arguments)


def run(num_ranks: int, arguments: Sequence[object], *, fault: str = "none", max_restarts: int = 0) -> tuple[int, str]:
    """Do a run to its end.

    Args:
        num_ranks: processes.
        arguments: the trainer's command line.
        fault: as for `start`.
        max_restarts: as for `start`.

    Returns:
        torchrun's exit status, and everything that was printed.
    """
    process = start(num_ranks, arguments, fault=fault, max_restarts=max_restarts)
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate()
        raise AssertionError(f"the run did not end:\n{output}") from None
    return process.returncode, output


def run_here(arguments: Sequence[object]) -> list[str]:
    """Do a run in this process, as its only rank.

    Args:
        arguments: the trainer's command line.

    Returns:
        The lines that were printed.
    """
    import torch
    import torch.distributed as dist

    from runtime.job.processes import Process
    from runtime.settings.flags import parse_flags
    from runtime.start import prepare, run_job

    settings, origin = prepare(parse_flags([str(argument) for argument in arguments]), Process())
    printed = io.StringIO()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with contextlib.redirect_stdout(printed):
            run_job(settings, origin, Process(), torch.device("cpu"), dist.HashStore(), lambda doing, **_: None)
    finally:
        dist.destroy_process_group()
    return printed.getvalue().splitlines()


def steps(log: Path) -> dict[int, dict[str, Any]]:
    """Read a log file.

    Args:
        log: the file of --log-file.

    Returns:
        Iteration -> the last record of its step.
    """
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return {record["iteration"]: record for record in records if "lm_loss" in record}


def _before_steps(action: Callable[[int], object]) -> None:
    """Do something before each step of the engine; the action is told the step's number in this attempt."""
    from runtime.engine import Engine

    plain = Engine.train_step
    numbers = itertools.count(1)

    def train_step(self: Any, batches: Any) -> Any:
        action(next(numbers))
        return plain(self, batches)

    Engine.train_step = train_step  # type: ignore[method-assign]


def _at_step(number: int, action: Callable[[], object]) -> None:
    """Do something on rank 1 before one step of the job's first attempt."""
    chosen = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    _before_steps(lambda n: action() if chosen and n == number else None)


def _at_write(iteration: int, action: Callable[[], object]) -> None:
    """Do something on rank 1 when it writes its part of an iteration's checkpoint."""
    from runtime.checkpoint import writer

    plain = writer.write_shard_file

    def write_shard_file(folder: Any, name: Any, entries: Any) -> Any:
        if f"{iteration:07d}" in Path(folder).name and os.environ["RANK"] == "1":
            action()
        return plain(folder, name, entries)

    writer.write_shard_file = write_shard_file


def _slow_renames() -> None:
    """Take a while for every renaming and removal of a checkpoint, so that a kill often meets one."""
    from runtime.checkpoint import folder

    plain_replace, plain_rmtree = os.replace, folder.shutil.rmtree

    def replace(*args: Any, **options: Any) -> None:
        if ".partial" in str(args) or ".old" in str(args):
            time.sleep(0.05)
        plain_replace(*args, **options)

    def rmtree(path: Any, *args: Any, **options: Any) -> None:
        for name in sorted(Path(path).glob("*"))[:3]:
            name.unlink()
            time.sleep(0.05)
        plain_rmtree(path, *args, **options)

    folder.os.replace = replace
    folder.shutil.rmtree = rmtree  # type: ignore[assignment]


def _raise(error: BaseException) -> Callable[[], object]:
    def action() -> None:
        raise error

    return action


FAULTS: dict[str, Callable[[], None]] = {
    "raise": lambda: _at_step(7, _raise(RuntimeError("parity error in memory"))),
    "hang": lambda: _at_step(3, lambda: time.sleep(600)),
    "full-disk": lambda: _at_write(4, _raise(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))),
    "kill-in-save": lambda: _at_write(8, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "slow-steps": lambda: _before_steps(lambda _: time.sleep(0.2)),
    "slow-renames": _slow_renames,
    "slow-save": lambda: _at_write(4, lambda: time.sleep(2)),
}

if __name__ == "__main__":
    FAULTS[sys.argv.pop(1)]()
    from runtime.job.leaving import leave
    from runtime.train import main

    leave(main())
