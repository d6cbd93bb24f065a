"""Balancing losses of the router, and how they reach the gradient.

Legend: T tokens, E experts, K choices per token, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor


def load_balancing_loss(
    prob_sums_E: Tensor, counts_E: Tensor, num_prob_tokens: Tensor | float, num_tokens: Tensor | float, topk: int
) -> Tensor:
    """E / K * sum over experts of (mean probability) * (choices per token); 1 when balanced.

    Where the probabilities are those of one rank of several, the result is that rank's summand.

    Args:
        prob_sums_E: [..., E] sum of the router's probabilities over this rank's tokens.
        counts_E: [..., E] choices of each expert over all tokens.
        num_prob_tokens: tokens over which the ranks' prob_sums together run.
        num_tokens: tokens over which counts_E run.
        topk: K.

    Returns:
        [...] the loss without its coefficient.

    Source: https://arxiv.org/abs/2101.03961, in the scale of
        https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/transformer/moe/moe_utils.py
    """
    num_experts = prob_sums_E.shape[-1]
    products = (prob_sums_E * counts_E.to(prob_sums_E.dtype)).sum(-1)
    return products * (num_experts / topk) / num_prob_tokens / num_tokens


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of the logits, 0 for no tokens.

    Args:
        logits_TE: [T, E] router logits.

    Returns:
        0-dim loss without its coefficient.

    Source: https://arxiv.org/abs/2202.08906, equation 5
    """
    return torch.logsumexp(logits_TE, dim=-1).square().sum() / max(logits_TE.shape[0], 1)


def hf_load_balancing_loss(logits_TE: Sequence[Tensor], topk: int) -> Tensor:
    """The loss of transformers' Mixtral: layers pooled, not divided by K, so K when balanced.

    Layers that collapse on different experts count as balanced: the mean over layers hides it.

    Args:
        logits_TE: one [T, E] tensor of router logits per layer.
        topk: K.

    Returns:
        0-dim loss without its coefficient.

    Source: https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/mixtral/modeling_mixtral.py
    """
    logits = torch.cat([layer.to(logits_TE[0].device) for layer in logits_TE])
    probs = torch.softmax(logits, dim=-1)
    chosen = probs.detach().topk(topk, dim=-1).indices
    counts = count_choices(chosen, logits.shape[1])
    return load_balancing_loss(probs.sum(0), counts, logits.shape[0], logits.shape[0], 1)


def count_choices(experts_TK: Tensor, num_experts: int) -> Tensor:
    """How often each expert was chosen.

    Args:
        experts_TK: [T, K] int64; values of num_experts and above are not counted.
        num_experts: E.

    Returns:
        [E] int64.
    """
    # An integer scatter-add gives the same sums in any order, and unlike bincount needs nothing from the host.
    flat = experts_TK.reshape(-1).clamp(max=num_experts)
    counts = flat.new_zeros(num_experts + 1)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_experts]


def aux_scores(logits_TE: Tensor, score_function: str) -> Tensor:
    """The probabilities that the balancing losses see: softmax, or sigmoid scaled to sum 1.

    Args:
        logits_TE: [T, E] router logits.
        score_function: softmax or sigmoid.

    Returns:
        [T, E] rows that sum to 1, in fp32 or fp64.
    """
    logits = logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()
    if score_function != "sigmoid":
        return torch.softmax(logits, dim=-1)
    scores = torch.sigmoid(logits)
    return scores / (scores.sum(-1, keepdim=True) + 1e-20)


def router_entropy(scores_TE: Tensor) -> Tensor:
    """Sum over tokens of the entropy of their distribution over experts, in nats.

    Args:
        scores_TE: [T, E] rows that sum to 1.

    Returns:
        0-dim sum.
    """
    total: Tensor = torch.special.entr(scores_TE).sum()
    return total


def expert_bias_step(counts_E: Tensor, rate: float, *, centered: bool) -> Tensor:
    """The step of the expert bias after a global batch: up where an expert got less than the mean.

    Args:
        counts_E: [..., E] choices over the global batch.
        rate: size of the step.
        centered: take the step's mean off, so that the biases keep their sum.

    Returns:
        [..., E] float32 step.

    Source: https://arxiv.org/abs/2408.15664, algorithm 1
    """
    counts = counts_E.double()  # exact: a count and a mean that are equal must compare as equal
    step = rate * torch.sign(counts.mean(-1, keepdim=True) - counts).float()
    return step - step.mean(-1, keepdim=True) if centered else step


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: Tensor | float) -> Tensor:
        ctx.scale = scale
        ctx.loss_like = (loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.loss_like
        if isinstance(ctx.scale, Tensor):
            return grad, ctx.scale.to(device, dtype), None
        # Filled on the device: a copy from the host would wait there for everything launched so far.
        return grad, torch.full((), ctx.scale, dtype=dtype, device=device), None


def attach_loss(x: Tensor, loss: Tensor, scale: Tensor | float) -> Tensor:
    """Pass x on unchanged, and add `scale` times the gradient of the loss in the backward pass.

    So a loss of an inner layer needs no way to the end of the model, nor through the stages of a pipeline.

    Args:
        x: any tensor on the way to the model's loss.
        loss: 0-dim loss.
        scale: its factor; a tensor is read when the backward pass runs.

    Returns:
        x.
    """
    return cast(Tensor, _AttachLoss.apply(x, loss, scale))  # type: ignore[no-untyped-call]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearLoss:
    """A loss that is linear in sums over tokens which the router leaves: factor * sum of sums[place] * weights.

    The counts of a balancing loss have no gradient, so they are its weights.
    """

    name: str
    place: slice
    """Of `Scored.sums`."""
    weights: Tensor | None
    """As many as `place` has sums, any type; None: 1 each."""
    factor: float
    """What the host knows of it, such as one over the number of tokens."""
    coeff: float
    """By which it adds to what is minimised."""

    def add_to(self, total: Tensor, sums: Tensor) -> None:
        """Add its summands to as many totals, without the coefficient, in one launch."""
        if self.weights is None:
            total.add_(sums[self.place], alpha=self.factor)
        else:
            total.addcmul_(sums[self.place], self.weights, value=self.factor)


class _AttachLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sums: Tensor, parts: Sequence[LinearLoss], scale: Tensor | float, *weights: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*weights)
        ctx.parts = [(part.place, part.factor * part.coeff) for part in parts]
        ctx.scale, ctx.like = scale, (sums.shape, sums.dtype, sums.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shape, dtype, device = ctx.like
        grad_sums = torch.zeros(shape, dtype=dtype, device=device)
        scale = ctx.scale.to(device) if isinstance(ctx.scale, Tensor) else None
        for (place, factor), weights in zip(ctx.parts, ctx.saved_tensors, strict=True):
            factor = factor if scale is not None else factor * ctx.scale
            tensors = [tensor for tensor in (weights, scale) if tensor is not None]
            if len(tensors) == 2:
                grad_sums[place].addcmul_(*tensors, value=factor)
            elif tensors:
                grad_sums[place].add_(tensors[0], alpha=factor)
            else:
                grad_sums[place].add_(factor)
        return grad, grad_sums, None, None, *[None] * len(ctx.parts)


def attach_linear(x: Tensor, sums: Tensor, parts: Sequence[LinearLoss], scale: Tensor | float) -> Tensor:
    """As `attach_loss`, for losses that are linear in the router's sums: nothing is launched but their gradient.

    A layer's router does this for each micro-batch, and where the layer is small, launches are what its time goes into.

    Args:
        x: any tensor on the way to the model's loss.
        sums: [2E + 3] as in `Scored`.
        parts: the losses.
        scale: factor of them all; a tensor is read, on the device, when the backward pass runs.

    Returns:
        x.
    """
    attached = _AttachLinear.apply(x, sums, parts, scale, *(part.weights for part in parts))  # type: ignore[no-untyped-call]
    return cast(Tensor, attached)
