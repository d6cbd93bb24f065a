"""How a process of a job ends with an error of the user's: one line, from one rank, where the user will see it."""

from __future__ import annotations

import json
import os
import sys
import time

USER_ERROR = 2
# Longer than torchrun takes to notice that the process that speaks has ended.
_GRACE_SECONDS = 3.0


def end_with(error: Exception) -> None:
    """Say an error that every process of the job meets alike; the caller then leaves with USER_ERROR.

    One process prints it. The others wait for torchrun to end them, since the first that ends is the one whose error
    torchrun's own report closes with.

    Args:
        error: what is wrong.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_GRACE_SECONDS)
        return
    tell_launcher(error)
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)


def tell_launcher(error: Exception) -> None:
    """Leave an error for the process that started this one: torchrun ends its report with it, as the root cause.

    Args:
        error: what is wrong.

    Source:
        https://github.com/pytorch/pytorch/blob/v2.11.0/torch/distributed/elastic/multiprocessing/errors/error_handler.py
        (record_exception) and .../errors/__init__.py (ChildFailedError): the file's form, and how it is shown.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": f"error: {error}", "timestamp": str(int(time.time()))}
    with open(path, "w", encoding="utf8") as file:
        json.dump({"message": {"message": f"error: {error}", "extraInfo": extra}}, file)
