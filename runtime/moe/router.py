"""The router: logits, choices, weights, and the losses and statistics that hang on them.

Legend: T tokens of this rank, E experts, K choices per token, B sequences, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.moe import losses
from runtime.moe.config import MoEConfig
from runtime.moe.groups import MoEGroups
from runtime.moe.losses import LinearLoss
from runtime.moe.router_linear import router_linear
from runtime.moe.routing import Routing, choose, in_turn
from runtime.moe.scoring import Scored, score, score_fused
from runtime.moe.statistics import RouterStats
from runtime.moe.tape import active_tape
from runtime.parallel.collectives import group_size

ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


def _sum_over(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group_size(group) > 1:
        values = values.clone()
        dist.all_reduce(values, group=group)
    return values


def _totals(counts_E: Tensor, num_tokens: int | None, group: dist.ProcessGroup | None) -> Tensor:
    """Sum counts over a group: [E] as they come, so that ranks round as one does; or [E + 1] fp64 with the tokens behind them."""
    if num_tokens is None:
        totals = counts_E.clone()
    else:
        totals = counts_E.new_full((counts_E.shape[0] + 1,), num_tokens, dtype=torch.float64)
        totals[:-1] = counts_E
    if group_size(group) > 1:
        dist.all_reduce(totals, group=group)
    return totals


def _fusable(config: MoEConfig, logits_TE: Tensor) -> bool:
    """Whether one kernel can choose, weigh and sum up: softmax over at most 512 experts, chosen by score alone."""
    router = config.router
    plain = config.topk_router and router.score == "softmax" and router.groups == 1 and not config.has_bias
    small = config.num_experts <= 512 and config.topk <= 32
    return plain and small and config.permute_fusion and logits_TE.is_cuda and logits_TE.dtype == torch.float32


class Router(nn.Module):
    """Scores experts for each token. Parameter: weight [E, D]. Buffer: expert_bias [E] fp32 where it is on.

    Every tp rank sees other tokens, so the gradient of `weight` is summed over tp x cp x dp.
    """

    expert_bias: Tensor | None

    def __init__(
        self,
        config: MoEConfig,
        groups: MoEGroups,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device | None,
    ) -> None:
        super().__init__()
        self.config, self.groups = config, groups
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size, dtype=dtype, device=device))
        self.linear_bias: nn.Parameter | None = None
        if config.router.linear_bias:
            self.linear_bias = nn.Parameter(torch.zeros(config.num_experts, dtype=dtype, device=device))
        bias = torch.zeros(config.num_experts, device=device) if config.has_bias else None
        self.register_buffer("expert_bias", bias)
        self.loss_scale: Tensor | float = 1.0
        self.logits: Tensor | None = None
        self.stats = RouterStats.zeros(config.num_experts, self.weight.device)
        self._window_counts_E: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the weights from a normal distribution; biases start at 0."""
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=std)
            if self.expert_bias is not None:
                self.expert_bias.zero_()

    def batch_sums(self) -> list[Tensor]:
        """What is summed up over a global batch: statistics, and the counts of global_aux_loss."""
        if self.stats.sums.device != self.weight.device:  # built on the meta device
            self.stats = RouterStats.zeros(self.config.num_experts, self.weight.device)
        return self.stats.tensors() + ([] if self._window_counts_E is None else [self._window_counts_E])

    def finish_step(self) -> None:
        """Move the expert bias by the load of the global batch, summed over tp x dp x cp."""
        if self.expert_bias is not None and self.config.enable_expert_bias:
            counts = _sum_over(self.stats.load_E, self.groups.tp_dp_cp)
            rate, centered = self.config.expert_bias_update_rate, self.config.expert_bias_centered
            self.expert_bias += losses.expert_bias_step(counts, rate, centered=centered)

    def forward(
        self, x_TD: Tensor, sequence_T: Tensor | None = None, num_sequences: int = 1, *, equal_tokens: bool = False
    ) -> Routing:
        """Route tokens.

        Args:
            x_TD: [T, D] this rank's tokens.
            sequence_T: [T] int64 sequence of each token in the micro-batch, equal numbering on the ranks of tp x cp;
                only seq_aux_loss needs it.
            num_sequences: B, sequences of the micro-batch.
            equal_tokens: whether the ranks of tp x cp all have T tokens, so that their number needn't be asked for.

        Returns:
            The routing, with the losses attached to its weights.
        """
        config = self.config
        logits = router_linear(self._jitter(x_TD), self.weight, ROUTER_DTYPES[config.router_dtype])
        if self.linear_bias is not None:
            logits = logits + self.linear_bias.to(logits.dtype)
        tape = active_tape()
        counting = tape is None or not tape.replaying
        chosen = tape.replay() if tape is not None and tape.replaying else None
        if chosen is None and config.force_load_balancing:
            chosen = in_turn(logits.shape[0], config, logits.device)
        # With a tape both runs take the same path: checkpointing compares what they save for the backward pass.
        if _fusable(config, logits):
            scored = score_fused(logits, config, chosen)
        else:
            if chosen is None:
                chosen = choose(logits, config, training=self.training, bias_E=self.expert_bias)
            scored = score(logits, config, chosen)
        if tape is not None and counting:
            tape.record(scored.routing.chosen_TK)
        routing = scored.routing
        if self.training and torch.is_grad_enabled():
            routing = self._attach_losses(
                scored, logits, sequence_T, num_sequences, equal=equal_tokens, counting=counting
            )
        if counting:
            with torch.no_grad():
                self.stats.add(scored, drops=config.capacity_factor is not None or not config.topk_router)
        return routing

    def _jitter(self, x_TD: Tensor) -> Tensor:
        """Multiply by uniform noise; only the router sees it. Drawn from the default generator of the device."""
        eps = self.config.input_jitter_eps
        if eps == 0 or not self.training:
            return x_TD
        return x_TD * torch.empty_like(x_TD).uniform_(1 - eps, 1 + eps)

    def _attach_losses(
        self,
        scored: Scored,
        logits_TE: Tensor,
        sequence_T: Tensor | None,
        num_sequences: int,
        *,
        equal: bool,
        counting: bool,
    ) -> Routing:
        config, weights = self.config, scored.routing.weights_TK
        pooled = config.aux_loss_mode == "hf"
        if pooled and counting:  # layers are pooled first: the loss is the model's, see hf_load_balancing_loss
            self.logits = logits_TE
        kinds = () if pooled else config.aux_losses
        chosen, counts = self._counted(scored, logits_TE) if kinds else (scored.routing.chosen_TK, scored.counts_E)
        linear = [pair for pair in kinds if pair[0] != "seq_aux_loss"]
        if linear or config.z_loss_coeff > 0:
            parts = self._linear_losses(scored, counts, linear, logits_TE.shape[0], equal=equal, counting=counting)
            if counting:
                self.stats.add_linear(parts, scored.sums)
            weights = losses.attach_linear(weights, scored.sums, parts, self.loss_scale)
        for kind, coeff in kinds:
            if kind == "seq_aux_loss":
                scores = losses.aux_scores(logits_TE, config.router.score)
                value = self._seq_aux_loss(scores, chosen, sequence_T, num_sequences)
                if counting:
                    self.stats.add_loss(kind, value)
                weights = losses.attach_loss(weights, value * coeff, self.loss_scale)
        return replace(scored.routing, weights_TK=weights)

    def _counted(self, scored: Scored, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The choices that balancing losses count, what the scores alone would choose, and how many of each expert."""
        config = self.config
        first_only = config.aux_loss_mode == "switch"
        if not (first_only or not config.topk_router or config.has_bias or config.router.groups > 1):
            return scored.routing.chosen_TK, scored.counts_E
        chosen = logits_TE.detach().topk(1 if first_only else config.topk, dim=-1).indices
        return chosen, losses.count_choices(chosen, config.num_experts)

    def _linear_losses(
        self,
        scored: Scored,
        counts_E: Tensor,
        kinds: Sequence[tuple[str, float]],
        num_tokens: int,
        *,
        equal: bool,
        counting: bool,
    ) -> list[LinearLoss]:
        """This rank's summands over tp x cp of the losses that follow from the sums."""
        config, tp_cp = self.config, self.groups.tp_cp
        tokens: Tensor | int = max(1, num_tokens * group_size(tp_cp))
        if group_size(tp_cp) > 1 and not (equal and "aux_loss" not in dict(kinds)):
            totals = _totals(counts_E, None if equal else num_tokens, tp_cp)
            totals_E, tokens = (totals, tokens) if equal else (totals[:-1], totals[-1:].clamp(min=1))
        else:
            totals_E = counts_E
        balanced = config.num_experts / (1 if config.aux_loss_mode == "switch" else config.topk)
        parts = []
        for kind, coeff in kinds:
            if kind == "global_aux_loss":
                window = self._counts_of_window(counts_E, num_tokens, counting=counting)
                weights, factor = window[:-1] / (window[-1] * tokens).clamp(min=1), balanced
            elif isinstance(tokens, Tensor):
                weights, factor = totals_E / tokens.square(), balanced
            else:
                weights, factor = totals_E, balanced / tokens**2
            part = LinearLoss(name=kind, place=scored.prob_sums, weights=weights, factor=factor, coeff=coeff)
            parts.append(part)
        if config.z_loss_coeff > 0:
            inverse, factor = (tokens.reciprocal(), 1.0) if isinstance(tokens, Tensor) else (None, 1 / tokens)
            part = LinearLoss(
                name="z_loss", place=scored.square_sum, weights=inverse, factor=factor, coeff=config.z_loss_coeff
            )
            parts.append(part)
        return parts

    def _counts_of_window(self, counts_E: Tensor, num_tokens: int, *, counting: bool) -> Tensor:
        """[E + 1] fp64 choices of each expert, and tokens, of all ranks and of the window so far."""
        if self._window_counts_E is None:
            self._window_counts_E = torch.zeros(counts_E.shape[0] + 1, dtype=torch.float64, device=counts_E.device)
        if counting:
            self._window_counts_E += _totals(counts_E, num_tokens, self.groups.tp_dp_cp)
        return self._window_counts_E

    def _seq_aux_loss(
        self, scores_TE: Tensor, chosen_TK: Tensor, sequence_T: Tensor | None, num_sequences: int
    ) -> Tensor:
        """Mean over sequences of each one's loss: this rank's summand over tp x cp."""
        num_tokens, num_experts = scores_TE.shape
        if sequence_T is None:
            sequence_T = chosen_TK.new_zeros(num_tokens)
        cells = sequence_T.unsqueeze(1) * num_experts + chosen_TK
        counts = losses.count_choices(cells, num_sequences * num_experts).view(num_sequences, num_experts)
        lengths = losses.count_choices(sequence_T.unsqueeze(1), num_sequences).unsqueeze(1)
        totals = _sum_over(torch.cat([counts, lengths], dim=1), self.groups.tp_cp)
        tokens = totals[:, -1].clamp(min=1)
        # A product with the one-hot matrix sums in a fixed order on every device, which index_add does not.
        member_BT = torch.nn.functional.one_hot(sequence_T, num_sequences).t().to(scores_TE.dtype)
        per_sequence = losses.load_balancing_loss(
            member_BT @ scores_TE, totals[:, :-1], tokens, tokens, chosen_TK.shape[1]
        )
        return per_sequence.mean()
