"""The libraries whose numbers and layout ours are: bitsandbytes for NF4, transformers for FP8."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from bitsandbytes import functional as bnb
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

_QUANTISER = SimpleNamespace(
    quantization_config=SimpleNamespace(weight_block_size=(128, 128), scale_fmt=None), pre_quantized=False
)


def nf4(matrix: Tensor, *, double: bool = False) -> tuple[Tensor, Any]:
    """Packed codes and state; on a CPU its way back knows no blocks that go over the end of a row, so there is one row."""
    return bnb.quantize_4bit(matrix.reshape(1, -1), blocksize=64, quant_type="nf4", compress_statistics=double)


def nf4_numbers(matrix: Tensor, *, double: bool = False) -> Tensor:
    """What is left of a matrix, in its type."""
    return bnb.dequantize_4bit(*nf4(matrix, double=double)).view(matrix.shape)


def fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers and scales; whole blocks are all that it takes, so zeros fill them up."""
    rows, columns = matrix.shape
    padded = F.pad(matrix, (0, -columns % 128, 0, -rows % 128))
    found = Fp8Quantize(_QUANTISER).convert({"w.weight": padded})
    return found["w.weight"][:rows, :columns], found["w.weight_scale_inv"]


def fp8_numbers(matrix: Tensor) -> Tensor:
    """What is left of a matrix, in its type."""
    rows, columns = matrix.shape
    padded = F.pad(matrix, (0, -columns % 128, 0, -rows % 128))
    found = Fp8Quantize(_QUANTISER).convert({"w.weight": padded})
    whole = Fp8Dequantize(_QUANTISER)._dequantize_one(found["w.weight"], found["w.weight_scale_inv"])
    return whole[:rows, :columns].to(matrix.dtype)
