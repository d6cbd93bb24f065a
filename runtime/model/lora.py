"""The settings of low-rank adapters (LoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeconv.families.adapted import scale_of
from runtime.flag import check_fields, flag
from runtime.quantised.sizes import BaseDtype


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Adapters beside frozen weights."""

    rank: int = flag(0, "--lora-rank", at_least=0)
    """Train low-rank adapters of this rank, and freeze the model; 0 trains the model itself."""
    alpha: float | None = flag(None, "--lora-alpha", above=0)
    """What adapters add is scaled by alpha over the rank; by default twice the rank."""
    rslora: bool = flag(False, "--lora-rslora")
    """Scale by alpha over the root of the rank (rank-stabilised LoRA)."""
    dropout: float = flag(0.0, "--lora-dropout", at_least=0, below=1)
    """Probability with which an adapter misses an element of its input, in training."""
    adapter: Path | None = flag(None, "--adapter", metavar="FOLDER")
    """Begin with the adapters of a PEFT folder instead of new ones: rank, alpha and targets are theirs."""
    targets: tuple[str, ...] = flag((), "--lora-targets", metavar="GLOB")
    """Weights that get an adapter, by their Hugging Face names ('*.self_attn.*' '*.experts.*'); by default all of
    attention's. Matrices of attention, dense layers, shared and routed experts can have one."""
    also_train: tuple[str, ...] = flag((), "--lora-also-train", metavar="GLOB")
    """Weights that are trained whole beside the adapters, by their Hugging Face names ('*.gate.weight' for routers)."""

    quantize_base: BaseDtype | None = None
    """Hold the frozen matrices of attention, dense layers and experts in 4-bit NormalFloat (nf4, blocks of 64) or in FP8 (fp8, e4m3
    with a scale for 128 x 128); they are quantised as they are read, and made numbers again just before each product."""
    double_quant: bool = False
    """Quantise nf4's scales too, to 8 bits: 0.516 bytes a weight instead of 0.5625."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.alpha is None:
            object.__setattr__(self, "alpha", 2.0 * self.rank)

    @property
    def scale(self) -> float:
        """Factor on what adapters add."""
        assert self.alpha is not None
        return scale_of(self.rank, self.alpha, rslora=self.rslora)
