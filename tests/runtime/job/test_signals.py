"""Being asked to stop, once and twice, while the process computes and while it is blocked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.job.signals import StopRequest

ROOT = Path(__file__).parents[3]


class Process:
    """This process, in which leaving is only noted."""

    def __init__(self) -> None:
        self.left: list[int] = []
        self.request = StopRequest(leave=self.left.append, same_request_seconds=0.2)

    def signal(self, number: int) -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.1)  # the thread that listens takes its turn


@pytest.fixture
def process() -> Iterator[Process]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    process = Process()
    yield process
    process.request.restore()
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_is_a_request_and_the_second_leaves(
    process: Process, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    process.request.begin_training()
    process.signal(number)
    assert process.request.received
    assert process.left == []
    process.signal(number)
    assert process.left == [], "a launcher passes on what the terminal has sent: one request"
    time.sleep(0.2)
    process.signal(number)
    assert process.left == [128 + number]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "leaving after this step and its save" in lines[0]


def test_before_training_the_first_leaves(process: Process) -> None:
    process.signal(signal.SIGTERM)
    assert not process.request.received
    assert process.left == [143]


def test_a_process_that_runs_no_python_leaves_too() -> None:
    program = "from runtime.job.signals import StopRequest\n"
    program += "request = StopRequest(same_request_seconds=0.2)\nrequest.begin_training()\nprint('ready', flush=True)\n"
    # A lock that nobody gives back, waited for in C without a look at signals: so wait collectives.
    program += "import ctypes\nsemaphore = ctypes.create_string_buffer(64)\nlibrary = ctypes.CDLL(None)\n"
    program += "library.sem_init(semaphore, 0, 0)\nwhile True:\n    library.sem_wait(semaphore)\n"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert child.poll() is None, "the first is a request"
    child.send_signal(signal.SIGINT)
    assert child.wait(5) == 130
    child.stdout.close()
