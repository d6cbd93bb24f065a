"""The errors a user can meet: each says what, where, what was found, what was expected and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Self


class MoeconvError(ValueError):
    """The base of every error that the user's input or machine can cause; the command line prints it without a traceback."""

    def advise(self, more: str) -> Self:
        """Put more behind the message, such as the way on from here, and give the error back to be raised again."""
        self.args = (f"{self}{more}",)
        return self


class SourceError(MoeconvError):
    """A source can't be read as a checkpoint: a missing, truncated, malformed or unsafe file."""


class MappingError(MoeconvError):
    """Tensors and family don't fit: an unknown, missing, duplicate or misshaped tensor, or a config that disagrees."""


class LayoutError(MoeconvError):
    """Degrees of parallelism that the model or each other don't allow."""


class RecipeError(MoeconvError):
    """An upcycling that can't be done as asked: a carrier that can't hold the source, or options that disagree."""


class IntegrityError(MoeconvError):
    """Bytes differ from their checksum, or rectangles don't cover a tensor exactly once."""


class DamageError(IntegrityError):
    """A stored piece of a tensor differs from its checksum; `file` and `tensor` say which."""

    def __init__(self, message: str, *, file: Path, tensor: str) -> None:
        """Keep what the message names, for a program that goes on without the file."""
        super().__init__(message)
        self.file, self.tensor = file, tensor


class WriteError(MoeconvError):
    """The output can't be written: it exists, the disk is full, the folder is read-only, a resumed run doesn't fit."""
