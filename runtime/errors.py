"""What a run says of settings that can't work."""

from __future__ import annotations

from moeconv.errors import MoeconvError


class ConfigError(MoeconvError):
    """Options of a training run that are wrong in themselves, disagree, or can't be honoured."""


def require(condition: bool, message: str) -> None:
    """Raise the error that a user reads unless a condition holds.

    Args:
        condition: what must be true.
        message: what was found, what was expected and what to do.

    Raises:
        ConfigError: the condition is false.
    """
    if not condition:
        raise ConfigError(message)
