"""A tensor of a checkpoint, or a rectangle of one, that is read when its numbers are asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from moeconv.dtypes import dtype, numpy_dtype
from moeconv.errors import SourceError
from moeconv.extras import needed
from moeconv.layout.rect import Rect

if TYPE_CHECKING:
    import torch

Index = slice | EllipsisType


class Readable(Protocol):
    """Whatever gives parts of tensors by name."""

    def read(self, name: str, rect: Rect | None = None) -> npt.NDArray[Any]:
        """Read a part of a tensor."""


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A rectangle of a tensor in a checkpoint. Slicing gives smaller ones and reads nothing; `numpy()` and `torch()` read it."""

    source: Readable
    name: str
    "The tensor's name on the hub."
    dtype: str
    "As safetensors calls it, such as `BF16`."
    rect: Rect
    "Which part of it this is."

    @property
    def shape(self) -> tuple[int, ...]:
        """The part's shape, in elements."""
        return self.rect.shape

    @property
    def nbytes(self) -> int:
        """The part's size in bytes."""
        return prod(self.shape) * dtype(self.dtype).itemsize

    def __getitem__(self, index: Index | tuple[Index, ...]) -> LazyTensor:
        """Give a rectangle of this one.

        Args:
            index: slices of step 1 and `...`, as numpy takes them.

        Returns:
            The rectangle, unread.

        Raises:
            SourceError: there are more indices than dimensions, a step, or a single number.
        """
        parts = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in parts:
            at = parts.index(Ellipsis)
            parts[at : at + 1] = [slice(None)] * (len(self.shape) - len(parts) + 1)
        if len(parts) > len(self.shape) or Ellipsis in parts:
            raise SourceError(f"{self.name}: {len(parts)} indices for {len(self.shape)} dimensions")
        parts += [slice(None)] * (len(self.shape) - len(parts))
        ranges = [self._range(part, size) for part, size in zip(parts, self.shape, strict=True)]
        inner = Rect(tuple(r.start for r in ranges), tuple(len(r) for r in ranges))
        return replace(self, rect=inner.shifted(self.rect.offsets))

    def _range(self, part: Any, size: int) -> range:
        if not isinstance(part, slice):
            raise SourceError(f"{self.name}: index {part}: a part is a rectangle; give {part}:{part + 1}")
        found = range(*part.indices(size))
        if found.step != 1:
            raise SourceError(f"{self.name}: a step of {found.step}; rectangles have steps of 1")
        return found if len(found) else range(0)

    def numpy(self) -> npt.NDArray[Any]:
        """Read it.

        Returns:
            An array of `shape` in the tensor's own type (ml_dtypes' bfloat16 for BF16).

        Raises:
            SourceError: a file can't be read.
        """
        if not all(self.shape):
            return np.empty(self.shape, numpy_dtype(self.dtype))
        return self.source.read(self.name, self.rect)

    def torch(self) -> torch.Tensor:
        """Read it as a torch tensor on the CPU, of `shape` and the tensor's own type.

        Raises:
            SourceError: a file can't be read.
            MissingPackageError: torch is not installed.
        """
        with needed("a torch tensor", "take numpy()"):
            from moeconv.as_torch import to_tensor
        return to_tensor(self.numpy())
