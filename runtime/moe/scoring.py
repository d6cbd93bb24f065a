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
    counts_E: Tensor
    """[E] int64 choices of each expert before any drop."""
    prob_sums_E: Tensor
    """[E] sums of the router's probabilities, with gradient."""
    square_sum: Tensor
    """0-dim sum of the squared log-sum-exp of the logits, with gradient."""
    entropy: Tensor
    """0-dim fp32 sum of the entropies, in nats."""
    nonfinite: Tensor
    """0-dim int64 tokens with a NaN or infinite logit."""


def score(logits_TE: Tensor, config: MoEConfig, chosen_TK: Tensor) -> Scored:
    """Weigh choices and sum up, in plain torch.

    Args:
        logits_TE: [T, E] router logits.
        config: the layer's options.
        chosen_TK: [T, topk] int64 from `choose`, or kept from an earlier forward pass.

    Returns:
        The routing and its sums.
    """
    scores = losses.aux_scores(logits_TE, config.score_function)
    return Scored(
        routing=route(logits_TE, config, chosen_TK),
        counts_E=losses.count_choices(chosen_TK, config.num_experts),
        prob_sums_E=scores.sum(0),
        square_sum=torch.logsumexp(logits_TE, dim=-1).square().sum(),
        entropy=losses.router_entropy(scores.detach()).float(),
        nonfinite=(~torch.isfinite(logits_TE.detach().sum(1))).sum(),
    )


def score_fused(logits_TE: Tensor, config: MoEConfig) -> Scored:
    """Choose, weigh and sum up in one kernel; for softmax routers that choose by score alone.

    Args:
        logits_TE: [T, E] fp32 router logits on a GPU.
        config: the layer's options.

    Returns:
        The routing and its sums.
    """
    from runtime.kernels.routing import topk_softmax

    num_experts = config.num_experts
    scale = 1.0 if config.topk_scaling_factor is None else config.topk_scaling_factor
    # Softmax over all, renormalised over the chosen, is softmax over the chosen.
    pre_softmax = config.pre_softmax and not config.renormalize
    experts, weights, sums = topk_softmax(logits_TE, config.topk, pre_softmax=pre_softmax, scale=scale)
    if config.capacity_factor is not None:
        routing = drop_tokens(weights, experts, num_experts, config)
    else:
        routing = Routing(experts_TK=experts, weights_TK=weights, chosen_TK=experts, max_rows=experts.numel())
    extra = sums[2 * num_experts :]
    return Scored(
        routing=routing,
        counts_E=sums[num_experts : 2 * num_experts].detach().long(),
        prob_sums_E=sums[:num_experts],
        square_sum=extra[0],
        entropy=extra[1].detach(),
        nonfinite=extra[2].detach().long(),
    )
