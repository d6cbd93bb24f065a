"""Plain torch modules of given parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def module_of(shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Make a module of zeros with parameters of these names and shapes.

    Args:
        shapes: by name; what stands before a dot is a module.

    Returns:
        The module.
    """
    root = nn.Module()
    for name, shape in shapes.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.register_parameter(last, nn.Parameter(torch.zeros(shape)))
    return root
