"""Root-mean-square norm, alone or after the residual's sum.

Legend: D width of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from runtime.parallel.gradient_sink import deliver_parts, sink_of

MAX_FUSED_WIDTH = 16384


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _plain_forward(x: Tensor, delta: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x if delta is None else x + delta
    wide = _wide(total)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight_D.to(wide.dtype)).to(x.dtype), total, rstd


def _plain_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, weight_D: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    normed, incoming = _wide(x) * rstd, _wide(grad)
    weighted = incoming * weight_D.to(incoming.dtype)
    grad_x = (weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * rstd
    if grad_total is not None:
        grad_x = grad_x + grad_total
    return grad_x.to(x.dtype), (incoming * normed).flatten(0, -2)


def _forward(
    x: Tensor, delta: Tensor | None, weight_D: Tensor, eps: float, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, the sum, the reciprocal root mean squares."""
    if not fused:
        return _plain_forward(x, delta, weight_D, eps)
    from runtime.kernels.rms_norm import rms_norm_forward

    return rms_norm_forward(x, None if delta is None else delta.contiguous(), weight_D, eps)


class _Source:
    """How a norm's output is made again, and that once for all who need it; holds it no longer than they do."""

    def __init__(self, eps: float, fused: bool) -> None:
        self._eps, self._fused = eps, fused
        self.uses = 0
        self._made: Tensor | None = None

    def take(self, total: Tensor, weight_D: Tensor) -> Tensor:
        """The output, for one of the uses."""
        made = self._made if self._made is not None else _forward(total, None, weight_D, self._eps, self._fused)[0]
        self.uses -= 1
        self._made = made if self.uses > 0 else None
        return made.view(total.shape)


@dataclass(frozen=True, slots=True)
class Kept:
    """What a function keeps of an input for its backward pass: the input, or what a norm made it of.

    A norm keeps its input in any case. Where the function that uses its output keeps that too, a tensor more is alive
    until the backward pass; a pass over memory makes it again.
    """

    tensors: tuple[Tensor, ...]
    """For `save_for_backward`."""
    source: _Source | None

    @property
    def count(self) -> int:
        """Number of tensors."""
        return len(self.tensors)

    @staticmethod
    def of(x: Tensor) -> Kept:
        """Decide what to keep of an input."""
        made_of = getattr(x, "made_of", None)
        if made_of is None:
            return Kept((x,), None)
        total, weight_D, source = made_of
        source.uses += 1
        return Kept((total, weight_D), source)

    @staticmethod
    def nothing() -> Kept:
        """Keep nothing: no gradient needs the input."""
        return Kept((), None)


def restore(saved: Sequence[Tensor], source: _Source | None) -> Tensor:
    """The input again, from the tensors of a `Kept` and its source."""
    return saved[0] if source is None else source.take(saved[0], saved[1])


def as_tokens(x_SBD: Tensor) -> Tensor:
    """[S, B, D] to [T, D], still known as a norm's output if it is one."""
    tokens_TD = x_SBD.reshape(-1, x_SBD.shape[-1])
    made_of = getattr(x_SBD, "made_of", None)
    if made_of is not None:
        total, weight_D, source = made_of
        tokens_TD.made_of = (total.view(tokens_TD.shape), weight_D, source)  # type: ignore[attr-defined]
    return tokens_TD


class _RMSNorm(torch.autograd.Function):
    """Keeps what was normalised and one number a row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight_D: Tensor, eps: float, fused: bool
    ) -> tuple[Tensor, Tensor]:
        out, total, rstd = _forward(x, delta, weight_D, eps, fused)
        ctx.save_for_backward(total, weight_D, rstd)
        ctx.fused, ctx.adds, ctx.sink = fused, delta is not None, sink_of(weight_D)
        ctx.set_materialize_grads(False)
        return out, total.view_as(total) if delta is None else total

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight_D, rstd = ctx.saved_tensors
        if grad is None:
            return grad_total, grad_total if ctx.adds else None, None, None, None
        if ctx.fused:
            from runtime.kernels.rms_norm import rms_norm_backward

            rest = None if grad_total is None else grad_total.contiguous()
            grad_x, parts_PD = rms_norm_backward(grad.contiguous(), rest, x, weight_D, rstd)
        else:
            grad_x, parts_PD = _plain_backward(grad, grad_total, x, weight_D, rstd)
        left = deliver_parts(ctx.sink, parts_PD, weight_D) if ctx.needs_input_grad[2] else None
        return grad_x, grad_x if ctx.adds else None, left, None, None


def _apply(
    x: Tensor, delta: Tensor | None, weight_D: Tensor, eps: float, remade: bool, fused: bool | None
) -> tuple[Tensor, Tensor]:
    if fused is None:
        fused = x.is_cuda
    fused = fused and x.shape[-1] <= MAX_FUSED_WIDTH
    if x.stride(-1) != 1 or (x.dim() > 3 and not x.is_contiguous() and not x.flatten(0, -3)._is_view()):
        x = x.contiguous()
    out = _RMSNorm.apply(x, delta, weight_D, eps, fused)  # type: ignore[no-untyped-call]
    normed, total = cast("tuple[Tensor, Tensor]", out)
    if remade and normed.requires_grad and total.is_contiguous():
        normed.made_of = (total.detach(), weight_D, _Source(eps, fused))  # type: ignore[attr-defined]
    return normed, total


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, fused: bool | None = None) -> Tensor:
    """Root-mean-square norm over the last dim: the hidden size, or the dim of a head.

    Args:
        x: [..., D].
        weight_D: [D] factor.
        eps: added to the mean square.
        fused: use the kernel; None: on a GPU.

    Returns:
        As x; computed in fp32 (fp64 for fp64) and rounded once. The weight's gradient is summed in fp32.
    """
    return _apply(x, None, weight_D, eps, False, fused)[0]


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight_D: Tensor, eps: float, *, remade: bool = False, fused: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual, and normalise the sum, in one pass.

    Args:
        x: [..., D] residual.
        delta: [..., D] what a branch of the layer gave; None for nothing to add. The backward pass adds the gradients of
            norm and sum in any case.
        weight_D: [D] factor of the norm.
        eps: added to the mean square.
        remade: let functions that need the norm in their backward pass make it again (see `Kept`). Off in a function
            that is checkpointed: both its runs must keep the same tensors, and a wrapper (FSDP's) that is there in one
            of them alone hides what a tensor was made of.
        fused: use the kernel; None: on a GPU.

    Returns:
        The norm and the sum, each as x.
    """
    return _apply(x, delta, weight_D, eps, remade, fused)
