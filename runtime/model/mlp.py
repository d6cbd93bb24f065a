"""The feed-forward half of a layer: a mixture of experts, or one SwiGLU network of a dense model.

Legend: S positions, B sequences, D hidden size, F inner width of this rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeconv.layout.shard import split_even
from runtime.errors import require
from runtime.model.context import ModelContext, columns, rows, tag_replicated
from runtime.moe.config import MoEConfig
from runtime.moe.layer import MoEGroups, MoELayer
from runtime.parallel.topology import Topology, tag


class DenseMLP(nn.Module):
    """SwiGLU, tensor-parallel over the inner width."""

    def __init__(self, context: ModelContext, layer: int) -> None:
        super().__init__()
        model, mesh = context.model, context.mesh
        self._context = context
        hidden, width = model.hidden_size, model.ffn_hidden_size
        begin, end = split_even(width, mesh.size("tp"))[mesh.rank("tp")]
        prefix = f"model.layers.{layer}.mlp"
        self.w13 = context.parameter(2 * (end - begin), hidden)
        pieces = (
            rows(f"{prefix}.gate_proj.weight", (width, hidden), begin, end),
            rows(f"{prefix}.up_proj.weight", (width, hidden), begin, end, end - begin),
        )
        tag(self.w13, Topology(pieces=pieces, sharded=("tp",)))
        self.w2 = context.parameter(hidden, end - begin)
        piece = columns(f"{prefix}.down_proj.weight", (hidden, width), begin, end)
        tag(self.w2, Topology(pieces=(piece,), sharded=("tp",)))

    def forward(self, x_SBD: Tensor) -> Tensor:
        """[S, B, D] to [S, B, D], split over tp with sequence parallelism."""
        gate, up = F.linear(self._context.enter(x_SBD), self.w13).chunk(2, dim=-1)
        return self._context.leave(F.linear(F.silu(gate) * up, self.w2))


class SparseMLP(nn.Module):
    """The MoE layer with its parameters tagged as rectangles of the experts' tensors on the hub."""

    def __init__(self, context: ModelContext, config: MoEConfig, layer: int) -> None:
        super().__init__()
        mesh, model = context.mesh, context.model
        require(
            config.shared_expert_intermediate_size is None,
            f"--moe-shared-expert-intermediate-size is {config.shared_expert_intermediate_size}; "
            f"a {model.model_type} checkpoint has no shared expert: leave the flag out",
        )
        self._sequences = "seq_aux_loss" in config.load_balancing
        groups = MoEGroups(
            ep=mesh.group("ep"),
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
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            dtype=context.dtype,
            device=torch.device("meta"),
        )
        prefix = f"model.layers.{layer}.block_sparse_moe"
        tag_replicated(self.moe.router.weight, f"{prefix}.gate.weight", partial=True, decay=True)
        self._tag_experts(context, config, prefix)

    def _tag_experts(self, context: ModelContext, config: MoEConfig, prefix: str) -> None:
        mesh, hidden, width = context.mesh, context.model.hidden_size, context.model.ffn_hidden_size
        first, end = split_even(config.num_experts, mesh.size("ep"))[mesh.rank("ep")]
        low, high = split_even(width, mesh.size("etp"))[mesh.rank("etp")]
        local = high - low
        w13, w2 = [], []
        for place, expert in enumerate(range(first, end)):
            name = f"{prefix}.experts.{expert}"
            w13.append(rows(f"{name}.w1.weight", (width, hidden), low, high, place * 2 * local))
            w13.append(rows(f"{name}.w3.weight", (width, hidden), low, high, place * 2 * local + local))
            w2.append(columns(f"{name}.w2.weight", (hidden, width), low, high, place * hidden))
        axes = ("ep", "etp")
        tag(self.moe.experts.w13, Topology(pieces=tuple(w13), sharded=axes, data_axis="edp"))
        tag(self.moe.experts.w2, Topology(pieces=tuple(w2), sharded=axes, data_axis="edp"))

    def forward(self, x_SBD: Tensor) -> Tensor:
        """[S, B, D] to [S, B, D], split over tp with sequence parallelism."""
        positions, batch, hidden = x_SBD.shape
        # Tokens lie position-major, so that the tp ranks' pieces of the sequence follow each other.
        sequences = torch.arange(batch, device=x_SBD.device).repeat(positions) if self._sequences else None
        out: Tensor = self.moe(x_SBD.reshape(-1, hidden), sequences, batch)
        return out.view_as(x_SBD)
