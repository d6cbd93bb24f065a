"""Causal attention over a sequence that context-parallel ranks share.

A sequence is cut into 2 * cp chunks; rank r holds chunks r and 2 * cp - 1 - r. In causal attention the work of a chunk
grows with its place, so an early and a late one together are the same work on every rank. Keys and values are
all-gathered, which with grouped-query attention is little, and each chunk's queries attend to the prefix that they see.

Legend: S positions, B sequences, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

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


def _attend(q_SBHK: Tensor, kv_SBGK: Tensor, window: int | None) -> Tensor:
    """Attention of queries that are the last positions of the keys' sequence.

    Args:
        q_SBHK: [Sq, B, H, K].
        kv_SBGK: [Sk, B, 2G, K] keys, then values; Sk >= Sq.
        window: positions that a query looks back, itself included; None is all.

    Returns:
        [Sq, B, H, K].
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBHK, *kv_SBGK.chunk(2, dim=2)))
    num_q, num_k = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if window is not None and num_k > window:
        query = torch.arange(num_k - num_q, num_k, device=q.device).unsqueeze(1)
        key = torch.arange(num_k, device=q.device)
        mask = (key <= query) & (key > query - window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    elif num_q == num_k:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    else:
        # Imported late: it brings the compiler along, seconds that runs without context parallelism need not spend.
        from torch.nn.attention.bias import causal_lower_right

        bias = causal_lower_right(num_q, num_k)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=gqa)
    return out.permute(2, 0, 1, 3)


def causal_attention(q_SBHK: Tensor, kv_SBGK: Tensor, group: Group, window: int | None) -> Tensor:
    """Causal self-attention, over all ranks of a context-parallel group.

    Args:
        q_SBHK: [S / cp, B, H, K] queries of this rank's two chunks.
        kv_SBGK: [S / cp, B, 2G, K] keys and values of the same positions, keys first.
        group: the context-parallel ranks; None for one.
        window: positions that a query looks back, itself included; None is all.

    Returns:
        [S / cp, B, H, K].
    """
    size, rank = group_size(group), group_rank(group)
    if size == 1:
        return _attend(q_SBHK, kv_SBGK, window)
    kv = _in_order(all_gather(kv_SBGK, 0, group), size)
    early, late = q_SBHK.chunk(2, dim=0)
    chunk = early.shape[0]
    ends = ((rank + 1) * chunk, (2 * size - rank) * chunk)
    return torch.cat([_attend(q, kv[:end], window) for q, end in zip((early, late), ends, strict=True)])
