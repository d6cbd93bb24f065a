"""The process groups that a MoE layer talks over."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.parallel.collectives import Group


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEGroups:
    """Groups of ranks; None is this rank alone.

    The expert mesh (edp, ep, etp) and the attention mesh (dp, cp, tp) are two factorizations of the same ranks.
    """

    ep: Group = None
    """Ranks that hold different experts."""
    ep_rows: Group = None
    """The same ranks with a communicator for rows alone, whose exchanges overlap with computation; None: they don't."""
    etp: Group = None
    """Ranks that hold pieces of the same experts."""
    tp: Group = None
    """Tensor-parallel ranks of attention."""
    tp_cp: Group = None
    """Ranks that share the sequences of a micro-batch: the balancing losses count over them."""
    tp_dp_cp: Group = None
    """Ranks that share a global batch: global_aux_loss and the expert bias count over them."""
    sequence_parallel: bool = True
    """Whether the tp ranks come with different tokens; otherwise the layer deals the tokens out among them."""
    equal_tokens: bool = False
    """Whether all ranks come with equally many tokens, so that none has to ask the others."""
