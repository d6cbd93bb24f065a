"""Self-attention with rotary positions and grouped queries, tensor-parallel over heads.

Legend: S positions, B sequences, D hidden size, H query heads, G key/value heads (all of this rank), K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moeconv.layout.shard import split_even, split_units
from runtime.model.context import ModelContext, columns, rows
from runtime.ops.linear import linear, linears
from runtime.ops.rotary import rotary
from runtime.parallel.context_attention import causal_attention, local_positions
from runtime.parallel.topology import Topology, tag


class Rotary(nn.Module):
    """Cosines and sines of the positions that this rank holds; computed once for each sequence length."""

    def __init__(self, context: ModelContext) -> None:
        super().__init__()
        self._context = context
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """Give the tables of a sequence.

        Args:
            num_positions: length of the whole sequence.

        Returns:
            Two tensors [S / cp, K] in the compute dtype.

        Source: https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/models/mixtral/modeling_mixtral.py
        """
        if num_positions not in self._tables:
            context, mesh = self._context, self._context.mesh
            dim = context.model.head_dim
            # On the CPU in fp32, as transformers does: a GPU's pow would round otherwise.
            exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
            frequencies = 1.0 / (context.model.rope_theta**exponents)
            positions = local_positions(num_positions, mesh.rank("cp"), mesh.size("cp"), torch.device("cpu"))
            angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
            cos, sin = (table.to(context.device, context.dtype) for table in (angles.cos(), angles.sin()))
            self._tables[num_positions] = (cos, sin)
        return self._tables[num_positions]


class Attention(nn.Module):
    """Attention of one layer: this rank's query heads, and the key/value heads that they use."""

    def __init__(self, context: ModelContext, layer: int) -> None:
        super().__init__()
        model, mesh = context.model, context.mesh
        self._context = context
        tp, rank = mesh.size("tp"), mesh.rank("tp")
        q_size, kv_size, hidden = (
            model.num_heads * model.head_dim,
            model.num_kv_heads * model.head_dim,
            model.hidden_size,
        )
        q_begin, q_end = split_even(q_size, tp)[rank]
        kv_begin, kv_end = split_units(kv_size, model.num_kv_heads, tp)[rank]
        kv_rows = kv_end - kv_begin
        prefix = f"model.layers.{layer}.self_attn"
        # With more ranks than key/value heads, neighbours hold the same head, each for its own query heads.
        shared = ("kv",) if tp > model.num_kv_heads else ()
        self.q_weight = context.parameter(q_end - q_begin, hidden)
        q_piece = rows(f"{prefix}.q_proj.weight", (q_size, hidden), q_begin, q_end)
        tag(self.q_weight, Topology(pieces=(q_piece,), sharded=("tp",)))
        self.kv_weight = context.parameter(2 * kv_rows, hidden)
        kv_pieces = tuple(
            rows(f"{prefix}.{kind}_proj.weight", (kv_size, hidden), kv_begin, kv_end, row)
            for kind, row in (("k", 0), ("v", kv_rows))
        )
        tag(self.kv_weight, Topology(pieces=kv_pieces, sharded=("tp",), replicated=shared, partial=shared))
        self.q_bias: nn.Parameter | None = None
        self.kv_bias: nn.Parameter | None = None
        if model.qkv_bias:
            self.q_bias = context.parameter(q_end - q_begin)
            q_piece = rows(f"{prefix}.q_proj.bias", (q_size,), q_begin, q_end)
            tag(self.q_bias, Topology(pieces=(q_piece,), sharded=("tp",), decay=False))
            self.kv_bias = context.parameter(2 * kv_rows)
            kv_pieces = tuple(
                rows(f"{prefix}.{kind}_proj.bias", (kv_size,), kv_begin, kv_end, row)
                for kind, row in (("k", 0), ("v", kv_rows))
            )
            tag(
                self.kv_bias,
                Topology(pieces=kv_pieces, sharded=("tp",), decay=False, replicated=shared, partial=shared),
            )
        self.o_weight = context.parameter(hidden, q_end - q_begin)
        o_piece = columns(f"{prefix}.o_proj.weight", (hidden, q_size), q_begin, q_end)
        tag(self.o_weight, Topology(pieces=(o_piece,), sharded=("tp",)))
        recompute = context.recompute
        self._recompute = recompute.granularity == "selective" and "core_attn" in recompute.modules

    def forward(self, x_SBD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend.

        Args:
            x_SBD: [S, B, D] normalised input, split over tp with sequence parallelism.
            cos: [S, K] table of the positions.
            sin: [S, K] table of the positions.

        Returns:
            As x_SBD.
        """
        x = self._context.enter(x_SBD)
        q, kv = linears(x, [self.q_weight, self.kv_weight], [self.q_bias, self.kv_bias])
        if self._recompute and torch.is_grad_enabled():
            out = checkpoint(self._core, q, kv, cos, sin, use_reentrant=False)
        else:
            out = self._core(q, kv, cos, sin)
        return self._context.leave(linear(out.flatten(-2), self.o_weight))

    def _core(self, q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = (*q.shape[:2], -1, self._context.model.head_dim)
        k, v = kv.view(heads).chunk(2, dim=2)
        q, k = rotary(q.view(heads), k, cos, sin)
        return causal_attention(q, k, v, self._context.mesh.group("cp"), self._context.model.sliding_window)
