"""How tokens reach the ranks that hold their experts, and come back.

Legend: T tokens of this rank, K choices per token, R rows, E experts (E_local on this rank), D hidden size.

Both dispatchers give the same sums. Host synchronisations in a forward pass: none where no rows are exchanged between
ranks with equally many tokens (ep 1), one otherwise (the numbers of rows); none in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.moe.clamped_experts import ClampedExperts
from runtime.moe.experts import Experts
from runtime.moe.groups import MoEGroups
from runtime.moe.losses import count_choices
from runtime.moe.packed import pack, unpack
from runtime.moe.packed_tokens import Choices, pack_tokens, unpack_tokens
from runtime.moe.passes import unpermute
from runtime.moe.permutation import RowPlan, plan_rows
from runtime.moe.routing import Routing
from runtime.ops.reading import Reading
from runtime.parallel.collectives import (
    all_gather,
    gather_tensor,
    group_rank,
    group_size,
    reduce_scatter,
)
from runtime.parallel.exchange import Exchange

AnyExperts = Experts | ClampedExperts


def run_local(x_TD: Tensor, routing: Routing, experts: AnyExperts) -> Tensor:
    """All experts whole on this rank: no communication, and the host never waits for the device."""
    plan = experts.plan(routing.experts_TK, routing.max_rows)
    out: Tensor = experts(x_TD, routing.weights_TK, plan)
    return out


class Counts:
    """Every rank's numbers [etp, ep, ...], on the device at once and on the host when they are waited for."""

    def __init__(self, values: Tensor, groups: MoEGroups) -> None:
        over_ep = gather_tensor(values.unsqueeze(0), 0, groups.ep)
        self.device = gather_tensor(over_ep.unsqueeze(0), 0, groups.etp)
        self._reading = Reading(self.device)

    def wait(self) -> list[list[list[int]]]:
        """The numbers; what has been launched after them goes on meanwhile."""
        numbers: list[list[list[int]]] = self._reading.wait().tolist()
        return numbers


def _plan_arrivals(blocks_N: Tensor, experts: AnyExperts, bound: int) -> RowPlan:
    """Order rows that arrive in blocks by expert.

    Args:
        blocks_N: [N] rows of each block; the blocks of each source are those of this rank's experts in turn.
        experts: this rank's.
        bound: at least the sum of the blocks.

    Returns:
        The plan of `bound` rows, of which those past the blocks' sum are dropped.
    """
    num_local = experts.num_local_experts
    if experts.fused and blocks_N.is_cuda:
        from runtime.kernels.sent_tokens import experts_of_arrivals

        return experts.plan(experts_of_arrivals(blocks_N, num_local, bound).unsqueeze(1), bound)
    places = torch.arange(bound, device=blocks_N.device)
    block = torch.bucketize(places, blocks_N.cumsum(0), right=True)
    ids = torch.where(block < blocks_N.shape[0], block % num_local, num_local)
    return experts.plan(ids.unsqueeze(1), bound)


def _choices_of_experts(experts_TK: Tensor, num_experts: int, *, fused: bool) -> Tensor:
    """[E] how often each expert was chosen."""
    if fused and experts_TK.is_cuda:
        from runtime.kernels.sent_tokens import homes

        return homes(experts_TK.contiguous(), num_experts, 1)[1][:num_experts]  # as if all were on one rank
    return count_choices(experts_TK, num_experts)


class Dispatch:
    """A layer's rows on their way to the ranks of their experts, and their results on the way back.

    Five steps in this order: making one, `start`, `compute`, `send_back`, `finish`. Between them another micro-batch's may
    be done, so that the device computes while rows travel. What doesn't depend on the numbers of rows is launched before
    the host waits for them, in `start`.
    """

    def __init__(
        self, x_TD: Tensor, routing: Routing, experts: AnyExperts, groups: MoEGroups, *, overlapped: bool
    ) -> None:
        """Put what goes to each rank into the ranks' order.

        Args:
            x_TD: [T, D] this rank's tokens; T may differ between ranks.
            routing: their routing over all experts.
            experts: this rank's experts.
            groups: ep exchanges rows; etp gathers its ranks' rows and sums their partial results.
            overlapped: let the device go on while rows travel.
        """
        self._experts, self._groups = experts, groups
        self._num_local = experts.num_local_experts
        self._num_experts = self._num_local * group_size(groups.ep)
        self._weights_dtype = routing.weights_TK.dtype
        over = groups.ep_rows if overlapped else groups.ep
        self._there, self._back = (Exchange(over, overlapped=overlapped) for _ in range(2))
        ep_rank = group_rank(groups.ep)
        self._own = slice(ep_rank * self._num_local, (ep_rank + 1) * self._num_local)
        self._counting, self._plan = self._prepare(x_TD, routing)

    def _prepare(self, x_TD: Tensor, routing: Routing) -> tuple[Counts | None, RowPlan]:
        """Have each choice's row depart with its weight, in the order of experts.

        Returns:
            How many rows each rank has for each expert, None where that isn't asked; and which choice is which row.
        """
        experts, groups = self._experts, self._groups
        counting = Counts(_choices_of_experts(routing.experts_TK, self._num_experts, fused=experts.fused), groups)
        plan = plan_rows(routing.experts_TK, self._num_experts, routing.max_rows, fused=experts.fused)
        self._there.depart(pack(x_TD, routing.weights_TK, plan, fused=experts.fused))
        self._blocks = counting.device[:, :, self._own].reshape(-1)
        # More rows than this arrive only where other ranks have more tokens than this one.
        self._expected = routing.max_rows * group_size(groups.ep) * group_size(groups.etp)
        self._arrivals = _plan_arrivals(self._blocks, experts, self._expected)
        return counting, plan

    def _sent(self, numbers: list[int]) -> list[int]:
        """What a rank with these numbers sends to each rank."""
        starts = range(0, self._num_experts, self._num_local)
        return [sum(numbers[start : start + self._num_local]) for start in starts]

    def start(self) -> None:
        """Wait on the host for the numbers of rows, and send the rows off."""
        assert self._counting is not None
        counts = self._counting.wait()
        etp_rank, ep_rank = group_rank(self._groups.etp), group_rank(self._groups.ep)
        self._input_splits = self._sent(counts[etp_rank][ep_rank])
        # What arrives here from each etp rank and each ep rank, and how many choices of our experts that is.
        arriving = [[self._sent(numbers)[ep_rank] for numbers in over_ep] for over_ep in counts]
        self._num_choices = sum(sum(numbers[self._own]) for over_ep in counts for numbers in over_ep)
        self._output_splits = arriving[etp_rank]
        self._etp_sizes = [sum(over_ep) for over_ep in arriving]
        self._there.start(self._output_splits, self._input_splits)

    def compute(self) -> None:
        """Apply this rank's experts to the rows that have come."""
        out = self._apply(self._there.arrive())
        self._back.depart(reduce_scatter(out, 0, self._groups.etp, self._etp_sizes).contiguous())

    def _apply(self, packed: Tensor) -> Tensor:
        """The results of what has come, one for each of the rows that came over etp."""
        etp, sizes = self._groups.etp, self._etp_sizes
        rows, weights = unpack(packed, self._weights_dtype)
        rows = all_gather(rows, 0, etp, sizes)
        weights = all_gather(weights, 0, etp, sizes)
        arrived = sum(sizes)
        if arrived > self._expected:
            self._arrivals = _plan_arrivals(self._blocks, self._experts, arrived)
        out: Tensor = self._experts(rows, weights.unsqueeze(1), self._arrivals.first(arrived, arrived))
        return out

    def send_back(self) -> None:
        """Send the results off."""
        self._back.start(self._input_splits, self._output_splits)

    def finish(self) -> Tensor:
        """Sum up each token's results.

        Returns:
            [T, D] weighted sums.
        """
        return unpermute(self._back.arrive(), self._plan, fused=self._experts.fused)


def _homes(experts_TK: Tensor, num_local: int, num_ranks: int, *, fused: bool) -> tuple[Tensor, Tensor]:
    """[T, P] each rank's own number where a token goes there, else P; and how many choices and tokens there are of each."""
    if fused and experts_TK.is_cuda:
        from runtime.kernels.sent_tokens import MAX_RANKS, homes

        if num_ranks <= MAX_RANKS:
            return homes(experts_TK.contiguous(), num_local, num_ranks)
    home_TK = (experts_TK // num_local).clamp(max=num_ranks)
    # A column for each rank: its own number, or none; of a dropped choice the one behind the last.
    ranks_TP = home_TK.new_full((home_TK.shape[0], num_ranks + 1), num_ranks).scatter_(1, home_TK, home_TK)
    ranks_TP = ranks_TP[:, :num_ranks].contiguous()
    counts = [count_choices(experts_TK, num_local * num_ranks), count_choices(ranks_TP, num_ranks)]
    return ranks_TP, torch.cat(counts)


class TokenDispatch(Dispatch):
    """The same where a token goes to a rank once, with all its choices of experts there, whose results come back summed.

    Choices of several experts of a rank are the rule where a token has more choices than there are ranks.
    """

    def _prepare(self, x_TD: Tensor, routing: Routing) -> tuple[Counts | None, RowPlan]:
        """Have each token depart to each rank that has an expert for it.

        Returns:
            How many choices each rank has of each expert, and how many tokens for each rank; and which row goes to which rank.
        """
        num_ranks, fused = group_size(self._groups.ep), self._experts.fused
        ranks_TP, counts = _homes(routing.experts_TK, self._num_local, num_ranks, fused=fused)
        most = min(routing.max_rows, x_TD.shape[0] * min(num_ranks, routing.experts_TK.shape[1]))
        counting, plan = self._arrange(ranks_TP, counts, most)
        choices = Choices(routing.experts_TK, self._num_local)
        self._num_choices_of_token = routing.experts_TK.shape[1]
        self._there.depart(pack_tokens(x_TD, routing.weights_TK, choices, plan, fused=fused))
        return counting, plan

    def _arrange(self, ranks_TP: Tensor, counts: Tensor, most: int) -> tuple[Counts | None, RowPlan]:
        """What `_prepare` returns: from each token's ranks, how many choices and tokens there are, and a bound of the rows."""
        counting = Counts(counts, self._groups)
        return counting, plan_rows(ranks_TP, ranks_TP.shape[1], most, fused=self._experts.fused)

    def _sent(self, numbers: list[int]) -> list[int]:
        return numbers[self._num_experts :]

    def _apply(self, packed: Tensor) -> Tensor:
        etp, sizes = self._groups.etp, self._etp_sizes
        topk, fused = self._num_choices_of_token, self._experts.fused
        rows, weights_TK, experts_TK = unpack_tokens(packed, topk, self._weights_dtype, fused=fused)
        rows = all_gather(rows, 0, etp, sizes)
        weights_TK = all_gather(weights_TK, 0, etp, sizes)
        plan = self._plan_choices(gather_tensor(experts_TK, 0, etp, sizes))
        out: Tensor = self._experts(rows, weights_TK, plan)
        return out

    def _plan_choices(self, experts_TK: Tensor) -> RowPlan:
        """The order of what has come, by expert."""
        return self._experts.plan(experts_TK, self._num_choices)


def run_all_to_all(dispatch: Dispatch) -> Tensor:
    """Do all that is left of a dispatch.

    Returns:
        [T, D] weighted sums.
    """
    dispatch.start()
    dispatch.compute()
    dispatch.send_back()
    return dispatch.finish()


def run_all_gather(
    x_TD: Tensor, routing: Routing, experts: AnyExperts, groups: MoEGroups, *, equal_tokens: bool = False
) -> Tensor:
    """Gather all ranks' tokens, apply this rank's experts, and sum the partial results back.

    Arguments and result as of `run_all_to_all`, and `equal_tokens`: whether T is the same on all ranks. Traffic does
    not depend on the balance of the routing.
    """
    num_local = experts.num_local_experts
    ep_rank = group_rank(groups.ep)
    ep_sizes = etp_sizes = None
    if equal_tokens and group_size(groups.ep) == 1:
        num_rows = routing.max_rows * group_size(groups.etp)
    else:
        mine = count_choices(routing.experts_TK, num_local * group_size(groups.ep))
        counts = Counts(torch.cat([mine, mine.new_full((1,), x_TD.shape[0])]), groups).wait()
        own = slice(ep_rank * num_local, (ep_rank + 1) * num_local)
        ep_sizes = [row[-1] for row in counts[group_rank(groups.etp)]]
        etp_sizes = [sum(row[-1] for row in over_ep) for over_ep in counts]
        num_rows = sum(sum(row[own]) for over_ep in counts for row in over_ep)

    def gather(values: Tensor) -> Tensor:
        return all_gather(all_gather(values, 0, groups.ep, ep_sizes), 0, groups.etp, etp_sizes)

    with torch.no_grad():
        ids = gather(routing.experts_TK) - ep_rank * num_local
        ids = ids.masked_fill((ids < 0) | (ids >= num_local), num_local)
    plan = experts.plan(ids, num_rows)
    out = experts(gather(x_TD), gather(routing.weights_TK), plan)
    return reduce_scatter(reduce_scatter(out, 0, groups.etp, etp_sizes), 0, groups.ep, ep_sizes)
