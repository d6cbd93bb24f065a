"""Tokens that reach the ranks of their experts in blocks of equal size: no number of rows is read by the host.

Legend: T tokens of this rank, P ranks, E experts, R rows (a token for a rank).
"""

from __future__ import annotations

from torch import Tensor

from runtime.moe.dispatch import AnyExperts, Counts, Dispatch, TokenDispatch
from runtime.moe.groups import MoEGroups
from runtime.moe.permutation import RowPlan, plan_blocks
from runtime.moe.routing import Routing
from runtime.moe.row_budget import RowBudget
from runtime.moe.sent_once import sends_once
from runtime.parallel.collectives import group_size


class _OfBudget(TokenDispatch):
    def __init__(
        self,
        x_TD: Tensor,
        routing: Routing,
        experts: AnyExperts,
        groups: MoEGroups,
        *,
        overlapped: bool,
        budget: RowBudget,
    ) -> None:
        """Begin; arguments as of `Dispatch`, T being the same on all ranks, and the room."""
        self._budget = budget
        super().__init__(x_TD, routing, experts, groups, overlapped=overlapped)


class MeasuredDispatch(_OfBudget):
    """`TokenDispatch` that keeps how much room it would have needed."""

    def start(self) -> None:
        """As of `Dispatch`."""
        super().start()
        self._budget.note(max(self._input_splits), self._num_choices)


class BudgetedDispatch(_OfBudget):
    """`TokenDispatch` in blocks: the same rows, each rank's followed by unused ones up to the room that there is."""

    def _prepare(self, x_TD: Tensor, routing: Routing) -> tuple[Counts | None, RowPlan]:
        room = self._budget.room
        assert room is not None
        self._block = min(room.sent, x_TD.shape[0])
        num_arriving = self._block * group_size(self._groups.ep) * group_size(self._groups.etp)
        self._num_choices = min(room.held, num_arriving * routing.experts_TK.shape[1])
        return super()._prepare(x_TD, routing)

    def _arrange(self, ranks_TP: Tensor, counts: Tensor, most: int) -> tuple[Counts | None, RowPlan]:
        needed = self._budget.sent_needed
        return None, plan_blocks(ranks_TP, ranks_TP.shape[1], self._block, needed, fused=self._experts.fused)

    def start(self) -> None:
        """Send the blocks off."""
        num_ranks = group_size(self._groups.ep)
        self._input_splits = self._output_splits = [self._block] * num_ranks
        self._etp_sizes = [self._block * num_ranks] * group_size(self._groups.etp)
        self._there.start(self._output_splits, self._input_splits)

    def _plan_choices(self, experts_TK: Tensor) -> RowPlan:
        return self._experts.plan(experts_TK, self._num_choices, self._budget.held_needed)


def make_dispatch(
    x_TD: Tensor,
    routing: Routing,
    experts: AnyExperts,
    groups: MoEGroups,
    *,
    overlapped: bool,
    budget: RowBudget | None = None,
    training: bool = True,
) -> Dispatch:
    """Begin to send choices to the ranks of their experts.

    Args:
        x_TD: as of `Dispatch`, like the next ones.
        routing: likewise.
        experts: likewise.
        groups: likewise.
        overlapped: likewise.
        budget: room for rows, where numbers are not to be read; None: they are.
        training: whether a step that outgrows its room is done again; otherwise numbers are read.

    Returns:
        What is under way.
    """
    num_ranks, topk = group_size(groups.ep), routing.chosen_TK.shape[1]
    if budget is not None and training:
        of_budget = MeasuredDispatch if budget.room is None else BudgetedDispatch
        return of_budget(x_TD, routing, experts, groups, overlapped=overlapped, budget=budget)
    num_experts = experts.num_local_experts * num_ranks
    # Not where there is a column for each expert: what travels behind a token has room for all its columns.
    once = routing.experts_TK.shape[1] == topk and sends_once(num_experts, topk, num_ranks)
    kind = TokenDispatch if once else Dispatch
    return kind(x_TD, routing, experts, groups, overlapped=overlapped)
