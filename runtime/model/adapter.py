"""Low-rank adapters beside a layer's weights.

Legend: D input width, N output width, P rank of all adapters of an input together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moeconv.families.adapted import LORA_A, LORA_B
from runtime.model.context import ModelContext
from runtime.moe.clamped_experts import ClampedExperts
from runtime.moe.experts import Experts
from runtime.moe.low_rank import Form
from runtime.ops.linear import linear
from runtime.ops.low_rank import Part, Scaling, add_low_rank, draw_seed, drop
from runtime.parallel.topology import topology_of


class Adapter(nn.Module):
    """The adapters of the weights that a parameter is made of."""

    def __init__(self, context: ModelContext, weight: nn.Parameter, roles: Sequence[str], layer: int) -> None:
        """Build on the meta device.

        Args:
            context: the model's context; the model has an adapter of one of the roles at least.
            weight: the parameter, tagged.
            roles: of its weights, one below the other.
            layer: their layer.
        """
        super().__init__()
        parameters = context.parameters
        places = [place for place, role in enumerate(roles) if parameters.has(role + LORA_A, layer)]
        # What every rank of tp holds whole of an adapter meets a part of the heads or neurons on each.
        self.a = parameters.take(*(roles[place] + LORA_A for place in places), layer=layer, partial=True)
        self.b = parameters.take(*(roles[place] + LORA_B for place in places), layer=layer, partial=True)
        pieces = [topology_of(weight).pieces[place] for place in places]
        self._parts = Part.of([(piece.row, piece.rect.shape[0]) for piece in pieces], context.lora.rank)
        self._scaling = Scaling(context.lora.scale, context.lora.dropout)

    def forward(self, out: Tensor, x: Tensor) -> Tensor:
        """Add to the maps' output [..., N], which is overwritten, what the adapters give for their input [..., D]."""
        return add_low_rank(out, x, self.a, self.b, self._parts, self._scaling, training=self.training)

    def reduced(self, x: Tensor) -> Tensor:
        """What B is applied to, scaled: [..., P] for the maps' input [..., D]."""
        dropout = self._scaling.dropout if self.training else 0.0
        return linear(drop(x, dropout, draw_seed(dropout)), self.a) * self._scaling.scale


def take_adapter(context: ModelContext, weight: nn.Parameter | None, *roles: str, layer: int) -> Adapter | None:
    """Make the adapters of a parameter's weights; None where they have none. Arguments as of `Adapter`."""
    if weight is None or not any(context.parameters.has(role + LORA_A, layer) for role in roles):
        return None
    return Adapter(context, weight, roles, layer)


def adapted(out: Tensor, x: Tensor, adapter: nn.Module | None) -> Tensor:
    """Add what an adapter gives, if there is one, to the output of a linear map."""
    if adapter is None:
        return out
    sum_: Tensor = adapter(out, x)
    return sum_


def adapt_experts(context: ModelContext, experts: Experts | ClampedExperts, layer: int) -> None:
    """Give a layer's routed experts the adapters that the model has of them."""
    clamped = {"gate_up": ("expert.gate_up",), "down": ("expert.down",)}
    plain = {"13": ("expert.gate", "expert.up"), "2": ("expert.down",)}
    inputs: dict[str, tuple[str, ...]] = {**(clamped if isinstance(experts, ClampedExperts) else plain)}
    for which, roles in inputs.items():
        _adapt_experts(context, experts, which, roles, layer)


def _adapt_experts(
    context: ModelContext, experts: Experts | ClampedExperts, which: str, roles: tuple[str, ...], layer: int
) -> None:
    parameters, rank, count = context.parameters, context.lora.rank, len(context.parameters.local_experts())
    places = [place for place, role in enumerate(roles) if parameters.has_expert(role + LORA_A, layer)]
    if not places:
        return
    width = parameters.local_shape(roles[places[0]] + LORA_B, layer)[0]
    depth = parameters.local_shape(roles[places[0]] + LORA_A, layer)[1]

    def empty(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=context.dtype, device="meta"))

    a, b = empty(count, len(places) * rank, depth), empty(count, len(places) * width, rank)
    parts = Part.of([(place * width, width) for place in places], rank)
    form = Form(parts, len(roles) * width, Scaling(context.lora.scale, context.lora.dropout))
    experts.adapt(which, a, b, form)
    parameters.tag_experts(a, *(roles[place] + LORA_A for place in places), layer=layer)
    parameters.tag_experts(b, *(roles[place] + LORA_B for place in places), layer=layer)
