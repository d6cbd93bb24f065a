"""Grouped products of small depth, such as those of low-rank adapters, that are added to others."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Thin(NamedTuple):
    """Another product over the same rows."""

    rows_RP: Tensor
    """[R, P], P being small."""
    matrices: Tensor
    """[E, N, P] where a transposed product is added to, [E, P, K] where a plain one."""
