"""Blends: several sources and the shares that they have of the samples, stated as for Megatron."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import require


@dataclass(frozen=True, slots=True)
class Blend:
    """Sources and their weights."""

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    """As stated; None: the sources are one row of documents, each takes part with all it has."""

    @property
    def shares(self) -> list[float]:
        """The weights, so that they sum to 1."""
        assert self.weights is not None
        import numpy as np  # here only: flags are read without it

        values = np.array(self.weights, np.float64)
        return [float(w) for w in values / np.sum(values)]


def parse_blend(words: Sequence[str], flag: str) -> Blend | None:
    """Read what a flag says: paths, or weights and paths in turn.

    Args:
        words: the flag's values.
        flag: its name, for messages.

    Returns:
        The blend; None where there are no words.

    Raises:
        ConfigError: weights for some paths only, or a weight that is no share.

    Source:
        https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/datasets/utils.py (get_blend_from_list): an even
        number of words whose 1st, 3rd, ... are all numbers are weights and paths. A single number and path is a weight too.
    """
    words = [word.strip() for word in words]
    if not words:
        return None
    numbers = [_number(word) for word in words[::2]]
    if len(words) % 2 or all(number is None for number in numbers):
        stray = [word for word in words if _number(word) is not None and not Path(word).exists()]
        require(
            not stray,
            f"{flag} {' '.join(words)}: {', '.join(stray)} is no path; give each path its weight before it, or none",
        )
        return Blend(tuple(words))
    weights = []
    for word, number in zip(words[::2], numbers, strict=True):
        require(
            number is not None,
            f"{flag}: {word} stands where a weight is expected; give each path its weight before it, or none",
        )
        assert number is not None
        require(
            math.isfinite(number) and number > 0,
            f"{flag}: weight {word}; expected more than 0 (leave out what has no share)",
        )
        weights.append(number)
    return Blend(tuple(words[1::2]), tuple(weights))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
