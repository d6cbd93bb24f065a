"""The end of a process whose work is done."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """End this process without taking the interpreter apart.

    While an interpreter is taken apart, a thread of a library's C++ that still runs can abort the whole process ("terminate called
    without an active exception"): a launcher then takes a run for failed that has saved everything.

    Args:
        status: the exit status.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
