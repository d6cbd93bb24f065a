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


class _Counts:
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
    places = torch.arange(bound, device=blocks_N.device)
    block = torch.bucketize(places, blocks_N.cumsum(0), right=True)
    ids = torch.where(block < blocks_N.shape[0], block % num_local, num_local)
    return experts.plan(ids.unsqueeze(1), bound)


class Dispatch:
    """A layer's rows on their way to the ranks of their experts, and their results on the way back.

    Five steps in this order: making one, `start`, `compute`, `send_back`, `finish`. Between them another micro-batch's may
    be done, so that the device computes while rows travel. What doesn't depend on the numbers of rows is launched before
    the host waits for them, in `start`.
    """

    def __init__(
        self, x_TD: Tensor, routing: Routing, experts: AnyExperts, groups: MoEGroups, *, overlapped: bool
    ) -> None:
        """Put each choice's row into the order of ranks and experts, with its weight.

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
        self._counting = _Counts(count_choices(routing.experts_TK, self._num_experts), groups)
        self._plan = plan_rows(routing.experts_TK, self._num_experts, routing.max_rows, fused=experts.fused)
        self._weights_dtype = routing.weights_TK.dtype
        over = groups.ep_rows if overlapped else groups.ep
        self._there, self._back = (Exchange(over, overlapped=overlapped) for _ in range(2))
        self._there.depart(pack(x_TD, routing.weights_TK, self._plan, fused=experts.fused))
        ep_rank = group_rank(groups.ep)
        self._own = slice(ep_rank * self._num_local, (ep_rank + 1) * self._num_local)
        self._blocks = self._counting.device[:, :, self._own].reshape(-1)
        # More rows than this arrive only where other ranks have more tokens than this one.
        self._expected = routing.max_rows * group_size(groups.ep) * group_size(groups.etp)
        self._arrivals = _plan_arrivals(self._blocks, experts, self._expected)

    def start(self) -> None:
        """Wait on the host for the numbers of rows, and send the rows off."""
        counts = self._counting.wait()
        etp_rank, ep_rank = group_rank(self._groups.etp), group_rank(self._groups.ep)
        sent = counts[etp_rank][ep_rank]
        starts = range(0, self._num_experts, self._num_local)
        self._input_splits = [sum(sent[start : start + self._num_local]) for start in starts]
        # What arrives here: for each etp rank and each ep rank, the rows of each of our experts.
        arriving = [[sum(row[self._own]) for row in over_ep] for over_ep in counts]
        self._output_splits = arriving[etp_rank]
        self._etp_sizes = [sum(over_ep) for over_ep in arriving]
        self._there.start(self._output_splits, self._input_splits)

    def compute(self) -> None:
        """Apply this rank's experts to the rows that have come."""
        etp, sizes = self._groups.etp, self._etp_sizes
        rows, weights = unpack(self._there.arrive(), self._weights_dtype)
        rows = all_gather(rows, 0, etp, sizes)
        weights = all_gather(weights, 0, etp, sizes)
        arrived = sum(sizes)
        if arrived > self._expected:
            self._arrivals = _plan_arrivals(self._blocks, self._experts, arrived)
        out = self._experts(rows, weights.unsqueeze(1), self._arrivals.first(arrived, arrived))
        self._back.depart(reduce_scatter(out, 0, etp, sizes).contiguous())

    def send_back(self) -> None:
        """Send the results off."""
        self._back.start(self._input_splits, self._output_splits)

    def finish(self) -> Tensor:
        """Sum up each token's results.

        Returns:
            [T, D] weighted sums.
        """
        return unpermute(self._back.arrive(), self._plan, fused=self._experts.fused)


def run_all_to_all(x_TD: Tensor, routing: Routing, experts: AnyExperts, groups: MoEGroups) -> Tensor:
    """Send each choice to the rank of its expert, and its result back; see `Dispatch`."""
    dispatch = Dispatch(x_TD, routing, experts, groups, overlapped=False)
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
        counts = _Counts(torch.cat([mine, mine.new_full((1,), x_TD.shape[0])]), groups).wait()
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
