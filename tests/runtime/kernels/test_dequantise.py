"""Quantised weights to numbers: the kernels against plain torch, bit for bit."""

from __future__ import annotations

import pytest
import torch

from runtime.quantised.fp8 import Fp8
from runtime.quantised.nf4 import Nf4, code_of, scales_code_of
from runtime.quantised.sizes import FP8_BLOCK, NF4_BLOCK, SCALES_BLOCK
from runtime.quantised.weight import Format

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CPU = torch.device("cpu")


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights of many sizes, and blocks of zeros alone."""
    generator = torch.Generator().manual_seed(1)
    out = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator) ** 3
    out[0] = 0
    return out.to(dtype)


@pytest.mark.parametrize("form", [Nf4(), Nf4(double=True), Fp8()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32] if CUDA else [torch.float32])
@pytest.mark.parametrize("shape", [(3, 96, 160), (1, 130, 70), (2, 7, 9), (2, 33, 257)])
def test_kernels_are_plain_torch(form: Format, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Compiled on a GPU, in Triton's interpreter without one, which rounds to 16 bits otherwise than any GPU."""
    from runtime.kernels.dequantise import dequantise_fp8, dequantise_nf4

    parts = form.empty(shape[0], shape[1:], CPU)
    for place in range(shape[0]):
        for own, part in zip(parts, form.quantise(matrix(shape[1:]) * (place + 1)), strict=True):
            own[place] = part
    want, got = torch.empty(shape, dtype=dtype), torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
    form.dequantise(parts, want)
    moved = tuple(part.to(DEVICE) for part in parts)
    if isinstance(form, Fp8):
        dequantise_fp8(moved, got, FP8_BLOCK)
    else:
        dequantise_nf4(moved, got, code_of(DEVICE), scales_code_of(DEVICE), (NF4_BLOCK, SCALES_BLOCK))
    assert torch.equal(got.cpu(), want)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
@pytest.mark.parametrize("form", [Nf4(), Nf4(double=True), Fp8()])
def test_a_gpu_quantises_as_a_cpu(form: Format) -> None:
    weight = matrix((512, 768), torch.bfloat16)
    here, there = form.quantise(weight), form.quantise(weight.cuda())
    for place, (want, got) in enumerate(zip(here, there, strict=True)):
        if place == 0 or len(here) == 2:
            assert torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))
        else:  # a mean is summed in another order
            torch.testing.assert_close(got.cpu().float(), want.float(), rtol=1e-5, atol=1)
