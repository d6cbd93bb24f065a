"""What is computed in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from runtime.flag import check_fields, flag

if TYPE_CHECKING:
    import torch

Fp8Format = Literal["e4m3", "hybrid"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise"]
ROW_ALIGNMENT = 128
"""Rows of a GPU's products are padded to a multiple of it, and columns must be one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Config:
    """The products of a model that are computed in 8 bits: attention's projections, dense and shared MLPs, experts.

    Head, router, embedding, norms and attention itself stay as they are.
    """

    format: Fp8Format | None = flag(None, "--fp8-format")
    """Compute products in FP8: e4m3, or hybrid with e5m2 gradients; on Hopper of experts, MLPs and attention's projections, elsewhere of experts by te."""
    recipe: Fp8Recipe = flag("delayed", "--fp8-recipe")
    """Scaling of FP8: delayed (by what earlier steps had), tensorwise (by the tensor itself) or blockwise (128 elements at a time, of weights 128 x 128)."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The format of gradients."""
        import torch  # here only: settings are read, and runs are planned, without it

        return torch.float8_e5m2 if self.format == "hybrid" else torch.float8_e4m3fn
