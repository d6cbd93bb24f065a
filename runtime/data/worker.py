"""A process that tokenizes: `python -m runtime.data.worker FD`, started by `runtime.data.pool` only."""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from runtime.data.chat import open_encoder
from runtime.data.errors import DataError
from runtime.data.parts import PartReport, tokenize_unit


def serve(connection: Connection) -> None:
    """Take units until the other side closes; answer each with its report or with an error's text.

    Args:
        connection: gives (EncoderSpec or ChatSpec, Tokenizing, folder) first, then units.
    """
    try:
        spec, how, folder = connection.recv()
        encoder = open_encoder(spec)
        while True:
            unit = connection.recv()
            answer: PartReport | str
            try:
                answer = tokenize_unit(unit, encoder, how, Path(folder))
            except DataError as error:
                answer = str(error)
            except OSError as error:
                answer = f"{folder}: can't be written: {error.strerror or error}; make room there, then start again: what is done is kept"
            connection.send(answer)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    serve(Connection(int(sys.argv[1])))
