"""Which source of a blend each sample comes from, as Megatron deals them out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_BLOCK = 1 << 16
_FEW = 8


class BlendOrder:
    """Which source each sample of a weighted blend comes from, and which of its samples it is.

    Each sample comes from the source that is furthest behind its share. The order of the first n samples doesn't depend
    on how many follow, so it is made in blocks, as they are needed.

    Source:
        https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/datasets/helpers.cpp (build_blending_indices)
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares = list(shares)
        self._begins: list[list[int]] = [[0] * len(self._shares)]
        """Samples of each source before each block."""
        self._blocks: dict[int, tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]] = {}

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Give the source and its sample's number for the sample `index` of the blend."""
        block, place = divmod(index, _BLOCK)
        sources, samples = self._block(block)
        return int(sources[place]), int(samples[place])

    def counts(self, size: int) -> list[int]:
        """Give how many of the first `size` samples come from each source."""
        block, place = divmod(size, _BLOCK)
        self._reach(block)
        counts = list(self._begins[block])
        if place:
            sources, _ = self._block(block)
            return [
                c + int(n) for c, n in zip(counts, np.bincount(sources[:place], minlength=len(counts)), strict=True)
            ]
        return counts

    def _reach(self, block: int) -> None:
        while len(self._begins) <= block:
            self._block(len(self._begins) - 1)

    def _block(self, block: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        if block not in self._blocks:
            if block:
                self._reach(block)
            counts = list(self._begins[block])
            deal = _deal if len(counts) <= _FEW else _deal_many
            made = deal(self._shares, counts, block * _BLOCK)
            if len(self._begins) == block + 1:
                self._begins.append(counts)
            self._blocks = dict(list(self._blocks.items())[-3:]) | {block: made}
        return self._blocks[block]


def _deal(shares: list[float], counts: list[int], begin: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Deal out one block; counts go on."""
    sources, samples = [0] * _BLOCK, [0] * _BLOCK
    for place in range(_BLOCK):
        target = float(max(begin + place, 1))
        best, most = 0, shares[0] * target - counts[0]
        for source in range(1, len(shares)):
            behind = shares[source] * target - counts[source]
            if behind > most:
                best, most = source, behind
        sources[place], samples[place] = best, counts[best]
        counts[best] += 1
    return np.array(sources, np.int32), np.array(samples, np.int64)


def _deal_many(
    shares: list[float], counts: list[int], begin: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The same for many sources."""
    weights, taken = np.array(shares), np.array(counts, np.float64)
    sources, samples = np.zeros(_BLOCK, np.int32), np.zeros(_BLOCK, np.int64)
    for place in range(_BLOCK):
        best = int(np.argmax(weights * max(begin + place, 1) - taken))
        sources[place], samples[place] = best, taken[best]
        taken[best] += 1
    counts[:] = taken.astype(np.int64).tolist()
    return sources, samples


def deal_exhaustively(sizes: Sequence[int]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Deal out every sample of every source once, in proportion to the sizes.

    Args:
        sizes: samples of each source.

    Returns:
        [sum of sizes] source, and number of its sample.

    Source:
        https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/datasets/helpers.cpp
        (build_exhaustive_blending_indices)
    """
    total = sum(sizes)
    weights, taken = np.array(sizes) / float(total), np.zeros(len(sizes))
    limits = np.array(sizes, np.float64)
    sources, samples = np.zeros(total, np.int32), np.zeros(total, np.int64)
    for place in range(total):
        behind = np.where(taken < limits, weights * max(place, 1) - taken, -np.inf)
        best = int(np.argmax(behind))
        sources[place], samples[place] = best, taken[best]
        taken[best] += 1
    return sources, samples
