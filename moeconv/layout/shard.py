"""Which part of a dimension each rank of an axis holds. Integers only: no names, no bytes."""

from __future__ import annotations

from math import isqrt

from moeconv.errors import LayoutError


def divisors(number: int) -> list[int]:
    """List the divisors of a number, ascending; of a number beyond 10^12, those up to a million."""
    small = [d for d in range(1, min(isqrt(number), 1_000_000) + 1) if number % d == 0]
    large = [number // d for d in reversed(small) if d * d != number] if number <= 10**12 else []
    return small + large


def split_even(size: int, parts: int) -> list[tuple[int, int]]:
    """Split `size` elements into `parts` equal ranges.

    Args:
        size: elements of the dimension; a multiple of `parts`.
        parts: ranks of the axis.

    Returns:
        For each rank its `(begin, end)`.

    Raises:
        LayoutError: the elements don't divide.
    """
    if size % parts:
        raise LayoutError(f"{size} does not divide by {parts}; degrees that fit: {', '.join(map(str, divisors(size)))}")
    step = size // parts
    return [(r * step, (r + 1) * step) for r in range(parts)]


def split_units(size: int, units: int, parts: int) -> list[tuple[int, int]]:
    """Split a dimension made of whole units (attention heads); ranks share a unit where there are more ranks than units.

    Args:
        size: elements of the dimension; a multiple of `units`.
        units: heads that must stay whole.
        parts: ranks of the axis; it divides `units` or is a multiple of it.

    Returns:
        For each rank its `(begin, end)`; equal ranges belong to ranks that hold the same unit.

    Raises:
        LayoutError: neither number divides the other.
    """
    if units % parts == 0:
        return split_even(size, parts)
    if parts % units:
        raise LayoutError(f"{units} units neither divide by {parts} nor divide it")
    step = size // units
    return [(r * units // parts * step, (r * units // parts + 1) * step) for r in range(parts)]


def split_ceil(size: int, parts: int) -> list[tuple[int, int]]:
    """Split a dimension that need not divide: ceil(size / parts) elements a rank, fewer or none on the last ranks.

    This is the split of the vocabulary, whose padding exists only in a rank's memory.

    Args:
        size: elements of the dimension.
        parts: ranks of the axis.

    Returns:
        For each rank its `(begin, end)`, empty ranges included.
    """
    step = -(-size // parts)
    return [(min(r * step, size), min((r + 1) * step, size)) for r in range(parts)]
