"""Megatron-Core's MoE functions, the reference of the routers and losses."""

from __future__ import annotations

import warnings
from types import ModuleType

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of GPU packages that it can do without
    import megatron.core.transformer.moe.moe_utils as megatron_moe

MEGATRON: ModuleType = megatron_moe
