"""Top-k routing in one pass over the logits, forward and backward.

Legend: T tokens, E experts, K choices per token, B blocks of tokens. Floor: the logits read once (twice backward).

The forward pass leaves all that losses and statistics need as per-block sums, so that nothing else reads the logits.
Among equal logits the lowest expert wins.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ELEMENTS = 4096  # of a block of logits
NUM_EXTRA = 3  # sums beside those of the experts: squared log-sum-exp, entropy, tokens with a logit that isn't finite


@triton.jit
def _sum_up(row, ids, values, probs, lse, chosen_count, valid, E: tl.constexpr):
    """Write a block's sums over tokens."""
    inside = valid[:, None] & (ids < E)[None, :]
    tl.store(row + ids, tl.sum(tl.where(inside, probs, 0.0), 0), mask=ids < E)
    tl.store(row + E + ids, tl.sum(tl.where(inside, chosen_count, 0.0), 0), mask=ids < E)
    # 0 * -inf is no part of an entropy
    entropy = lse - tl.sum(tl.where(inside & (probs > 0), probs * values, 0.0), 1)
    finite = tl.abs(tl.sum(values, 1)) < float("inf")
    tl.store(row + 2 * E, tl.sum(tl.where(valid, lse * lse, 0.0), 0))
    tl.store(row + 2 * E + 1, tl.sum(tl.where(valid, entropy, 0.0), 0))
    tl.store(row + 2 * E + 2, tl.sum(tl.where(valid & (finite == 0), 1.0, 0.0), 0))


@triton.jit
def _forward_kernel(
    logits,
    experts,
    weights,
    sums,
    num_tokens,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    PRE_SOFTMAX: tl.constexpr,
    GIVEN: tl.constexpr,
):
    block = tl.program_id(0)
    tokens = block * TOKENS + tl.arange(0, TOKENS)
    ids = tl.arange(0, EXPERTS)
    valid = tokens < num_tokens
    inside = valid[:, None] & (ids < E)[None, :]
    values = tl.load(logits + tokens[:, None].to(tl.int64) * E + ids[None, :], mask=inside, other=0.0)
    scores = tl.where((ids < E)[None, :], values, float("-inf"))
    top = tl.max(scores, 1)
    exps = tl.exp(scores - top[:, None])
    total = tl.sum(exps, 1)
    lse = top + tl.log(total)
    probs = exps / total[:, None]

    choice_ids = tl.arange(0, CHOICES)
    picked = tl.full((TOKENS, CHOICES), float("-inf"), tl.float32)
    chosen_count = tl.zeros((TOKENS, EXPERTS), tl.float32)
    rest = scores
    for k in tl.static_range(K):
        choice = experts + tokens.to(tl.int64) * K + k
        if GIVEN:
            index = tl.load(choice, mask=valid, other=0)
            hit = ids[None, :] == index[:, None]
            best = tl.sum(tl.where(hit, scores, 0.0), 1)
        else:
            best = tl.max(rest, 1)
            # A NaN has no maximum: stay among the experts, the count of such tokens reports it.
            index = tl.minimum(tl.argmax(rest, 1), E - 1)
            hit = ids[None, :] == index[:, None]
            rest = tl.where(hit, float("-inf"), rest)
            tl.store(choice, index.to(tl.int64), mask=valid)
        chosen_count += hit.to(tl.float32)
        picked = tl.where(choice_ids[None, :] == k, best[:, None], picked)
    if PRE_SOFTMAX:
        share = tl.exp(picked - lse[:, None])
    else:
        share = tl.exp(picked - top[:, None])
        share = share / tl.sum(share, 1)[:, None]
    place = tokens[:, None].to(tl.int64) * K + choice_ids[None, :]
    tl.store(weights + place, share * scale, mask=valid[:, None] & (choice_ids < K)[None, :])
    _sum_up(sums + block * (2 * E + 3), ids, values, probs, lse, chosen_count, valid, E)


@triton.jit
def _backward_kernel(
    logits,
    experts,
    weights,
    grad_weights,
    grad_sums,
    grad_logits,
    num_tokens,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    PRE_SOFTMAX: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    ids = tl.arange(0, EXPERTS)
    valid = tokens < num_tokens
    inside = valid[:, None] & (ids < E)[None, :]
    cells = tokens[:, None].to(tl.int64) * E + ids[None, :]
    values = tl.load(logits + cells, mask=inside, other=float("-inf"))
    values = tl.where(valid[:, None], values, 0.0)
    top = tl.max(values, 1)
    exps = tl.exp(values - top[:, None])
    total = tl.sum(exps, 1)
    lse = top + tl.log(total)
    probs = exps / total[:, None]

    incoming = tl.zeros((TOKENS, EXPERTS), tl.float32)
    share = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for k in tl.static_range(K):
        place = tokens.to(tl.int64) * K + k
        hit = ids[None, :] == tl.load(experts + place, mask=valid, other=-1)[:, None]
        incoming += tl.where(hit, tl.load(grad_weights + place, mask=valid, other=0.0)[:, None] * scale, 0.0)
        share += tl.where(hit, tl.load(weights + place, mask=valid, other=0.0)[:, None] / scale, 0.0)
    of_probs = tl.load(grad_sums + ids, mask=ids < E, other=0.0)[None, :]
    of_squares = tl.load(grad_sums + 2 * E)
    if PRE_SOFTMAX:
        of_probs = of_probs + incoming
        grad = tl.zeros((TOKENS, EXPERTS), tl.float32)
    else:
        grad = share * (incoming - tl.sum(share * incoming, 1)[:, None])
    grad += probs * (of_probs - tl.sum(probs * of_probs, 1)[:, None])
    grad += (2.0 * of_squares) * lse[:, None] * probs
    tl.store(grad_logits + cells, grad, mask=inside)


def _blocks(num_tokens: int, num_experts: int) -> tuple[int, int, int]:
    experts = triton.next_power_of_2(num_experts)
    tokens = max(1, min(64, MAX_ELEMENTS // experts))
    return experts, tokens, max(1, triton.cdiv(num_tokens, tokens))


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, chosen_TK: Tensor | None, topk: int, pre_softmax: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens, num_experts = logits_TE.shape
        logits_TE = logits_TE.contiguous()
        padded, tokens, num_blocks = _blocks(num_tokens, num_experts)
        if chosen_TK is None:
            experts = torch.empty(num_tokens, topk, dtype=torch.int64, device=logits_TE.device)
        else:
            experts = chosen_TK.contiguous().detach()  # what a function gives is never its input itself
        weights = logits_TE.new_empty(num_tokens, topk)
        sums = logits_TE.new_empty(num_blocks, 2 * num_experts + NUM_EXTRA)
        _forward_kernel[(num_blocks,)](
            logits_TE,
            experts,
            weights,
            sums,
            num_tokens,
            scale,
            num_experts,
            topk,
            tokens,
            padded,
            triton.next_power_of_2(topk),
            pre_softmax,
            chosen_TK is not None,
        )
        ctx.save_for_backward(logits_TE, experts, weights)
        ctx.pre_softmax, ctx.scale = pre_softmax, scale
        ctx.mark_non_differentiable(experts)
        return experts, weights, sums.sum(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad_weights: Tensor, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        logits, experts, weights = ctx.saved_tensors
        num_tokens, num_experts = logits.shape
        padded, tokens, num_blocks = _blocks(num_tokens, num_experts)
        grad_logits = torch.empty_like(logits)
        _backward_kernel[(num_blocks,)](
            logits,
            experts,
            weights,
            grad_weights.contiguous(),
            grad_sums.contiguous(),
            grad_logits,
            num_tokens,
            ctx.scale,
            num_experts,
            experts.shape[1],
            tokens,
            padded,
            ctx.pre_softmax,
        )
        return grad_logits, None, None, None, None


def topk_softmax(
    logits_TE: Tensor, topk: int, *, pre_softmax: bool, scale: float, chosen_TK: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose and weigh experts.

    Args:
        logits_TE: [T, E] fp32.
        topk: K.
        pre_softmax: weights are the softmax over all experts; otherwise over the chosen ones.
        scale: factor on the weights, not 0.
        chosen_TK: [T, K] int64 choices of an earlier run, which stay; None: the best are chosen.

    Returns:
        experts [T, K] int64, best first; weights [T, K]; sums [2E + 3]: of probabilities per expert, of choices per
        expert, of squared log-sum-exp, of entropy (nats), of tokens with a logit that is not finite. Gradients flow from
        weights, from the sums of probabilities and from that of squares.
    """
    found = _TopK.apply(logits_TE, chosen_TK, topk, pre_softmax, scale)  # type: ignore[no-untyped-call]
    return cast("tuple[Tensor, Tensor, Tensor]", found)
