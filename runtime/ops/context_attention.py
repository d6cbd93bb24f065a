"""Causal attention over a sequence that context-parallel ranks share.

A sequence is cut into 2 * cp chunks; rank r holds chunks r and 2 * cp - 1 - r. In causal attention the work of a chunk
grows with its place, so an early and a late one together are the same work on every rank. Keys and values are
all-gathered, which with grouped-query attention is little, and each chunk's queries attend to the prefix that they see.

Legend: S positions, B sequences, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.ops.attention import attend
from runtime.ops.documents import Documents
from runtime.parallel.collectives import Group, all_gather, group_rank, group_size


def local_positions(num_positions: int, cp_rank: int, cp_size: int, device: torch.device) -> Tensor:
    """The positions of a sequence that a context-parallel rank holds.

    Args:
        num_positions: length of the sequence, a multiple of 2 * cp_size (of 1 where cp_size is 1).
        cp_rank: the rank.
        cp_size: ranks that share the sequence.
        device: where the result lies.

    Returns:
        [num_positions / cp_size] int64.
    """
    if cp_size == 1:
        return torch.arange(num_positions, device=device)
    chunk = num_positions // (2 * cp_size)
    starts = (cp_rank * chunk, (2 * cp_size - 1 - cp_rank) * chunk)
    return torch.cat([torch.arange(start, start + chunk, device=device) for start in starts])


def _in_order(gathered_SBGK: Tensor, cp_size: int) -> Tensor:
    """Put the chunks of all ranks, as they come from an all-gather, into the order of the sequence."""
    chunks = gathered_SBGK.chunk(2 * cp_size, dim=0)
    early = [chunks[2 * rank] for rank in range(cp_size)]
    late = [chunks[2 * rank + 1] for rank in reversed(range(cp_size))]
    return torch.cat(early + late)


def causal_attention(
    q_SBHK: Tensor,
    k_SBGK: Tensor,
    v_SBGV: Tensor,
    group: Group,
    window: int | None,
    *,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Causal self-attention, over all ranks of a context-parallel group.

    Args:
        q_SBHK: [S / cp, B, H, K] queries of this rank's two chunks.
        k_SBGK: [S / cp, B, G, K] keys of the same positions.
        v_SBGV: [S / cp, B, G, V] values.
        group: the context-parallel ranks; None for one.
        window: positions that a query looks back, itself included; None is all.
        scale: of queries times keys; None is one over the root of K.
        sinks_H: [H] a logit of each head that takes a share of the attention and gives nothing; None for none.
        documents: of the whole rows, which don't see each other; None: a row is one.

    Returns:
        [S / cp, B, H, V].
    """
    size, rank = group_size(group), group_rank(group)
    if size == 1:
        packed = documents.part(0, len(q_SBHK)) if documents is not None else None
        return attend(q_SBHK, k_SBGK, v_SBGV, window, scale=scale, sinks_H=sinks_H, packed=packed)
    kv = _in_order(all_gather(torch.cat([k_SBGK, v_SBGV], dim=-1), 0, group), size)
    early, late = q_SBHK.chunk(2, dim=0)
    chunk = early.shape[0]
    ends = ((rank + 1) * chunk, (2 * size - rank) * chunk)
    out = []
    for q, end in zip((early, late), ends, strict=True):
        k, v = kv[:end, ..., : k_SBGK.shape[-1]], kv[:end, ..., k_SBGK.shape[-1] :]
        packed = documents.part(end - chunk, end) if documents is not None else None
        out.append(attend(q, k, v, window, scale=scale, sinks_H=sinks_H, packed=packed))
    return torch.cat(out)
