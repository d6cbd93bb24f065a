"""Whether a token goes to a rank once for all its choices of experts there, or once for each."""

from __future__ import annotations

import math

LEAST_SAVED = 0.25
"""Of the rows: with fewer that needn't travel, the launches that sort tokens by ranks take longer than they save."""


def share_saved(num_experts: int, topk: int, num_ranks: int) -> float:
    """Say how many of its choices a token needn't send, where all experts are chosen alike.

    Args:
        num_experts: E.
        topk: K.
        num_ranks: that share the experts.

    Returns:
        The share of K choices that go to a rank to which another one goes.
    """
    others = num_experts - num_experts // num_ranks
    missed = math.comb(others, topk) / math.comb(num_experts, topk)  # of the ranks, to which nothing goes
    return 1 - num_ranks * (1 - missed) / topk


def sends_once(num_experts: int, topk: int, num_ranks: int) -> bool:
    """Whether tokens go to each rank once; arguments as of `share_saved`."""
    return share_saved(num_experts, topk, num_ranks) >= LEAST_SAVED
