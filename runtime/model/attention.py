"""Self-attention with rotary positions and grouped queries, tensor-parallel over heads.

Legend: S positions, B sequences, D hidden size, H query heads, G key/value heads (all of this rank), K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runtime.model.adapter import take_adapter
from runtime.model.context import ModelContext
from runtime.model.norm import RMSNorm, SharedRMSNorm
from runtime.model.past import Past
from runtime.model.tensor_maps import ColumnMaps, RowMap
from runtime.ops.context_attention import causal_attention
from runtime.ops.documents import Documents
from runtime.ops.rotary import rotary


class Attention(nn.Module):
    """Attention of one layer: this rank's query heads, and the key/value heads that they use."""

    def __init__(self, context: ModelContext, layer: int) -> None:
        super().__init__()
        model, parameters = context.model, context.parameters
        self._context, self._layer = context, layer
        self._head_dim = model.sizes["head_dim"]
        self._window = model.compute.windows[layer]
        self._scale = model.compute.attention_scale
        self._neighbours = model.compute.rope.interleaved
        self._norms_last = model.compute.head_norms == "after rotation"
        self.q_weight = parameters.take("attention.q", layer=layer)
        self.kv_weight = parameters.take("attention.k", "attention.v", layer=layer)
        self.q_bias = parameters.take_optional("attention.q.bias", layer=layer)
        self.kv_bias = parameters.take_optional("attention.k.bias", "attention.v.bias", layer=layer)
        self.o_weight = parameters.take("attention.o", layer=layer)
        self.o_bias = parameters.take_optional("attention.o.bias", layer=layer, partial=context.sp)
        self.q_adapter = take_adapter(context, self.q_weight, "attention.q", layer=layer)
        self.kv_adapter = take_adapter(context, self.kv_weight, "attention.k", "attention.v", layer=layer)
        self.o_adapter = take_adapter(context, self.o_weight, "attention.o", layer=layer)
        self.sinks = parameters.take_optional("attention.sinks", layer=layer)
        self.q_norm = self._norm("attention.q_norm", layer)
        self.k_norm = self._norm("attention.k_norm", layer)
        self._recompute = context.recomputes("core_attn")
        self._in = ColumnMaps(context, "queries, keys and values", self.q_weight, self.kv_weight)
        self._out = RowMap(context, "attention's output", self.o_weight)

    def _norm(self, role: str, layer: int) -> RMSNorm | SharedRMSNorm | None:
        """The norm of queries or keys: over each head, or over all heads together where its weight is as long."""
        context, eps = self._context, self._context.model.compute.norm_eps
        # The ranks of tp see different heads.
        weight = context.parameters.take_optional(role, layer=layer, partial=True)
        if weight is None:
            return None
        full_size = context.model.tensor(role, layer).shape[0]
        if full_size == self._head_dim:
            return RMSNorm(weight, eps)
        return SharedRMSNorm(weight, eps, context.mesh.group("tp"), full_size)

    def forward(
        self, x_SBD: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None = None, past: Past | None = None
    ) -> Tensor:
        """Attend.

        Args:
            x_SBD: [S, B, D] normalised input, split over tp with sequence parallelism.
            cos: [S, R] table of the positions, or [S, B, R].
            sin: likewise.
            documents: of the rows, which don't see each other; None: a row is one.
            past: has the positions before these, and takes these; None: there are none.

        Returns:
            As x_SBD.
        """
        weights, biases = [self.q_weight, self.kv_weight], [self.q_bias, self.kv_bias]
        q, kv = self._in(x_SBD, weights, biases, [self.q_adapter, self.kv_adapter])
        if self._recompute and torch.is_grad_enabled():
            out = checkpoint(self._core, q, kv, cos, sin, documents, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self._core(q, kv, cos, sin, documents, past)
        out = self._out(out.flatten(-2), self.o_weight, self.o_adapter)
        return out if self.o_bias is None else out + self.o_bias

    def _core(
        self, q: Tensor, kv: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None, past: Past | None = None
    ) -> Tensor:
        k, v = kv.chunk(2, dim=-1)
        norms = (None, None) if self._norms_last else (self.q_norm, self.k_norm)
        q_SBHK, k_SBGK = self._heads(q, norms[0]), self._heads(k, norms[1])
        q_SBHK, k_SBGK = rotary(q_SBHK, k_SBGK, cos, sin, neighbours=self._neighbours)
        if self._norms_last and self.q_norm is not None and self.k_norm is not None:
            q_SBHK, k_SBGK = self.q_norm(q_SBHK), self.k_norm(k_SBGK)
        # A copy, so that the backward pass doesn't keep the keys as they were before.
        v_SBGK = self._heads(v.contiguous(), None)
        if past is not None:
            k_SBGK, v_SBGK = past.extend(self._layer, k_SBGK, v_SBGK)
        group, scale = self._context.mesh.group("cp"), self._scale
        return causal_attention(
            q_SBHK, k_SBGK, v_SBGK, group, self._window, scale=scale, sinks_H=self.sinks, documents=documents
        )

    def _heads(self, x: Tensor, norm: RMSNorm | SharedRMSNorm | None) -> Tensor:
        """Cut the last dim into heads, with the norm before or after."""
        if isinstance(norm, SharedRMSNorm):
            x = norm(x)
        x_SBHK = x.view(*x.shape[:-1], -1, self._head_dim)
        return norm.forward(x_SBHK) if isinstance(norm, RMSNorm) else x_SBHK
