"""What a light installation leaves out, and an error that names the extra which brings it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moeconv.errors import MoeconvError

# What is imported -> the extra of pyproject.toml that brings it.
_EXTRAS = {"torch": "torch", "transformers": "torch"}


class MissingPackageError(MoeconvError):
    """What was asked for needs a package that isn't installed; the message names the extra that brings it."""


@contextmanager
def needed(doing: str, otherwise: str = "") -> Iterator[None]:
    """Turn a failed import of a package that an extra brings into an error that says what to install.

    Args:
        doing: what needs it, as `training`.
        otherwise: what helps without it, as `leave the check out with --no-check`.

    Raises:
        MissingPackageError: an import within failed for want of such a package.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        advice = f"; or {otherwise}" if otherwise else ""
        raise MissingPackageError(
            f"{doing} needs {package}, which is not installed: pip install 'moeconv[{_EXTRAS[package]}]'{advice}"
        ) from None
