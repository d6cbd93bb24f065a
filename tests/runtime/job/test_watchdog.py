"""The watchdog: who fails, stalls or vanishes is named on every rank; the process is ended and not left standing."""

from __future__ import annotations

import re
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from runtime.job.watchdog import FAILURE_STATUS, Watchdog


class Rank:
    """A watchdog whose process is a thread of the test: leaving it is an event."""

    def __init__(self, store: Any, rank: int, **options: Any) -> None:
        self.left: list[int] = []
        self.gone = threading.Event()
        settings = {"stall_seconds": 60.0, "silence_seconds": 60.0, "interval": 0.02} | options
        self.watchdog = Watchdog(store, rank, 2, leave=self._leave, **settings)
        self.watchdog.start()

    def _leave(self, status: int) -> None:
        self.left.append(status)
        self.gone.set()


def clients() -> list[Any]:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)
    return [server, dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))]


def test_a_failure_ends_the_other_rank_with_the_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    first, second = (Rank(store, rank) for rank, store in enumerate(clients()))
    second.watchdog.progress("iteration 7")
    try:
        raise RuntimeError("bad memory")
    except RuntimeError as error:
        second.watchdog.fail(error)
    assert first.gone.wait(5)
    assert first.left == [FAILURE_STATUS]
    message = capfd.readouterr().err
    own, others = message.split("[rank 0] ends in start-up: ")
    assert own.startswith("[rank 1] failed in iteration 7:")
    assert 'raise RuntimeError("bad memory")' in own, "the traceback comes first"
    assert others.startswith("rank 1 on")
    assert others.endswith("failed in iteration 7: RuntimeError: bad memory\n"), "and once"
    assert not second.left


def test_what_follows_from_a_failure_is_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    first, second = (Rank(store, rank, interval=60.0) for rank, store in enumerate(clients()))
    assert second.watchdog.fail(RuntimeError("bad memory"))
    assert not first.watchdog.fail(ConnectionError("closed by peer"))
    message = capfd.readouterr().err
    assert message.endswith("[rank 0] ends in start-up: another rank has failed before\n")
    assert "closed by peer" not in message


@pytest.mark.parametrize("which", [0, 1])
def test_a_stopped_rank_is_blamed_by_the_one_that_waits(which: int, capfd: pytest.CaptureFixture[str]) -> None:
    ranks = [Rank(store, rank, stall_seconds=0.5) for rank, store in enumerate(clients())]
    for rank in ranks:
        rank.watchdog.progress("iteration 3")
    time.sleep(0.2)
    ranks[which].watchdog._stop.set()  # as SIGSTOP does: no heartbeat, long before the time of silence is over
    waiting = ranks[1 - which]
    assert waiting.gone.wait(5)
    message = capfd.readouterr().err
    assert f"[rank {1 - which}] ends in iteration 3: rank {which} on" in message
    assert f"gives no sign of life while rank {1 - which} waits in iteration 3" in message


def test_a_rank_that_is_behind_is_blamed(capfd: pytest.CaptureFixture[str]) -> None:
    ranks = [Rank(store, rank, stall_seconds=0.5) for rank, store in enumerate(clients())]
    for number, rank in enumerate(ranks):
        for iteration in range(1, 4 - number):
            rank.watchdog.progress(f"iteration {iteration}")
    assert all(rank.gone.wait(5) for rank in ranks)
    message = capfd.readouterr().err
    assert message.count("rank 1 on") == 2
    assert re.search(
        r"rank 1 on \S+ stands still (for \d+ s in iteration 2|in iteration 2 while rank 0 waits)", message
    )


def test_standing_still_ends_every_rank_and_shows_the_stacks(capfd: pytest.CaptureFixture[str]) -> None:
    stores = clients()
    stuck = Rank(stores[1], 1, stall_seconds=0.3)
    stuck.watchdog.progress("iteration 3")
    other = Rank(stores[0], 0)
    assert stuck.gone.wait(5)
    assert other.gone.wait(5)
    message = capfd.readouterr().err
    assert "rank 1 on" in message
    assert "in iteration 3 (--distributed-timeout-minutes)" in message
    assert "test_watchdog.py" in message  # the stack of the thread that stood still


def test_progress_keeps_a_rank_alive_and_a_silent_one_is_missed(capfd: pytest.CaptureFixture[str]) -> None:
    stores = clients()
    alive = Rank(stores[0], 0, stall_seconds=0.3, silence_seconds=1.0)
    silent = Rank(stores[1], 1)
    for _ in range(20):
        alive.watchdog.progress("working")
        time.sleep(0.03)
    assert not alive.left
    silent.watchdog._stop.set()  # as if the process were killed: no word, no heartbeat
    deadline = time.monotonic() + 5
    while not alive.gone.is_set() and time.monotonic() < deadline:
        alive.watchdog.progress("working")
        time.sleep(0.03)
    assert alive.left == [FAILURE_STATUS]
    assert "gave no sign of life for 1 s" in capfd.readouterr().err


def test_a_rank_that_is_lost_right_after_the_start_is_missed(capfd: pytest.CaptureFixture[str]) -> None:
    stores = clients()
    lost = Rank(stores[1], 1, interval=60.0)
    time.sleep(0.2)
    lost.watchdog._stop.set()
    other = Rank(stores[0], 0, silence_seconds=0.3)
    assert other.gone.wait(5)
    assert "rank 1 on" in capfd.readouterr().err


def test_a_rank_that_ends_as_it_should_is_not_missed() -> None:
    stores = clients()
    alive = Rank(stores[0], 0, silence_seconds=0.2)
    done = Rank(stores[1], 1)
    done.watchdog.stop()
    time.sleep(0.6)
    assert not alive.left
    alive.watchdog.stop()
