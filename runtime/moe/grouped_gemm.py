"""Products of each expert's rows with its matrix, behind one interface.

Legend: R rows in expert order, E experts, N and K the sizes of an expert's matrix.

Rows from plan.offsets_E[-1] on belong to no expert: their results may be uninitialised memory.
"""

from __future__ import annotations

import importlib.util
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.fp8.config import ROW_ALIGNMENT, Fp8Config
from runtime.fp8.operands import fits
from runtime.moe.config import MoEConfig, MoEConfigError
from runtime.moe.permutation import RowPlan
from runtime.moe.thin import Thin
from runtime.parallel.gradient_sink import GradientSink


class GroupedGemm(Protocol):
    """Three products that a layer and its gradients need, over the rows of a plan."""

    name: str
    row_alignment: int
    """Rows of an expert are padded to a multiple of it."""

    def rows_times_transposed(self, rows_RK: Tensor, weight_ENK: Tensor, plan: RowPlan) -> Tensor:
        """[R, N]: each expert's rows times the transpose of its matrix."""
        ...

    def rows_times(self, rows_RN: Tensor, weight_ENK: Tensor, plan: RowPlan) -> Tensor:
        """[R, K]: each expert's rows times its matrix."""
        ...

    def transposed_times_rows(self, left_RN: Tensor, right_RK: Tensor, plan: RowPlan) -> Tensor:
        """[E, N, K]: the transpose of each expert's rows times its rows; zero for an expert without rows."""
        ...

    def rows_times_transposed_and(self, rows_RK: Tensor, weight_ENK: Tensor, thin: Thin, plan: RowPlan) -> Tensor:
        """[R, N]: `rows_times_transposed` of both products, added."""
        out = self.rows_times_transposed(rows_RK, weight_ENK, plan)
        return out.add_(self.rows_times_transposed(*thin, plan))

    def rows_times_and(self, rows_RN: Tensor, weight_ENK: Tensor, thin: Thin, plan: RowPlan) -> Tensor:
        """[R, K]: `rows_times` of both products, added."""
        return self.rows_times(rows_RN, weight_ENK, plan).add_(self.rows_times(*thin, plan))

    def add_transposed_times_rows(
        self, left_RN: Tensor, right_RK: Tensor, plan: RowPlan, total_ENK: Tensor, *, fresh: bool
    ) -> None:
        """Add `transposed_times_rows` to a sum of the rows' dtype or a wider one; overwrite it where it is fresh."""
        product = self.transposed_times_rows(left_RN, right_RK, plan)
        if fresh:
            total_ENK.copy_(product)
        else:
            total_ENK += product


def weight_gradient(
    gemm: GroupedGemm, left_RN: Tensor, right_RK: Tensor, plan: RowPlan, sink: GradientSink | None
) -> Tensor | None:
    """Bring the gradient of experts' weights to the sum that their sink keeps, if they have one.

    Args:
        gemm: the grouped products.
        left_RN: [R, N] gradient of the output's rows.
        right_RK: [R, K] the input's rows.
        plan: which row belongs to which expert.
        sink: the weights'; None where they have none.

    Returns:
        What a backward function gives autograd: [E, N, K], None where the gradient has been added.
    """
    opened = None if sink is None else sink.open()
    if sink is None or opened is None:
        return gemm.transposed_times_rows(left_RN, right_RK, plan)
    gemm.add_transposed_times_rows(left_RN, right_RK, plan, opened.total, fresh=opened.fresh)
    sink.close()
    return None


@runtime_checkable
class GatedGemm(GroupedGemm, Protocol):
    """Grouped products that also know the first half of an expert in one step."""

    def hidden_and_swiglu(
        self, rows_RD: Tensor, w13_EGD: Tensor, weights_TK: Tensor, plan: RowPlan, thin: Thin | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pre-activations [R, 2F], gate then up, `thin` added, and silu(gate) * up * weight [R, F]."""
        ...


class LoopGemm(GroupedGemm):
    """One product per expert, in any dtype: the reference that the others are held against."""

    name = "loop"
    row_alignment = 1

    @staticmethod
    def _ranges(plan: RowPlan) -> list[tuple[int, int]]:
        ends = plan.offsets_E.tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def rows_times_transposed(self, rows_RK: Tensor, weight_ENK: Tensor, plan: RowPlan) -> Tensor:
        """See `GroupedGemm`; unused rows are zero."""
        out = rows_RK.new_zeros(rows_RK.shape[0], weight_ENK.shape[1])
        for expert, (start, end) in enumerate(self._ranges(plan)):
            out[start:end] = rows_RK[start:end] @ weight_ENK[expert].t()
        return out

    def rows_times(self, rows_RN: Tensor, weight_ENK: Tensor, plan: RowPlan) -> Tensor:
        """See `GroupedGemm`; unused rows are zero."""
        return self.rows_times_transposed(rows_RN, weight_ENK.transpose(1, 2), plan)

    def transposed_times_rows(self, left_RN: Tensor, right_RK: Tensor, plan: RowPlan) -> Tensor:
        """See `GroupedGemm`."""
        parts = [left_RN[start:end].t() @ right_RK[start:end] for start, end in self._ranges(plan)]
        return torch.stack(parts)


class TorchGemm(GroupedGemm):
    """`torch.nn.functional.grouped_mm`: no look at the device by the host, fp32, bf16 and fp16."""

    name = "torch"
    row_alignment = 1

    def rows_times_transposed(self, rows_RK: Tensor, weight_ENK: Tensor, plan: RowPlan) -> Tensor:
        """See `GroupedGemm`."""
        return F.grouped_mm(rows_RK, weight_ENK.transpose(1, 2), offs=plan.offsets_E)

    def rows_times(self, rows_RN: Tensor, weight_ENK: Tensor, plan: RowPlan) -> Tensor:
        """See `GroupedGemm`."""
        return F.grouped_mm(rows_RN, weight_ENK, offs=plan.offsets_E)

    def transposed_times_rows(self, left_RN: Tensor, right_RK: Tensor, plan: RowPlan) -> Tensor:
        """See `GroupedGemm`."""
        return F.grouped_mm(left_RN.t(), right_RK, offs=plan.offsets_E)


class CutlassGemm(GroupedGemm):
    """The grouped_gemm package: bf16 on a GPU; the host waits for the sizes of the groups."""

    name = "grouped_gemm"
    row_alignment = 1

    @staticmethod
    def _sizes(plan: RowPlan) -> Tensor:
        ends = plan.offsets_E.long()
        return torch.diff(ends, prepend=ends.new_zeros(1)).cpu()

    def rows_times_transposed(self, rows_RK: Tensor, weight_ENK: Tensor, plan: RowPlan) -> Tensor:
        """See `GroupedGemm`."""
        from grouped_gemm import backend

        out: Tensor = backend.gmm(rows_RK, weight_ENK, self._sizes(plan), trans_a=False, trans_b=True)
        return out

    def rows_times(self, rows_RN: Tensor, weight_ENK: Tensor, plan: RowPlan) -> Tensor:
        """See `GroupedGemm`."""
        from grouped_gemm import backend

        out: Tensor = backend.gmm(rows_RN, weight_ENK, self._sizes(plan), trans_a=False, trans_b=False)
        return out

    def transposed_times_rows(self, left_RN: Tensor, right_RK: Tensor, plan: RowPlan) -> Tensor:
        """See `GroupedGemm`."""
        from grouped_gemm import backend

        out: Tensor = backend.gmm(left_RN, right_RK, self._sizes(plan), trans_a=True, trans_b=False)
        return out


_PACKAGES = {
    "hopper": ("triton", "cuda.bindings"),
    "grouped_gemm": ("grouped_gemm",),
    "te": ("transformer_engine",),
}
_INSTALL = "pip install 'moeconv[gpu]'"


Sizes = tuple[int, ...]
"""Hidden size, and width of a rank's piece of an expert."""


def computed_in(weight: Tensor, built: torch.dtype) -> torch.dtype:
    """The dtype that experts compute in.

    Args:
        weight: one of theirs, as it is now.
        built: the dtype that they were built with; that of full sharding's gathered weights, whose shards are fp32 masters.
    """
    return built if hasattr(weight, "placements") else weight.dtype


def resolve_backend(
    config: MoEConfig, device: torch.device, dtype: torch.dtype, fp8: Fp8Config | None = None, sizes: Sizes = ()
) -> str:
    """The backend that runs: the chosen one, or for auto the fastest that is installed and knows the dtype and the sizes.

    Args:
        config: gemm_backend.
        device: where the experts live.
        dtype: their dtype.
        fp8: what is computed in FP8, by hopper or te on a GPU.
        sizes: of the experts' matrices, which FP8 asks for.

    Returns:
        hopper, torch, grouped_gemm, te or loop.

    Raises:
        MoEConfigError: the chosen backend is not installed, or can't run on this device, in this dtype or with these sizes.
    """
    name = config.gemm_backend
    in_fp8 = fp8 is not None and fp8.format is not None and device.type == "cuda"
    if name == "auto":
        if fp8 is not None and in_fp8:
            why = _against_hopper(fp8, device, dtype, sizes)
            if why is not None and (missing := _missing("te")):
                raise MoEConfigError(
                    f"--fp8-format: experts in FP8 take hopper, and {why}, or {missing[0]}, not installed: {_INSTALL}"
                )
            return "hopper" if why is None else "te"
        if dtype == torch.float64:
            return "loop"
        return "hopper" if _suits_hopper(device, dtype) and not _missing("hopper") else "torch"
    if name in _PACKAGES:
        if missing := _missing(name):
            raise MoEConfigError(
                f"--moe-grouped-gemm-backend {name} needs {' and '.join(missing)}, not installed: {_INSTALL}"
            )
        if device.type != "cuda":
            raise MoEConfigError(f"--moe-grouped-gemm-backend {name} runs on a GPU; on {device.type} use torch or loop")
        if name != "te" and dtype != torch.bfloat16:
            raise MoEConfigError(f"--moe-grouped-gemm-backend {name} computes in bfloat16, got {dtype}; use torch")
        if in_fp8 and name == "hopper" and not fits(device, *sizes):
            raise MoEConfigError(
                f"--fp8-format: {_misfit(sizes)}: give --moe-grouped-gemm-backend te, or leave FP8 out"
            )
    if name == "torch" and dtype == torch.float64:
        raise MoEConfigError("--moe-grouped-gemm-backend torch knows no float64; use loop")
    return name


def describe_backend(
    config: MoEConfig, device: torch.device, dtype: torch.dtype, fp8: Fp8Config | None = None, sizes: Sizes = ()
) -> str:
    """Say which backend runs the experts, and what a faster one lacks.

    Args:
        config: gemm_backend.
        device: where the experts live.
        dtype: their dtype.
        fp8: what is computed in FP8.
        sizes: as of `resolve_backend`.

    Returns:
        A line for the log.

    Raises:
        MoEConfigError: as `resolve_backend`.
    """
    name = resolve_backend(config, device, dtype, fp8, sizes)
    line = f"grouped GEMMs of the experts: {name}"
    if fp8 is not None and fp8.format is not None and device.type == "cuda":
        line += " in FP8"
        if config.gemm_backend == "auto":
            why = _against_hopper(fp8, device, dtype, sizes)
            line += ", chosen by auto" + (f": hopper is faster, and {why}" if why is not None else "")
        return line
    if config.gemm_backend != "auto":
        return line
    missing = _missing("hopper") if name == "torch" and _suits_hopper(device, dtype) else []
    return f"{line}, chosen by auto" + (
        f"; hopper is faster and lacks {' and '.join(missing)}: {_INSTALL}" if missing else ""
    )


def _against_hopper(fp8: Fp8Config, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> str | None:
    """Say why experts in FP8 don't go through our own kernels; None where they do."""
    if not _suits_hopper(device, dtype):
        return f"it takes bfloat16 on Hopper GPUs, not {dtype} on compute capability {torch.cuda.get_device_capability(device)[0]}"
    if not fits(device, *sizes):
        return _misfit(sizes)
    missing = _missing("hopper")
    return f"it lacks {' and '.join(missing)}: {_INSTALL}" if missing else None


def _misfit(sizes: Sizes) -> str:
    return f"on a rank experts are {sizes[0]} x {sizes[1]}, where the backend hopper takes multiples of {ROW_ALIGNMENT} in FP8"


def _suits_hopper(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] == 9


def _missing(backend: str) -> list[str]:
    """The backend's packages that are not installed."""
    missing = []
    for package in _PACKAGES[backend]:
        try:
            found = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:  # of the package's parent
            found = False
        if not found:
            missing.append(package)
    return missing


def make_gemm(name: str) -> GroupedGemm:
    """The products of a resolved backend other than te."""
    if name == "hopper":
        from runtime.moe.hopper_gemm import HopperGemm

        return HopperGemm()
    gemms: dict[str, type[LoopGemm] | type[TorchGemm] | type[CutlassGemm]] = {
        "loop": LoopGemm,
        "torch": TorchGemm,
        "grouped_gemm": CutlassGemm,
    }
    return gemms[name]()
