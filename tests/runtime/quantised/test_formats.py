"""Codes, scales and numbers against the libraries', bit for bit."""

from __future__ import annotations

import pytest
import torch

from moeconv.quant.numbers import fp8_blocks
from runtime.quantised.fp8 import Fp8
from runtime.quantised.nf4 import CODE, Nf4, scales_code_of
from runtime.quantised.sizes import piece_bytes
from runtime.quantised.weight import Format, QuantisedWeight, Workspace
from tests.runtime.kernels.test_dequantise import matrix
from tests.runtime.quantised import library

CPU = torch.device("cpu")
SHAPES = [(128, 64), (96, 160), (256, 1024), (3, 70), (7, 10), (130, 257)]


def numbers(form: Format, parts: tuple[torch.Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    out = torch.full((1, *shape), float("nan"), dtype=dtype, device=parts[0].device)
    form.dequantise(tuple(part.unsqueeze(0) for part in parts), out)
    return out[0]


def test_code_is_the_librarys() -> None:
    assert torch.equal(torch.tensor(CODE), library.bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(scales_code_of(CPU), library.bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_the_librarys(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = matrix(shape, dtype)
    packed, state = library.nf4(weight)
    codes, scales = Nf4().quantise(weight)
    assert torch.equal(codes, packed.view(-1))
    assert torch.equal(scales, state.absmax)
    assert torch.equal(numbers(Nf4(), (codes, scales), shape, dtype), library.nf4_numbers(weight))


@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_scales_are_the_librarys(shape: tuple[int, int]) -> None:
    weight = matrix(shape)
    packed, state = library.nf4(weight, double=True)
    codes, small, groups, offset = Nf4(double=True).quantise(weight)
    assert torch.equal(codes, packed.view(-1))
    assert torch.equal(groups, state.state2.absmax)
    assert torch.equal(offset, state.offset)
    # On a CPU the library now and then takes the neighbour of the nearest number; on GPUs it does as we do.
    of_code, place = scales_code_of(CPU), torch.arange(small.numel()) // 256
    want = (library.nf4(weight)[1].absmax - offset) / groups[place]
    ours, theirs = ((of_code[x.long()] - want).abs() for x in (small, state.absmax))
    assert bool((ours <= theirs + 1e-6).all())
    assert float((small != state.absmax).float().mean()) < 0.01
    theirs = (packed.view(-1), state.absmax, groups, offset)
    got = numbers(Nf4(double=True), theirs, shape, torch.float32)
    assert torch.equal(got, library.bnb.dequantize_4bit(packed, state).view(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_is_the_librarys(shape: tuple[int, int]) -> None:
    weight = matrix(shape)
    codes, scales = Fp8().quantise(weight)
    want_codes, want_scales = library.fp8(weight)
    assert torch.equal(codes.view(torch.uint8), want_codes.view(torch.uint8))
    assert torch.equal(scales, want_scales)
    assert torch.equal(numbers(Fp8(), (codes, scales), shape, torch.float32), library.fp8_numbers(weight))
    # What the converter writes is the same.
    stored, inverse = fp8_blocks(weight.numpy(), (128, 128), exponents=False)
    assert stored.tobytes() == codes.view(torch.uint8).numpy().tobytes()
    assert inverse.tobytes() == scales.numpy().tobytes()


@pytest.mark.parametrize(
    ("form", "size"),
    [
        (Nf4(), piece_bytes("nf4", (130, 70))),
        (Nf4(double=True), piece_bytes("nf4", (130, 70), double=True)),
        (Fp8(), piece_bytes("fp8", (130, 70))),
    ],
)
def test_bytes_are_the_formula(form: Format, size: int) -> None:
    workspace = Workspace(torch.bfloat16, CPU)
    weight = QuantisedWeight(torch.Size((3, 130, 70)), 3, form, workspace)
    assert weight.nbytes == 3 * size
    assert workspace.nbytes == 3 * 130 * 70 * 2
    elements = 4096 * 4096
    per_element = {Nf4(): 0.5625, Nf4(double=True): 0.5 + 1 / 64 + 4 / 16384, Fp8(): 1 + 4 / 16384}[form]
    kind, double = ("fp8" if form == Fp8() else "nf4"), form == Nf4(double=True)
    assert piece_bytes(kind, (4096, 4096), double=double) == elements * per_element + (4 if double else 0)
