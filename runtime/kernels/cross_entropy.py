"""Cross entropy over logits of a vocabulary, or of one rank's part of it.

Legend: T tokens, V columns. Floor, at memory bandwidth: the logits read once forward; read and written once backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _statistics_kernel(
    logits, labels, top, total, chosen, first, row_stride, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """A token's largest logit, the sum of exponentials beside it, and its label's logit, in one pass."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * row_stride
    largest = tl.full((BLOCK,), float("-inf"), dtype=ACC)
    sums = tl.zeros((BLOCK,), dtype=ACC)
    for start in range(0, COLUMNS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(row + column, mask=column < COLUMNS, other=float("-inf")).to(ACC)
        higher = tl.maximum(largest, values)
        # What has seen nothing yet stays at -inf, whose difference to itself would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        sums = sums * tl.exp(largest - base) + tl.exp(values - base)
        largest = higher
    highest = tl.max(largest, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    tl.store(top + token, highest)
    tl.store(total + token, tl.sum(sums * tl.exp(largest - base), 0))
    label = tl.load(labels + token) - first
    mine = (label >= 0) & (label < COLUMNS)
    tl.store(chosen + token, tl.load(row + label, mask=mine, other=0.0).to(ACC))


@triton.jit
def _gradient_kernel(
    logits, labels, lse, grad, first, row_stride, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Write (probabilities - one at the label) * grad over the logits, and 0 over what is no column."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * row_stride
    label = tl.load(labels + token) - first
    scale = tl.zeros((BLOCK,), dtype=ACC) + tl.load(grad + token).to(ACC)
    shift = tl.load(lse + token)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(row + column, mask=column < COLUMNS, other=float("-inf")).to(ACC)
        result = (tl.exp(values - shift) - tl.where(column == label, 1.0, 0.0)) * scale
        # A token that doesn't count gives 0 whatever its logits are.
        result = tl.where((column < COLUMNS) & (scale != 0.0), result, 0.0)
        tl.store(row + column, result.to(logits.dtype.element_ty), mask=column < WIDTH)


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _block(num_columns: int) -> int:
    return min(BLOCK, int(triton.next_power_of_2(max(16, num_columns))))


def token_statistics(
    logits_TV: Tensor, labels_T: Tensor, first: int, num_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a token's loss is made of.

    Args:
        logits_TV: [T, V], rows contiguous.
        labels_T: [T] int64.
        first: the label of column 0.
        num_columns: columns that belong to the vocabulary; those after it are padding.

    Returns:
        [T] each, fp32 (fp64 for fp64): largest logit (-inf without columns), sum of exponentials of the differences to
        it, the label's logit (0 where another rank has it).
    """
    wide = torch.float64 if logits_TV.dtype == torch.float64 else torch.float32
    out = torch.empty(3, labels_T.shape[0], dtype=wide, device=logits_TV.device)
    if labels_T.shape[0]:
        args = (logits_TV, labels_T, out[0], out[1], out[2], first, logits_TV.stride(0), num_columns)
        _statistics_kernel[(labels_T.shape[0],)](*args, _block(num_columns), _accumulator(logits_TV.dtype), num_warps=8)
    return out[0], out[1], out[2]


def logits_to_gradient(
    logits_TV: Tensor, labels_T: Tensor, lse_T: Tensor, grad_T: Tensor, first: int, num_columns: int
) -> Tensor:
    """Turn logits into their gradient where they lie.

    Args:
        logits_TV: [T, V], rows contiguous; becomes its gradient, 0 in columns past num_columns.
        labels_T: [T] int64.
        lse_T: [T] log of the sum of exponentials over the whole vocabulary.
        grad_T: [T] gradient of each token's loss, 0 for tokens that don't count.
        first: the label of column 0.
        num_columns: columns that belong to the vocabulary.

    Returns:
        logits_TV.
    """
    if logits_TV.numel():
        args = (logits_TV, labels_T, lse_T, grad_T, first, logits_TV.stride(0), num_columns, logits_TV.shape[1])
        block = _block(logits_TV.shape[1])
        _gradient_kernel[(logits_TV.shape[0],)](*args, block, _accumulator(logits_TV.dtype), num_warps=8)
        # Whoever still holds the logits for another backward pass must get an error, not our gradient.
        torch.autograd.graph.increment_version(logits_TV)
    return logits_TV
