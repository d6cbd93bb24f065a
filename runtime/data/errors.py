"""The error of everything that has to do with training data."""

from __future__ import annotations

from moeconv.errors import MoeconvError


class DataError(MoeconvError):
    """Training data that can't be read, are malformed, or are too few."""


def need(module: str, what: str) -> DataError:
    """Make the error of an optional library that is missing.

    Args:
        module: the library, as pip knows it.
        what: what it is needed for, with the file.

    Returns:
        The error, which names the command that installs it.
    """
    return DataError(f"{what} needs the library {module}, which is not installed: pip install 'moeconv[data]'")
