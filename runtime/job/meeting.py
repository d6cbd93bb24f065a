"""A job from its processes' meeting to its end: they join, do the work, and whatever goes wrong ends all of them."""

from __future__ import annotations

import sys
from typing import Protocol

import torch
from torch.distributed.distributed_c10d import Store

from moeconv.errors import MoeconvError
from runtime.job.failure import USER_ERROR, tell_launcher
from runtime.job.processes import Process, connect, end_groups, start
from runtime.job.signals import StopRequest
from runtime.job.watchdog import FAILURE_STATUS, Progress, Watchdog


class Work(Protocol):
    """What the processes do once they have met."""

    def __call__(self, device: torch.device, store: Store, progress: Progress, stop: StopRequest) -> None:
        """Work.

        Args:
            device: what to compute on.
            store: of this job, for what is no collective.
            progress: told what happens next, for the watchdog.
            stop: whether this process was asked to stop.
        """


def do_together(process: Process, hang_timeout: float, work: Work) -> int:
    """Let the processes of a job meet, and do its work.

    Args:
        process: this process's place in the job.
        hang_timeout: seconds that it may stand still.
        work: what to do.

    Returns:
        The exit status: 0 when the work is done, 2 for an error of the user's.
    """
    watchdog: Watchdog | None = None
    try:
        # A connection of its own: nothing that the process groups wait for can block it.
        store = connect(process, "health")
        watchdog = Watchdog(store, process.rank, process.world_size, stall_seconds=hang_timeout)
        watchdog.start()
        stop = StopRequest(speaks=process.rank == 0)
        watchdog.progress("joining the job", limited=False)
        # The watchdog comes first: it knows which rank stands still and where.
        device = start(process, connect(process, "groups"), 2 * hang_timeout + 60)
        work(device, connect(process, "data"), watchdog.progress, stop)
    except MoeconvError as error:
        tell_launcher(error)  # each rank: torchrun's report closes with whichever ends first
        if watchdog is None or watchdog.fail(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except BaseException as error:
        if watchdog is None:
            raise
        if not watchdog.fail(error):
            return FAILURE_STATUS
        sys.excepthook = lambda *_: None  # the traceback stands above already, before those of the others
        raise
    watchdog.stop()
    end_groups()
    return 0
