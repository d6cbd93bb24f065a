"""The feed-forward half of a layer: a gated network, or a mixture of experts with what every token passes beside it.

Legend: S positions, B sequences, D hidden size, F inner width of this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from runtime.model.adapter import adapt_experts, take_adapter
from runtime.model.context import ModelContext
from runtime.model.tensor_maps import ColumnMaps, RowMap
from runtime.moe.clamped_experts import ClampedExperts
from runtime.moe.config import MoEConfig
from runtime.moe.dispatch import Dispatch
from runtime.moe.layer import MoEGroups, MoELayer
from runtime.ops.linear import linear
from runtime.ops.norm import as_tokens
from runtime.ops.swiglu import swiglu


class GatedMLP(nn.Module):
    """SwiGLU, tensor-parallel over the inner width: a dense layer, or the experts that every token passes."""

    def __init__(self, context: ModelContext, part: str, layer: int) -> None:
        """Build on the meta device.

        Args:
            context: the model's context.
            part: `mlp` or `shared`, the first half of its tensors' roles.
            layer: number of the layer.
        """
        super().__init__()
        parameters = context.parameters
        self.w13 = parameters.take(f"{part}.gate", f"{part}.up", layer=layer)
        self.w2 = parameters.take(f"{part}.down", layer=layer)
        self.adapter13 = take_adapter(context, self.w13, f"{part}.gate", f"{part}.up", layer=layer)
        self.adapter2 = take_adapter(context, self.w2, f"{part}.down", layer=layer)
        self.b13 = parameters.take_optional(f"{part}.gate.bias", f"{part}.up.bias", layer=layer)
        self.b2 = parameters.take_optional(f"{part}.down.bias", layer=layer, partial=context.sp)
        name = "shared experts" if part == "shared" else "dense layers"
        self._first = ColumnMaps(context, f"{name}' gate and up", self.w13)
        self._second = RowMap(context, f"{name}' down", self.w2)

    def forward(self, x_SBD: Tensor) -> Tensor:
        """[S, B, D] to [S, B, D], split over tp with sequence parallelism."""
        hidden = self._first(x_SBD, [self.w13], [self.b13], [self.adapter13])[0]
        out = self._second(swiglu(hidden), self.w2, self.adapter2)
        return out if self.b2 is None else out + self.b2


class SharedMLP(nn.Module):
    """The experts that every token passes, times a sigmoid of the token where the family has a gate for them.

    A model may have the gate and experts of width 0: then nothing is added, and the gate is kept as it is.
    """

    def __init__(self, context: ModelContext, layer: int) -> None:
        super().__init__()
        parameters = context.parameters
        self.mlp = GatedMLP(context, "shared", layer) if parameters.has("shared.gate", layer) else None
        self.gate = parameters.take_optional("shared.router", layer=layer, partial=context.sp)

    def forward(self, x_SBD: Tensor) -> Tensor:
        """[S, B, D] to [S, B, D], split over tp with sequence parallelism."""
        out: Tensor = self.mlp(x_SBD) if self.mlp is not None else torch.zeros_like(x_SBD)
        return out if self.gate is None else torch.sigmoid(linear(x_SBD, self.gate)) * out


class MoEMLP(nn.Module):
    """The MoE layer with its parameters tagged, and the shared experts beside it."""

    def __init__(self, context: ModelContext, config: MoEConfig, layer: int) -> None:
        super().__init__()
        mesh, model, parameters = context.mesh, context.model, context.parameters
        self._sequences = "seq_aux_loss" in config.load_balancing
        groups = MoEGroups(
            ep=mesh.group("ep"),
            ep_rows=mesh.group("ep_rows") if context.parallel.overlap_exchange else None,
            etp=mesh.group("etp"),
            tp=mesh.group("tp"),
            tp_cp=mesh.group("tp_cp"),
            tp_dp_cp=mesh.group("tp_dp_cp"),
            sequence_parallel=context.sp,
            equal_tokens=True,
        )
        self.moe = MoELayer(
            config,
            groups,
            hidden_size=model.sizes["hidden"],
            ffn_hidden_size=model.sizes["ffn"],
            num_local_experts=len(parameters.local_experts()),
            ffn_local_size=parameters.local_width("expert.down", layer),
            dtype=context.dtype,
            device=torch.device("meta"),
            gate=model.compute.gate,
            fp8=context.fp8,
            name=f"layers.{layer}.experts",
        )
        parameters.tag_whole(self.moe.router.weight, "router", layer=layer, partial=True)
        experts = self.moe.experts
        if isinstance(experts, ClampedExperts):
            parameters.tag_experts(experts.gate_up, "expert.gate_up", layer=layer)
            parameters.tag_experts(experts.gate_up_bias, "expert.gate_up.bias", layer=layer)
            parameters.tag_experts(experts.down, "expert.down", layer=layer)
            parameters.tag_experts(experts.down_bias, "expert.down.bias", layer=layer)
        else:
            parameters.tag_experts(experts.w13, "expert.gate", "expert.up", layer=layer)
            parameters.tag_experts(experts.w2, "expert.down", layer=layer)
        adapt_experts(context, experts, layer)
        if self.moe.router.linear_bias is not None:
            parameters.tag_whole(self.moe.router.linear_bias, "router.linear.bias", layer=layer, partial=True)
        if parameters.has("router.bias", layer):
            parameters.keep_buffer(self.moe.router, "expert_bias", "router.bias", layer=layer)
        shared = any(parameters.has(role, layer) for role in ("shared.gate", "shared.router"))
        self.shared = SharedMLP(context, layer) if shared else None

    def forward(self, x_SBD: Tensor) -> Tensor:
        """[S, B, D] to [S, B, D], split over tp with sequence parallelism."""
        out: Tensor = self.moe(as_tokens(x_SBD), self._numbers(x_SBD), x_SBD.shape[1]).view_as(x_SBD)
        return out if self.shared is None else out + self.shared(x_SBD)

    def _numbers(self, x_SBD: Tensor) -> Tensor | None:
        """[S * B] the sequence of each token, where a loss wants to know it."""
        positions, batch, _ = x_SBD.shape
        # Tokens lie position-major, so that the tp ranks' pieces of the sequence follow each other.
        return torch.arange(batch, device=x_SBD.device).repeat(positions) if self._sequences else None

    def begin(self, x_SBD: Tensor) -> UnderWay:
        """Start what `forward` does: all that needs no rows of other ranks."""
        dispatch = self.moe.begin(as_tokens(x_SBD), self._numbers(x_SBD), x_SBD.shape[1])
        # Behind the departure, so that in the backward pass it is computed before the rows' gradients are waited for.
        shared = None if self.shared is None else self.shared(x_SBD)
        return UnderWay(dispatch, x_SBD.shape, shared)


class UnderWay(NamedTuple):
    """A MoE layer whose rows travel."""

    dispatch: Dispatch
    """Whose steps are to be done, but for the last."""
    shape: torch.Size
    shared_SBD: Tensor | None

    def finish(self) -> Tensor:
        """What the layer's `forward` gives."""
        out_SBD = self.dispatch.finish().view(self.shape)
        return out_SBD if self.shared_SBD is None else out_SBD + self.shared_SBD
