"""Which activations are computed again in the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.errors import require
from runtime.flag import check_fields, flag

RecomputeGranularity = Literal["none", "selective", "full"]
RecomputeModule = Literal["moe_act", "layernorm", "core_attn", "moe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputeConfig:
    """Which activations are computed again in the backward pass instead of being kept."""

    granularity: RecomputeGranularity = flag(
        "none", "--recompute-granularity", shorthands={"--recompute-activations": "selective"}
    )
    """selective: the parts that --recompute-modules names; full: whole layers, of which only the input is kept."""
    modules: tuple[RecomputeModule, ...] = flag(("moe_act", "layernorm", "core_attn"), "--recompute-modules")
    """selective only: the parts that are computed again."""
    method: Literal["uniform", "block"] = flag("uniform", "--recompute-method")
    """full only: uniform recomputes every layer on its own, block the first --recompute-num-layers of each stage."""
    num_layers: int = flag(0, "--recompute-num-layers", at_least=0)
    """full only, with --recompute-method block: layers of each stage that are computed again; 0 is all of them."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.method == "uniform" and self.granularity == "full" and self.num_layers == 1:
            object.__setattr__(self, "num_layers", 0)  # in groups of one layer, which is what uniform does here
        require(
            self.method == "uniform" or self.granularity == "full",
            f"--recompute-method {self.method} needs --recompute-granularity full",
        )
        require(
            self.method == "block" or self.num_layers == 0,
            f"--recompute-num-layers is {self.num_layers} without --recompute-method block; by default each layer is "
            "recomputed on its own: give --recompute-granularity full --recompute-method block, or leave it out",
        )
        require(len(set(self.modules)) == len(self.modules), f"--recompute-modules {self.modules}: one is named twice")
