"""Transformer Engine's attention: cuDNN's kernels with windows and documents, which torch's own way to them doesn't have.

Legend: S positions, B sequences, H query heads, G key/value heads, K head dim, V dim of values.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.kernels.transformer_engine import import_transformer_engine
from runtime.ops.attention_kernels import Attended, Flash, Forward, Gradients, Kernel, row_behind_row, row_beside_row
from runtime.ops.documents import Bounds

_NAMES = {"bottom_right_diagonal", "cuda_graph", "cu_seqlens_q_padded", "softmax_type", "window_size", "o_format"}
"""Arguments of its functions."""
_UNUSABLE = (ImportError, OSError, AttributeError, TypeError, RuntimeError)
"""What a version raises that is built for another torch or CUDA, or whose functions are others."""
_TOLERANCE = 2e-2
"""Between the results of two kernels in bf16, which are each some 3e-3 from exact ones."""


@dataclass(frozen=True, slots=True)
class TransformerEngine:
    """Causal, of as many queries as keys."""

    functions: Any
    """As `transformer_engine` gives them."""
    scale: float | None
    window: int | None = None
    """Positions that a query looks back, itself included; None: all."""
    bounds: Bounds | None = None
    """Of documents, each a sequence of its own; None: a row is one."""

    def _call(self, tensors: tuple[Tensor, ...], aux: list[Tensor] | None = None) -> Any:
        """Call its function of the forward pass, or, with what that gave beside its output, of the backward pass."""
        engine, q = self.functions, tensors[0]
        ends, most = self._ends(q)
        layout = "sbhd" if self.bounds is None else "thd"
        options: dict[str, Any] = (
            {} if self.bounds is None else dict.fromkeys(("cu_seqlens_q_padded", "cu_seqlens_kv_padded"), ends)
        )
        options |= {
            "attn_scale": self.scale,
            "qkv_layout": "_".join([layout] * 3),
            "o_format": layout,
            "attn_mask_type": "causal" if self.bounds is None else "padding_causal",
            "window_size": (-1, -1) if self.window is None else (self.window - 1, 0),
            "cuda_graph": q.is_cuda and torch.cuda.is_current_stream_capturing(),
        }
        backend = engine.FusedAttnBackend["F16_arbitrary_seqlen"]
        sizes = (most, most, ends, ends)
        if aux is None:
            return engine.fused_attn_fwd(True, *sizes, *tensors, q.dtype, backend, **options)
        options |= {"do_format": layout, "dqkv_layout": options["qkv_layout"]}
        return engine.fused_attn_bwd(*sizes, *tensors, q.dtype, aux, backend, **options)

    def _ends(self, q: Tensor) -> tuple[Tensor, int]:
        if self.bounds is not None:
            return self.bounds.queries, self.bounds.most_queries
        positions, rows = q.shape[:2]
        return torch.arange(0, (rows + 1) * positions, positions, dtype=torch.int32, device=q.device), positions

    def _laid_out(self, x_SBHK: Tensor) -> Tensor:
        """[S, B, H, K], or [B * S, H, K] with documents; contiguous."""
        return (x_SBHK if self.bounds is None else row_behind_row(x_SBHK)).contiguous()

    def _back(self, x: Tensor, rows: int) -> Tensor:
        return x if self.bounds is None else row_beside_row(x, rows)

    def forward(self, q_SBHK: Tensor, k_SBGK: Tensor, v_SBGV: Tensor) -> Forward:
        """As of `Kernel`."""
        rows = q_SBHK.shape[1]
        tensors = (self._laid_out(q_SBHK), self._laid_out(k_SBGK), self._laid_out(v_SBGV))
        out, (log_sum, *aux) = self._call(tensors)
        if self.bounds is None:  # [B, H, S, 1]
            log_sum_SBH = log_sum.squeeze(-1).permute(2, 0, 1)
        else:  # [B * S, H, 1]
            log_sum_SBH = row_beside_row(log_sum.squeeze(-1), rows)
        return self._back(out, rows), log_sum_SBH, tuple(aux)

    def backward(self, grad_SBHV: Tensor, done: Attended, kept: tuple[Any, ...]) -> Gradients:
        """As of `Kernel`."""
        rows = done.q_SBHK.shape[1]
        tensors = tuple(self._laid_out(x) for x in (*done[:4], grad_SBHV))
        if self.bounds is None:
            log_sum = done.log_sum_SBH.permute(1, 2, 0).contiguous().unsqueeze(-1)
        else:
            log_sum = row_behind_row(done.log_sum_SBH).contiguous().unsqueeze(-1)
        grads = self._call(tensors, [log_sum, *kept])
        dq, dk, dv = (self._back(x, rows) for x in grads[:3])
        return dq, dk, dv


@functools.cache
def transformer_engine() -> Any | None:
    """Give the module with its functions; None where it isn't installed, or can't be trusted, of which a warning tells.

    They aren't part of its public interface. So a version is used whose functions take what they are given here, and find what
    torch's flash kernels find.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        import_transformer_engine()
        functions = importlib.import_module("transformer_engine.pytorch.cpp_extensions.fused_attn")
        missing = _NAMES - inspect.signature(functions.fused_attn_fwd).parameters.keys()
        why = f"it doesn't take {', '.join(sorted(missing))}" if missing else ""
        why = why or differs(functions, torch.device("cuda"), torch.bfloat16)
    except _UNUSABLE as error:
        functions, why = None, str(error) or type(error).__name__
    if why:
        warnings.warn(
            f"Transformer Engine's attention can't be used ({why}): windows and documents go to torch's flash kernels, which are "
            "slower; nothing else depends on it",
            stacklevel=2,
        )
        return None
    return functions


def differs(functions: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Compare its attention with that of torch's flash kernels in a small case of each kind.

    Args:
        functions: its two, and the names of their kernels.
        device: where.
        dtype: of queries, keys and values.

    Returns:
        What differs; empty where nothing does.
    """
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(96, 2, heads, 64, generator=generator, device=device).to(dtype) for heads in (4, 2, 2, 4)
    )
    ends = torch.tensor([0, 40, 96, 96, 192], dtype=torch.int32, device=device)
    for bounds, window in ((Bounds(ends, ends, 96, 96), None), (Bounds(ends, ends, 96, 96), 17), (None, 17)):
        found = [
            _both_passes(kernel, q, k, v, grad)
            for kernel in (TransformerEngine(functions, None, window, bounds), Flash(None, window, bounds))
        ]
        for name, mine, other in zip(("output", "sums", "queries", "keys", "values"), *found, strict=True):
            error = float((mine.double() - other.double()).norm() / other.double().norm())
            if not error < _TOLERANCE:
                kind = " and ".join((["documents"] if bounds is not None else []) + (["a window"] if window else []))
                return f"{'gradients of ' if name in ('queries', 'keys', 'values') else ''}{name} with {kind} differ by {error:.1e}"
    return ""


def _both_passes(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        out, log_sum, kept = kernel.forward(q, k, v)
        return out, log_sum, *kernel.backward(grad, Attended(q, k, v, out, log_sum), kept)
