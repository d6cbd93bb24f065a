"""How parameters are packed into buckets: sizes and order alone, without torch, so that a plan counts the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

BUCKET_SIZE = 40_000_000
"""Elements after which a new bucket begins: large enough for full bandwidth, small enough to overlap."""
ALIGNMENT = 64
"""Elements; keeps every parameter at an address that matrix products like."""
ROW_MULTIPLE = 8
"""Rows of the vocabulary are padded to this multiple in memory: matrix products with odd widths are slow on GPUs."""

T = TypeVar("T")


def pack(
    items: Sequence[T], alike: Callable[[T], Hashable], size: Callable[[T], int], limit: int = BUCKET_SIZE
) -> Iterator[list[T]]:
    """Sort parameters into buckets, the last of the model first: their gradients come first.

    Args:
        items: the parameters in the order of the model.
        alike: gives what those of one bucket have in common.
        size: gives the elements of one.
        limit: elements after which a new bucket begins.

    Yields:
        The members of each bucket.
    """
    opened: dict[Hashable, list[T]] = {}
    filled: dict[Hashable, int] = {}
    for item in reversed(items):
        key = alike(item)
        if key in opened and filled[key] + size(item) > limit:
            yield opened.pop(key)
            del filled[key]
        opened.setdefault(key, []).append(item)
        filled[key] = filled.get(key, 0) + size(item)
    yield from opened.values()


def lay_out(sizes: Sequence[int], parts: int) -> tuple[list[int], int]:
    """Lay the members of a bucket out, each aligned, and the whole divisible by the ranks that share it.

    Args:
        sizes: elements of each member.
        parts: ranks that share the bucket.

    Returns:
        Where each member begins, and the elements of the bucket.
    """
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    unit = parts * ALIGNMENT
    return starts, -(-end // unit) * unit


def on_host(sizes: Sequence[int], fraction: float) -> list[bool]:
    """Choose the shards whose masters and optimizer states are kept in the host's memory: the first, up to a share.

    Args:
        sizes: elements that a rank updates, of each shard.
        fraction: share of all of them that is to be on the host, 0 to 1; the shard that it ends in goes there, too.

    Returns:
        For each, whether it is chosen.
    """
    wanted, before, out = fraction * sum(sizes), 0, []
    for size in sizes:
        out.append(before < wanted)
        before += size
    return out
