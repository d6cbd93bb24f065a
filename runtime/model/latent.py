"""Multi-head latent attention: queries, keys and values of all heads come from small latent vectors, tensor-parallel over heads.

Every rank of tp computes the latent vectors of all tokens; its heads alone are its own.

Legend: S positions, B sequences, D hidden size, H heads of this rank, K elements of a query or key, R of them turned, L elements of the latent
vector of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runtime.model.adapter import Adapter, adapted, take_adapter
from runtime.model.context import ModelContext
from runtime.model.norm import RMSNorm
from runtime.model.past import Past
from runtime.model.tensor_maps import ColumnMaps, RowMap
from runtime.ops.context_attention import causal_attention
from runtime.ops.documents import Documents
from runtime.ops.latent_heads import latent_heads
from runtime.ops.linear import linear


class LatentAttention(nn.Module):
    """Latent attention of one layer: the latent projections, and this rank's heads."""

    def __init__(self, context: ModelContext, layer: int) -> None:
        super().__init__()
        model, parameters = context.model, context.parameters
        sizes, eps = model.sizes, model.compute.latent_norm_eps
        self._context, self._layer, self._latent = context, layer, sizes["kv_rank"]
        self._plain, self._turned, self._value = sizes["nope_dim"], sizes["head_dim"], sizes["v_dim"]
        self._scale = model.compute.attention_scale
        self._neighbours = model.compute.rope.interleaved

        def whole(role: str) -> nn.Parameter | None:
            # Of what every rank of tp holds whole, each has the part of the gradient that its heads give.
            return parameters.take_optional(role, layer=layer, partial=True)

        def norm(role: str) -> RMSNorm | None:
            weight = whole(role)
            return RMSNorm(weight, eps) if weight is not None else None

        self.q_weight = parameters.take_optional("attention.q", layer=layer)
        self.q_a_weight, self.q_a_bias = whole("attention.q_a"), whole("attention.q_a.bias")
        self.q_b_weight = parameters.take_optional("attention.q_b", layer=layer)
        self.kv_a_weight, self.kv_a_bias = whole("attention.kv_a"), whole("attention.kv_a.bias")
        self.kv_b_weight = parameters.take("attention.kv_b", layer=layer)
        self.o_weight = parameters.take("attention.o", layer=layer)
        self.o_bias = parameters.take_optional("attention.o.bias", layer=layer, partial=context.sp)

        def adapter(weight: nn.Parameter | None, role: str) -> Adapter | None:
            return take_adapter(context, weight, role, layer=layer)

        self.q_adapter = adapter(self.q_weight, "attention.q")
        self.q_a_adapter = adapter(self.q_a_weight, "attention.q_a")
        self.q_b_adapter = adapter(self.q_b_weight, "attention.q_b")
        self.kv_a_adapter = adapter(self.kv_a_weight, "attention.kv_a")
        self.kv_b_adapter = adapter(self.kv_b_weight, "attention.kv_b")
        self.o_adapter = adapter(self.o_weight, "attention.o")
        self.q_norm, self.kv_norm = norm("attention.q_a_norm"), norm("attention.kv_a_norm")
        self._recompute = context.recomputes("core_attn")
        self._in = ColumnMaps(context, "latent projections", fp8=False, apart=True)
        self._out = RowMap(context, "attention's output", self.o_weight, fp8=False)

    def forward(
        self, x_SBD: Tensor, cos: Tensor, sin: Tensor, documents: Documents | None = None, past: Past | None = None
    ) -> Tensor:
        """Attend; see `Attention`."""
        assert self.kv_a_weight is not None
        assert self.kv_norm is not None
        # Queries or their latent vector, and that of keys and values.
        q_weight, q_adapter = (
            (self.q_weight, self.q_adapter) if self.q_weight is not None else (self.q_a_weight, self.q_a_adapter)
        )
        assert q_weight is not None
        weights, biases = [q_weight, self.kv_a_weight], [self.q_a_bias, self.kv_a_bias]
        q, latent = self._in(x_SBD, weights, biases, [q_adapter, self.kv_a_adapter])
        q = q if self.q_weight is not None else self._queries(q)
        latent_SBL, k_turned_SBR = latent[..., : self._latent], latent[..., self._latent :]
        normed = self.kv_norm(latent_SBL.contiguous())
        kv = adapted(linear(normed, self.kv_b_weight), normed, self.kv_b_adapter)
        if self._recompute and torch.is_grad_enabled():
            out = checkpoint(
                self._core, q, kv, k_turned_SBR, cos, sin, documents, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out = self._core(q, kv, k_turned_SBR, cos, sin, documents, past)
        out = self._out(out.flatten(-2), self.o_weight, self.o_adapter)
        return out if self.o_bias is None else out + self.o_bias

    def _queries(self, latent_SBL: Tensor) -> Tensor:
        """The queries of a latent vector."""
        assert self.q_b_weight is not None
        assert self.q_norm is not None
        latent: Tensor = self.q_norm(latent_SBL)
        return adapted(linear(latent, self.q_b_weight), latent, self.q_b_adapter)

    def _core(
        self,
        q: Tensor,
        kv: Tensor,
        k_turned_SBR: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents: Documents | None,
        past: Past | None = None,
    ) -> Tensor:
        q_SBHK = q.view(*q.shape[:-1], -1, self._plain + self._turned)
        kv_SBHK = kv.view(*kv.shape[:-1], -1, self._plain + self._value)
        queries, keys, v = latent_heads(q_SBHK, kv_SBHK, k_turned_SBR, cos, sin, neighbours=self._neighbours)
        if past is not None:
            keys, v = past.extend(self._layer, keys, v)
        group = self._context.mesh.group("cp")
        return causal_attention(queries, keys, v, group, None, scale=self._scale, documents=documents)
