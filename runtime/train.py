"""`torchrun [...] -m runtime.train`: read the command line, then train.

Nothing heavy is imported before the command line has been read: help and a misspelt flag answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from moeconv.errors import MoeconvError
from moeconv.extras import needed
from runtime.job.failure import USER_ERROR, end_with
from runtime.job.leaving import leave
from runtime.settings.flags import parse_flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: the command line without the program's name; None takes the process's own.

    Returns:
        The exit status: 0 when the run came to its end or was asked to stop, 2 for an error of the user's.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    first = os.environ.get("RANK", "0") == "0"
    if not first and {"-h", "--help"} & set(words):
        return 0
    try:
        given = parse_flags(words)
        with needed("training"):
            from torch.distributed.elastic.multiprocessing.errors import record

            from runtime.start import start_run
    except MoeconvError as error:
        end_with(error)
        return USER_ERROR
    status: int | None = record(start_run)(given)
    return status or 0


if __name__ == "__main__":
    leave(main())
