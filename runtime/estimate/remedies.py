"""Smaller ways to train what fits no layout, the cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from runtime.optim.config import OptimConfig


def remedies(optim: OptimConfig, dtype: str) -> Iterator[tuple[dict[str, Any], OptimConfig]]:
    """Give what could be changed of an optimizer so that a GPU holds less.

    Args:
        optim: the settings that don't fit.
        dtype: of the weights.

    Yields:
        The changed fields, and the settings with them: masters as remainders, which lose nothing; moments in bf16 besides,
        which are rounded; then masters and moments in the host's memory, which cost the way there.
    """
    changed: dict[str, Any] = {}
    if optim.optimizer == "adam" and optim.master_weights == "fp32" and dtype == "bfloat16":
        changed = changed | {"master_weights": "remainder"}
        yield changed, replace(optim, **changed)
    if optim.moments_dtype == "float32":
        changed = changed | {"moments_dtype": "bfloat16"}
        yield changed, replace(optim, **changed)
    if optim.optimizer == "adam" and not optim.optimizer_cpu_offload:
        changed = changed | {"optimizer_cpu_offload": True}
        yield changed, replace(optim, **changed)
