"""Low-rank adapters of routed experts, as grouped products over the rows that the experts themselves take.

Legend: T tokens, K choices per token, R rows in expert order, E experts of this rank, D and N the input and output
width of an expert's matrix, P rank of all adapters of an input together, F width of this rank's piece of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.moe import passes
from runtime.moe.grouped_gemm import GatedGemm, GroupedGemm, weight_gradient
from runtime.moe.permutation import RowPlan
from runtime.moe.thin import Thin
from runtime.ops.low_rank import Part, Scaling, draw_seed, drop
from runtime.ops.norm import Kept, restore
from runtime.parallel.gradient_sink import GradientSink, deliver, sink_of
from runtime.quantised.weight import Weight, dense, held, numbers

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


class _Products:
    """The grouped products of adapters with the rows of a plan; P is filled up with zeros to what kernels want."""

    def __init__(self, a_EPD: Tensor, b: Tensor, form: Form, plan: RowPlan, gemm: GroupedGemm, seed: int) -> None:
        self._form, self._plan, self._gemm, self._seed = form, plan, gemm, seed
        self._dropout = form.scaling.dropout
        self._sizes = a_EPD.shape[1], b.shape
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

    def reduce(self, rows_RD: Tensor) -> Tensor:
        """[R, P]: scale times the product with A."""
        kept = drop(rows_RD, self._dropout, self._seed)
        return self._gemm.rows_times_transposed(kept, self._a, self._plan).mul_(self._form.scaling.scale)

    def added(self, reduced_RP: Tensor) -> Thin:
        """The product that is added to the output."""
        return Thin(reduced_RP, self._b)

    def expand(self, reduced_RP: Tensor) -> Tensor:
        """[R, N]: what is added to the output."""
        return self._gemm.rows_times_transposed(*self.added(reduced_RP), self._plan)

    def grad_reduced(self, grad_RN: Tensor) -> Tensor:
        """[R, P]: the gradient of the product with A, before its scale."""
        return self._gemm.rows_times(grad_RN, self._b, self._plan).mul_(self._form.scaling.scale)

    def grad_rows(self, grad_RP: Tensor) -> Tensor:
        """[R, D]: the gradient of the input."""
        return drop(self._gemm.rows_times(grad_RP, self._a, self._plan), self._dropout, self._seed)

    def grad_of_both(self, grad_RN: Tensor, weight_END: Tensor, grad_RP: Tensor) -> Tensor:
        """[R, D]: the gradient of the input by way of the expert's matrix and by way of A."""
        if self._dropout:
            return self._gemm.rows_times(grad_RN, weight_END, self._plan).add_(self.grad_rows(grad_RP))
        return self._gemm.rows_times_and(grad_RN, weight_END, Thin(grad_RP, self._a), self._plan)

    def grad_a(self, grad_RP: Tensor, rows_RD: Tensor, a: Tensor, sink: GradientSink | None) -> Tensor | None:
        """Bring the gradient of A to its sum; what it gives is for autograd."""
        kept = drop(rows_RD, self._dropout, self._seed)
        product = self._gemm.transposed_times_rows(grad_RP, kept, self._plan)
        return deliver(sink, product[:, : self._sizes[0]], a)

    def grad_b(self, grad_RN: Tensor, reduced_RP: Tensor, b: Tensor, sink: GradientSink | None) -> Tensor | None:
        """Bring the gradient of B to its sum; what it gives is for autograd."""
        product = self._gemm.transposed_times_rows(grad_RN, reduced_RP, self._plan)
        parts = [product[:, part.out, part.ranks] for part in self._form.parts]
        return deliver(sink, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), b)


def unfilled(plan: RowPlan) -> Tensor:
    """[R, 1] whether no choice fills a row; such rows may hold anything."""
    return (plan.slot_of_row_R < 0).unsqueeze(1)


class _AddToRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        rows: Tensor,
        a: Tensor,
        b: Tensor,
        form: Form,
        plan: RowPlan,
        gemm: GroupedGemm,
        seed: int,
    ) -> Tensor:
        products = _Products(a, b, form, plan, gemm, seed)
        reduced = products.reduce(rows)
        out.add_(products.expand(reduced).masked_fill_(unfilled(plan), 0))
        ctx.save_for_backward(rows, reduced, a, b)
        ctx.args = form, plan, gemm, seed
        ctx.sinks = sink_of(a), sink_of(b)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, reduced, a, b = ctx.saved_tensors
        empty = unfilled(ctx.args[1])
        products = _Products(a, b, *ctx.args)
        clean = grad.contiguous().masked_fill(empty, 0)
        grad_reduced = products.grad_reduced(clean).masked_fill_(empty, 0)
        need = ctx.needs_input_grad
        grad_b = products.grad_b(clean, reduced, b, ctx.sinks[1]) if need[3] else None
        grad_a = products.grad_a(grad_reduced, rows, a, ctx.sinks[0]) if need[2] else None
        grad_rows = products.grad_rows(grad_reduced).masked_fill_(empty, 0) if need[1] else None
        return grad, grad_rows, grad_a, grad_b, None, None, None, None


def add_to_rows(
    out_RN: Tensor, rows_RD: Tensor, adapters: Adapters, plan: RowPlan, gemm: GroupedGemm, *, training: bool
) -> Tensor:
    """Add what adapters give to each expert's rows.

    Args:
        out_RN: [R, N] the experts' output, which is overwritten.
        rows_RD: [R, D] their input.
        adapters: of each expert.
        plan: which row belongs to which expert.
        gemm: the grouped products.
        training: whether dropout applies.

    Returns:
        [R, N].
    """
    form = adapters.form if training else _without_dropout(adapters.form)
    args = (out_RN, rows_RD, adapters.a, adapters.b, form, plan, gemm, draw_seed(form.scaling.dropout))
    return cast(Tensor, _AddToRows.apply(*args))  # type: ignore[no-untyped-call]


def _without_dropout(form: Form) -> Form:
    return Form(form.parts, form.width, Scaling(form.scaling.scale))


class _AdaptedMLP(torch.autograd.Function):
    """As the experts' own node, with adapters: keeps x, the pre-activations and the first adapters' small product."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        w13_EGD: Weight,
        w2_EDF: Weight,
        a13: Tensor | None,
        b13: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        forms: tuple[Form | None, Form | None],
        seeds: tuple[int, int],
        plan: RowPlan,
        gemm: GroupedGemm,
        fused: bool,
    ) -> Tensor:
        (w13, ctx.w13), (w2, ctx.w2) = held(w13_EGD), held(w2_EDF)
        ctx.forms, ctx.seeds, ctx.plan, ctx.gemm, ctx.fused = forms, seeds, plan, gemm, fused
        rows = passes.gather_rows(x_TD, plan, fused=fused)
        first, second = _products(ctx, a13, b13, a2, b2)
        reduced = None if first is None else first.reduce(rows)
        thin = None if first is None or reduced is None else first.added(reduced)
        if isinstance(gemm, GatedGemm) and fused:
            hidden, act = gemm.hidden_and_swiglu(rows, numbers(w13_EGD), weights_TK, plan, thin)
        else:
            hidden = _product(gemm, rows, numbers(w13_EGD), thin, plan)
            act = passes.swiglu(hidden, weights_TK, plan, fused=fused)
        del rows
        thin = None if second is None else second.added(second.reduce(act))
        out = _product(gemm, act, numbers(w2_EDF), thin, plan)
        del act, thin
        kept = Kept.of(x_TD) if ctx.needs_input_grad[2] or ctx.needs_input_grad[4] else Kept.nothing()
        ctx.save_for_backward(hidden, weights_TK, w13, w2, a13, b13, a2, b2, reduced, *kept.tensors)
        ctx.source, ctx.pitch = kept.source, x_TD.stride(0)
        ctx.sinks = [None if p is None else sink_of(p) for p in (w13, w2, a13, b13, a2, b2)]
        return passes.sum_rows(out, plan, fused=fused)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weights_TK, w13, w2, a13, b13, a2, b2, reduced, *saved = ctx.saved_tensors
        plan, gemm, fused, need = ctx.plan, ctx.gemm, ctx.fused, ctx.needs_input_grad
        sinks: list[GradientSink | None] = ctx.sinks
        first, second = _products(ctx, a13, b13, a2, b2)
        grads: list[Tensor | None] = [None] * 6  # of w13, w2, a13, b13, a2, b2
        grad_rows = passes.gather_rows(grad_TD.contiguous(), plan, fused=fused)
        grad_reduced = None if second is None else second.grad_reduced(grad_rows)
        grad_act = _gradient(gemm, grad_rows, dense(w2, ctx.w2), second, grad_reduced, plan)
        if fused and hidden.is_cuda and torch._C._autograd._get_current_graph_task_keep_graph():
            hidden = hidden.clone()  # written over below, and this node will run again: zero-bubble does so
        grad_hidden, grad_weights, act = passes.swiglu_backward(hidden, weights_TK, grad_act, plan, fused=fused)
        del hidden, grad_act
        if need[3]:
            grads[1] = weight_gradient(gemm, grad_rows, act, plan, sinks[1])
        if second is not None and grad_reduced is not None:
            grads[4] = second.grad_a(grad_reduced, act, a2, sinks[4]) if need[6] else None
            grads[5] = second.grad_b(grad_rows, second.reduce(act), b2, sinks[5]) if need[7] else None
        del grad_rows, act
        grad_first = None if first is None else first.grad_reduced(grad_hidden)
        if first is not None and need[5]:
            grads[3] = first.grad_b(grad_hidden, reduced, b13, sinks[3])
        if need[2] or need[4]:
            rows = passes.gather_rows(restore(saved, ctx.source), plan, fused=fused)
            if need[2]:
                grads[0] = weight_gradient(gemm, grad_hidden, rows, plan, sinks[0])
            if first is not None and grad_first is not None and need[4]:
                grads[2] = first.grad_a(grad_first, rows, a13, sinks[2])
            del rows
        grad_x = None
        if need[0]:
            grad_rows = _gradient(gemm, grad_hidden, dense(w13, ctx.w13), first, grad_first, plan)
            grad_x = passes.sum_rows(grad_rows, plan, fused=fused, pitch=ctx.pitch)
        return grad_x, grad_weights, *grads, None, None, None, None, None


def _product(gemm: GroupedGemm, rows: Tensor, weight_ENK: Tensor, thin: Thin | None, plan: RowPlan) -> Tensor:
    if thin is None:
        return gemm.rows_times_transposed(rows, weight_ENK, plan)
    return gemm.rows_times_transposed_and(rows, weight_ENK, thin, plan)


def _gradient(
    gemm: GroupedGemm,
    grad: Tensor,
    weight_ENK: Tensor,
    products: _Products | None,
    grad_reduced: Tensor | None,
    plan: RowPlan,
) -> Tensor:
    if products is None or grad_reduced is None:
        return gemm.rows_times(grad, weight_ENK, plan)
    return products.grad_of_both(grad, weight_ENK, grad_reduced)


def _products(
    ctx: Any, a13: Tensor | None, b13: Tensor | None, a2: Tensor | None, b2: Tensor | None
) -> tuple[_Products | None, _Products | None]:
    first, second = ctx.forms
    made = [
        None if a is None or b is None else _Products(a, b, form, ctx.plan, ctx.gemm, seed)
        for a, b, form, seed in ((a13, b13, first, ctx.seeds[0]), (a2, b2, second, ctx.seeds[1]))
    ]
    return made[0], made[1]


def adapted_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    w13_EGD: Weight,
    w2_EDF: Weight,
    first: Adapters | None,
    second: Adapters | None,
    plan: RowPlan,
    gemm: GroupedGemm,
    *,
    fused: bool,
    training: bool,
) -> Tensor:
    """Each token's weighted sum over its experts' SwiGLU networks with adapters.

    Args:
        x_TD: [T, D] tokens.
        weights_TK: [T, K] routing weights.
        w13_EGD: [E, 2F, D], rows of w1 (gate) first, then of w3 (up).
        w2_EDF: [E, D, F].
        first: adapters beside w13.
        second: adapters beside w2.
        plan: which choice is which row.
        gemm: the grouped products.
        fused: use the fused kernels on a GPU.
        training: whether dropout applies.

    Returns:
        [T, D] in the dtype of x.
    """
    given = (first, second)
    matrices = [m for adapters in given for m in ((None, None) if adapters is None else adapters[:2])]
    forms = tuple(None if a is None else a.form if training else _without_dropout(a.form) for a in given)
    seeds = tuple(0 if form is None else draw_seed(form.scaling.dropout) for form in forms)
    args = (x_TD, weights_TK, w13_EGD, w2_EDF, *matrices, forms, seeds, plan, gemm, fused)
    return cast(Tensor, _AdaptedMLP.apply(*args))  # type: ignore[no-untyped-call]
