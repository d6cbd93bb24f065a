"""Blockwise FP8 in plain torch: scales and roundings by ml_dtypes, linear maps and experts against fp64, and training beside fp32."""

from math import floor, inf, log2, nan

import ml_dtypes
import numpy as np
import pytest
import torch

from benchmarks.train_step import make_engine, mixtral, text_batch
from runtime.engine import Engine
from runtime.fp8.blocks import MOST, columns_of, empty_matrices, factors, quantise_matrices, rows_of
from runtime.fp8.config import Fp8Config
from runtime.fp8.linear import Fp8Linears
from runtime.fp8.operands import E4M3
from runtime.fp8.scaling import Scaling
from runtime.moe.fp8_block_experts import BlockExperts
from runtime.moe.permutation import plan_rows
from tests.runtime.moe.oracle import dense, moe_output, relative

CPU, E5M2 = torch.device("cpu"), torch.float8_e5m2
KINDS = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}


def scaling(fp8_format: str) -> Scaling:
    made = Scaling(Fp8Config(format=fp8_format, recipe="blockwise"), CPU)  # type: ignore[arg-type]
    made.begin(trains=True)
    return made


def block(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the numbers of one block are in 8 bits with a scale of their own, in fp64."""
    amax, kind = float(x.abs().max()), KINDS[dtype]
    scale = 2.0 ** floor(log2(float(ml_dtypes.finfo(kind).max) / amax)) if amax else 1.0
    return torch.from_numpy((x.double().numpy() * scale).astype(np.float32).astype(kind).astype(np.float64)) / scale


def rounded(x: torch.Tensor, dtype: torch.dtype, height: int, width: int) -> torch.Tensor:
    """A matrix in blocks."""
    rows = [torch.cat([block(b, dtype) for b in row.split(width, 1)], 1) for row in x.split(height, 0)]
    return torch.cat(rows)


def draw(*shape: int) -> torch.Tensor:
    """Columns of different sizes."""
    return torch.randn(shape) * torch.logspace(-2, 2, shape[-1])


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_factors_are_the_largest_powers_of_two_that_saturate_nothing(dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    amax = torch.cat([torch.rand(1000) * 1000, torch.tensor([limit, limit * 1.001, 1.0, 2.0**-20])])
    found = factors(amax, dtype)
    assert torch.equal(found, 2.0 ** torch.floor(torch.log2(limit / amax.double())).float())
    assert (amax * found <= limit).all()
    assert (amax * found * 2 > limit).all()
    assert factors(torch.tensor([0.0, 1e-38]), dtype).tolist() == [1.0, MOST]
    assert factors(torch.tensor([inf, nan]), dtype).isnan().all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_each_block_is_rounded_by_itself(dtype: torch.dtype) -> None:
    x = draw(256, 384)
    assert torch.equal(rows_of(x, dtype).in_fp32().double(), rounded(x, dtype, 1, 128))
    assert torch.equal(columns_of(x, dtype).in_fp32().double(), rounded(x, dtype, 128, 1).t())
    x[3, 7] = inf
    assert rows_of(x, dtype).in_fp32().isnan().nonzero().tolist() == [[3, column] for column in range(128)]


def test_weights_and_their_transposes_are_the_same_numbers() -> None:
    weights = [draw(2, 128, 256), draw(2, 256, 256)]
    made = empty_matrices(2, 384, 256, CPU)
    quantise_matrices(weights, made)
    assert made.rows is not None
    assert made.columns is not None
    found = made.rows.in_fp32()
    for expert, whole in enumerate(torch.cat(weights, 1)):
        assert torch.equal(found[expert].double(), rounded(whole, E4M3, 128, 128))
    assert torch.equal(made.columns.in_fp32(), found.transpose(1, 2))


@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
def test_linears_multiply_what_the_8_bits_stand_for(fp8_format: str) -> None:
    maps = Fp8Linears(scaling(fp8_format))
    x = draw(67, 3, 256).requires_grad_()
    weights = [torch.randn(128, 256, requires_grad=True), torch.randn(384, 256, requires_grad=True)]
    outs = maps(x, weights)
    grads = [draw(*out.shape) for out in outs]
    torch.autograd.backward(outs, grads)
    flat, gradient = x.detach().flatten(0, 1), maps.scaling.config.gradient_dtype
    g = torch.cat([grad.flatten(0, 1) for grad in grads], 1)
    w8 = rounded(torch.cat([w.detach() for w in weights]), E4M3, 128, 128)
    for out, wanted in zip(outs, (rounded(flat, E4M3, 1, 128) @ w8.t()).split([128, 384], 1), strict=True):
        assert relative(out.flatten(0, 1), wanted) < 1e-6
    assert x.grad is not None
    assert relative(x.grad.flatten(0, 1), rounded(g, gradient, 1, 128) @ w8) < 1e-6
    expected = rounded(g, gradient, 128, 1).t() @ rounded(flat, E4M3, 128, 1)
    assert relative(torch.cat([w.grad for w in weights if w.grad is not None]), expected) < 1e-6


@pytest.mark.parametrize("fp8_format", ["e4m3", "hybrid"])
def test_experts_are_near_fp64(fp8_format: str) -> None:
    layer = BlockExperts(scaling(fp8_format), CPU)
    chosen = torch.randn(90, 5).topk(2, -1).indices.masked_fill(torch.rand(90, 2) < 0.1, 5)
    plan = plan_rows(chosen, 5, 180, alignment=layer.row_alignment, fused=False)
    leaves = [draw(90, 128), torch.rand(90, 2), torch.randn(5, 512, 128) / 50, torch.randn(5, 128, 256) / 16]
    grad = draw(90, 128)
    mine, exact = ([t.to(dtype, copy=True).requires_grad_() for t in leaves] for dtype in (torch.float32, torch.double))
    out = layer(*mine, plan)
    out.backward(grad)
    expected = moe_output(exact[0], dense(chosen, exact[1], 5)[0], exact[2], exact[3])
    expected.backward(grad.double())
    assert relative(out, expected) < 0.08
    for a, b in zip(mine, exact, strict=True):
        assert relative(a.grad, b.grad) < (0.1 if fp8_format == "e4m3" else 0.14)  # type: ignore[arg-type]


def engine(fp8: Fp8Config | None) -> Engine:
    model = mixtral(hidden=128, layers=1, heads=2, kv_heads=2, head_dim=64, ffn=128, vocab=64, experts=2)
    return make_engine(model, torch.float32, CPU, lr=3e-3, fp8=fp8)


def test_training_is_near_fp32() -> None:
    steps = [[text_batch(64, 2, 16, 2 * step + m) for m in range(2)] for step in range(4)]
    exact, mine = (
        [made.train_step(batches).lm_loss for batches in steps]
        for made in (engine(None), engine(Fp8Config(format="e4m3", recipe="blockwise")))
    )
    assert mine != exact
    assert max(abs(a - b) / b for a, b in zip(mine, exact, strict=True)) < 5e-3
