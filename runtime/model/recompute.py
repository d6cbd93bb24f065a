"""Which activations are computed again in the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runtime.errors import require
from runtime.flag import check_fields, flag

RecomputeGranularity = Literal["none", "selective", "full"]
OffloadModule = Literal["layer_inputs", "attention", "mlp"]
RecomputeModule = Literal["moe_act", "layernorm", "core_attn", "moe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecomputeConfig:
    """Which activations are computed again in the backward pass instead of being kept."""

    granularity: RecomputeGranularity = flag(
        "none", "--recompute-granularity", shorthands={"--recompute-activations": "selective"}
    )
    """selective: the parts that --recompute-modules names; full: whole layers, of which only the input is kept."""
    modules: tuple[RecomputeModule, ...] = flag(("moe_act", "layernorm", "core_attn"), "--recompute-modules")
    """selective only: the parts that are computed again. Norms ("layernorm") always are, outside of whole layers that
    are: no output of theirs is kept."""
    method: Literal["uniform", "block"] = flag("uniform", "--recompute-method")
    """full only: uniform recomputes every layer on its own, block the first --recompute-num-layers of each stage."""
    num_layers: int = flag(0, "--recompute-num-layers", at_least=0)
    """full only, with --recompute-method block: layers of each stage that are computed again; 0 is all of them."""
    offload: tuple[OffloadModule, ...] = flag((), "--offload-activations")
    """Parts whose activations wait in page-locked memory of the host for the backward pass: layer_inputs (what layers keep
    that are computed again, with --recompute-granularity full), attention, mlp (experts, or the dense feed-forward part)."""

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
        whole = self.granularity == "full"
        others = [module for module in self.offload if module != "layer_inputs"]
        require(
            whole or "layer_inputs" not in self.offload,
            "--offload-activations layer_inputs: no layer keeps its input alone; it needs --recompute-granularity full",
        )
        require(
            not (whole and others and self.num_layers == 0),
            f"--offload-activations {' '.join(others)} with --recompute-granularity full: layers that are computed again keep "
            "their input alone; give layer_inputs, or recompute some layers only (--recompute-method block)",
        )
        require(
            len(set(self.offload)) == len(self.offload), f"--offload-activations {self.offload}: one is named twice"
        )
        require(len(set(self.modules)) == len(self.modules), f"--recompute-modules {self.modules}: one is named twice")
