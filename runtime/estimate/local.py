"""The sizes of one rank's part of a micro-batch, on which memory, time and traffic depend alike.

Legend: T tokens, D hidden size, H query heads, G key/value heads, K choices of a token, R rows, E experts, F width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from runtime.estimate.machine import Machine
from runtime.estimate.setup import ITEMSIZE, Setup
from runtime.moe.config import MoEConfig
from runtime.moe.sent_once import sends_once, share_saved


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """One rank's sizes."""

    item: int
    """Bytes of an activation's element."""
    tokens: int
    """In attention and gated layers, where every rank of tp has all of them."""
    tokens_between: int
    """Between those regions: shared out over tp with sequence parallelism."""
    tokens_moe: int
    """In the router: every rank of tp has its own."""
    hidden: int
    query: int
    """Elements of a token's queries on this rank."""
    key_value: int
    """Elements of its keys and values together."""
    value: int
    """Elements of the attention's output."""
    heads: int
    vocabulary: int
    """Columns of the logits, with padding."""
    num_experts: int
    experts: int
    """On this rank."""
    width: int
    """Of an expert's part on this rank."""
    rows_sent: float
    """Choices of this rank's tokens."""
    rows: float
    """That arrive at the fullest rank's experts."""
    rows_allocated: float
    """With the room for each expert's padding."""
    rows_computed: float
    """With the padding that is expected."""
    departing: float
    """Rows that this rank sends where rows are exchanged: one for each choice, or for each rank that a token goes to."""
    arriving: float
    """Such rows that come to the fullest rank, or that it has room for."""
    gathered: float
    """Tokens that the experts' inputs hold: those that arrive, or those of all ranks that gather them."""
    exchanged: bool
    """Whether rows are exchanged (all-to-all)."""
    once: bool
    """Whether a token has one such row for all its choices of experts on a rank."""

    @property
    def has_experts(self) -> bool:
        """Whether there are MoE layers."""
        return self.num_experts > 0


def local_sizes(setup: Setup, machine: Machine, imbalance: float | None = None) -> Local:
    """Work out one rank's sizes.

    Args:
        setup: what is planned.
        machine: says how rows are aligned.
        imbalance: rows of the fullest expert-parallel rank, of the mean; None takes the machine's.

    Returns:
        The sizes of the fullest rank.
    """
    parallel, common, moe = setup.parallel, _sizes_without_experts(setup), setup.moe
    if moe is None:
        counts = ("rows_sent", "rows", "rows_allocated", "rows_computed", "departing", "arriving", "gathered")
        return Local(
            **common, **dict.fromkeys(("num_experts", "experts", "width", *counts), 0), exchanged=False, once=False
        )
    sent = common["tokens_moe"] * moe.topk
    even = parallel.ep == 1 or moe.force_load_balancing
    uneven = 1.0 if even else machine.imbalance if imbalance is None else imbalance
    factor = moe.capacity_factor
    if factor is not None:
        uneven = factor if moe.pad_to_capacity else min(uneven, factor)
    exchanged = parallel.ep > 1 and moe.dispatcher == "alltoall"
    experts, align = moe.num_experts // parallel.ep, machine.row_alignment
    rows = sent * parallel.etp * uneven
    room = rows * setup.row_margin
    once = exchanged and (setup.captured or sends_once(moe.num_experts, moe.topk, parallel.ep))
    travelling = (sent, sent * uneven)
    departing, arriving = _once(setup, moe, travelling, common["tokens_moe"]) if once else travelling
    return Local(
        **common,
        num_experts=moe.num_experts,
        experts=experts,
        width=setup.model.sizes["ffn"] // parallel.etp,
        rows_sent=sent,
        rows=rows,
        rows_allocated=-(-(room + experts * (align - 1)) // align) * align,
        rows_computed=rows + experts * min((align - 1) / 2, rows / experts),
        departing=departing,
        arriving=arriving,
        gathered=(arriving if exchanged else common["tokens_moe"] * parallel.ep) * parallel.etp,
        exchanged=exchanged,
        once=once,
    )


def _sizes_without_experts(setup: Setup) -> dict[str, int]:
    """Work out the fields of `Local` that don't depend on experts."""
    model, tp = setup.model, setup.parallel.tp
    sizes, tokens = model.sizes, setup.micro_batch_size * setup.seq_length // setup.parallel.cp
    latent = model.has("attention.kv_b")
    heads = max(1, sizes["heads"] // tp)
    width_q = sizes["qk_dim"] if latent else sizes["head_dim"]
    kv_heads = heads if latent else max(1, sizes["kv_heads"] // tp)
    width_kv = width_q + (sizes["v_dim"] if latent else sizes["head_dim"])
    vocabulary = next(p.shape[0] for p in setup.parameters.chunk(range(1)) if p.part == "embedding")
    return {
        "item": ITEMSIZE[setup.dtype],
        "tokens": tokens,
        "tokens_between": tokens // tp if setup.sp else tokens,
        "tokens_moe": -(-tokens // tp),
        "hidden": sizes["hidden"],
        "query": heads * width_q,
        "key_value": kv_heads * width_kv,
        "value": heads * (sizes["v_dim"] if latent else sizes["head_dim"]),
        "heads": heads,
        "vocabulary": vocabulary,
    }


def _once(setup: Setup, moe: MoEConfig, choices: tuple[float, ...], tokens: int) -> tuple[float, ...]:
    """Rows of so many choices where a token is sent once to each of the ranks, which have so many tokens each."""
    share = 1 - share_saved(moe.num_experts, moe.topk, setup.parallel.ep)
    # In a CUDA graph blocks with room, of all tokens at most.
    most = tokens * setup.parallel.ep if setup.captured else math.inf
    return tuple(min(count * share * setup.row_margin, most) for count in choices)
