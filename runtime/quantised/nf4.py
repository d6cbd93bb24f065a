"""NF4: four bits an element, in blocks of 64 that share a scale; the numbers and layout of bitsandbytes.

Legend: P matrices, N elements of one, S scales of one, G groups of scales of one.

Source: https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/backends/default/ops.py (quantize_4bit,
quantize_blockwise) and https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/functional.py
(get_4bit_type, create_dynamic_map, quantize_4bit with compress_statistics)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.quantised.sizes import NF4_BLOCK, SCALES_BLOCK

CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_SMALLEST = 1e-38


@functools.cache
def code_of(device: torch.device) -> Tensor:
    """[16] the numbers that four bits stand for, fp32, ascending."""
    return torch.tensor(CODE, device=device)


@functools.cache
def pairs_of(device: torch.device) -> Tensor:
    """[256, 2] the two numbers of a byte."""
    byte = torch.arange(256, device=device)
    return code_of(device)[torch.stack([byte >> 4, byte & 15], dim=-1)]


@functools.cache
def scales_code_of(device: torch.device) -> Tensor:
    """[256] the numbers that eight bits of a scale stand for, fp32, ascending: a fraction that is longer the larger the number."""
    numbers = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        for sign in (1, -1):
            numbers += (sign * 10 ** (exponent - 6) * middles).tolist()
    return torch.tensor(sorted(numbers), dtype=torch.float32).to(device)


def _nearest(flat: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The code of each of [N] fp32 elements after division by their block's largest, as int32, and [S] the largest."""
    full = flat.numel() // block * block
    blocks = flat[:full].view(-1, block)
    largest = blocks.abs().amax(-1)
    scaled = (blocks * (1.0 / largest.clamp(min=_SMALLEST)).unsqueeze(1)).clamp_(-1, 1).view(-1)
    if full < flat.numel():
        rest = flat[full:]
        last = rest.abs().amax().clamp(min=_SMALLEST)
        largest, scaled = torch.cat([largest, last.view(1)]), torch.cat([scaled, (rest / last).clamp_(-1, 1)])
    bounds = (code[:-1] + code[1:]) / 2
    return torch.bucketize(scaled, bounds, out_int32=True), largest


@dataclass(frozen=True, slots=True)
class Nf4:
    """The format; with `double` scales are eight bits each."""

    double: bool = False

    def empty(self, count: int, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
        """Memory for matrices of one shape.

        Args:
            count: P.
            shape: rows and columns of each.
            device: where.

        Returns:
            [P, N / 2] uint8 codes, the first of two in the high bits; [P, S] fp32 scales, or with quantised scales [P, S] uint8,
            [P, G] fp32 scales of scales, and [P] fp32 what is added to them.
        """
        size = shape[0] * shape[1]
        scales = -(-size // NF4_BLOCK)
        codes = torch.zeros(count, -(-size // 2), dtype=torch.uint8, device=device)
        if not self.double:
            return codes, torch.zeros(count, scales, device=device)
        groups = torch.zeros(count, -(-scales // SCALES_BLOCK), device=device)
        return codes, torch.zeros(count, scales, dtype=torch.uint8, device=device), groups, groups.new_zeros(count)

    def quantise(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """Quantise one matrix of any float type; the parts of `empty` without their first dim."""
        flat = matrix.reshape(-1).float()
        codes, scales = _nearest(flat, code_of(flat.device), NF4_BLOCK)
        if codes.numel() % 2:  # zero fills the last byte
            codes = torch.cat([codes, codes.new_full((1,), CODE.index(0.0))])
        codes = codes.to(torch.uint8)
        packed = codes[::2] << 4 | codes[1::2]
        if not self.double:
            return packed, scales
        offset = scales.mean()
        small, groups = _nearest(scales - offset, scales_code_of(flat.device), SCALES_BLOCK)
        return packed, small.to(torch.uint8), groups, offset

    def dequantise(self, parts: tuple[Tensor, ...], out: Tensor) -> None:
        """Write the numbers.

        Args:
            parts: as `empty` gave them.
            out: [P, rows, columns], contiguous, any float type; each number is a product in fp32, rounded once.
        """
        if out.is_cuda:
            from runtime.kernels.dequantise import dequantise_nf4

            codes = (code_of(out.device), scales_code_of(out.device))
            dequantise_nf4(parts, out, *codes, (NF4_BLOCK, SCALES_BLOCK))
            return
        for place, matrix in enumerate(out.view(out.shape[0], -1)):
            matrix.copy_(self._numbers([part[place] for part in parts], matrix.numel()))

    def _numbers(self, parts: list[Tensor], size: int) -> Tensor:
        codes, scales = parts[0], parts[1]
        if self.double:
            groups = parts[2].repeat_interleave(SCALES_BLOCK)[: scales.numel()]
            scales = scales_code_of(scales.device)[scales.long()] * groups + parts[3]
        numbers = pairs_of(codes.device).index_select(0, codes.int()).view(-1)[:size]
        full = size // NF4_BLOCK
        numbers[: full * NF4_BLOCK].view(-1, NF4_BLOCK).mul_(scales[:full].unsqueeze(1))
        numbers[full * NF4_BLOCK :].mul_(scales[-1])
        return numbers
