"""Which experts a token goes to, and with which weights.

Legend: T tokens of this rank, E experts, K choices of a token. A choice whose value is E (one past the last expert) is
dropped: it takes no row of any expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moeconv.families.compute import Router
from runtime.moe.config import MoEConfig
from runtime.moe.sinkhorn import sinkhorn

_EPSILON = 1e-20


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """The routing of a micro-batch.

    `experts_TK` has one column per choice; one per expert (K = E, most of them dropped) where experts fill a capacity.
    """

    experts_TK: Tensor
    """[T, K] int64, the expert of each choice, E where dropped."""
    weights_TK: Tensor
    """[T, K] router dtype, the weight of each choice, 0 where dropped; carries the gradient."""
    chosen_TK: Tensor
    """[T, topk] int64, the choices before any drop."""
    max_rows: int
    """Upper bound of the kept choices, known without a look at the device."""


def group_limited_topk(scores_TE: Tensor, router: Router) -> Tensor:
    """Choose experts from the best groups only.

    Args:
        scores_TE: [T, E] float.
        router: groups of neighbouring experts, groups per token, how many experts' scores make a group's, experts per token.

    Returns:
        [T, topk] int64, best first.

    Source: https://arxiv.org/abs/2412.19437, node-limited routing, as
        https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/deepseek_v3/modeling_deepseek_v3.py has it
    """
    grouped = scores_TE.view(-1, router.groups, scores_TE.shape[1] // router.groups)
    group_scores = grouped.topk(router.group_best, dim=-1).values.sum(-1)
    best = group_scores.topk(router.group_top_k, dim=-1).indices
    allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    masked = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
    indices: Tensor = masked.topk(router.top_k, dim=-1).indices
    return indices


def expert_capacity(num_tokens: int, num_choices: int, num_experts: int, factor: float) -> int:
    """Rows of an expert: ceil(T * K / E * factor), at most T.

    Args:
        num_tokens: T, the tokens of this rank.
        num_choices: K, choices per token.
        num_experts: E.
        factor: the capacity factor.

    Returns:
        The capacity C.
    """
    return min(num_tokens, math.ceil(num_tokens * num_choices / num_experts * factor))


def best_tokens(priority_TE: Tensor, capacity: int) -> Tensor:
    """Mark each expert's `capacity` tokens of highest priority; the earliest among equals.

    Args:
        priority_TE: [T, E] any ordered dtype.
        capacity: tokens per expert, at most T.

    Returns:
        [T, E] bool.
    """
    order = priority_TE.argsort(dim=0, descending=True, stable=True)[:capacity]
    return torch.zeros_like(priority_TE, dtype=torch.bool).scatter_(0, order, True)


def in_turn(num_tokens: int, config: MoEConfig, device: torch.device) -> Tensor:
    """Send tokens to all experts in turn, so that all have as many, or one more.

    Experts that follow each other in turn lie far apart, for else all of a token's choices would be on one rank, and less would
    travel than does as routed.

    Args:
        num_tokens: T.
        config: the layer's options.
        device: where the tokens are.

    Returns:
        [T, topk] int64.
    """
    return turns(num_tokens * config.topk, config.num_experts, device).view(-1, config.topk)


def turns(num: int, num_experts: int, device: torch.device) -> Tensor:
    """Go through all experts again and again, each time by about the golden section of them.

    Args:
        num: of turns.
        num_experts: E.
        device: of the result.

    Returns:
        [num] int64; any E in a row are all of them.
    """
    wanted = num_experts * (5**0.5 - 1) / 2
    step = min((n for n in range(1, num_experts + 1) if math.gcd(n, num_experts) == 1), key=lambda n: abs(n - wanted))
    return torch.arange(num, device=device) * step % num_experts


def choose(logits_TE: Tensor, config: MoEConfig, *, training: bool, bias_E: Tensor | None = None) -> Tensor:
    """Choose each token's experts, before any drop; no gradient.

    Args:
        logits_TE: [T, E] router logits.
        config: the layer's options; for expert_choice the result only serves statistics.
        training: sinkhorn balances in training only.
        bias_E: [E] added to the scores for the choice alone.

    Returns:
        [T, topk] int64, best first.
    """
    with torch.no_grad():
        scores = logits_TE
        if config.load_balancing[0] == "sinkhorn" and training:
            scores = sinkhorn(logits_TE, fused=config.permute_fusion)
        elif config.router.score == "sigmoid":
            scores = torch.sigmoid(logits_TE)
            if bias_E is not None:
                scores = scores + bias_E
        elif config.router.groups > 1 or bias_E is not None:
            scores = torch.softmax(logits_TE, dim=-1)
            if bias_E is not None:
                scores = scores + bias_E
        if config.router.groups > 1:
            return group_limited_topk(scores, config.router)
        return scores.topk(config.topk, dim=-1).indices


def weigh(logits_TE: Tensor, chosen_TK: Tensor, config: MoEConfig) -> Tensor:
    """The weights of chosen experts.

    Args:
        logits_TE: [T, E] router logits.
        chosen_TK: [T, K] int64 from `choose`.
        config: the layer's options.

    Returns:
        [T, K] in the dtype of the logits, differentiable in them.

    Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/transformer/moe/moe_utils.py
    """
    if config.load_balancing[0] == "sinkhorn":
        full = torch.sigmoid(logits_TE) if config.topk == 1 else torch.softmax(logits_TE, dim=-1)
        return full.gather(1, chosen_TK)
    router = config.router
    if router.score == "sparsemixer":
        return sparsemixer_weights(logits_TE, chosen_TK, router.jitter)
    if router.score == "sigmoid":
        weights = torch.sigmoid(logits_TE.gather(1, chosen_TK))
        if router.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + _EPSILON)
    elif router.normalise:  # a softmax over all, divided by its sum over the chosen, is a softmax over the chosen
        weights = torch.softmax(logits_TE.gather(1, chosen_TK), dim=-1)
    else:
        weights = torch.softmax(logits_TE, dim=-1).gather(1, chosen_TK)
    return weights if router.scale == 1.0 else weights * router.scale


def sparsemixer_weights(logits_TE: Tensor, chosen_TK: Tensor, jitter: float) -> Tensor:
    """The weights of two experts that are chosen one after the other: each its softmax over the logits near the best one that is left.

    Args:
        logits_TE: [T, E] router logits.
        chosen_TK: [T, 2] int64, the largest logit first.
        jitter: a logit counts where its distance from the best, relative to the larger of the two, is at most twice this.

    Returns:
        [T, 2], differentiable in the logits. The random sampling of the paper is left out: the weights are those that
        inference takes.

    Source: https://arxiv.org/abs/2409.12136, as
        https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/phimoe/modeling_phimoe.py has it
    """
    left, weights = logits_TE, []
    for k in range(chosen_TK.shape[1]):
        chosen_T1 = chosen_TK[:, k : k + 1]
        with torch.no_grad():
            best = logits_TE.gather(1, chosen_T1)
            far = (best - logits_TE) / torch.maximum(logits_TE.abs(), best) > 2 * jitter
        weights.append(torch.softmax(left.masked_fill(far, float("-inf")), dim=-1).gather(1, chosen_T1))
        left = left.scatter(1, chosen_T1, float("-inf"))
    return torch.cat(weights, dim=1)


def _fill(weights_TE: Tensor, mask_TE: Tensor, chosen_TK: Tensor, max_rows: int) -> Routing:
    """A routing with one column per expert."""
    num_experts = mask_TE.shape[1]
    experts = torch.arange(num_experts, device=mask_TE.device).expand_as(mask_TE)
    return Routing(
        experts_TK=experts.masked_fill(~mask_TE, num_experts),
        weights_TK=weights_TE * mask_TE,
        chosen_TK=chosen_TK,
        max_rows=max_rows,
    )


def expert_choice(logits_TE: Tensor, config: MoEConfig, chosen_TK: Tensor) -> Routing:
    """Let each expert take the C = T * factor / E tokens that score it highest.

    An expert compares all tokens of the micro-batch, later ones of a sequence too, so a causal model trained this way
    sees a trace of the future that it does not have when it generates.

    Args:
        logits_TE: [T, E] router logits.
        config: capacity_factor is the mean number of experts per token, topk where it is None.
        chosen_TK: [T, topk] each token's own choice, for statistics.

    Returns:
        The routing, one column per expert, weights softmax over experts.

    Source: https://arxiv.org/abs/2202.09368, section 3.2
    """
    num_tokens, num_experts = logits_TE.shape
    scores = torch.softmax(logits_TE, dim=-1)
    factor = config.topk if config.capacity_factor is None else config.capacity_factor
    capacity = expert_capacity(num_tokens, 1, num_experts, factor)
    return _fill(scores, best_tokens(scores.detach(), capacity), chosen_TK, capacity * num_experts)


def drop_tokens(weights_TK: Tensor, chosen_TK: Tensor, num_experts: int, config: MoEConfig) -> Routing:
    """Bound each expert to its capacity; the weights that stay are not renormalised.

    Args:
        weights_TK: [T, K] weights of the choices.
        chosen_TK: [T, K] int64 choices.
        num_experts: E.
        config: capacity_factor, drop_policy, pad_to_capacity.

    Returns:
        The routing; with pad_to_capacity exactly C rows for each expert, the added ones with weight 0.

    Source: https://github.com/NVIDIA/Megatron-LM/blob/d98e8a6/megatron/core/transformer/moe/moe_utils.py
    """
    assert config.capacity_factor is not None
    num_tokens, topk = chosen_TK.shape
    capacity = expert_capacity(num_tokens, topk, num_experts, config.capacity_factor)
    priority = weights_TK.detach() if config.drop_policy == "probs" else torch.ones_like(weights_TK)
    priority_TE = priority.new_full((num_tokens, num_experts), -1).scatter_(1, chosen_TK, priority)
    kept_TE = best_tokens(priority_TE, capacity)
    max_rows = capacity * num_experts
    if config.pad_to_capacity:
        weights_TE = weights_TK.new_zeros(num_tokens, num_experts).scatter(1, chosen_TK, weights_TK)
        return _fill(weights_TE, kept_TE, chosen_TK, max_rows)
    kept_TK = kept_TE.gather(1, chosen_TK)
    return Routing(
        experts_TK=chosen_TK.masked_fill(~kept_TK, num_experts),
        weights_TK=weights_TK * kept_TK,
        chosen_TK=chosen_TK,
        max_rows=min(max_rows, num_tokens * topk),
    )


def route(logits_TE: Tensor, config: MoEConfig, chosen_TK: Tensor) -> Routing:
    """Turn choices into a routing: weights, and drops where a capacity is set.

    Args:
        logits_TE: [T, E] router logits.
        config: the layer's options.
        chosen_TK: [T, topk] int64 from `choose`, or kept from an earlier forward pass.

    Returns:
        The routing.
    """
    if config.load_balancing[0] == "expert_choice":
        return expert_choice(logits_TE, config, chosen_TK)
    weights = weigh(logits_TE, chosen_TK, config)
    if config.capacity_factor is not None:
        return drop_tokens(weights, chosen_TK, logits_TE.shape[1], config)
    return Routing(experts_TK=chosen_TK, weights_TK=weights, chosen_TK=chosen_TK, max_rows=chosen_TK.numel())
