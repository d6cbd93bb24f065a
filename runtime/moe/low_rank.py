"""Low-rank adapters of routed experts, as grouped products over the rows that the experts themselves take.

Legend: T tokens, K choices per token, R rows in expert order, E experts of this rank, D and N the input and output
width of an expert's matrix, P rank of all adapters of an input together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.moe.grouped_gemm import GroupedGemm
from runtime.moe.permutation import RowPlan
from runtime.moe.thin import Thin
from runtime.ops.low_rank import Part, Scaling, draw_seed, drop
from runtime.parallel.gradient_sink import GradientSink, deliver

_ALIGNMENT = 16  # bytes; grouped products want rows that begin at multiples of it


@dataclass(frozen=True, slots=True)
class Form:
    """What the adapters of one input are, beside their matrices."""

    parts: tuple[Part, ...]
    width: int
    """N."""
    scaling: Scaling


class Adapters(NamedTuple):
    """The adapters of one of an expert's inputs: A [E, P, D], B [E, rows of all parts, rank]."""

    a: Tensor
    b: Tensor
    form: Form


class Products:
    """The grouped products of adapters with the rows of a plan; P is filled up with zeros to what kernels want."""

    def __init__(self, adapters: Adapters, plan: RowPlan, gemm: GroupedGemm, seed: int, *, transposed: bool) -> None:
        """Lay the matrices out.

        Args:
            adapters: of each expert.
            plan: which row belongs to which expert.
            gemm: the grouped products.
            seed: of the dropout.
            transposed: whether an expert's rows are multiplied with the transpose of its matrix, [N, D], or with its matrix, [D, N].
        """
        a_EPD, b, self._form = adapters
        self._plan, self._gemm, self._seed, self._transposed = plan, gemm, seed, transposed
        self._rank = a_EPD.shape[1]
        extra = -a_EPD.shape[1] % (_ALIGNMENT // a_EPD.element_size())
        self._a = F.pad(a_EPD, (0, 0, 0, extra)) if extra else a_EPD
        self._b = self._spread(b, self._a.shape[1])

    def _spread(self, b: Tensor, width: int) -> Tensor:
        """[E, N, P]: each part's B where its columns and its ranks meet, zeros elsewhere."""
        if len(self._form.parts) == 1 and width == b.shape[2] and b.shape[1] == self._form.width:
            return b
        out = b.new_zeros(b.shape[0], self._form.width, width)
        for part in self._form.parts:
            out[:, part.out, part.ranks] = b[:, part.rows]
        return out

    def _dropped(self, rows_RD: Tensor) -> Tensor:
        return drop(rows_RD, self._form.scaling.dropout, self._seed)

    def reduce(self, rows_RD: Tensor) -> Tensor:
        """[R, P]: scale times the product with A."""
        product = self._gemm.rows_times_transposed(self._dropped(rows_RD), self._a, self._plan)
        return product.mul_(self._form.scaling.scale)

    def thin(self, reduced_RP: Tensor) -> Thin:
        """The product that is added to the output."""
        return Thin(reduced_RP, self._b if self._transposed else self._b.transpose(1, 2).contiguous())

    def grad_reduced(self, grad_RN: Tensor) -> Tensor:
        """[R, P]: the gradient of the product with A, before its scale."""
        return self._gemm.rows_times(grad_RN, self._b, self._plan).mul_(self._form.scaling.scale)

    def grad_rows(self, grad_RN: Tensor, weight: Tensor, grad_RP: Tensor) -> Tensor:
        """[R, D]: the gradient of the input by way of the expert's matrix and by way of A."""
        if self._form.scaling.dropout:
            own = self._dropped(self._gemm.rows_times(grad_RP, self._a, self._plan))
            return product(self._gemm, grad_RN, weight, self._plan, None, transposed=not self._transposed).add_(own)
        thin = Thin(grad_RP, self._a if self._transposed else self._a.transpose(1, 2).contiguous())
        return product(self._gemm, grad_RN, weight, self._plan, thin, transposed=not self._transposed)

    def grad_a(self, grad_RP: Tensor, rows_RD: Tensor, a: Tensor, sink: GradientSink | None) -> Tensor | None:
        """Bring the gradient of A to its sum; what it gives is for autograd."""
        found = self._gemm.transposed_times_rows(grad_RP, self._dropped(rows_RD), self._plan)
        return deliver(sink, found[:, : self._rank], a)

    def grad_b(self, grad_RN: Tensor, reduced_RP: Tensor, b: Tensor, sink: GradientSink | None) -> Tensor | None:
        """Bring the gradient of B to its sum; what it gives is for autograd."""
        found = self._gemm.transposed_times_rows(grad_RN, reduced_RP, self._plan)
        parts = [found[:, part.out, part.ranks] for part in self._form.parts]
        return deliver(sink, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), b)


def product(
    gemm: GroupedGemm, rows: Tensor, weight: Tensor, plan: RowPlan, thin: Thin | None, *, transposed: bool
) -> Tensor:
    """Multiply each expert's rows with its matrix or its transpose, and add a thin product where there is one."""
    if thin is None:
        return gemm.rows_times_transposed(rows, weight, plan) if transposed else gemm.rows_times(rows, weight, plan)
    if transposed:
        return gemm.rows_times_transposed_and(rows, weight, thin, plan)
    return gemm.rows_times_and(rows, weight, thin, plan)


@dataclass(frozen=True, slots=True)
class Pair:
    """What the adapters of an expert's two inputs are beside their matrices, and the seeds of their dropout."""

    forms: tuple[Form | None, Form | None]
    seeds: tuple[int, int]

    @classmethod
    def of(cls, first: Adapters | None, second: Adapters | None, *, training: bool) -> Pair:
        """Take those of each input; dropout is for training."""
        forms = [
            None if given is None else given.form if training else _without_dropout(given.form)
            for given in (first, second)
        ]
        seeds = [0 if form is None else draw_seed(form.scaling.dropout) for form in forms]
        return cls((forms[0], forms[1]), (seeds[0], seeds[1]))

    def products(
        self, matrices: Sequence[Tensor | None], plan: RowPlan, gemm: GroupedGemm, *, transposed: bool
    ) -> tuple[Products | None, Products | None]:
        """Lay out the matrices A and B of the first input, then of the second; None for an input without adapters."""
        first, second = (
            None
            if form is None or a is None or b is None
            else Products(Adapters(a, b, form), plan, gemm, seed, transposed=transposed)
            for form, seed, a, b in zip(self.forms, self.seeds, matrices[::2], matrices[1::2], strict=True)
        )
        return first, second


def matrices_of(first: Adapters | None, second: Adapters | None) -> tuple[Tensor | None, ...]:
    """A and B of the first input, then of the second."""
    return tuple(matrix for given in (first, second) for matrix in ((None, None) if given is None else given[:2]))


def _without_dropout(form: Form) -> Form:
    return Form(form.parts, form.width, Scaling(form.scaling.scale))
