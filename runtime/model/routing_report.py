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

_COLUMNS = ("aux_loss", "z_loss", "added", "entropy", "nonfinite", "dropped")


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingReport:
    """What the routers of a model did with a global batch; the same on every rank, on the CPU.

    Legend: L layers, E experts. A layer without experts has 0 tokens.
    """

    aux_loss_L: Tensor
    """[L] fp64 balancing loss without its coefficient, mean over micro-batches; 1 is balanced."""
    z_loss_L: Tensor
    """[L] fp64 router z-loss without its coefficient, mean over micro-batches."""
    added_L: Tensor
    """[L] fp64 what the layer's losses, with their coefficients, add to the loss that is minimised."""
    entropy_L: Tensor
    """[L] fp64 entropy of the router's distribution, nats, mean over tokens; ln(E) is no preference at all."""
    dropped_L: Tensor
    """[L] int64 choices that no expert computed."""
    nonfinite_L: Tensor
    """[L] int64 tokens with a NaN or infinite router logit."""
    tokens_L: Tensor
    """[L] int64 tokens that the router saw."""
    load_LE: Tensor
    """[L, E] int64 choices of each expert, before any drop."""
    num_ranks: int = 1
    """Expert-parallel ranks, of which each has as many experts, in order."""

    @property
    def aux_loss(self) -> float:
        """Balancing loss, mean over the layers with experts; 0 for a dense model."""
        return self._mean(self.aux_loss_L)

    @property
    def z_loss(self) -> float:
        """Router z-loss, mean over the layers with experts; 0 for a dense model."""
        return self._mean(self.z_loss_L)

    @property
    def added_loss(self) -> float:
        """What all layers' losses, with their coefficients, add to the cross entropy."""
        return float(self.added_L.sum())

    @property
    def entropy(self) -> float:
        """Router entropy in nats, mean over the layers with experts; 0 for a dense model."""
        return self._mean(self.entropy_L)

    @property
    def rank_load(self) -> float:
        """Choices of the expert-parallel rank that has most, of the mean, for which the others wait: mean over the layers with experts."""
        rows_LP = self.load_LE.view(len(self.load_LE), self.num_ranks, -1).sum(-1).double()
        return self._mean(rows_LP.amax(1) / rows_LP.mean(1).clamp(min=1))

    @property
    def dropped_share(self) -> float:
        """Dropped choices over all choices; 0 for a dense model."""
        return int(self.dropped_L.sum()) / max(int(self.load_LE.sum()), 1)

    @property
    def nonfinite(self) -> int:
        """Tokens with a NaN or infinite router logit, summed over layers."""
        return int(self.nonfinite_L.sum())

    def _mean(self, values_L: Tensor) -> float:
        active = self.tokens_L > 0
        return float(values_L[active].mean()) if bool(active.any()) else 0.0


class RouterMetrics:
    """Packs the statistics of this rank's MoE layers, and unpacks the sum over all ranks."""

    def __init__(self, context: ModelContext, module: nn.Module) -> None:
        self._context = context
        self._layers: dict[int, MoELayer] = {
            layer.index: moe_layers(layer)[0]
            for layer in module.modules()
            if isinstance(layer, DecoderLayer) and moe_layers(layer)
        }
        self._index = torch.tensor(list(self._layers), dtype=torch.int64, device=context.device)

    @property
    def _shape(self) -> tuple[int, int]:
        model = self._context.model
        return model.sizes["layers"], (model.sizes["experts"] if self._context.moe is not None else 0)

    def pack(self) -> Tensor:
        """Give this rank's summands: [L * (6 + E)] fp64 on the device, no synchronisation; [0] for a dense model."""
        num_layers, num_experts = self._shape
        if num_experts == 0:
            return torch.zeros(0, dtype=torch.float64, device=self._context.device)
        width = len(_COLUMNS) + num_experts
        table = torch.zeros(num_layers, width, dtype=torch.float64, device=self._context.device)
        if self._layers:
            table.index_copy_(0, self._index, self._rows())
        return table.flatten()

    def _rows(self) -> Tensor:
        """[l, 6 + E] fp64 of the l layers of this rank; all layers at once, since each kernel costs a launch."""
        stats = [layer.stats for layer in self._layers.values()]
        sums = torch.stack([item.sums for item in stats])
        num_experts = (sums.shape[1] - 3) // 2
        summands = {name: torch.stack([item.summands[name] for item in stats]) for name in stats[0].summands}
        losses = {name: found.flatten(1).sum(1) if found.dim() > 1 else found for name, found in summands.items()}
        zero = torch.zeros_like(sums[:, -1])
        balancing = [value for name, value in losses.items() if name != "z_loss"]
        columns = {
            "aux_loss": torch.stack(balancing).mean(0) if balancing else zero,
            "z_loss": losses.get("z_loss", zero),
            "added": sum((losses[name] * weight for name, weight in self._weights() if name in losses), zero),
            "entropy": sums[:, -2],
            "nonfinite": sums[:, -1],
            "dropped": torch.stack([item.dropped for item in stats]).double(),
        }
        return torch.cat(
            [torch.stack([columns[name] for name in _COLUMNS], 1), sums[:, num_experts : 2 * num_experts]], 1
        )

    def _weights(self) -> list[tuple[str, float]]:
        """By which factor each loss of a layer adds to what is minimised."""
        config = next(iter(self._layers.values())).config
        pairs = [*config.aux_losses, ("z_loss", config.z_loss_coeff)]
        if config.aux_loss_mode == "hf":
            # The pooled loss is the model's and stands in each of its layers, under one name.
            pairs = [("aux_loss", coeff / len(self._layers)) for _, coeff in config.aux_losses[:1]] + pairs[-1:]
        return pairs

    def unpack(self, total: Tensor, num_microbatches: int) -> RoutingReport | None:
        """Read the sum over all ranks.

        Args:
            total: the sum of all `pack`, on the CPU.
            num_microbatches: of the global batch.

        Returns:
            The report; None for a dense model.
        """
        num_layers, num_experts = self._shape
        if num_experts == 0:
            return None
        table = total.view(num_layers, len(_COLUMNS) + num_experts)
        column = {name: table[:, place] for place, name in enumerate(_COLUMNS)}
        load_LE = table[:, len(_COLUMNS) :].round().to(torch.int64)
        tokens_L = load_LE.sum(1) // self._context.model.sizes["top_k"]
        return RoutingReport(
            aux_loss_L=column["aux_loss"] / num_microbatches,
            z_loss_L=column["z_loss"] / num_microbatches,
            added_L=column["added"] / num_microbatches,
            entropy_L=column["entropy"] / tokens_L.clamp(min=1),
            dropped_L=column["dropped"].round().to(torch.int64),
            nonfinite_L=column["nonfinite"].round().to(torch.int64),
            tokens_L=tokens_L,
            load_LE=load_LE,
            num_ranks=self._context.mesh.size("ep"),
        )

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
