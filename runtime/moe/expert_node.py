"""Experts of two products with an activation between them, as one node of the graph, low-rank adapters included.

Legend: T tokens, K choices per token, R rows in expert order, E experts of this rank, D hidden size, F width of this
rank's piece of an expert.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from runtime.moe import passes
from runtime.moe.grouped_gemm import GroupedGemm, weight_gradient
from runtime.moe.low_rank import Adapters, Pair, Products, matrices_of, product
from runtime.moe.permutation import RowPlan
from runtime.moe.thin import Thin
from runtime.ops.norm import Kept, restore
from runtime.parallel.gradient_sink import sink_of
from runtime.quantised.weight import Weight, dense, held, numbers


class Gradients(NamedTuple):
    """What an activation's backward pass gives."""

    hidden_R2F: Tensor
    """Of the first product."""
    weights_TK: Tensor
    """Of the routing weights."""
    act_RF: Tensor
    """The activation itself, computed again."""
    bias_E2F: Tensor | None = None
    """Of the first product's biases, where they are wanted."""


class Kind(Protocol):
    """What is between the products, and how experts' matrices lie."""

    transposed: ClassVar[bool]
    """Whether matrices are [out, in], as rows are multiplied with their transposes; or [in, out]."""

    @property
    def plan(self) -> RowPlan:
        """Which choice is which row."""

    @property
    def gemm(self) -> GroupedGemm:
        """The grouped products."""

    @property
    def fused(self) -> bool:
        """Whether to use the fused kernels on a GPU."""

    def forward(
        self, rows_RD: Tensor, weight: Tensor, bias: Tensor | None, weights_TK: Tensor, thin: Thin | None
    ) -> tuple[Tensor, Tensor]:
        """Give the first product [R, 2F], `thin` added, and what its activation is, times the routing weight, [R, F]."""

    def backward(
        self, hidden_R2F: Tensor, bias: Tensor | None, weights_TK: Tensor, grad_RF: Tensor, *, sum_bias: bool
    ) -> Gradients:
        """Give the gradients, and the activation; on a GPU over what it is given."""


class _Experts(torch.autograd.Function):
    """Gather, both products, activation and sum: keeps x and the first product, of adapters a small one, nothing else of size.

    With y = sum over choices of s * W2 a, the backward needs neither the rows of x nor the experts' outputs: the gradient of s
    is <W2' dy, a>, and those of the weights take rows gathered again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        first: Weight,
        bias: Tensor | None,
        second: Weight,
        a1: Tensor | None,
        b1: Tensor | None,
        a2: Tensor | None,
        b2: Tensor | None,
        pair: Pair,
        kind: Kind,
    ) -> Tensor:
        plan, gemm, fused = kind.plan, kind.gemm, kind.fused
        before, behind = pair.products((a1, b1, a2, b2), plan, gemm, transposed=kind.transposed)
        rows = passes.gather_rows(x_TD, plan, fused=fused)
        reduced = None if before is None else before.reduce(rows)
        thin = None if before is None or reduced is None else before.thin(reduced)
        hidden, act = kind.forward(rows, numbers(first), bias, weights_TK, thin)
        del rows
        thin = None if behind is None else behind.thin(behind.reduce(act))
        out = product(gemm, act, numbers(second), plan, thin, transposed=kind.transposed)
        del act, thin
        kept = Kept.of(x_TD) if ctx.needs_input_grad[2] or ctx.needs_input_grad[5] else Kept.nothing()
        (w1, ctx.first), (w2, ctx.second) = held(first), held(second)
        ctx.save_for_backward(hidden, weights_TK, w1, bias, w2, a1, b1, a2, b2, reduced, *kept.tensors)
        ctx.pair, ctx.kind, ctx.source, ctx.pitch = pair, kind, kept.source, x_TD.stride(0)
        ctx.sinks = [None if p is None else sink_of(p) for p in (w1, w2, a1, b1, a2, b2)]
        return passes.sum_rows(out, plan, fused=fused)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weights_TK, w1, bias, w2, a1, b1, a2, b2, reduced, *saved = ctx.saved_tensors
        kind, need = ctx.kind, ctx.needs_input_grad
        plan, gemm, fused = kind.plan, kind.gemm, kind.fused
        before, behind = ctx.pair.products((a1, b1, a2, b2), plan, gemm, transposed=kind.transposed)
        of_w1, of_w2, of_a1, of_b1, of_a2, of_b2 = ctx.sinks
        grads: list[Tensor | None] = [None] * 7  # of w1, bias, w2, a1, b1, a2, b2
        grad_rows = passes.gather_rows(grad_TD.contiguous(), plan, fused=fused)
        grad_small = None if behind is None else behind.grad_reduced(grad_rows)
        grad_act = _back(kind, behind, grad_rows, dense(w2, ctx.second), grad_small)
        if fused and hidden.is_cuda and torch._C._autograd._get_current_graph_task_keep_graph():
            hidden = hidden.clone()  # written over below, and this node will run again: zero-bubble does so
        grad_hidden, grad_weights, act, grads[1] = kind.backward(hidden, bias, weights_TK, grad_act, sum_bias=need[3])
        del hidden, grad_act
        if need[4]:
            grads[2] = weight_gradient(gemm, *_laid(kind, grad_rows, act), plan, of_w2)
        if behind is not None and grad_small is not None:
            grads[5] = behind.grad_a(grad_small, act, a2, of_a2) if need[7] else None
            grads[6] = behind.grad_b(grad_rows, behind.reduce(act), b2, of_b2) if need[8] else None
        del grad_rows, act
        grad_small = None if before is None else before.grad_reduced(grad_hidden)
        if before is not None and need[6]:
            grads[4] = before.grad_b(grad_hidden, reduced, b1, of_b1)
        if need[2] or need[5]:
            rows = passes.gather_rows(restore(saved, ctx.source), plan, fused=fused)
            grads[0] = weight_gradient(gemm, *_laid(kind, grad_hidden, rows), plan, of_w1) if need[2] else None
            if before is not None and grad_small is not None and need[5]:
                grads[3] = before.grad_a(grad_small, rows, a1, of_a1)
            del rows
        grad_x = None
        if need[0]:
            grad_rows = _back(kind, before, grad_hidden, dense(w1, ctx.first), grad_small)
            grad_x = passes.sum_rows(grad_rows, plan, fused=fused, pitch=ctx.pitch)
        return grad_x, grad_weights, *grads, None, None


def _back(kind: Kind, products: Products | None, grad: Tensor, weight: Tensor, grad_small: Tensor | None) -> Tensor:
    """The gradient of an input's rows, by way of the matrix and of its adapters."""
    if products is not None and grad_small is not None:
        return products.grad_rows(grad, weight, grad_small)
    return product(kind.gemm, grad, weight, kind.plan, None, transposed=not kind.transposed)


def _laid(kind: Kind, grad: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of a matrix's gradient: first those rows whose width is its first."""
    return (grad, rows) if kind.transposed else (rows, grad)


def run_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    matrices: tuple[Weight, Weight],
    bias: Tensor | None,
    adapters: tuple[Adapters | None, Adapters | None],
    kind: Kind,
    *,
    training: bool,
) -> Tensor:
    """Each token's weighted sum over its experts.

    Args:
        x_TD: [T, D] tokens.
        weights_TK: [T, K] routing weights.
        matrices: [E, ...] of the first product and of the second.
        bias: [E, 2F] of the first; None: there is none.
        adapters: beside the first matrices and beside the second.
        kind: what is between the products, and what they are done with.
        training: whether dropout of adapters applies.

    Returns:
        [T, D] in the dtype of x.
    """
    beside = (*matrices_of(*adapters), Pair.of(*adapters, training=training))
    args = (x_TD, weights_TK, matrices[0], bias, matrices[1], *beside, kind)
    return cast(Tensor, _Experts.apply(*args))  # type: ignore[no-untyped-call]
