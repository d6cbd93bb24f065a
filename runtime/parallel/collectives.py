"""Collectives that autograd understands, on plain local tensors.

Tensor parallel code needs two things to be stated explicitly: what a tensor is on the ranks of a group (the same
everywhere, a partial sum, a piece) and what its gradient is. Each function here names one such step, with the backward
that belongs to it:

====================  ======================  =======================
function              forward                 backward
====================  ======================  =======================
copy_to               identity                all-reduce
reduce_from           all-reduce              identity
all_gather            all-gather              reduce-scatter
reduce_scatter        reduce-scatter          all-gather
gather_from           all-gather              own piece
split_to              own piece               all-gather
====================  ======================  =======================

All-to-alls of rows are in `runtime.parallel.exchange`. A group of one rank (or None) makes every function the identity.
All of them run on NCCL and on gloo.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

# Their names since torch 2.13.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_size(group: Group) -> int:
    """The number of ranks in a group, 1 for None."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """This rank's place in a group, 0 for None."""
    return 0 if group is None else group.rank()


def _gather_first(x: Tensor, group: Group) -> Tensor:
    """All-gather equal pieces along dim 0."""
    out = x.new_empty((x.shape[0] * group_size(group), *x.shape[1:]))
    all_gather_single(out, x, group=group)
    return out


def _reduce_scatter_first(x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Sum over the group and keep this rank's piece of dim 0 (equal pieces)."""
    out = x.new_empty((x.shape[0] // group_size(group), *x.shape[1:]))
    reduce_scatter_single(out, x, op=op, group=group)
    return out


def _offsets(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts


def gather_tensor(x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None = None) -> Tensor:
    """All-gather pieces along a dim; no gradient.

    Args:
        x: this rank's piece, any dtype.
        dim: the dim along which the pieces are joined.
        group: the ranks that take part.
        sizes: each rank's size along `dim` where they differ; equal pieces without it.

    Returns:
        The joined tensor, equal on every rank of the group.
    """
    if group_size(group) == 1:
        return x
    front = x.movedim(dim, 0)
    if sizes is None or len(set(sizes)) == 1:
        return _gather_first(front.contiguous(), group).movedim(0, dim)
    # Uneven pieces travel padded to the largest: one collective, and gloo knows no uneven all-gather.
    longest = max(sizes)
    padded = front.new_zeros((longest, *front.shape[1:]))
    padded[: front.shape[0]] = front
    parts = torch.split(_gather_first(padded, group), longest)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).movedim(0, dim)


def reduce_scatter_tensor(x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None = None) -> Tensor:
    """Sum over the group, keep this rank's piece along a dim; no gradient.

    Args:
        x: this rank's summand, the same shape on every rank.
        dim: the dim that is cut.
        group: the ranks that take part.
        sizes: each rank's size along `dim` where they differ; equal pieces without it.

    Returns:
        This rank's piece of the sum.
    """
    if group_size(group) == 1:
        return x
    front = x.movedim(dim, 0)
    if sizes is None or len(set(sizes)) == 1:
        return _reduce_scatter_first(front.contiguous(), group).movedim(0, dim)
    longest = max(sizes)
    padded = front.new_zeros((longest * len(sizes), *front.shape[1:]))
    for rank, part in enumerate(torch.split(front, list(sizes))):
        padded[rank * longest : rank * longest + part.shape[0]] = part
    return _reduce_scatter_first(padded, group)[: sizes[group_rank(group)]].movedim(0, dim)


def _own_piece(x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None) -> Tensor:
    size = group_size(group)
    sizes = sizes if sizes is not None else [x.shape[dim] // size] * size
    rank = group_rank(group)
    return x.narrow(dim, _offsets(sizes)[rank], sizes[rank])


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        out = x.contiguous().clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None, reduce: bool) -> Tensor:
        ctx.args = (dim, group, sizes, reduce)
        return gather_tensor(x, dim, group, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dim, group, sizes, reduce = ctx.args
        piece = reduce_scatter_tensor if reduce else _own_piece
        return piece(grad, dim, group, sizes), None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None, reduce: bool) -> Tensor:
        ctx.args = (dim, group, sizes)
        return reduce_scatter_tensor(x, dim, group, sizes) if reduce else _own_piece(x, dim, group, sizes).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return gather_tensor(grad, *ctx.args), None, None, None, None


def copy_to(x: Tensor, group: Group) -> Tensor:
    """Give every rank's computation the same input: identity, whose gradient is summed over the group."""
    return x if group_size(group) == 1 else cast(Tensor, _CopyTo.apply(x, group))  # type: ignore[no-untyped-call]


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """Sum partial results over the group; the gradient of the sum is that of each summand."""
    return x if group_size(group) == 1 else cast(Tensor, _ReduceFrom.apply(x, group))  # type: ignore[no-untyped-call]


def all_gather(x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None = None) -> Tensor:
    """Join the ranks' pieces along a dim where each rank then computes something else from the whole.

    Args:
        x: this rank's piece.
        dim: the dim along which the pieces are joined.
        group: the ranks that take part; None or one rank: identity.
        sizes: each rank's size along `dim` where they differ.

    Returns:
        The whole tensor; its gradient is reduce-scattered.
    """
    if group_size(group) == 1:
        return x
    return cast(Tensor, _AllGather.apply(x, dim, group, sizes, True))  # type: ignore[no-untyped-call]


def gather_from(x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None = None) -> Tensor:
    """Join the ranks' pieces along a dim where every rank then computes the same from the whole.

    Arguments as in `all_gather`; the gradient, equal on every rank, is cut instead of summed.
    """
    if group_size(group) == 1:
        return x
    return cast(Tensor, _AllGather.apply(x, dim, group, sizes, False))  # type: ignore[no-untyped-call]


def reduce_scatter(x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None = None) -> Tensor:
    """Sum partial results over the group and keep this rank's piece along a dim; the gradient is all-gathered."""
    if group_size(group) == 1:
        return x
    return cast(Tensor, _ReduceScatter.apply(x, dim, group, sizes, True))  # type: ignore[no-untyped-call]


def split_to(x: Tensor, dim: int, group: Group, sizes: Sequence[int] | None = None) -> Tensor:
    """Keep this rank's piece of a tensor that is equal on every rank; the gradient is all-gathered."""
    if group_size(group) == 1:
        return x
    return cast(Tensor, _ReduceScatter.apply(x, dim, group, sizes, False))  # type: ignore[no-untyped-call]
