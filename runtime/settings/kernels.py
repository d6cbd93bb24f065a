"""What a run's attention and experts are computed by, as lines of its log."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from runtime.flag import flag_name
from runtime.model.context import TORCH_DTYPES
from runtime.moe.config import MoEConfig
from runtime.moe.grouped_gemm import describe_backend
from runtime.ops.attention import describe_attention
from runtime.settings.run import RunConfig


def describe_kernels(run: RunConfig, device: torch.device) -> Iterator[str]:
    """Give the lines: which kernels, what would be faster, and what tokens don't do.

    Args:
        run: the settings.
        device: where to compute.
    """
    windows = any(window is not None and window < run.train.seq_length for window in run.model.compute.windows)
    documents, dtype = run.data.separates_documents, TORCH_DTYPES[run.dtype]
    if run.parallel.cp == 1:
        yield from describe_attention(device, dtype, windows=windows, documents=documents)
    if run.moe is None:
        return
    sizes = run.model.sizes["hidden"], run.model.sizes["ffn"] // run.parallel.etp
    yield describe_backend(run.moe, device, dtype, run.fp8, sizes)
    if run.moe.force_load_balancing:
        yield (
            f"WARNING: {flag_name(MoEConfig, 'force_load_balancing')} sends tokens to all experts in turn, whatever the router "
            "says: measure with it; a model that should learn trains without"
        )
