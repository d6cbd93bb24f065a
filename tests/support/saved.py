"""What autograd holds between a layer's passes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def saved_tensors(layer: nn.Module, x: Tensor, least: int) -> list[Tensor]:
    """Run a layer forward, and give the tensors that it keeps for its backward pass.

    Args:
        layer: what takes x.
        x: its input.
        least: elements; smaller tensors are left out.

    Returns:
        One tensor of each storage, without parameters and x.
    """
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), x)}
    return [tensor for place, tensor in saved.items() if place not in own and tensor.numel() > least]
