"""A quantised weight as the products see it: numbers that are made when they are needed, in memory that the next weight takes."""

from __future__ import annotations

from math import prod
from typing import Protocol

import torch
from torch import Tensor

from runtime.quantised.fp8 import Fp8
from runtime.quantised.nf4 import Nf4
from runtime.quantised.sizes import BaseDtype


class Format(Protocol):
    """How the numbers of a matrix are held."""

    def empty(self, count: int, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
        """Memory for so many matrices of one shape."""

    def quantise(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The parts of one matrix."""

    def dequantise(self, parts: tuple[Tensor, ...], out: Tensor) -> None:
        """Write the numbers of all matrices."""


def make_format(kind: BaseDtype, *, double: bool = False) -> Format:
    """Give a format by its name; `double` quantises NF4's scales, too."""
    return Fp8() if kind == "fp8" else Nf4(double)


class Workspace:
    """Memory for the numbers of one weight at a time, shared by all: whoever comes next writes over them.

    The steps of a device run one after the other, so that a product has read its weight before the next is made.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def reserve(self, elements: int) -> None:
        """Make room for a weight of so many elements."""
        if elements > self._memory.numel():
            self._memory = torch.empty(elements, dtype=self.dtype, device=self.device)

    def take(self, elements: int) -> Tensor:
        """Give the memory for a weight of at most as many elements as were reserved."""
        return self._memory[:elements]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._memory.nbytes


class QuantisedWeight:
    """A frozen weight [..., in], made of equal matrices: those of a parameter that lie one below the other.

    It stands where a module has a parameter, and has no gradient. Whoever multiplies with it says `dense`, and has the numbers
    until somebody says so again.
    """

    def __init__(self, shape: torch.Size, count: int, form: Format, workspace: Workspace) -> None:
        """Allocate.

        Args:
            shape: of the parameter.
            count: its matrices; they share its elements evenly.
            form: how they are held.
            workspace: where its numbers are made.
        """
        self.shape, self._form, self._workspace = shape, form, workspace
        self._matrices = (count, prod(shape) // shape[-1] // count, shape[-1])
        self.parts = form.empty(count, self._matrices[1:], workspace.device)
        workspace.reserve(prod(shape))

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that products see."""
        return self._workspace.dtype

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self._workspace.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(part.nbytes for part in self.parts)

    def take(self, place: int, matrix: Tensor) -> None:
        """Quantise one of its matrices, of any float type; its precision is that of what is given."""
        self.put(place, self._form.quantise(matrix.to(self.device)))

    def put(self, place: int, parts: tuple[Tensor, ...]) -> None:
        """Take one of its matrices as it is held."""
        for own, part in zip(self.parts, parts, strict=True):
            own[place].copy_(part)

    def dense(self) -> Tensor:
        """The numbers, in the parameter's shape, until the next weight's are made."""
        out = self._workspace.take(prod(self.shape))
        self._form.dequantise(self.parts, out.view(self._matrices))
        return out.view(self.shape)


Weight = Tensor | QuantisedWeight


def held(weight: Weight) -> tuple[Tensor | None, QuantisedWeight | None]:
    """What a function keeps of a weight for its backward pass: a tensor, to be saved as one, or what makes it again."""
    return (weight, None) if isinstance(weight, Tensor) else (None, weight)


def dense(weight: Tensor | None, quantised: QuantisedWeight | None = None) -> Tensor:
    """The numbers of a weight that `held` gave; of a quantised one until the next is asked for."""
    if quantised is not None:
        return quantised.dense()
    assert weight is not None
    return weight


def numbers(weight: Weight) -> Tensor:
    """The numbers of a weight; of a quantised one until the next is asked for."""
    return weight if isinstance(weight, Tensor) else weight.dense()
