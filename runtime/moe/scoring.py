"""A micro-batch's routing with the sums over tokens that its losses and statistics need.

Legend: T tokens of this rank, E experts, K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.moe import losses
from runtime.moe.config import MoEConfig
from runtime.moe.routing import Routing, drop_tokens, route


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """The routing and sums over this rank's tokens."""

    routing: Routing
    sums: Tensor
    """[2E + 3] sums of probabilities per expert, of choices per expert before any drop, of the squared log-sum-exp, of
    the entropy in nats, of tokens with a NaN or infinite logit; the first and the third carry gradients."""

    @property
    def num_experts(self) -> int:
        """E."""
        return (self.sums.shape[0] - 3) // 2

    @property
    def prob_sums(self) -> slice:
        """Where `sums` has the E sums of the router's probabilities, with gradient."""
        return slice(0, self.num_experts)

    @property
    def counts_E(self) -> Tensor:
        """[E] choices of each expert before any drop, in the sums' type: exact in fp32 up to 2^24 of an expert."""
        return self.sums.detach()[self.num_experts : -3]

    @property
    def square_sum(self) -> slice:
        """Where `sums` has the one sum of the squared log-sum-exp of the logits, with gradient."""
        return slice(2 * self.num_experts, 2 * self.num_experts + 1)


def score(logits_TE: Tensor, config: MoEConfig, chosen_TK: Tensor) -> Scored:
    """Weigh choices and sum up, in plain torch.

    Args:
        logits_TE: [T, E] router logits.
        config: the layer's options.
        chosen_TK: [T, topk] int64 from `choose`, or kept from an earlier forward pass.

    Returns:
        The routing and its sums.
    """
    scores = losses.aux_scores(logits_TE, config.router.score)
    exact = logits_TE.to(scores.dtype)
    parts = [
        scores.sum(0),
        losses.count_choices(chosen_TK, config.num_experts).to(scores.dtype),
        torch.logsumexp(exact, dim=-1).square().sum().view(1),
        losses.router_entropy(scores.detach()).view(1),
        (~torch.isfinite(exact.detach().sum(1))).sum().to(scores.dtype).view(1),
    ]
    return Scored(routing=route(logits_TE, config, chosen_TK), sums=torch.cat(parts))


def score_fused(logits_TE: Tensor, config: MoEConfig, chosen_TK: Tensor | None = None) -> Scored:
    """Choose, weigh and sum up in one kernel; for softmax routers that choose by score alone.

    Args:
        logits_TE: [T, E] fp32 router logits on a GPU.
        config: the layer's options.
        chosen_TK: [T, topk] int64 kept from an earlier forward pass; None: choose.

    Returns:
        The routing and its sums.
    """
    from runtime.kernels.routing import topk_softmax

    router = config.router
    # A softmax over all, divided by its sum over the chosen, is a softmax over the chosen.
    experts, weights, sums = topk_softmax(
        logits_TE, router.top_k, pre_softmax=not router.normalise, scale=router.scale, chosen_TK=chosen_TK
    )
    if config.capacity_factor is not None:
        routing = drop_tokens(weights, experts, config.num_experts, config)
    else:
        routing = Routing(experts_TK=experts, weights_TK=weights, chosen_TK=experts, max_rows=experts.numel())
    return Scored(routing=routing, sums=sums)
