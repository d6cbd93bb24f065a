"""What the trainer computes, and what it refuses of a model, by name."""

from __future__ import annotations

from pathlib import Path
from typing import cast, get_args

from moeconv.families.base import Model
from moeconv.families.compute import FIXED
from moeconv.quant import require_plain
from runtime.errors import require
from runtime.model.dtypes import DtypeName

# The roles that the trainer's modules take. A model with others would be trained without them.
TAKES = frozenset(
    (
        *("embedding", "final_norm", "head", "attention_norm", "mlp_norm", "router", "router.bias", "shared.router"),
        *("final_norm.bias", "head.bias", "attention_norm.bias", "mlp_norm.bias", "router.linear.bias"),
        *(f"attention.{name}" for name in ("q", "k", "v", "o", "sinks")),
        *("attention.q_norm", "attention.k_norm"),
        *(f"attention.{name}" for name in ("q_a", "q_a_norm", "q_b", "kv_a", "kv_a_norm", "kv_b")),
        *(f"attention.{name}.bias" for name in ("q", "k", "v", "o", "q_a", "kv_a")),
        *(f"{part}.{name}" for part in ("mlp", "expert", "shared") for name in ("gate", "up", "down")),
        *(f"{part}.{name}.bias" for part in ("mlp", "shared") for name in ("gate", "up", "down")),
        *("expert.gate_up", "expert.gate_up.bias", "expert.down.bias"),
    )
)


def check_supported(model: Model, where: Path) -> None:
    """Refuse a model that the trainer would compute otherwise than transformers.

    Args:
        model: a checkpoint's.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: names what the trainer doesn't compute.
        MappingError: config.json states something that nobody computes, or weights are quantised.
    """
    compute = model.compute
    require(
        compute.act == "silu",
        f"{where}: {model.family.compute.act.name} is {compute.act!r}; the trainer computes 'silu' (SwiGLU)",
    )
    strange = sorted({rule.role for rule in model.rules} - TAKES)
    strange += [compute.lacks] if compute.lacks is not None else []
    require(
        not strange,
        f"{where}: the trainer doesn't compute {model.family.name}: {', '.join(strange)}; it converts, and trains elsewhere",
    )
    require_plain(model, where, "training", ", or train adapters over them: --lora-rank with --quantize-base")
    for key, value in compute.others.items():
        require(
            False,
            f"{where}: config.json says {key} = {value!r}, which the trainer doesn't compute{_instead(model, key)}",
        )
    require(
        model.sizes["heads"] % model.sizes["kv_heads"] == 0,
        f"{where}: {model.family.key_of('heads')} is {model.sizes['heads']}, not a multiple of {model.family.key_of('kv_heads')} {model.sizes['kv_heads']}",
    )


def _instead(model: Model, key: str) -> str:
    """Say which value of a key the trainer computes, where it computes one."""
    compute = model.family.compute
    fixed = {**FIXED, **compute.fixed}
    if key in compute.same:
        size = compute.same[key]
        return f"; it computes {key} = {model.sizes[size]} ({model.family.key_of(size)})"
    return f"; it computes {key} = {fixed[key]!r}" if key in fixed else ""


def stored_dtype(model: Model) -> DtypeName:
    """Give the type that a checkpoint's config.json says its weights have; float32 where it is silent."""
    name = model.config.get("dtype") or model.config.get("torch_dtype") or "float32"
    known = get_args(DtypeName)
    require(name in known, f"config.json: dtype is {name!r}; expected one of {', '.join(known)}")
    return cast(DtypeName, name)
