"""A transformers model's parameters under their names on the hub."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moeconv.families import FAMILIES
from moeconv.families.base import Model
from moeconv.layout.rect import Rect
from moeconv.pieces import NameMap


def model_of(model: PreTrainedModel) -> Model:
    """Read a transformers model's config as a checkpoint's is read."""
    config = model.config.to_dict()
    return Model.from_config(FAMILIES[config["model_type"]], config)


def hub_tensors(model: PreTrainedModel, value: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """Split what transformers keeps fused into the tensors of the hub.

    Args:
        model: a transformers model.
        value: what to take of a parameter or buffer: itself, or its gradient; those without are left out.

    Returns:
        Hub name -> tensor.
    """
    ours = model_of(model)
    names = NameMap(ours)
    stored = {n: b for n, b in model.named_buffers() if "rotary" not in n and "inv_freq" not in n}
    out: dict[str, Tensor] = {}
    for name, parameter in {**dict(model.named_parameters()), **stored}.items():
        tensor = value(parameter)
        if tensor is None or not parameter.numel():
            continue
        flat = tensor.detach().flatten()
        for piece in names.pieces(name, "F32", tensor.shape, "memory", 0):
            begin = piece.begin // 4
            out[piece.tensor] = flat[begin : begin + piece.rect.size].view(piece.rect.shape)
    return out


def reader(tensors: dict[str, Tensor]) -> Callable[[str, Rect], Any]:
    """Give rectangles of tensors in memory, as a checkpoint does.

    Args:
        tensors: hub name -> global tensor.

    Returns:
        What `Engine.load_state` reads with.
    """
    return lambda name, rect: tensors[name][rect.slices()].to(torch.float32).contiguous().numpy()
