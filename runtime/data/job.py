"""The data of a job of several processes: tokenized once, waited for without a time limit."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch.distributed.distributed_c10d import Store

from moeconv.errors import MoeconvError
from runtime.data.errors import DataError
from runtime.data.loader import DataSource
from runtime.data.prepare import PrepareProgress
from runtime.data.summary import describe_progress

_POLL_SECONDS = 0.2
_NOTE_SECONDS = 30.0


def prepare_data(data: DataSource, store: Store, world_size: int, note: Callable[[str], None] | None) -> None:
    """Tokenize what isn't yet, and meet the other ranks when all have their data.

    On each machine, or once where the cache is shared, one process works with all cores; the others wait at its lock. No
    collective runs meanwhile, so no timeout of one ends the job. Which ranks are alive is the watchdog's concern.

    Args:
        data: the job's data.
        store: of this job, with keys of this purpose only.
        world_size: number of ranks.
        note: shows a line, about every half minute while work goes on; None shows nothing.

    Raises:
        DataError: data can't be read, on this rank or on another.
    """
    try:
        data.prepare(_reporter(note))
    except MoeconvError as error:
        store.set("error", str(error))
    store.add("arrived", 1)
    while store.add("arrived", 0) < world_size:
        time.sleep(_POLL_SECONDS)
    if store.check(["error"]):
        raise DataError(store.get("error").decode())


def _reporter(note: Callable[[str], None] | None) -> Callable[[PrepareProgress], None]:
    last = -_NOTE_SECONDS

    def report(progress: PrepareProgress) -> None:
        nonlocal last
        if note is not None and time.monotonic() - last >= _NOTE_SECONDS:
            last = time.monotonic()
            note(describe_progress(progress))

    return report
