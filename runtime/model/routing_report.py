"""What the routers report, in one vector that has the same length on every rank.

A stage without MoE layers contributes zeros: the reduction that sums the vector is never left out by anyone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.model.context import ModelContext
from runtime.model.decoder import DecoderLayer
from runtime.moe.layer import MoELayer, moe_layers

_NUM_LOSSES = 2  # balancing loss, z-loss


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """Losses without their coefficients, mean over layers, and the load of each expert."""

    aux_loss: float
    z_loss: float
    load: Tensor | None


class RouterMetrics:
    """Packs the statistics of this rank's MoE layers, and unpacks the sum over all ranks."""

    def __init__(self, context: ModelContext, module: nn.Module) -> None:
        self._context = context
        self._layers: dict[int, MoELayer] = {
            layer.index: moe_layers(layer)[0]
            for layer in module.modules()
            if isinstance(layer, DecoderLayer) and moe_layers(layer)
        }

    @property
    def _shape(self) -> tuple[int, int]:
        model = self._context.model
        return model.sizes["layers"], (model.sizes["experts"] if self._context.moe is not None else 0)

    def pack(self) -> Tensor:
        """Give this rank's summands: [L * (2 + E)] fp64 on the device, no synchronisation."""
        num_layers, num_experts = self._shape
        if num_experts == 0:
            return torch.zeros(0, dtype=torch.float64, device=self._context.device)
        table = torch.zeros(num_layers, _NUM_LOSSES + num_experts, dtype=torch.float64, device=self._context.device)
        for index, layer in self._layers.items():
            balancing = [value for name, value in layer.stats.losses.items() if name != "z_loss"]
            if balancing:
                table[index, 0] = torch.stack(balancing).mean()
            if "z_loss" in layer.stats.losses:
                table[index, 1] = layer.stats.losses["z_loss"]
            table[index, _NUM_LOSSES:] = layer.stats.load_E
        return table.flatten()

    def unpack(self, total: Tensor, num_microbatches: int) -> RoutingReport:
        """Read the sum over all ranks.

        Args:
            total: the sum of all `pack`, on the CPU.
            num_microbatches: of the global batch.

        Returns:
            The report.
        """
        num_layers, num_experts = self._shape
        if num_experts == 0:
            return RoutingReport(0.0, 0.0, None)
        table = total.view(num_layers, _NUM_LOSSES + num_experts)
        means = table[:, :_NUM_LOSSES].sum(0) / len(self._context.model.moe_layers) / num_microbatches
        return RoutingReport(float(means[0]), float(means[1]), table[:, _NUM_LOSSES:].round().to(torch.int64))

    def expert_bias(self) -> Tensor:
        """Gather the expert biases of all layers: [L, E] fp32 on the CPU, on every rank. Collective over pp."""
        table = torch.zeros(self._shape, device=self._context.device)
        for index, layer in self._layers.items():
            if layer.router.expert_bias is not None:
                table[index] = layer.router.expert_bias
        if self._context.mesh.size("pp") > 1:
            dist.all_reduce(table, group=self._context.mesh.group("pp"))
        return table.cpu()

    def set_expert_bias(self, table: Tensor) -> None:
        """Set the expert biases of this rank's layers from [L, E]."""
        for index, layer in self._layers.items():
            if layer.router.expert_bias is not None:
                layer.router.expert_bias.copy_(table[index])
