"""What the trainer computes, and what it refuses of a model, by name."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from moeconv.families.base import Model
from runtime.errors import require
from runtime.model.context import TORCH_DTYPES
from runtime.model.dtypes import DtypeName


def check_supported(model: Model, where: Path) -> None:
    """Refuse a model that the trainer would compute otherwise than transformers.

    Args:
        model: a checkpoint's.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: names what the trainer doesn't compute.
        MappingError: config.json states something that nobody computes.
    """
    compute = model.compute
    require(
        compute.act == "silu",
        f"{where}: {model.family.compute.act.name} is {compute.act!r}; the trainer computes 'silu' (SwiGLU)",
    )
    for key, value in compute.others.items():
        require(False, f"{where}: config.json says {key} = {value!r}, which the trainer doesn't compute")
    require(
        model.sizes["heads"] % model.sizes["kv_heads"] == 0,
        f"{where}: {model.sizes['heads']} attention heads are not a multiple of {model.sizes['kv_heads']} key/value heads",
    )


def stored_dtype(model: Model) -> DtypeName:
    """Give the type that a checkpoint's config.json says its weights have; float32 where it is silent."""
    name = model.config.get("dtype") or model.config.get("torch_dtype") or "float32"
    require(name in TORCH_DTYPES, f"config.json: dtype is {name!r}; expected one of {', '.join(TORCH_DTYPES)}")
    return cast(DtypeName, name)
