"""What targets share: what a case is, copies of the corpus, and whether pieces lie in their files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from moeconv.checkpoint import Checkpoint

# A case takes the case's own random numbers. It raises MoeconvError for what it refuses, and gives what contradicts
# itself in what it accepted, None where nothing does.
Case = Callable[[Random], str | None]
# Takes the corpus and an empty folder of its own.
Target = Callable[[Path, Path], Case]


def copied(corpus: Path, scratch: Path, name: str) -> Path:
    """Copy a folder of the corpus, which cases change."""
    return Path(shutil.copytree(corpus / name, scratch / Path(name).name))


def outside(found: Checkpoint) -> str | None:
    """Say which tensor of an opened checkpoint lies outside its file."""
    for name, pieces in found.pieces.items():
        for piece in pieces:
            if piece.begin < 0 or (
                not piece.strides and piece.begin + piece.nbytes > os.stat(found.root / piece.file).st_size
            ):
                return f"{name} is outside its file"
    return None
