"""Rectangles of a tensor: where a part starts in each dimension, and how long it is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from operator import add, lt, sub

from moeconv.errors import IntegrityError

_MAX_COMPARISONS = 500_000  # of rectangles that begin in the same rows; a layout of thousands of ranks needs 300,000


@dataclass(frozen=True, slots=True, order=True)
class Rect:
    """A rectangular part of a tensor: `offsets[d] <= index[d] < offsets[d] + shape[d]` in every dimension d, in elements."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Rect:
        """Make the rectangle that is the whole of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @classmethod
    def slab(cls, shape: Sequence[int], dim: int, begin: int, end: int) -> Rect:
        """Make the part `begin <= index[dim] < end` of a tensor of this shape, whole in every other dimension."""
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[dim], sizes[dim] = begin, end - begin
        return cls(tuple(offsets), tuple(sizes))

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def ends(self) -> tuple[int, ...]:
        """The first index past the rectangle, in each dimension."""
        return tuple(map(add, self.offsets, self.shape))

    def intersect(self, other: Rect) -> Rect | None:
        """Give the part that both rectangles share, or None where they share no element."""
        begin = tuple(map(max, self.offsets, other.offsets))
        shape = tuple(map(sub, map(min, self.ends, other.ends), begin))
        return Rect(begin, shape) if not shape or min(shape) > 0 else None

    def holds(self, other: Rect) -> bool:
        """Say whether every element of another rectangle is in this one."""
        return self == other or not other.size or self.intersect(other) == other

    def within(self, outer: Rect) -> Rect:
        """Give this rectangle in the coordinates of a rectangle that contains it."""
        return Rect(tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True)), self.shape)

    def shifted(self, offsets: Sequence[int]) -> Rect:
        """Give this rectangle moved by `offsets` elements."""
        return Rect(tuple(a + b for a, b in zip(self.offsets, offsets, strict=True)), self.shape)

    def slices(self) -> tuple[slice, ...]:
        """Give the index expression that selects the rectangle from an array of the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.shape, strict=True))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{o + n}" for o, n in zip(self.offsets, self.shape, strict=True)) + "]"


def check_cover(name: str, shape: Sequence[int], parts: Iterable[tuple[Rect, str]]) -> None:
    """Check that rectangles cover a tensor exactly once: no gap, no overlap, nothing outside.

    Args:
        name: the tensor's name, for the message.
        shape: the tensor's shape, in elements.
        parts: the rectangles, each with a word on where it is (a file's name), for the message.

    Raises:
        IntegrityError: an element is covered by no rectangle or by two, or a rectangle reaches outside.
    """
    whole = Rect.whole(shape)
    ordered = sorted(parts)
    if len(ordered) == 1 and ordered[0][0] == whole:  # as most are
        return
    for rect, where in ordered:
        if not len(rect.offsets) == len(rect.shape) == len(shape) or not whole.holds(rect):
            held = f"offsets {list(rect.offsets)}, extent {list(rect.shape)}"
            raise IntegrityError(f"{name}: {where} holds {held}, which is outside the tensor's shape {list(shape)}")
    _check_apart(name, ordered)
    covered = sum(rect.size for rect, _ in ordered)
    if covered != whole.size:
        held = ", ".join(f"{rect} in {where}" for rect, where in ordered[:8]) or "nothing"
        raise IntegrityError(
            f"{name}: {whole.size - covered} of {whole.size} elements are in no file (held: {held}); a file is missing or incomplete"
        )


def _check_apart(name: str, ordered: Sequence[tuple[Rect, str]]) -> None:
    """Check that no two rectangles, sorted, share an element."""
    spans = [(rect.offsets, rect.ends) for rect, _ in ordered if rect.size]
    held = [part for part in ordered if part[0].size]
    left = _MAX_COMPARISONS
    for index, (begin, end) in enumerate(spans):
        for at in range(index + 1, len(spans)):
            other_begin, other_end = spans[at]
            if end and other_begin[0] >= end[0]:
                break  # sorted by the first offset: nothing later can reach back
            left -= 1
            if not left:
                raise IntegrityError(f"{name}: is cut into {len(held)} rectangles, more than any layout makes of it")
            if all(map(lt, begin, other_end)) and all(map(lt, other_begin, end)):
                (rect, where), (other, elsewhere) = held[index], held[at]
                raise IntegrityError(
                    f"{name}: {where} holds {rect} and {elsewhere} holds {other}, which overlap; expected each element once"
                )
