"""How much arithmetic a training step is, and what share of a GPU's peak that makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from moeconv.families.adapted import AdaptedModel
from moeconv.families.base import GlobalTensor, Model

if TYPE_CHECKING:
    import torch

# Peak of dense bf16 and fp16 matrix products in TFLOP/s, without sparsity, by a part of the GPU's name; the first that
# fits counts. From the vendors' data sheets.
_PEAKS = (
    ("GB300", 2500.0),
    ("B300", 2250.0),
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("B100", 1750.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.0),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800 PCIe", 756.0),
    ("H800", 989.4),
    ("H20", 148.0),
    ("A100", 311.8),
    ("A800", 311.8),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.1),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
    ("MI355X", 2516.6),
    ("MI350X", 2306.9),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
    ("MI250X", 383.0),
)


def forward_flops(model: Model, seq_length: int, documents: Sequence[int] = ()) -> float:
    """Count the arithmetic of the forward pass for one token, at two operations for a multiplication and an addition.

    Matrix products and attention; of the experts those that a token is routed to. Attention is causal, within a
    layer's window where it has one, so a token looks at half the sequence on average. Norms, activations, the
    embedding's look-up and the router's choice are left out, and so is what is computed a second time
    (recomputation, rows that only fill up to a capacity).

    Args:
        model: the architecture.
        seq_length: positions of a sequence.
        documents: lengths of documents that attention stays in, a fair sample of them; none: it sees whole sequences.

    Returns:
        Floating-point operations a token.

    Source:
        https://github.com/NVIDIA/Megatron-LM/blob/001b00c/megatron/training/training.py (which knows no windows)
    """
    sizes, matrices = model.sizes, _matrices(model, model.tensors.values())
    attended = 0.0
    lengths = Counter(documents or (seq_length,))
    tokens = sum(length * count for length, count in lengths.items())
    for window in model.compute.windows:
        for length, count in lengths.items():
            size = min(window or length, length)
            attended += count * length / tokens * size * (1 - size / (2 * length))
    return 2 * matrices + 4 * attended * sizes["heads"] * sizes["head_dim"]


def _matrices(model: Model, tensors: Iterable[GlobalTensor]) -> float:
    """Elements of the matrices that a token meets, of the experts those that it is routed to."""
    share = model.sizes.get("top_k", 0) / max(model.sizes.get("experts", 0), 1)
    met = (t for t in tensors if len(t.shape) > 1 and t.rule.where != "first")
    return sum(t.size * (1.0 if t.expert is None else share) for t in met)


def training_flops(model: Model, seq_length: int, documents: Sequence[int] = ()) -> float:
    """Count the arithmetic of a training step for one token: the forward pass, and twice as much backward.

    Of what is frozen beside adapters the backward pass computes the gradient of the input alone.

    Args:
        model: the architecture.
        seq_length: positions of a sequence.
        documents: lengths of documents that attention stays in, a fair sample of them; none: it sees whole sequences.

    Returns:
        Floating-point operations a token.
    """
    frozen = 0.0
    if isinstance(model, AdaptedModel):
        frozen = 2 * _matrices(model, (t for t in model.tensors.values() if t.name not in model.own))
    return 3 * forward_flops(model, seq_length, documents) - frozen


def peak_flops(device_name: str) -> float | None:
    """Look up the peak of a GPU for dense bf16 matrix products.

    Args:
        device_name: what torch.cuda.get_device_name says.

    Returns:
        Operations a second; None for a GPU that is not in the table.
    """
    plain = device_name.replace("-", " ").lower()
    words = plain.split()
    for name, teraflops in _PEAKS:
        parts = name.lower().split()
        if all(part in words for part in parts):
            return teraflops * 1e12
    return None


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Look up what the share of the peak is taken of.

    Args:
        device: what the run computes on.
        dtype: of the activations; an FP8 run is compared with its activations' type too.

    Returns:
        Operations a second; None off a GPU, for an unknown GPU, and for types that are no 16 bits wide.
    """
    import torch  # here only: a plan counts without it

    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return peak_flops(torch.cuda.get_device_name(device))
