"""Attention by whichever kernels a case gets, against a softmax written out in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from runtime.ops.attention import attend
from tests.runtime.moe.oracle import relative

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def exact(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("sbhk,tbhk->bhst", q, k) / q.shape[-1] ** 0.5
    query = torch.arange(k.shape[0] - q.shape[0], k.shape[0], device=q.device).unsqueeze(1)
    key = torch.arange(k.shape[0], device=q.device)
    seen = (key <= query) & (key > query - (window or k.shape[0]))
    return torch.einsum("bhst,tbhk->sbhk", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32] if CUDA else [torch.float32])
@pytest.mark.parametrize("window", [None, 1, 37, 1000])
@pytest.mark.parametrize(
    ("num_q", "num_k", "heads", "kv_heads", "dim"),
    [(256, 256, 8, 2, 128), (77, 77, 4, 4, 64), (64, 200, 6, 2, 96), (1, 1, 2, 1, 32), (300, 300, 3, 1, 40)],
)
def test_attention(
    num_q: int, num_k: int, heads: int, kv_heads: int, dim: int, window: int | None, dtype: torch.dtype
) -> None:
    q = torch.randn(num_q, 2, heads, dim, device=DEVICE).to(dtype).requires_grad_()
    kv = torch.randn(num_k, 2, 2 * kv_heads, dim, device=DEVICE).to(dtype).requires_grad_()
    out = attend(q, *kv.chunk(2, dim=2), window)
    assert out.shape == q.shape
    wide = [x.detach().double().requires_grad_() for x in (q, kv)]
    want = exact(wide[0], *wide[1].chunk(2, dim=2), window)
    grad = torch.randn_like(want)
    grads = torch.autograd.grad(out, [q, kv], grad.to(dtype))
    wants = torch.autograd.grad(want, wide, grad)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative(out, want) < bound
    for mine, other in zip(grads, wants, strict=True):
        # A position that sees itself alone has no gradient of its scores: held against a typical one.
        typical = 1e-30 if num_k > 1 and window != 1 else float(grad.norm())
        assert float((mine.double() - other).norm()) < bound * max(float(other.norm()), typical)
