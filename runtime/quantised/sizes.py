"""Sizes of quantised weights, without torch, so that a plan counts the same."""

from __future__ import annotations

from math import prod
from typing import Literal

from moeconv.families.adapted import ADAPTABLE, AdaptedModel

BaseDtype = Literal["nf4", "fp8"]
NF4_BLOCK = 64
"""Elements that share a scale."""
SCALES_BLOCK = 256
"""Scales that share a scale of their own, where they are quantised again."""
FP8_BLOCK = (128, 128)
"""Rows and columns that share a scale."""


def quantises(model: AdaptedModel, name: str) -> bool:
    """Say whether a weight of a frozen base can be held quantised: a matrix of attention, dense layers or experts.

    Args:
        model: the base with adapters.
        name: the weight's.
    """
    tensor = model.tensors[name]
    return tensor.rule.role in ADAPTABLE and name not in model.own


def piece_bytes(kind: BaseDtype, shape: tuple[int, int], *, double: bool = False) -> int:
    """Count the bytes of a quantised matrix, scales included.

    Args:
        kind: of numbers.
        shape: rows and columns, this rank's.
        double: whether NF4's scales are quantised themselves.

    Returns:
        Bytes: for NF4 a half and 4 / 64 an element, with quantised scales a half, 1 / 64 and 4 / 16384, and 4; for FP8 one and
        4 / 16384.
    """
    elements = prod(shape)
    if kind == "fp8":
        return elements + 4 * prod(-(-size // block) for size, block in zip(shape, FP8_BLOCK, strict=True))
    scales = -(-elements // NF4_BLOCK)
    codes = -(-elements // 2)
    return codes + (scales + 4 * -(-scales // SCALES_BLOCK) + 4 if double else 4 * scales)
