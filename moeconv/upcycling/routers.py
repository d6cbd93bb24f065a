"""Router rows: drawn, drawn with mean zero over experts, or pointed at the experts' centroids."""

from __future__ import annotations

import numpy as np

from moeconv.upcycling.draws import Floats, normal


def drawn(seed: int, name: str, count: int, hidden: int, std: float, *, zero_mean: bool) -> Floats:
    """Draw rows.

    Args:
        seed: the run's seed.
        name: the router's tensor.
        count: the number of rows.
        hidden: their length.
        std: standard deviation of the elements.
        zero_mean: subtract the mean over rows, so that no direction of the hidden state favours all experts alike.

    Returns:
        The rows [count, hidden].
    """
    rows = normal(seed, name, 0, count, hidden) * np.float32(std)
    return rows - rows.mean(0, keepdims=True) if zero_mean else rows


def scaled(rows: Floats, std: float) -> Floats:
    """Give each row the length that a drawn row of this standard deviation has.

    Args:
        rows: [experts, hidden].
        std: standard deviation of the elements.

    Returns:
        The rows, in the same directions.
    """
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    target = std * rows.shape[1] ** 0.5
    out: Floats = (rows / np.maximum(lengths, 1e-30) * target).astype(np.float32)
    return out
