"""Libraries' attention kernels, forward and backward apart: what comes between them can be put in.

A backward kernel computes probabilities anew from scores and the logarithm of their sum, and takes from the output what the
softmax takes back. Given the sum and the output of a larger attention, of which a kernel has seen only some keys, it gives
exactly those keys' gradients.

Legend: Sq queries, Sk keys, B sequences, H query heads, G key/value heads, K head dim, V dim of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from runtime.ops.documents import Bounds

aten = torch.ops.aten

Forward = tuple[Tensor, Tensor, tuple[Any, ...]]
"""[Sq, B, H, V] attention; [Sq, B, H] fp32 logarithm of the sum of each query's exponentials; what the backward kernel wants."""
Gradients = tuple[Tensor, Tensor, Tensor]


class Attended(NamedTuple):
    """What a backward pass starts from: a kernel's part of the keys, with output and sums of all."""

    q_SBHK: Tensor
    k_SBGK: Tensor
    v_SBGV: Tensor
    out_SBHV: Tensor
    log_sum_SBH: Tensor


class Kernel(Protocol):
    """Attention of some queries to some keys."""

    def forward(self, q_SBHK: Tensor, k_SBGK: Tensor, v_SBGV: Tensor) -> Forward:
        """Attend."""

    def backward(self, grad_SBHV: Tensor, done: Attended, kept: tuple[Any, ...]) -> Gradients:
        """Give the gradients of queries, keys and values."""


def row_behind_row(x_SBHK: Tensor) -> Tensor:
    """[B * S, H, K], as documents are taken."""
    return x_SBHK.transpose(0, 1).flatten(0, 1)


def row_beside_row(x: Tensor, rows: int) -> Tensor:
    """[S, B, ...] of what lies row behind row."""
    return x.view(rows, -1, *x.shape[1:]).transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Cudnn:
    """cuDNN's: of all pairs, or, with as many queries as keys, causal; keys and values aren't repeated for the query heads."""

    causal: bool
    scale: float | None

    def forward(self, q_SBHK: Tensor, k_SBGK: Tensor, v_SBGV: Tensor) -> Forward:
        """As of `Kernel`."""
        heads_first = (x.permute(1, 2, 0, 3) for x in (q_SBHK, k_SBGK, v_SBGV))
        found = aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, 0.0, self.causal, scale=self.scale)
        out, log_sum = found[0].permute(2, 0, 1, 3), found[1].view(found[0].shape[:3]).permute(2, 0, 1)
        return out, log_sum, (found[1].shape, found[2:8])

    def backward(self, grad_SBHV: Tensor, done: Attended, kept: tuple[Any, ...]) -> Gradients:
        """As of `Kernel`."""
        shape, (begins_q, begins_k, most_q, most_k, seed, offset) = kept
        grad, q, k, v, out = (x.permute(1, 2, 0, 3) for x in (grad_SBHV, *done[:4]))
        log_sum = done.log_sum_SBH.permute(1, 2, 0).contiguous().view(shape)
        sizes = (begins_q, begins_k, most_q, most_k)
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, log_sum, seed, offset, None, *sizes, 0.0, self.causal, scale=self.scale
        )
        dq, dk, dv = (x.permute(2, 0, 1, 3) for x in grads)
        return dq, dk, dv


@dataclass(frozen=True, slots=True)
class Flash:
    """torch's flash attention, causal: the last query sees the last key; values as wide as keys."""

    scale: float | None
    window: int | None = None
    """Positions that a query looks back, itself included: tiles outside aren't computed. None: all."""
    bounds: Bounds | None = None
    """Of documents, each a sequence of its own; None: a row is one."""

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {} if self.scale is None else {"scale": self.scale}
        return (
            options if self.window is None else options | {"window_size_left": self.window - 1, "window_size_right": 0}
        )

    def _sizes(self, q_SBHK: Tensor, k_SBGK: Tensor) -> tuple[Any, ...]:
        if self.bounds is None:
            return None, None, q_SBHK.shape[0], k_SBGK.shape[0]
        return self.bounds.queries, self.bounds.keys, self.bounds.most_queries, self.bounds.most_keys

    def _laid_out(self, x_SBHK: Tensor) -> Tensor:
        """[B, S, H, K], or [B * S, H, K] with documents."""
        return x_SBHK.transpose(0, 1) if self.bounds is None else row_behind_row(x_SBHK)

    def _back(self, x: Tensor, rows: int) -> Tensor:
        return x.transpose(0, 1) if self.bounds is None else row_beside_row(x, rows)

    def forward(self, q_SBHK: Tensor, k_SBGK: Tensor, v_SBGV: Tensor) -> Forward:
        """As of `Kernel`."""
        q, k, v = (self._laid_out(x) for x in (q_SBHK, k_SBGK, v_SBGV))
        sizes = self._sizes(q_SBHK, k_SBGK)
        found = aten._flash_attention_forward(q, k, v, *sizes, 0.0, True, False, **self._options())
        log_sum: Tensor = found[1]
        if self.bounds is None:  # [B, H, Sq]
            log_sum = log_sum.permute(2, 0, 1)
        else:  # [H, B * Sq]
            log_sum = log_sum.view(len(log_sum), q_SBHK.shape[1], -1).permute(2, 1, 0)
        return self._back(found[0], q_SBHK.shape[1]), log_sum, tuple(found[2:4])

    def backward(self, grad_SBHV: Tensor, done: Attended, kept: tuple[Any, ...]) -> Gradients:
        """As of `Kernel`."""
        grad, q, k, v, out = (self._laid_out(x) for x in (grad_SBHV, *done[:4]))
        if self.bounds is None:
            log_sum = done.log_sum_SBH.permute(1, 2, 0).contiguous()
        else:
            log_sum = done.log_sum_SBH.permute(2, 1, 0).contiguous().flatten(1)
        sizes = self._sizes(done.q_SBHK, done.k_SBGK)
        grads = aten._flash_attention_backward(grad, q, k, v, out, log_sum, *sizes, 0.0, True, *kept, **self._options())
        dq, dk, dv = (self._back(x, done.q_SBHK.shape[1]) for x in grads)
        return dq, dk, dv
