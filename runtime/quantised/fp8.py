"""FP8: e4m3 numbers in blocks of 128 x 128 that share a scale, as DeepSeek's releases store them.

Legend: P matrices of R rows and C columns.

Source: https://github.com/huggingface/transformers/blob/v5.0.0/src/transformers/integrations/finegrained_fp8.py (Fp8Quantize)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.quantised.sizes import FP8_BLOCK

DTYPE = torch.float8_e4m3fn
MAX = 448.0


def _blocks(shape: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // FP8_BLOCK[0]), -(-shape[1] // FP8_BLOCK[1])


def _spread(scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """[R, C] each element's scale."""
    rows = scales.repeat_interleave(FP8_BLOCK[0], 0)[: shape[0]]
    return rows.repeat_interleave(FP8_BLOCK[1], 1)[:, : shape[1]]


@dataclass(frozen=True, slots=True)
class Fp8:
    """The format."""

    def empty(self, count: int, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
        """Memory for matrices of one shape.

        Args:
            count: P.
            shape: rows and columns of each.
            device: where.

        Returns:
            [P, R, C] float8_e4m3fn, and [P, rows of blocks, columns of blocks] fp32: what to multiply with.
        """
        return torch.zeros(count, *shape, dtype=DTYPE, device=device), torch.zeros(
            count, *_blocks(shape), device=device
        )

    def quantise(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """Quantise one matrix of any float type; the parts of `empty` without their first dim."""
        rows, columns = matrix.shape
        down, across = _blocks((rows, columns))
        wide = matrix.float()
        padded = F.pad(wide, (0, across * FP8_BLOCK[1] - columns, 0, down * FP8_BLOCK[0] - rows))
        top = padded.view(down, FP8_BLOCK[0], across, FP8_BLOCK[1]).abs().amax((1, 3))
        forward = torch.where(top > 0, top.reciprocal() * MAX, 1.0)
        scaled = (wide * _spread(forward, (rows, columns))).clamp_(-MAX, MAX)
        return scaled.to(DTYPE), forward.reciprocal()

    def dequantise(self, parts: tuple[Tensor, ...], out: Tensor) -> None:
        """Write the numbers.

        Args:
            parts: as `empty` gave them.
            out: [P, R, C], contiguous, any float type; each number is a product in fp32, rounded once.
        """
        if out.is_cuda and torch.cuda.get_device_capability(out.device) >= (
            8,
            9,
        ):  # Triton knows the type from there on
            from runtime.kernels.dequantise import dequantise_fp8

            dequantise_fp8(parts, out, FP8_BLOCK)
            return
        numbers, scales = parts
        for place in range(out.shape[0]):
            out[place].copy_(numbers[place].float().mul_(_spread(scales[place], (out.shape[1], out.shape[2]))))
